"""Find every matmul and say which layer and role it belongs to. AOT -> CLASSIFIED.

    %addmm = aten.addmm(%bias, %x, %w_t)           fc1 fprop (x, w)
    %mm_1  = aten.mm(%dy, %w)                      fc1 dgrad (dy, w)
    %mm_2  = aten.mm(%dy_t, %x)                    fc1 wgrad (dy, x)

Only metadata is written. A matmul that cannot run in FP4 is classified too, with the obstacle as its reason.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from nvfp4c.dialect import MATMUL, Matmul, Operand, Role, arguments
from nvfp4c.dtypes import QUANTIZABLE_DTYPES
from nvfp4c.passes.graph_edit import SHAPE_OPS, backward_nodes
from nvfp4c.sites import GraphInput, ModelNames, site_name

aten = torch.ops.aten

OPERAND_PLACES = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
"""Where each matmul has its two operands."""

OTHER_MATMULS = {
    aten._scaled_mm.default: "already in FP8 or FP4",
    aten._int_mm.default: "integer matmul",
    aten._grouped_mm.default: "grouped matmul is not supported",
    aten.mv.default: "matrix times vector",
    aten.addmv.default: "matrix times vector",
}
"""Matmuls that are left alone, and why. Their operands are arguments 0 and 1, or 1 and 2 for the `add` forms."""

DERIVING_OPS = SHAPE_OPS | {
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.constant_pad_nd.default,
}
"""Operations through which a tensor still counts as the same operand: arrangements, casts and parts."""


def origin(node: fx.Node) -> fx.Node:
    """The tensor that an operand was cut, cast or rearranged from."""
    while node.target in DERIVING_OPS or (
        node.target is operator.getitem and arguments(node)[0].target in DERIVING_OPS
    ):
        node = arguments(node)[0]
    return node


@dataclass(frozen=True)
class _Forward:
    """What backward matmuls are recognised by: a forward matmul, and its weight and input where it has a weight."""

    matmul: Matmul
    weight: fx.Node | None
    input: fx.Node | None
    seq_nr: int | None


@dataclass(frozen=True)
class Classify:
    """Write `Matmul` metadata on every matmul node. names: of the model's modules and parameters."""

    names: ModelNames

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        inputs = self._inputs(graph)
        backward = backward_nodes(graph)
        uses: Counter[str] = Counter()
        forwards: list[_Forward] = []
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            places = operand_places(node)
            if places is None:
                continue
            operands = (arguments(node)[places[0]], arguments(node)[places[1]])
            if node in backward:
                node.meta[MATMUL] = self._backward(node, operands, forwards)
            else:
                forwards.append(self._forward(node, operands, inputs, uses))
                node.meta[MATMUL] = forwards[-1].matmul
        return graph

    def _inputs(self, graph: fx.Graph) -> dict[fx.Node, GraphInput]:
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        return {node: self.names.input_of(node, position) for position, node in enumerate(placeholders)}

    def _forward(
        self,
        node: fx.Node,
        operands: tuple[fx.Node, fx.Node],
        inputs: dict[fx.Node, GraphInput],
        uses: Counter[str],
    ) -> _Forward:
        origins = tuple(origin(operand) for operand in operands)
        weights = [index for index in (0, 1) if origins[index] in inputs and inputs[origins[index]].is_weight]
        weight = origins[weights[0]] if weights else None
        site = site_name(self.names.module_of(node), inputs[weight].names if weight is not None else ())
        uses[site] += 1
        if uses[site] > 1:
            site = f"{site}#{uses[site] - 1}"
        obstacle = obstacle_of(node, operands)
        seq_nr = node.meta.get("seq_nr")
        if weight is None or len(weights) == 2:
            what = "no weight: a product of two activations" if weight is None else "a product of two weights"
            matmul = Matmul(site, Role.FPROP, (Operand.INPUT, Operand.INPUT), obstacle or what)
            return _Forward(matmul, None, None, seq_nr)
        kinds = (Operand.WEIGHT, Operand.INPUT) if weights[0] == 0 else (Operand.INPUT, Operand.WEIGHT)
        return _Forward(Matmul(site, Role.FPROP, kinds, obstacle), weight, origins[1 - weights[0]], seq_nr)

    def _backward(self, node: fx.Node, operands: tuple[fx.Node, fx.Node], forwards: list[_Forward]) -> Matmul:
        """The layer is the forward matmul of the same autograd node; where none is known, one with the same weight."""
        origins = tuple(origin(operand) for operand in operands)
        obstacle = obstacle_of(node, operands)
        same_layer = [forward for forward in forwards if forward.seq_nr == node.meta.get("seq_nr")]
        for forward in same_layer or forwards:
            weight = origins.index(forward.weight) if forward.weight in origins else None
            read = origins.index(forward.input) if same_layer and forward.input in origins else None
            site = forward.matmul.site
            if weight is not None and read is not None:  # computed again by a custom backward
                return Matmul(site, Role.FPROP, _kinds(Operand.WEIGHT, weight, Operand.INPUT), obstacle)
            if weight is not None:
                return Matmul(site, Role.DGRAD, _kinds(Operand.WEIGHT, weight), obstacle)
            if read is not None:
                return Matmul(site, Role.WGRAD, _kinds(Operand.INPUT, read), obstacle)
        site = same_layer[0].matmul.site if same_layer else site_name(self.names.module_of(node), ())
        reason = same_layer[0].matmul.obstacle if same_layer else None
        reason = obstacle or reason or "no weight: gradient of a product of two activations"
        return Matmul(site, Role.DGRAD, (Operand.GRADIENT, Operand.GRADIENT), reason)


def _kinds(known: Operand, index: int, other: Operand = Operand.GRADIENT) -> tuple[Operand, Operand]:
    return (known, other) if index == 0 else (other, known)


def operand_places(node: fx.Node) -> tuple[int, int] | None:
    """Where a node has its two matmul operands, or None if it is no matmul."""
    if node.target in OPERAND_PLACES:
        return OPERAND_PLACES[node.target]
    if node.target in OTHER_MATMULS:
        return (1, 2) if "add" in str(node.target) else (0, 1)
    if node.target is aten.convolution.default and _is_pointwise(node):
        return (0, 1)
    return None


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a convolution has a 1x1 kernel: a matmul over channels."""
    return all(isinstance(size, int) and size == 1 for size in arguments(node)[1].meta["val"].shape[2:])


def obstacle_of(node: fx.Node, operands: tuple[fx.Node, fx.Node]) -> str | None:
    """Why this matmul cannot run in FP4 whatever the recipe says, or None."""
    left, right = (operand.meta["val"] for operand in operands)
    if node.target is aten.convolution.default:
        return "1x1 convolution"
    if node.target in OTHER_MATMULS:
        return OTHER_MATMULS[node.target]
    if left.layout is not torch.strided or right.layout is not torch.strided:
        return f"sparse operand ({left.layout}, {right.layout})"
    output = node.meta["val"]
    for tensor in (left, right, output):
        if tensor.dtype not in QUANTIZABLE_DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    if any(isinstance(size, int) and size == 0 for size in (*left.shape, *right.shape)):
        return "empty: a dimension is 0"
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return "addmm with alpha or beta"
    return None
