"""What the nodes of a fused graph launch, and compiling it ahead: kernels compile while Inductor is at work.

Without this every kernel would compile when it is first launched, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from nvfp4c.codegen import cached_weight, operations
from nvfp4c.codegen.launching import Launch, compile_ahead
from nvfp4c.dialect import DEQUANTIZE, PRODUCT, REGION, WEIGHT, arguments, numbers
from nvfp4c.region import Region

KERNELS = (REGION, DEQUANTIZE, WEIGHT, PRODUCT)

Launching = tuple[Launch, Region | None]
"""A launch and the region that its kernel was emitted for; None for a kernel that is not emitted."""


def compile_kernels(graph: fx.Graph) -> fx.Graph:
    """Start to compile, in the background, all that a graph on a GPU will launch. The graph stays as it is."""
    found: dict[torch.device, list[Launch]] = {}
    for node in graph.nodes:
        if node.target in KERNELS:
            read = _read(node)
            if read[0].is_cuda and all(map(_known, read)):
                device = read[0].device
                found.setdefault(device, []).extend(launch for launch, _ in launches(node, device))
    for device, together in found.items():
        compile_ahead(together, device)
    return graph


def launches(node: fx.Node, device: torch.device, capability: tuple[int, int] | None = None) -> Iterator[Launching]:
    """What a node launches; nothing where it computes an empty matrix, or is none of the operations with kernels.

    capability: of a GPU that need not be there; asked of `device` if None. Symbolic sizes are taken at their example.
    """
    if node.target is REGION:
        inputs, _, _, text = arguments(node)
        yield from _region(text, tuple(_layout(x.meta["val"]) for x in inputs), device, capability)
    elif node.target is DEQUANTIZE:
        codes, values = arguments(node)[0].meta["val"], node.meta["val"]
        down = codes.stride(-1) != 1
        yield from _unpacking(values.mT if down else values, down, device)
    elif node.target is PRODUCT:
        yield operations.product_factors(device), None
    elif node.target is WEIGHT:
        weight, dtype, text, _ = arguments(node)
        shape, stride, _ = _layout(weight.meta["val"])
        needed = cached_weight.regions(text)
        for region in (needed.reduce, needed.fill):
            yield from _region(region.to_json(), ((shape, stride, dtype),), device, capability)
        for _ in needed.fill.outputs[1:]:
            yield from _unpacking(node.meta["val"][-1], needed.packed.down, device)


def _region(
    text: str, layouts: tuple[operations.Layout, ...], device: torch.device, capability: tuple[int, int] | None
) -> Iterator[Launching]:
    found = operations.prepared(text, layouts, device, capability)
    if found.launch.programs:
        yield found.launch, found.region


def _unpacking(values: Tensor, down: bool, device: torch.device) -> Iterator[Launching]:
    shape = numbers(values.shape)
    if 0 not in shape:
        yield operations.unpacking(shape, down, device), None


def _layout(x: Tensor) -> operations.Layout:
    return numbers(x.shape), numbers(x.stride()), x.dtype


def _read(node: fx.Node) -> list[Tensor]:
    given = arguments(node)[0]
    return [x.meta["val"] for x in (given if node.target is REGION else [given])]


def _known(x: Tensor) -> bool:
    """Whether every size has an example; what depends on data has none."""
    sizes: Sequence[int | torch.SymInt] = x.shape
    return all(size.node.has_hint() for size in sizes if isinstance(size, torch.SymInt))
