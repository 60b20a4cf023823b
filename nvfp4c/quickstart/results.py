"""Runs as plain data, to JSON and back."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nvfp4c.errors import OptionError
from nvfp4c.page import finite
from nvfp4c.quickstart.train import Run


def prepared(folder: Path) -> Path:
    """`folder`, created if need be and known to be writable; OptionError when it is not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OptionError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    return folder


def run_to_dict(run: Run) -> dict[str, Any]:
    """A run's fields and its final losses."""
    finals = {"final_train_loss": run.final_train_loss, "final_validation_loss": run.final_validation_loss}
    return {**asdict(run), **finals}


def run_from_dict(values: Mapping[str, Any]) -> Run:
    """The run that `run_to_dict` wrote, also after a journey through JSON."""
    known = {field.name: values[field.name] for field in fields(Run)}
    known["train_losses"] = tuple(_number(loss) for loss in values["train_losses"])
    known["validation"] = tuple((step, _number(loss)) for step, loss in values["validation"])
    return Run(**known)


def to_json(value: Any) -> str:
    """Indented standard JSON; numbers that are not finite become null, which JSON has no other word for."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
