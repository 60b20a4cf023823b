"""Every region of a task's graphs by itself: the bytes that the cost model predicts, and those its time is worth.

A kernel that takes as long as a copy of 10 MB is worth 10 MB. Where that is more than predicted, something else than
memory held it up: arithmetic, mostly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nvfp4c import cost
from nvfp4c import options as option_parsing
from nvfp4c.bench.kernel_cases import LARGE_BYTES
from nvfp4c.bench.llama import Llama, Size
from nvfp4c.bench.timing import Samples, Watch, clock_for, interleaved
from nvfp4c.bench.variants import RECIPE, converted
from nvfp4c.codegen.targets import AUTO, kernel_table, resolve
from nvfp4c.dialect import REGION, KernelTable, arguments
from nvfp4c.errors import TargetError
from nvfp4c.kernel_plan import KernelRow, kernel_plan
from nvfp4c.region import Region, without_streams
from nvfp4c.tasks import Task

ROUNDS = {"cuda": 20, "cpu": 3}
COPY = "copy"


@dataclass(frozen=True)
class Measured:
    """A kind of region: its nodes, what is predicted of each, its time, and the bytes of a copy that takes as long."""

    row: KernelRow
    nodes: tuple[fx.Node, ...]
    samples: Samples
    worth: float

    @property
    def launches(self) -> int:
        return len(self.nodes)

    @property
    def ratio(self) -> float:
        """Measured bytes over predicted ones."""
        return self.worth / self.row.bytes

    def figures(self) -> dict[str, float]:
        """What is said beside the prediction."""
        return {"measured_bytes": self.worth, "measured_over_predicted": self.ratio}

    def to_dict(self) -> dict[str, Any]:
        return {**self.row.to_dict(), "launches": self.launches, **self.figures(), **self.samples.to_dict()}


def kernels_at_hand(name: str, device: torch.device) -> KernelTable:
    """Those of the target called `name`, or "auto", to be timed on a device.

    Raises OptionError for a name that does not exist, and TargetError where the target has no regions, or is not the
    one that the device takes by itself.
    """
    target, own = resolve(name, device), resolve(AUTO, device)
    table = kernel_table(target)
    if table.region is None:
        raise TargetError(f"target {target.name!r} has no regions to time, since Inductor writes its code; use a GPU")
    if target != own:
        raise TargetError(
            f"kernels for {target.name!r} are not what {device} would run, so timing them there says nothing of "
            f"either; use {own.name!r}, or {AUTO!r}"
        )
    return table


def measure(
    planned: Mapping[fx.Node, KernelRow], table: KernelTable, device: str, rounds: int, watch: Watch
) -> list[Measured]:
    """Time each kind of region of a plan, the one that takes most of a step first. What is no region is left out.

    Symbolic sizes are at their example values. Raises TargetError where memory does not suffice.
    """
    kinds = _kinds(planned)
    try:
        calls = {str(place): _call(table, nodes[0], device) for place, nodes in enumerate(kinds)}
        source = torch.randn(LARGE_BYTES[device] // torch.float32.itemsize, device=device)
        into = torch.empty_like(source)
        calls[COPY] = lambda: into.copy_(source)
        samples = interleaved(calls, clock_for(device, 1, short=True), rounds, warmups=2, watch=watch)
    except torch.OutOfMemoryError as error:
        raise TargetError("what all regions read does not fit into this GPU's memory; take smaller batches") from error
    rate = 2 * source.nbytes / samples[COPY].median
    found = [
        Measured(planned[nodes[0]], nodes, samples[str(place)], samples[str(place)].median * rate)
        for place, nodes in enumerate(kinds)
    ]
    return sorted(found, key=lambda one: -one.launches * one.samples.median)


def measure_llama(size: Size, device: str, dtype: torch.dtype, rounds: int, watch: Watch) -> list[Measured]:
    """`measure` of a training step of Llama blocks. Raises TargetError for a device whose target has no regions."""
    table = kernels_at_hand(AUTO, torch.device(device))
    watch("capturing", 0, 1)
    planned = kernel_plan(_task(size, device, dtype), option_parsing.parse({"recipe": RECIPE}), table.target)
    return measure(planned, table, device, rounds, watch)


def _task(size: Size, device: str, dtype: torch.dtype) -> Task:
    with torch.device(device):
        model = Llama(size)
    x = torch.randn(size.batch, size.sequence, size.width, device=device, dtype=dtype, requires_grad=True)
    return Task(size.name, converted(model, dtype), [x], lambda model, batch: model(batch).float().sum())


def _kinds(planned: Mapping[fx.Node, KernelRow]) -> list[tuple[fx.Node, ...]]:
    """The regions' nodes by kind: those that launch one kernel on inputs that lie alike. Empty ones launch none."""
    kinds: dict[object, list[fx.Node]] = defaultdict(list)
    for node, row in planned.items():
        if node.target is not REGION:
            continue
        given, _, _, text = arguments(node)
        kernel, layouts = without_streams(Region.from_json(text)), tuple(_layout(one.meta["val"]) for one in given)
        if all(0 not in shape for shape, _, _ in layouts):
            kinds[kernel, row.operations, row.decision, layouts].append(node)
    return [tuple(nodes) for nodes in kinds.values()]


def _call(table: KernelTable, node: fx.Node, device: str) -> Callable[[], object]:
    """A launch of a region on random inputs that lie as in the graph."""
    given, amaxes, seed, text = arguments(node)
    inputs = [_like(one.meta["val"], device) for one in given]
    reduced = [torch.tensor(4.0, device=device) for _ in amaxes]
    key = None if seed is None else torch.tensor(1, device=device)
    region = table.region
    assert region is not None
    return lambda: region(inputs, reduced, key, text)


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and type."""


def _layout(x: Tensor) -> Layout:
    def numbers(sizes: Sequence[int | torch.SymInt]) -> tuple[int, ...]:
        return tuple(int(cost.at_example_sizes(cost.extent(size), [x])) for size in sizes)

    return numbers(x.shape), numbers(x.stride()), x.dtype


def _like(x: Tensor, device: str) -> Tensor:
    """Random numbers that lie like x. Those of an expanded axis lie in one place, as they do in x."""
    shape, strides, dtype = _layout(x)
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.randn(length, dtype=dtype, device=device).as_strided(shape, strides)
