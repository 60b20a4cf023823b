"""The bar that long commands show: how far they are, and how long they still take, by a clock that is made up."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from nvfp4c.cli.progress import progress


class Clock:
    """The time in seconds, which stands still until it is set on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool, work: Callable[[Clock, Any], None]) -> str:
    """What standard error gets while `work` tells a watch how far it is."""
    clock, file = Clock(), io.StringIO()

    def console(stderr: bool = False) -> Console:
        assert stderr
        return Console(file=file, force_terminal=terminal, width=120, get_time=clock)

    monkeypatch.setattr(sys.modules["nvfp4c.cli.progress"], "Console", console)
    with progress() as watch:
        work(clock, watch)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


@pytest.mark.parametrize("seconds", [0.5, 20.0, 120.0])
def test_the_time_left_is_what_the_parts_took(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Also of parts that take minutes each."""

    def work(clock: Clock, watch: Any) -> None:
        for done in range(4):
            watch("measuring", done, 10)
            clock.now += seconds
        clock.now -= seconds

    def time(count: float) -> str:
        minutes, rest = divmod(int(count), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"

    *_, last = shown(monkeypatch, True, work).strip().splitlines()
    assert re.sub(r"\s*[━╸╺]+\s*", " ", last) == f"measuring 3/10 {time(3 * seconds)} {time(7 * seconds + 0.5)} left"


def test_a_line_for_each_thing_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(clock: Clock, watch: Any) -> None:
        for what in ("measuring", "running plans"):
            for done in range(3):
                watch(what, done, 2)

    assert shown(monkeypatch, False, work) == "measuring\nrunning plans\n"
