"""Is a graph legal at its stage? What each stage may hold is data; the checks run around every pass in tests."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.node import Target
from torch.utils._pytree import tree_leaves, tree_map

from nvfp4c.dialect import (
    AMAX,
    BLOCK_SCALED_MM,
    DEQUANTIZE,
    HADAMARD,
    PRODUCT,
    QUANTIZE,
    REGION,
    RESIDUAL,
    SCALED_MM,
    TRANSPOSE,
    WEIGHT,
    Quantization,
    Stage,
    arguments,
    assignment_of,
    is_dialect,
    matmul_of,
)
from nvfp4c.errors import VerifyError
from nvfp4c.formats import BLOCK, ROW_BLOCK, TILE_BLOCK, padded
from nvfp4c.region import Form, Layout, Output, Region, reduction
from nvfp4c.scale_layout import swizzled_shape

aten = torch.ops.aten

_SCALED = frozenset({HADAMARD, AMAX, QUANTIZE, TRANSPOSE, DEQUANTIZE, SCALED_MM, BLOCK_SCALED_MM})
_FUSED = frozenset({REGION, WEIGHT, PRODUCT, BLOCK_SCALED_MM, DEQUANTIZE, QUANTIZE, TRANSPOSE})

ALLOWED: dict[Stage, frozenset[Target]] = {
    Stage.AOT: frozenset(),
    Stage.CLASSIFIED: frozenset(),
    Stage.ASSIGNED: frozenset(),
    Stage.ROTATED: frozenset({HADAMARD}),
    Stage.SCALED: _SCALED,
    Stage.FUSED: _FUSED,
    Stage.LOWERED: frozenset(),
}
"""Which operations of the dialect a graph may hold at each stage."""

MATMULS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
"""Their operands are their last two arguments."""

TURNS = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})

NOT_CANCELLED = "its operands are not rotated with the same signs, so the rotation does not cancel"

Signs = tuple[int, ...] | None


def verify(graph: fx.Graph, stage: Stage) -> None:
    """Raise VerifyError, naming the node, when the graph is not legal at `stage`."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"{stage.name}: {str(error).partition('!')[0]}") from error  # the rest is the whole graph
    drawn: dict[object, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        _check_operation(node, stage)
        _check_metadata(node, stage)
        made = is_dialect(node) or (node.target in (*TURNS, operator.getitem) and is_dialect(arguments(node)[0]))
        if made:
            _check_stored(node, stage)
        if node.target in CHECKS:
            CHECKS[node.target](node, stage)
        if made:
            _check_value(node, stage)
        if node.target is QUANTIZE and arguments(node)[3] == "stochastic":
            other = drawn.setdefault(arguments(node)[5:7], node)
            if other is not node:
                raise _fail(node, stage, f"draws the same random bits as %{other.name}; it needs a stream of its own")


def _fail(node: fx.Node, stage: Stage, what: str) -> VerifyError:
    return VerifyError(f"{stage.name}: node %{node.name} ({node.target}): {what}")


def _check_operation(node: fx.Node, stage: Stage) -> None:
    if not is_dialect(node):
        return
    if node.target not in ALLOWED[stage]:
        raise _fail(node, stage, "this operation is not allowed at this stage")
    if node.kwargs:
        raise _fail(node, stage, f"takes {', '.join(node.kwargs)} by name; passes read arguments by place")


def _check_metadata(node: fx.Node, stage: Stage) -> None:
    assignment = assignment_of(node)
    if node.target in MATMULS and stage in (Stage.CLASSIFIED, Stage.ASSIGNED) and matmul_of(node) is None:
        raise _fail(node, stage, "a matmul without a site and role; classify must see it")
    if stage is Stage.ASSIGNED and matmul_of(node) is not None and assignment is None:
        raise _fail(node, stage, "a classified matmul without an assignment")
    if assignment is not None and assignment.precision == "bf16" and not assignment.reason:
        raise _fail(node, stage, "bf16 without a reason")


def _check_stored(node: fx.Node, stage: Stage) -> None:
    for each in (*node.all_input_nodes, node):
        if "val" not in each.meta:
            raise _fail(each, stage, "no stored value")


def _check_value(node: fx.Node, stage: Stage) -> None:
    """The stored value must be what the operation gives on the stored values of its arguments."""
    args = tree_map(lambda leaf: leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf, tuple(arguments(node)))
    fake_mode = detect_fake_mode([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])
    if fake_mode is None:
        return
    with fake_mode:
        derived = node.target(*args)  # type: ignore[operator]
    expected, stored = _described(derived), _described(node.meta["val"])
    if expected != stored:
        raise _fail(node, stage, f"stored value {stored}, derived {expected}")


def _described(value: object) -> str:
    """`torch.uint8[16, 32] on cpu`, for every tensor of a value."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return " and ".join(f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}] on {leaf.device}" for leaf in leaves)


def _check_matmul(node: fx.Node, stage: Stage) -> None:
    assignment = assignment_of(node)
    operands = dict(zip(("left", "right"), arguments(node)[-2:], strict=True))
    if stage is Stage.ROTATED:
        signs = {side: _rotation_signs(operand) for side, operand in operands.items()}
        if signs["left"] != signs["right"]:
            raise _fail(node, stage, NOT_CANCELLED)
        if assignment is not None and assignment.left is not None and signs["left"] != assignment.left.signs:
            raise _fail(node, stage, f"assigned the signs {assignment.left.signs}, rotated with {signs['left']}")
    if stage in (Stage.SCALED, Stage.FUSED) and assignment is not None and assignment.precision == "nvfp4":
        if assignment.left is not None and assignment.right is not None:
            raise _fail(node, stage, "assigned to NVFP4 but not scaled")
        side = "left" if assignment.left is not None else "right"
        if stage is Stage.SCALED and _unturned(operands[side]).target is not DEQUANTIZE:
            raise _fail(node, stage, f"its {side} operand is assigned to NVFP4 but not quantised")


def _check_quantize(node: fx.Node, stage: Stage) -> None:
    source, amax, block, rounding = arguments(node)[:4]
    if tuple(block) not in (ROW_BLOCK, TILE_BLOCK) or rounding not in ("nearest", "stochastic"):
        raise _fail(node, stage, f"there are no {block} blocks with {rounding} rounding")
    if (rounding == "stochastic") != (_argument(node, 5) is not None):
        raise _fail(node, stage, "stochastic rounding, and no other, needs a seed")
    if amax.target is AMAX:
        reduced = arguments(amax)[0].meta["val"].numel(), _own_signs(amax, 1)
        read = source.meta["val"].numel(), _own_signs(node, 4)
        if str(reduced) != str(read):
            raise _fail(node, stage, f"%{amax.name} is not the amax of what it quantises")


def _check_transpose(node: fx.Node, stage: Stage) -> None:
    maker = _maker(arguments(node)[0])
    if (
        maker is not None
        and maker.target is QUANTIZE
        and _quantize_of(maker) != Quantization(TILE_BLOCK, "nearest", None)
    ):
        raise _fail(node, stage, "only 16x16 tiles, not rotated, can be turned")


def _check_dequantize(node: fx.Node, stage: Stage) -> None:
    codes, scales, amax, length = arguments(node)[:4]
    _check_operand(node, stage, "the", codes, scales, amax, length)


def _check_scaled_mm(node: fx.Node, stage: Stage) -> None:
    args, assignment = arguments(node), assignment_of(node)
    native = node.target is BLOCK_SCALED_MM
    length = args[0].meta["val"].shape[-1] * 2 if native else args[6]
    found: list[Quantization] = []
    for side, (codes, scales, amax) in (("left", args[:3]), ("right", args[3:6])):
        maker = _check_operand(node, stage, side, codes, scales, amax, length)
        if native and not _is_swizzled(codes, scales):
            raise _fail(node, stage, f"{side} scales are not laid out as the FP4 tensor cores read them")
        if maker is not None:
            found.append(_quantization(maker, codes))
            assigned = getattr(assignment, side, None)
            if assigned is not None and found[-1] != assigned:
                raise _fail(node, stage, f"{side} operand is quantised as {found[-1]}, assigned {assigned}")
    if len(found) == 2 and found[0].signs != found[1].signs:
        raise _fail(node, stage, NOT_CANCELLED)


def _check_product(node: fx.Node, stage: Stage) -> None:
    residual = arguments(node)[RESIDUAL]
    if residual is not None:
        shape, wanted = (list(map(str, one.meta["val"].shape)) for one in (residual, node))
        if shape != wanted:
            raise _fail(node, stage, f"its residual %{residual.name} is not of its shape")


def _check_block_scaled_mm(node: fx.Node, stage: Stage) -> None:
    _check_scaled_mm(node, stage)
    _check_product(node, stage)


def _check_operand(
    node: fx.Node, stage: Stage, side: str, codes: fx.Node, scales: fx.Node, amax: fx.Node | None, length: Any
) -> fx.Node | None:
    """One packed operand; returns what quantised it, None when another graph did."""
    size = length.meta["val"] if isinstance(length, fx.Node) else length
    if str(codes.meta["val"].shape[-1] * 2) != str(padded(size)):
        raise _fail(node, stage, f"{side} operand is not quantised along the contraction axis of {size} elements")
    maker = _maker(codes)
    if maker is not _maker(scales):
        raise _fail(node, stage, f"{side} codes and scales come from different quantisations")
    if maker is not None and maker.target is TRANSPOSE:
        maker = _maker(arguments(maker)[0])
    if maker is not None and amax is not None and not _is_amax_of(amax, maker, codes):
        raise _fail(node, stage, f"{side} operand was quantised with another amax")
    return maker


def _check_weight(node: fx.Node, stage: Stage) -> None:
    weight, _, text, _ = arguments(node)
    if weight.op != "placeholder":
        raise _fail(node, stage, f"%{weight.name} is no input of the graph, so what it holds has no version")
    outputs = Region.from_json(text).outputs
    kinds = {replace(output, form=Form.PACKED) for output in outputs}
    if len(kinds) != 1 or not all(output.quantised and not output.stochastic for output in outputs):
        raise _fail(node, stage, "a weight is quantised to nearest, and in one way")
    if any(output.layout is Layout.NATIVE and not output.native for output in outputs):
        raise _fail(node, stage, "an operand that is dequantised lies as its matrix does")


CHECKS: dict[Target, Callable[[fx.Node, Stage], None]] = {
    **dict.fromkeys(MATMULS, _check_matmul),
    QUANTIZE: _check_quantize,
    TRANSPOSE: _check_transpose,
    DEQUANTIZE: _check_dequantize,
    SCALED_MM: _check_scaled_mm,
    BLOCK_SCALED_MM: _check_block_scaled_mm,
    PRODUCT: _check_product,
    WEIGHT: _check_weight,
}
"""What each operation must satisfy."""


def _maker(item: fx.Node) -> fx.Node | None:
    """The quantisation or turn that codes or scales are an item of; None across a graph's boundary."""
    return arguments(item)[0] if item.target is operator.getitem else None


def _is_swizzled(codes: fx.Node, scales: fx.Node) -> bool:
    *lead, rows, width = codes.meta["val"].shape
    expected = (*lead, *swizzled_shape(rows, 2 * width // BLOCK))
    return list(map(str, scales.meta["val"].shape)) == list(map(str, expected))


def _region_output(item: fx.Node) -> Output:
    """The output that an item of a region, or of a weight, belongs to. A weight gives its amax before them."""
    made, place = arguments(item)
    of_weight = made.target is WEIGHT
    outputs = Region.from_json(arguments(made)[2 if of_weight else 3]).outputs
    return [output for output in outputs for _ in range(output.tensors)][place - of_weight]


def _is_amax_of(amax: fx.Node, maker: fx.Node, codes: fx.Node) -> bool:
    """Whether codes were quantised with an amax. All quantisations of one weight may share that of the first."""
    if maker.target is WEIGHT:
        return _weight_amax(amax) == (*arguments(maker)[:2], reduction(Region((_region_output(codes),))))
    given: Any = arguments(maker)[1]
    return amax is (given[_region_output(codes).amax] if maker.target is REGION else given)


def _weight_amax(amax: fx.Node) -> tuple[fx.Node, torch.dtype, Region] | None:
    """Of which weight, cast to what, an amax is, and how it is reduced; None for that of anything else."""
    maker = _maker(amax)
    if maker is None or maker.target is not WEIGHT or arguments(amax)[1] != 0:
        return None
    weight, dtype, text, _ = arguments(maker)
    return weight, dtype, reduction(Region.from_json(text))


def _quantization(maker: fx.Node, codes: fx.Node) -> Quantization:
    """How codes were quantised, in the words of an assignment."""
    if maker.target is WEIGHT:
        output = _region_output(codes)
        return Quantization(output.block, output.rounding, output.signs)
    if maker.target is REGION:
        output = _region_output(codes)
        return Quantization(output.block, output.rounding, output.signs or _rotation_signs(arguments(maker)[0][0]))
    return _quantize_of(maker)


def _quantize_of(quantize: fx.Node) -> Quantization:
    """How a node quantises."""
    return Quantization(tuple(arguments(quantize)[2]), arguments(quantize)[3], _own_signs(quantize, 4))


def _own_signs(node: fx.Node, place: int) -> Signs:
    """Signs of what a node reduces or quantises: of its own rotation (the argument at `place`), or of one before it."""
    own = _argument(node, place)
    return tuple(own) if own is not None else _rotation_signs(arguments(node)[0])


def _argument(node: fx.Node, place: int) -> Any:
    return arguments(node)[place] if len(arguments(node)) > place else None


def _rotation_signs(operand: fx.Node) -> Signs:
    """Signs of the transform that an operand, or what it is the transpose of, was made by."""
    source = _unturned(operand)
    if source.target is operator.getitem and arguments(source)[0].target is REGION:
        return _region_output(source).signs
    return tuple(arguments(source)[1]) if source.target is HADAMARD else None


def _unturned(operand: fx.Node) -> fx.Node:
    source: fx.Node = arguments(operand)[0] if operand.target in TURNS else operand
    return source
