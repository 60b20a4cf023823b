"""Numbers that a run of the model found, each set in a file of its own as soon as it is found: no run is made twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nvfp4c.files import write_text

Question = dict[str, Any]
"""What the numbers are, as plain data: what was measured, and all that it depends on."""


def kept(
    folder: Path | None, kind: str, question: Question, count: int, measure: Callable[[], Sequence[float]]
) -> tuple[float, ...]:
    """`count` numbers that answer a question: those of a file in the folder, else what `measure` finds, then kept.

    kind: the first word of the file's name. A file that is damaged, or answers something else, counts as none.
    """
    if folder is None:
        return tuple(measure())
    text = json.dumps(question, sort_keys=True)
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    found = _read(path, json.loads(text), count)
    if found is None:
        found = tuple(measure())
        write_text(path, json.dumps({"question": question, "numbers": found}) + "\n")
    return found


def _read(path: Path, question: Question, count: int) -> tuple[float, ...] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        numbers = tuple(data["numbers"])
        sound = data["question"] == question
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return numbers if sound and len(numbers) == count and all(type(one) is float for one in numbers) else None
