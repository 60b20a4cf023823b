"""The progress bar of commands that take minutes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from nvfp4c.watch import Watch

PACE = 600.0
"""Seconds over whose parts the time left is estimated. rich's 30 would never show any where a part takes longer."""


@contextmanager
def progress() -> Iterator[Watch]:
    """A bar on standard error for what is being done, with the time that it took and, from its second part on, the time
    left; where that is no terminal, a line for each new thing."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    terminal = console.is_terminal
    with Progress(*columns, console=console, disable=not terminal, transient=True, speed_estimate_period=PACE) as bars:
        tasks: dict[str, TaskID] = {}

        def watch(what: str, done: int, of: int) -> None:
            if what not in tasks:
                for finished in tasks.values():
                    bars.update(finished, visible=False)
                tasks[what] = bars.add_task(what, total=of)
                if not terminal:
                    console.print(what, highlight=False, soft_wrap=True)
            bars.update(tasks[what], completed=done)

        yield watch
