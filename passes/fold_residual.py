"""Let a product add what is added to it, before it rounds. FUSED -> FUSED.

    %y = nvfp4.product(%a, %b, %aa, %ba, %bias, None, bf16)
    %v = aten.view(%y, [2, 8, 32])
    %s = aten.add(%x, %v)
becomes
    %r = aten.reshape(%x, [16, 32])
    %y = nvfp4.product(%a, %b, %aa, %ba, %bias, %r, bf16)
    %s = aten.view(%y, [2, 8, 32])

so the sum is rounded once, and the product alone is neither written nor read. A product does not wait for what comes
after it: its operands would have to be kept until then. So of two products the later one takes the other as its
residual, and sums of many become a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from nvfp4c.dialect import BLOCK_SCALED_MM, PRODUCT, RESIDUAL, SCALED_MM, arguments
from nvfp4c.passes.graph_edit import insert

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
"""Of a product, which is contiguous, these keep the order of the elements."""


def fold_residual(graph: fx.Graph) -> fx.Graph:
    """Fold every sum that a product can take over."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        found = match(node)
        if found is not None:
            _fold(graph, node, found)
    return graph


@dataclass(frozen=True)
class Folding:
    """A product, the last view of it, and what that is added to, before it was brought into its shape."""

    product: fx.Node
    view: fx.Node
    other: fx.Node


def match(node: fx.Node) -> Folding | None:
    """The product that a sum can become a part of; on the joint graph, the matmul that becomes this product."""
    left, right = arguments(node)
    if not _is_tensor(left) or not _is_tensor(right) or left is right or node.kwargs.get("alpha", 1) != 1:
        return None
    if len({str(_layout(one)) for one in (node, left, right)}) != 1:
        return None
    return _folding(left, right) or _folding(right, left)


def _is_tensor(term: object) -> bool:
    """Numbers may be added too, and lengths, which are nodes where they are symbolic."""
    return isinstance(term, fx.Node) and isinstance(term.meta.get("val"), Tensor)


def _folding(term: fx.Node, other: fx.Node) -> Folding | None:
    """A term that is a product which nothing else reads, which adds nothing yet, and which comes after the other."""
    product = term
    while len(product.users) == 1 and product.target in VIEWS:
        product = arguments(product)[0]
    if len(product.users) != 1 or product.target not in (SCALED_MM, PRODUCT, BLOCK_SCALED_MM):
        return None
    while other.target in VIEWS:
        other = arguments(other)[0]
    sizes = product.meta["val"].shape
    symbolic = sum(isinstance(size, torch.SymInt) for size in sizes)
    # One symbolic size follows from the others, unless there are no elements.
    deducible = symbolic == 0 or (symbolic == 1 and 0 not in [size for size in sizes if isinstance(size, int)])
    free = product.target is SCALED_MM or arguments(product)[RESIDUAL] is None
    return Folding(product, term, other) if free and deducible and other < product else None


def _layout(node: fx.Node) -> tuple[object, ...]:
    """All that has to be equal for nothing to be broadcast, cast or rearranged; sizes may be symbolic."""
    x: Tensor = node.meta["val"]
    steps = [step for size, step in zip(x.shape, x.stride(), strict=True) if not (isinstance(size, int) and size == 1)]
    return x.dtype, x.device, list(x.shape), steps


def _fold(graph: fx.Graph, node: fx.Node, found: Folding) -> None:
    product, residual = found.product, found.other
    shape = product.meta["val"].shape
    if str(list(residual.meta["val"].shape)) != str(list(shape)):
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        with graph.inserting_before(product):
            residual = insert(graph, aten.reshape.default, (residual, sizes), product)
    args = list(arguments(product))
    args[RESIDUAL] = residual
    product.args = tuple(args)
    node.replace_all_uses_with(found.view)
    graph.erase_node(node)
