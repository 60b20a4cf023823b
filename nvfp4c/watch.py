"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[str, int, int], None]
"""Is told what is being done, how many parts of it are done, and of how many."""


def unwatched(what: str, done: int, of: int) -> None:
    """A watch that nobody looks at."""
