"""A training step in each variant: how long it takes, what memory it needs, and how long it takes to compile."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from nvfp4c.bench import compile_time
from nvfp4c.bench.compile_time import CompileTime
from nvfp4c.bench.llama import Size
from nvfp4c.bench.memory import Memory, on_gpu
from nvfp4c.bench.profiling import top_kernels
from nvfp4c.bench.timing import Samples, Watch, clock_for, interleaved
from nvfp4c.bench.variants import REFERENCE, Step, Variant, build_steps
from nvfp4c.errors import TargetError
from nvfp4c.weight_cache import clear_weight_cache

ROUNDS = {"cuda": 12, "cpu": 5}
WARMUPS = 1

STEPS = {"cuda": 10, "cpu": 1}
"""Steps in a row that make one sample, as training makes them. A GPU that is busy all the time runs as fast as its
power limit lets it; what a single step takes after another kind of step depends on what that one left of the power
budget, and on how fast the first kernels are launched on an idle GPU."""


@dataclass(frozen=True)
class Measured:
    """What is known of one variant. memory: on a GPU. compiles: cold ones, none of what is not compiled or left out."""

    variant: Variant
    step: Samples
    memory: Memory | None
    compiles: tuple[CompileTime, ...]
    profile: list[dict[str, Any]] | None

    @property
    def compile_seconds(self) -> float | None:
        """The median."""
        return statistics.median(one.total for one in self.compiles) if self.compiles else None


@dataclass(frozen=True)
class TrainResult:
    """All variants; the first is the one that the others are compared with."""

    measured: tuple[Measured, ...]

    def speed(self, of: Measured) -> float:
        """How fast a variant is relative to the reference: its step takes 1 / speed of the time."""
        return self.measured[0].step.median / of.step.median

    def memory_ratio(self, of: Measured) -> float | None:
        """Its peak memory over the reference's."""
        reference = self.measured[0].memory
        return of.memory.peak / reference.peak if of.memory and reference else None

    def compile_ratio(self, of: Measured) -> float | None:
        """Its cold compile time over the reference's."""
        own, reference = of.compile_seconds, self.measured[0].compile_seconds
        return own / reference if own and reference else None

    def to_dict(self) -> dict[str, Any]:
        return {found.variant.name: self._to_dict(found) for found in self.measured}

    def _to_dict(self, found: Measured) -> dict[str, Any]:
        compiles = [{**asdict(one), "total": one.total} for one in found.compiles]
        return {
            "description": found.variant.description,
            "speed": self.speed(found),
            "memory_ratio": self.memory_ratio(found),
            "compile_ratio": self.compile_ratio(found),
            "step": found.step.to_dict(),
            "memory": asdict(found.memory) if found.memory else None,
            "compile_seconds": {"median": found.compile_seconds, "samples": compiles} if compiles else None,
            **({"profile": found.profile} if found.profile else {}),
        }


def measure(
    chosen: Sequence[Variant],
    size: Size,
    device: str,
    rounds: int,
    in_a_row: int,
    *,
    micro_batches: int = 1,
    compiles: int,
    with_profile: bool,
    watch: Watch,
) -> TrainResult:
    """Measure the chosen variants, of which the first is the reference. in_a_row: steps a sample.

    micro_batches: passes of a step, whose gradients add up. compiles: with empty caches, of each variant.

    Raises TargetError where memory does not suffice, and whatever the backends raise.
    """
    assert chosen[0].name == REFERENCE
    try:
        # First, while this process holds no memory on the device.
        compiling = _compile_times(chosen, size, device, compiles, watch)
        steps = build_steps(chosen, size, device)
        steps = {name: replace(step, micro_batches=micro_batches) for name, step in steps.items()}
        _compile(steps, watch)
        calls = {name: partial(_whole, step) for name, step in steps.items()}
        clock = clock_for(device, in_a_row, short=False)
        samples = interleaved(calls, clock, rounds, warmups=WARMUPS, watch=watch)
        memory = {name: memory_of(step) for name, step in steps.items()} if device == "cuda" else {}
        profiles = {}
        if with_profile:
            profiles = {name: top_kernels(step, device, step.prepare) for name, step in steps.items()}
    except torch.OutOfMemoryError as error:
        raise TargetError(f"size {size.name!r} does not fit into this GPU's memory; choose a smaller --size") from error
    return TrainResult(
        tuple(
            Measured(
                variant,
                samples[variant.name],
                memory.get(variant.name),
                tuple(compiling.get(variant.name, ())),
                profiles.get(variant.name),
            )
            for variant in chosen
        )
    )


def _compile_times(
    chosen: Sequence[Variant], size: Size, device: str, compiles: int, watch: Watch
) -> dict[str, list[CompileTime]]:
    """In turns, so that what drifts drifts for all of them."""
    compiled = [variant.name for variant in chosen if variant.backend is not None]
    found: dict[str, list[CompileTime]] = {}
    for number, name in enumerate(compiles * compiled):
        watch(f"compiling {name} with empty caches", number, compiles * len(compiled))
        found.setdefault(name, []).append(compile_time.measure(name, size.name, device))
    return found


def _compile(steps: dict[str, Step], watch: Watch) -> None:
    """One step each, so that the rounds to come compile nothing."""
    for number, (name, step) in enumerate(steps.items()):
        watch(f"first step of {name}", number, len(steps))
        _whole(step)


def _whole(step: Step) -> None:
    """A step of a training loop: gradients are dropped first, and parameters are taken for changed."""
    step.prepare()
    step()


def memory_of(step: Step) -> Memory:
    """What one step holds on the current GPU: weights that other steps have packed and kept are forgotten before."""
    clear_weight_cache()
    step.prepare()
    return on_gpu(step)
