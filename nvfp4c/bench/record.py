"""A result with all that is needed to judge and repeat it, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4c.files import write_text
from nvfp4c.quickstart import environment
from nvfp4c.quickstart.results import to_json


@dataclass(frozen=True)
class Record:
    """name: of the file, without its ending. settings: what was asked for. results: what was measured."""

    name: str
    about: Mapping[str, str]
    settings: Mapping[str, Any]
    results: Any

    @property
    def text(self) -> str:
        return to_json({"about": self.about, "settings": self.settings, "results": self.results})


def about(device: str, command: str, commit: str | None) -> dict[str, str]:
    """Command, commit, machine and versions. commit: None to look it up."""
    return {"command": command, "commit": commit or environment.commit(), **environment.describe(device)}


def save(record: Record, folder: Path) -> Path:
    """Write the record into a folder, whole or not at all; returns the file's path."""
    path = folder / f"{record.name}.json"
    write_text(path, record.text)
    return path
