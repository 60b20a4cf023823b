"""Time several things against each other: in interleaved rounds, so that what drifts drifts for all of them.

Each round times every call once, in an order that is shuffled anew, so that none always follows the same other one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4c.watch import Watch, unwatched

Call = Callable[[], object]
Clock = Callable[[Call], float]
"""Runs a call and returns the seconds that it took."""

HEAD_START = 80
"""Times that a GPU reads more than its cache holds before a sample of a short kernel. It takes some milliseconds, in
which the processor gets ahead: else kernels would be timed by how fast Python launches them. It only reads, for lines
that it wrote would be the timed kernel's to write back."""


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, a sample a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, relative to the median: differences smaller than this say nothing."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    def to_dict(self) -> dict[str, Any]:
        """The statistics and all samples, in seconds."""
        return {"median_seconds": self.median, "relative_spread": self.spread, "seconds": list(self.seconds)}


def interleaved(
    calls: Mapping[str, Call],
    clock: Clock,
    rounds: int,
    *,
    warmups: int = 1,
    before: Callable[[str], object] = lambda name: None,
    watch: Watch = unwatched,
) -> dict[str, Samples]:
    """Samples of each call by its name, `rounds` each, after `warmups` rounds that are not kept.

    before: is told the name of a call before it is made, outside what is timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for number in range(-warmups, rounds):
        watch("timing", max(number, 0), rounds)
        shuffle(order)
        for name in order:
            before(name)
            seconds = clock(calls[name])
            if number >= 0:
                samples[name].append(seconds)
    watch("timing", rounds, rounds)
    return {name: Samples(tuple(found)) for name, found in samples.items()}


def clock_for(device: str, repeats: int, *, short: bool) -> Clock:
    """Times by the device's own clock. repeats: calls a sample, of which the mean is taken.

    short: each call is a short kernel. On a GPU its launches are then hidden, and what came before is driven from the
    cache. A call that is to find its own inputs cold has to take others each time.
    """
    if device == "cuda":
        return CudaClock(repeats, short)
    return lambda call: _elapsed(call, repeats)


def _elapsed(call: Call, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


class CudaClock:
    """Seconds between two events around the calls, on the current stream of the current GPU."""

    def __init__(self, repeats: int, short: bool) -> None:
        self._repeats = repeats
        # Only for kernels: the memory that a training step takes is measured too.
        self._filler = torch.zeros(cache_bytes("cuda"), dtype=torch.float32, device="cuda") if short else None

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if self._filler is not None:
            for _ in range(HEAD_START):
                self._filler.sum()
        start.record()
        for _ in range(self._repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._repeats


def cache_bytes(device: str) -> int:
    """The size of the cache that inputs must exceed to be read from memory: a GPU's L2, an ample guess for a CPU."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    return 32 * 2**20
