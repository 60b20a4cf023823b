"""Quantise both operands of a matmul and multiply them with their scales. ROTATED -> SCALED.

    %mm = aten.mm(%x, %w_t)
becomes
    %xa = nvfp4.amax(%x)
    %xq = nvfp4.quantize(%x, %xa, [1, 16], "nearest")            # (codes, scales)
    %wa = nvfp4.amax(%w)
    %wq = nvfp4.quantize(%w, %wa, [16, 16], "nearest")
    %mm = nvfp4.scaled_mm(*%xq, %xa, *%wq, %wa, k, None, torch.bfloat16)

Operands are turned so that both are contracted along their last axis. The amax is taken of the tensor that an operand
only rearranges, so that all its arrangements share one. Stochastic operands draw from one seed a graph, each from a
stream of its own. Where a recipe leaves one operand alone, the other is quantised and dequantised again and the matmul
stays.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import fx
from torch._inductor import inductor_prims

from nvfp4c.dialect import (
    AMAX,
    ASSIGNMENT,
    DEQUANTIZE,
    MATMUL,
    QUANTIZE,
    SCALED_MM,
    Assignment,
    Quantization,
    arguments,
    assignment_of,
)
from nvfp4c.passes.classify import OPERAND_PLACES
from nvfp4c.passes.graph_edit import arrangement_base, insert, transposed

SEED = inductor_prims.seed
"""Draws from torch's generator: fresh each step, reproducible under torch.manual_seed."""


@dataclass
class _Quantizer:
    """Inserts quantised operands into one graph, handing out its random streams."""

    graph: fx.Graph
    streams: count[int] = field(default_factory=count)
    seeds: dict[torch.device, fx.Node] = field(default_factory=dict)

    def quantized(self, node: fx.Node, how: Quantization, like: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """(codes, scales, amax) of a node, inserted before the matmul `like`."""
        amax = insert(self.graph, AMAX, (arrangement_base(node),), like)
        args: list[object] = [node, amax, list(how.block), how.rounding]
        if how.rounding == "stochastic":
            args += [None, self.seed(like), next(self.streams)]
        pair = insert(self.graph, QUANTIZE, args, like)
        codes, scales = (insert(self.graph, operator.getitem, (pair, index), like) for index in (0, 1))
        return codes, scales, amax

    def seed(self, like: fx.Node) -> fx.Node:
        """The seed of this graph on the device of a node, drawn before anything else."""
        device = like.meta["val"].device
        if device not in self.seeds:
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                self.seeds[device] = insert(self.graph, SEED, (device,), first)
        return self.seeds[device]


def insert_scaling(graph: fx.Graph) -> fx.Graph:
    """Replace every matmul assigned to NVFP4."""
    quantizer = _Quantizer(graph)
    for node in list(graph.nodes):
        assignment = assignment_of(node)
        if assignment is None or assignment.precision == "bf16":
            continue
        with graph.inserting_before(node):
            if assignment.left is None or assignment.right is None:
                _quantize_one(quantizer, node, assignment)
            else:
                _quantize_both(quantizer, node, assignment.left, assignment.right)
    # Turning a turned operand back leaves the turns without a reader; they would hide who reads a rotated tensor.
    graph.eliminate_dead_code()
    return graph


def _quantize_both(quantizer: _Quantizer, node: fx.Node, left: Quantization, right: Quantization) -> None:
    graph = quantizer.graph
    left_place, right_place = OPERAND_PLACES[node.target]  # type: ignore[index]
    rows = arguments(node)[left_place]
    columns = transposed(graph, arguments(node)[right_place], node)
    k = _last_size(graph, rows, node)
    a = quantizer.quantized(rows, left, node)
    b = quantizer.quantized(columns, right, node)
    bias = arguments(node)[0] if left_place == 1 else None
    product = insert(graph, SCALED_MM, (*a, *b, k, bias, node.meta["val"].dtype), node)
    for key in (MATMUL, ASSIGNMENT):
        product.meta[key] = node.meta[key]
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _quantize_one(quantizer: _Quantizer, node: fx.Node, assignment: Assignment) -> None:
    graph = quantizer.graph
    places = OPERAND_PLACES[node.target]  # type: ignore[index]
    left = assignment.left is not None
    how = assignment.left or assignment.right
    assert how is not None
    place = places[0] if left else places[1]
    rows = arguments(node)[place] if left else transposed(graph, arguments(node)[place], node)
    codes, scales, amax = quantizer.quantized(rows, how, node)
    k = _last_size(graph, rows, node)
    values = insert(graph, DEQUANTIZE, (codes, scales, amax, k, rows.meta["val"].dtype), node)
    node.update_arg(place, values if left else transposed(graph, values, node))


def _last_size(graph: fx.Graph, rows: fx.Node, like: fx.Node) -> int | fx.Node:
    """Length of a node's last axis: a number, or a node where it is symbolic."""
    size = rows.meta["val"].shape[-1]
    if isinstance(size, int):
        return size
    return insert(graph, torch.ops.aten.sym_size.int, (rows, rows.meta["val"].dim() - 1), like)
