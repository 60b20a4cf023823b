"""Text files below a folder, in an order that does not change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 256 * 2**20
"""Text read at most: far more than a quickstart or an analysis uses, little enough for any machine's memory."""

SNIFFED_BYTES = 8192
INSTALLED_PACKAGES = ("site-packages", "dist-packages")
NOTHING_READ = "every file in it is binary, empty, hidden or unreadable"
"""Why `read` yields nothing."""


def read(root: Path, suffix: str = "") -> Iterator[tuple[str, bytes]]:
    """Relative path and content of each text file below `root`, in the order of the paths, up to MAX_BYTES in all.

    A file is text if no byte near its start is 0. suffix: of the files read, such as ".py"; all by default.
    """
    left = MAX_BYTES
    for path in _files(root):
        if path.suffix != suffix and suffix:
            continue
        try:
            content = path.read_bytes() if path.is_file() else b""
        except OSError:
            continue
        if not content or b"\0" in content[:SNIFFED_BYTES]:
            continue
        yield path.relative_to(root).as_posix(), content[:left]
        left -= len(content)
        if left <= 0:
            return


def _files(root: Path) -> Iterator[Path]:
    """Files below `root` in a stable order, or `root` itself; hidden ones and installed packages are left out."""
    if root.is_file():
        yield root
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in INSTALLED_PACKAGES)
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
