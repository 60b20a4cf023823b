"""What a budget limits, and what each choice costs of it: always a sum over sites and roles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nvfp4c.cost import BF16_BYTES, MACHINES, NVFP4_BYTES, matmul_seconds
from nvfp4c.errors import DataError, OptionError, nearest
from nvfp4c.sensitivity.analysis import Key
from nvfp4c.sensitivity.constraints import choices
from nvfp4c.sensitivity.measurements import Measurements, RoleMeasure

PAPER_SHARE = 0.15
"""Of the matmul operations, left in BF16 by arXiv 2509.25149."""

NVFP4_BITS, BF16_BITS = 8 * NVFP4_BYTES, 8 * BF16_BYTES
"""Of an element of a weight. Kernels store the scale of a 16x16 tile once for each of its rows, so a tile counts like
rows of 16."""


@dataclass(frozen=True)
class Budget:
    """What is allowed.

    unit: "operations": at most this share of all matmul operations stays in BF16, 0..1. "bits": a weight has at most
    this many bits an element, in the mean over all elements; it is stored in NVFP4 where its fprop runs in NVFP4, so
    dgrad and wgrad cost nothing. "speed": all matmuls of a step run at least this many times as fast as in BF16 on
    `target`, a GPU of nvfp4c.cost.MACHINES, as predicted there.
    """

    limit: float
    unit: str = "operations"
    target: str = ""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise OptionError(f"unknown unit {self.unit!r} of a budget; {nearest(self.unit, UNITS)}")
        if not (math.isfinite(self.limit) and self.limit >= 0):
            raise OptionError(f"a budget must be a number of 0 or more, got {self.limit}")
        if self.unit == "operations" and self.limit > 1:
            raise OptionError(f"a budget of operations is a share, 0..1, got {self.limit}; for 15% write 0.15")
        if self.unit == "speed" and self.limit == 0:
            raise OptionError("a budget of speed must be above 0; 1 is the speed of BF16")
        if self.unit == "speed" and self.target not in MACHINES:
            raise OptionError(
                f"a budget of speed needs a GPU as its target, got {self.target!r}; {nearest(self.target, MACHINES)}"
            )
        if self.unit != "speed" and self.target:
            raise OptionError(f"only a budget of speed has a target; leave {self.target!r} out")

    @property
    def ceiling(self) -> float:
        """The most that `Costs.of` may be. For speed that is time, relative to all in BF16."""
        return 1 / self.limit if self.unit == "speed" else self.limit

    def refusal(self, least: float) -> str:
        """What to say where costs are at least `least`: the nearest budget, rounded to the side that can be met."""
        if self.unit == "speed":
            most = math.floor(1e4 / least) / 1e4
            return (
                f"no plan makes the matmuls of a step {self.limit:g} times as fast as BF16 on {self.target}: "
                f"the constraints and what cannot run in FP4 allow at most {most:.4f}; ask for {most:.4f} or less"
            )
        floor = math.ceil(least * 1e4) / 1e4
        what = {
            "operations": f"leaves only {self.limit:g} of the matmul operations in BF16",
            "bits": f"stores weights in {self.limit:g} bits an element",
        }[self.unit]
        return (
            f"no plan {what}: the constraints and what cannot run in FP4 take at least {floor:.4f}; "
            f"ask for {floor:.4f} or more"
        )


@dataclass(frozen=True)
class Costs:
    """What plans cost, in the unit of `Budget.ceiling`. fixed: with all that can in FP4. bf16: what each adds in BF16,
    which may be negative: on a GPU without FP4, a matmul in NVFP4 takes longer."""

    fixed: float
    bf16: Mapping[Key, float]

    def of(self, bf16: Iterable[Key]) -> float:
        """With these in BF16."""
        return self.fixed + math.fsum(self.bf16[key] for key in bf16)


def costs(measurements: Measurements, budget: Budget) -> Costs:
    """What each choice costs of a budget. Raises DataError where there is nothing to count."""
    return UNITS[budget.unit](measurements, budget)


def operations(measurements: Measurements, budget: Budget | None = None) -> Costs:
    """Shares of all operations of matmuls. What cannot run in FP4 counts as far as it was measured."""
    return _relative(measurements, bf16=lambda role: role.operations, nvfp4=lambda role: 0.0)


def _speed(measurements: Measurements, budget: Budget) -> Costs:
    """Seconds, relative to those of all matmuls in BF16."""
    machine = MACHINES[budget.target]

    def seconds(precision: str) -> Callable[[RoleMeasure], float]:
        return lambda role: matmul_seconds(role.m, role.n, role.k, precision, machine)

    return _relative(measurements, seconds("bf16"), seconds("nvfp4"))


def _relative(
    measurements: Measurements, bf16: Callable[[RoleMeasure], float], nvfp4: Callable[[RoleMeasure], float]
) -> Costs:
    """Costs of roles, divided by the cost of all of them in BF16."""
    free = choices(measurements)
    every = {(site.site, name): role for site in measurements.sites for name, role in site.roles.items()}
    total = math.fsum(map(bf16, every.values()))
    if not total:
        raise DataError("the measurements hold no matmul with operations; measure a model that has one")
    least = math.fsum(nvfp4(role) if key in free else bf16(role) for key, role in every.items())
    return Costs(least / total, {key: (bf16(role) - nvfp4(role)) / total for key, role in free.items()})


def _bits(measurements: Measurements, budget: Budget) -> Costs:
    """Bits an element. A weight of several sites counts once, at its first: they agree."""
    elements = {site.weight: site.weight_elements for site in measurements.sites if site.weight}
    total = sum(elements.values())
    if not total:
        raise DataError("the measurements hold no weight, so bits of weights cannot be limited; use another unit")
    stored_by: dict[str, Key] = {}
    free = choices(measurements)
    for site in measurements.sites:
        if site.weight and (site.site, "fprop") in free:
            stored_by.setdefault(site.weight, (site.site, "fprop"))
    packed = sum(elements[weight] for weight in stored_by)
    added = {key: 0.0 for key in free}
    added.update({key: (BF16_BITS - NVFP4_BITS) * elements[weight] / total for weight, key in stored_by.items()})
    return Costs((NVFP4_BITS * packed + BF16_BITS * (total - packed)) / total, added)


UNITS: Mapping[str, Callable[[Measurements, Budget], Costs]] = {
    "operations": operations,
    "bits": _bits,
    "speed": _speed,
}
"""What a budget can limit."""
