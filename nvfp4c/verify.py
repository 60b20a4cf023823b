"""Is a graph legal at its stage? What each stage may hold is data; the checks run around every pass in tests."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.node import Target
from torch.utils._pytree import tree_leaves, tree_map

from nvfp4c.dialect import (
    AMAX,
    DEQUANTIZE,
    HADAMARD,
    QUANTIZE,
    SCALED_MM,
    TRANSPOSE,
    Stage,
    arguments,
    assignment_of,
    is_dialect,
    matmul_of,
)
from nvfp4c.errors import VerifyError
from nvfp4c.formats import padded

aten = torch.ops.aten

_SCALED = frozenset({HADAMARD, AMAX, QUANTIZE, TRANSPOSE, DEQUANTIZE, SCALED_MM})

ALLOWED: dict[Stage, frozenset[Target]] = {
    Stage.AOT: frozenset(),
    Stage.CLASSIFIED: frozenset(),
    Stage.ASSIGNED: frozenset(),
    Stage.ROTATED: frozenset({HADAMARD}),
    Stage.SCALED: _SCALED,
    Stage.FUSED: _SCALED,
    Stage.LOWERED: frozenset(),
}
"""Which operations of the dialect a graph may hold at each stage."""

MATMULS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})


def verify(graph: fx.Graph, stage: Stage) -> None:
    """Raise VerifyError, naming the node, when the graph is not legal at `stage`."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"{stage.name}: {error}") from error
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        _check_operation(node, stage)
        _check_metadata(node, stage)
        if is_dialect(node):
            _check_value(node, stage)
        if node.target is SCALED_MM:
            _check_scaled_mm(node, stage)
        if node.target in MATMULS and stage is Stage.ROTATED:
            _check_rotation(node, stage, _rotation_signs(arguments(node)[-2]), _rotation_signs(arguments(node)[-1]))


def _fail(node: fx.Node, stage: Stage, what: str) -> VerifyError:
    return VerifyError(f"{stage.name}: node %{node.name} ({node.target}): {what}")


def _check_operation(node: fx.Node, stage: Stage) -> None:
    if is_dialect(node) and node.target not in ALLOWED[stage]:
        raise _fail(node, stage, "this operation is not allowed at this stage")
    if stage is Stage.FUSED and node.target is HADAMARD and all(user.target in (AMAX, QUANTIZE) for user in node.users):
        raise _fail(node, stage, "its readers can all rotate by themselves; it should have been folded")


def _check_metadata(node: fx.Node, stage: Stage) -> None:
    if node.target in MATMULS and stage in (Stage.CLASSIFIED, Stage.ASSIGNED) and matmul_of(node) is None:
        raise _fail(node, stage, "a matmul without a site and role; classify must see it")
    if stage is Stage.ASSIGNED and matmul_of(node) is not None and assignment_of(node) is None:
        raise _fail(node, stage, "a classified matmul without an assignment")
    assignment = assignment_of(node)
    if assignment is not None:
        if assignment.precision == "bf16" and not assignment.reason:
            raise _fail(node, stage, "bf16 without a reason")
        both = assignment.left is not None and assignment.right is not None
        if stage in (Stage.SCALED, Stage.FUSED) and both and node.target is not SCALED_MM:
            raise _fail(node, stage, "assigned to NVFP4 but not scaled")


def _check_value(node: fx.Node, stage: Stage) -> None:
    """The stored value must be what the operation gives on the stored values of its arguments."""
    if "val" not in node.meta:
        raise _fail(node, stage, "no stored value")
    args = tree_map(lambda leaf: leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf, tuple(arguments(node)))
    fake_mode = detect_fake_mode([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])
    if fake_mode is None:
        return
    with fake_mode:
        derived = node.target(*args, **node.kwargs)  # type: ignore[operator]
    pairs = zip(tree_leaves(derived), tree_leaves(node.meta["val"]), strict=True)
    for expected, stored in pairs:
        if (_shape(expected), expected.dtype, expected.device) != (_shape(stored), stored.dtype, stored.device):
            raise _fail(
                node, stage, f"stored value {stored.dtype}{_shape(stored)}, derived {expected.dtype}{_shape(expected)}"
            )


def _shape(tensor: Tensor) -> tuple[str, ...]:
    return tuple(map(str, tensor.shape))


def _check_scaled_mm(node: fx.Node, stage: Stage) -> None:
    a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, k = arguments(node)[:7]
    length = k.meta["val"] if isinstance(k, fx.Node) else k
    for side, codes, scales, amax in (("left", a_codes, a_scales, a_amax), ("right", b_codes, b_scales, b_amax)):
        if str(codes.meta["val"].shape[-1] * 2) != str(padded(length)):
            raise _fail(node, stage, f"{side} operand is not quantised along the contraction axis of {length} elements")
        maker = _maker(codes)
        if maker is not _maker(scales):
            raise _fail(node, stage, f"{side} codes and scales come from different quantisations")
        if maker is not None and maker.target is QUANTIZE and arguments(maker)[1] is not amax:
            raise _fail(node, stage, f"{side} operand was quantised with another amax")
    left, right = _maker(a_codes), _maker(b_codes)
    if left is not None and right is not None:
        _check_rotation(node, stage, _quantize_signs(left), _quantize_signs(right))


def _check_rotation(node: fx.Node, stage: Stage, left: Sequence[int] | None, right: Sequence[int] | None) -> None:
    if left != right:
        raise _fail(node, stage, "its operands are not rotated with the same signs, so the rotation does not cancel")


def _maker(item: fx.Node) -> fx.Node | None:
    """The quantisation that an operand's codes or scales are an item of; None across a graph's boundary."""
    return arguments(item)[0] if item.target is operator.getitem else None


def _quantize_signs(maker: fx.Node) -> list[int] | None:
    """Signs that a quantisation's operand is rotated with, by itself or before it."""
    if maker.target is not QUANTIZE:
        return None
    own = arguments(maker)[4] if len(arguments(maker)) > 4 else None
    return list(own) if own is not None else _rotation_signs(arguments(maker)[0])


def _rotation_signs(operand: fx.Node) -> list[int] | None:
    """Signs of the transform that an operand, or what it is the transpose of, was made by."""
    source = arguments(operand)[0] if operand.target in (aten.permute.default, aten.t.default) else operand
    return list(arguments(source)[1]) if source.target is HADAMARD else None
