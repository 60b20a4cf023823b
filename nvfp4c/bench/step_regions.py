"""Every region of a training step by itself: the bytes that the cost model predicts, and those its time is worth.

A kernel that takes as long as a copy of 10 MB is worth 10 MB. Where that is more than predicted, something else than
memory held it up: arithmetic, mostly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nvfp4c import options as option_parsing
from nvfp4c.bench.kernel_cases import LARGE_BYTES
from nvfp4c.bench.llama import Llama, Size
from nvfp4c.bench.timing import Samples, Watch, clock_for, interleaved
from nvfp4c.bench.variants import RECIPE, converted
from nvfp4c.codegen.targets import kernel_table, resolve
from nvfp4c.dialect import REGION, KernelTable, arguments
from nvfp4c.errors import TargetError
from nvfp4c.fused_graphs import Half, fused_graphs
from nvfp4c.kernel_plan import KernelRow, row_of
from nvfp4c.tasks import Task

ROUNDS = {"cuda": 20, "cpu": 3}
COPY = "copy"


@dataclass(frozen=True)
class Measured:
    """A kind of region: how many a step launches, what is predicted of one, its time, and the bytes of such a copy."""

    row: KernelRow
    launches: int
    samples: Samples
    worth: float

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.row.to_dict(),
            "launches": self.launches,
            "measured_bytes": self.worth,
            "measured_over_predicted": self.worth / self.row.bytes,
            **self.samples.to_dict(),
        }


def measure(size: Size, device: str, dtype: torch.dtype, rounds: int, watch: Watch) -> list[Measured]:
    """Time each kind of region of a step of Llama blocks, the one that takes most of the step first.

    Raises TargetError for a device whose target has no regions.
    """
    target = resolve("auto", torch.device(device))
    table = kernel_table(target)
    if table.region is None:
        raise TargetError(f"target {target.name!r} has no regions to time, since Inductor writes its code; use a GPU")
    watch("capturing", 0, 1)
    halves = fused_graphs(_task(size, device, dtype), option_parsing.parse({"recipe": RECIPE}), target.name)
    kinds = _kinds(halves, target.name)
    calls = {str(place): _call(table, node, device) for place, (node, _, _) in enumerate(kinds)}
    source = torch.randn(LARGE_BYTES[device] // dtype.itemsize, dtype=dtype, device=device)
    into = torch.empty_like(source)
    calls[COPY] = lambda: into.copy_(source)
    samples = interleaved(calls, clock_for(device, 1, short=True), rounds, warmups=2, watch=watch)
    rate = 2 * source.nbytes / samples[COPY].median
    found = [
        Measured(row, launches, samples[str(place)], samples[str(place)].median * rate)
        for place, (_, row, launches) in enumerate(kinds)
    ]
    return sorted(found, key=lambda one: -one.launches * one.samples.median)


def _task(size: Size, device: str, dtype: torch.dtype) -> Task:
    with torch.device(device):
        model = Llama(size)
    x = torch.randn(size.batch, size.sequence, size.width, device=device, dtype=dtype, requires_grad=True)
    return Task(size.name, converted(model, dtype), [x], lambda model, batch: model(batch).float().sum())


def _kinds(halves: Sequence[Half], target: str) -> list[tuple[fx.Node, KernelRow, int]]:
    """One node of each kind of region, and how many there are: of the same outputs, on inputs that lie alike."""
    nodes: dict[object, tuple[fx.Node, KernelRow]] = {}
    counts: Counter[object] = Counter()
    for half in halves:
        for node in half.graph.find_nodes(op="call_function", target=REGION):
            inputs, text = arguments(node)[0], arguments(node)[3]
            row = row_of(half, node, target)
            layouts = tuple((tuple(x.shape), x.stride(), x.dtype) for x in (one.meta["val"] for one in inputs))
            key = (row.computes, row.operations, row.decision, layouts, "stochastic" in text)
            nodes.setdefault(key, (node, row))
            counts[key] += 1
    return [(*nodes[key], counts[key]) for key in nodes]


def _call(table: KernelTable, node: fx.Node, device: str) -> Callable[[], object]:
    """A launch of a region on random inputs that lie as in the graph."""
    given, amaxes, seed, text = arguments(node)
    inputs = [_like(one.meta["val"], device) for one in given]
    reduced = [torch.tensor(4.0, device=device) for _ in amaxes]
    key = None if seed is None else torch.tensor(1, device=device)
    region = table.region
    assert region is not None
    return lambda: region(inputs, reduced, key, text)


def _like(x: Tensor, device: str) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return made.normal_()
