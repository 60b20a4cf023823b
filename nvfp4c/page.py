"""Parts of an HTML page that stands alone: data for its scripts, and text that cannot become markup."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """`value` with null for each number in it that is not finite: JSON has no word for those."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element."""
    return json.dumps(finite(value), allow_nan=False).replace("<", "\\u003c")


def facts(named: Mapping[str, str]) -> str:
    """The inside of a description list."""
    return "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in named.items())
