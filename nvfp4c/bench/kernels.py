"""Kernels against the ceilings of their own device: what its memory moves and its matrix units do, in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4c.bench.kernel_cases import Case, Ceiling, cases
from nvfp4c.bench.timing import Samples, Watch, clock_for, interleaved
from nvfp4c.errors import OptionError, TargetError

SHAPES = {"cuda": ((8192, 4096), (8192, 14336)), "cpu": ((1024, 1024),)}
ROUNDS = {"cuda": 30, "cpu": 10}
REPEATS = {"cuda": 16, "cpu": 2}
"""Calls a sample. What the last one leaves in the cache is written back outside of what is timed, at most one cache of
all that the calls of a sample write."""

WARMUPS = 3


@dataclass(frozen=True)
class Timed:
    """A case and its samples. rate: bytes or operations a second. ratio: to the ceiling measured in the same run."""

    case: Case
    samples: Samples
    ratio: float

    @property
    def rate(self) -> float:
        return self.case.amount / self.samples.median

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.case.name,
            "ceiling": self.case.ceiling.value,
            "reference": self.case.reference,
            "amount": self.case.amount,
            "rate": self.rate,
            "ratio": self.ratio,
            **self.samples.to_dict(),
        }


@dataclass(frozen=True)
class ShapeResult:
    """All cases on one shape of input."""

    rows: int
    columns: int
    timed: tuple[Timed, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "columns": self.columns, "cases": [timed.to_dict() for timed in self.timed]}


def shapes(device: str, rows: int | None, columns: int | None) -> tuple[tuple[int, int], ...]:
    """The shape asked for, or the device's own. Raises OptionError where only half of one is given."""
    if rows is None and columns is None:
        return SHAPES[device]
    if rows is None or columns is None:
        raise OptionError("A shape needs both --rows and --columns; give the other one too, or none.")
    return ((rows, columns),)


def measure(device: str, rows: int, columns: int, rounds: int, watch: Watch) -> ShapeResult:
    """Time every case on one shape. Raises TargetError where memory does not suffice."""
    watch(f"{rows} x {columns}: making inputs", 0, 1)
    try:
        found = cases(device, rows, columns)
        calls = {case.name: case.call for case in found}
        clock = clock_for(device, REPEATS[device], short=True)
        samples = interleaved(
            calls,
            clock,
            rounds,
            warmups=WARMUPS,
            watch=lambda what, done, of: watch(f"{rows} x {columns}: {what}", done, of),
        )
    except torch.OutOfMemoryError as error:
        raise TargetError(f"{rows} x {columns} does not fit into this GPU's memory; give smaller --rows") from error
    return ShapeResult(rows, columns, compared(found, samples))


def compared(found: Sequence[Case], samples: dict[str, Samples]) -> tuple[Timed, ...]:
    """Each case with its rate as a share of the fastest reference of the same ceiling."""
    rates = {case.name: case.amount / samples[case.name].median for case in found}
    ceilings = {
        ceiling: max(rates[case.name] for case in found if case.reference and case.ceiling is ceiling)
        for ceiling in Ceiling
    }
    return tuple(Timed(case, samples[case.name], rates[case.name] / ceilings[case.ceiling]) for case in found)
