"""The `nvfp4::` operations, and what passes write on graph nodes: the contract between passes and code generation.

Every operation is functional, and *is* its reference function in `nvfp4c.numerics`; so a graph at any stage can be
interpreted on any device. Tensors are [M, K] or [B, M, K], quantised along their last axis, which is always the
contraction axis of the product they feed. Codes and scales of `quantize` lie in memory as their source does, transposed
where it is a transpose, so that a kernel never moves an element across both axes; all other results are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Target

from nvfp4c import numerics, philox
from nvfp4c.formats import block_count, padded
from nvfp4c.region import Layout, Region, empty_outputs, evaluate, reduction
from nvfp4c.scale_layout import swizzle, swizzled_shape, unswizzle

LIBRARY = torch.library.Library("nvfp4", "DEF")


class Stage(Enum):
    """How far a graph has come; each pass takes one step."""

    AOT = 0
    CLASSIFIED = 1
    ASSIGNED = 2
    ROTATED = 3
    SCALED = 4
    FUSED = 5
    LOWERED = 6


class Role(str, Enum):
    """What a matmul computes for its layer: y = x W^T, dx = dy W, or dW = dy^T x."""

    FPROP = "fprop"
    DGRAD = "dgrad"
    WGRAD = "wgrad"


class Operand(str, Enum):
    """What an operand of a matmul is to its layer."""

    INPUT = "x"
    WEIGHT = "w"
    GRADIENT = "dy"


@dataclass(frozen=True)
class Matmul:
    """Written by `classify` on each matmul node under `MATMUL`.

    operands: what the left and the right argument are. obstacle: why it can only stay as it is, or None.
    """

    site: str
    role: Role
    operands: tuple[Operand, Operand]
    obstacle: str | None = None


@dataclass(frozen=True)
class Quantization:
    """How one operand is quantised. signs: rotate with these signs first, or None."""

    block: tuple[int, int]
    rounding: str
    signs: tuple[int, ...] | None


@dataclass(frozen=True)
class Assignment:
    """Written by `assign` on each classified node under `ASSIGNMENT`.

    left, right: how each operand is quantised, None to leave it as it is; both None is bf16. reason: for bf16, why.
    """

    left: Quantization | None
    right: Quantization | None
    reason: str

    @property
    def precision(self) -> str:
        return "bf16" if self.left is None and self.right is None else "nvfp4"


MATMUL = "nvfp4_matmul"
ASSIGNMENT = "nvfp4_assignment"


def hadamard(x: Tensor, signs: Sequence[int]) -> Tensor:
    return numerics.rotate(x, signs)


def amax(x: Tensor, signs: Sequence[int] | None = None) -> Tensor:
    return numerics.tensor_amax(x if signs is None else numerics.rotate(x, signs))


def oriented_like(x: Tensor, values: Tensor) -> Tensor:
    """`values` with their last axis contiguous where x's is, else the axis before it: a transposed view stays one."""
    return values.contiguous() if x.stride(-1) == 1 else values.mT.contiguous().mT


def quantize_values(
    x: Tensor,
    amax: Tensor,
    block: Sequence[int],
    rounding: str,
    signs: Sequence[int] | None = None,
    seed: Tensor | None = None,
    stream: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Codes not yet packed, uint8 [.., M, ceil16(K)], and scales. seed, stream: of stochastic rounding."""
    if signs is not None:
        x = numerics.rotate(x, signs)
    return numerics.block_codes(x, amax, (block[0], block[1]), random_bits(x, rounding, seed, stream))


def random_bits(x: Tensor, rounding: str, seed: Tensor | None, stream: int | Tensor) -> Tensor | None:
    """What an operand [.., M, K] is rounded with, uint8 [.., M, ceil16(K)]; None for rounding to nearest."""
    if rounding != "stochastic":
        return None
    assert seed is not None, "stochastic rounding needs a seed"
    return philox.random_bytes_like(x, seed, stream)


def quantize(
    x: Tensor,
    amax: Tensor,
    block: Sequence[int],
    rounding: str,
    signs: Sequence[int] | None = None,
    seed: Tensor | None = None,
    stream: int | Tensor = 0,
    layout: str = Layout.LINEAR.value,
) -> tuple[Tensor, Tensor]:
    """layout: "linear", which lies in memory as x does, or "native": see `region.Layout`."""
    codes, scales = quantize_values(x, amax, block, rounding, signs, seed, stream)
    if Layout(layout) is Layout.NATIVE:
        return numerics.pack(codes).contiguous(), swizzle(scales)
    return oriented_like(x, numerics.pack(codes)), oriented_like(x, scales)


def transpose(codes: Tensor, scales: Tensor, k: int) -> tuple[Tensor, Tensor]:
    turned_codes, turned_scales = numerics.tile_transpose(codes, scales, k)
    return turned_codes.contiguous(), turned_scales.contiguous()


def dequantize(codes: Tensor, scales: Tensor, amax: Tensor | None, k: int, dtype: torch.dtype) -> Tensor:
    values = numerics.block_values(numerics.unpack(codes), scales)
    if amax is not None:
        values = values * (amax / numerics.GLOBAL_MAX)
    return oriented_like(codes, values.narrow(-1, 0, k).to(dtype))


def scaled_mm(
    a_codes: Tensor,
    a_scales: Tensor,
    a_amax: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_amax: Tensor,
    k: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """k: length of the contraction axis; beyond it there are only zeros (of rotated operands all blocks are whole)."""
    a, b = operand_values(a_codes, a_scales), operand_values(b_codes, b_scales)
    return scale_product(torch.matmul(a, b.mT), a_amax, b_amax, bias, None, out_dtype)


def operand_values(codes: Tensor, scales: Tensor) -> Tensor:
    """code * scale of packed codes, in whole blocks."""
    return numerics.block_values(numerics.unpack(codes), scales)


def block_scaled_mm(
    a_codes: Tensor,
    a_scales: Tensor,
    a_amax: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """scaled_mm of operands in the native layout, over whole blocks: beyond the contraction axis there are only zeros.

    a_codes: uint8 [.., M, K / 2], a_scales: [.., *swizzled_shape(M, K / 16)]; b the same with N rows. residual:
    [.., M, N], added last.
    """
    k = 2 * a_codes.shape[-1]
    a_scales = unswizzle(a_scales, a_codes.shape[-2], block_count(k))
    b_scales = unswizzle(b_scales, b_codes.shape[-2], block_count(k))
    a, b = operand_values(a_codes, a_scales), operand_values(b_codes, b_scales)
    return scale_product(torch.matmul(a, b.mT), a_amax, b_amax, bias, residual, out_dtype)


def scale_product(
    product: Tensor,
    a_amax: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue of every scaled matmul: the global factor, then the bias, then the residual, in FP32, then one
    rounding.

    residual: what is added to the result, of its shape, in any float type and anywhere in memory.
    """
    return add_terms(product.float() * numerics.global_factor(a_amax, b_amax), bias, residual, out_dtype)


def add_terms(product: Tensor, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """What follows the factor in `scale_product`; product: float32."""
    for term in (bias, residual):
        if term is not None:
            product = product + term.float()
    return product.to(out_dtype)


def region_outputs(
    inputs: Sequence[Tensor], amaxes: Sequence[Tensor], seed: Tensor | None, region: str
) -> list[Tensor]:
    return evaluate(Region.from_json(region), inputs, amaxes, seed)


def weight(w: Tensor, dtype: torch.dtype, region: str, sure: bool) -> list[Tensor]:
    """The amax of a parameter, then every tensor of a region of it; its outputs differ in form only.

    dtype: rounded to it first. sure: whether what was made for the same version may be used although no update of the
    parameter was seen yet, as in a backward. How often the work is really done is left to the target.
    """
    matrix, found = [w.to(dtype)], Region.from_json(region)
    (amax,) = evaluate(reduction(found), matrix, [], None)
    return [amax, *evaluate(found, matrix, [amax], None)]


def product(
    a: Tensor,
    b: Tensor,
    a_amax: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """scaled_mm of operands already dequantised, without their global factors; residual: [.., M, N], added last."""
    return scale_product(torch.matmul(a.float(), b.float().mT), a_amax, b_amax, bias, residual, out_dtype)


def _packed_like(x: Tensor, rows: int, k: int) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-2]
    codes = x.new_empty((*lead, rows, padded(k) // 2), dtype=torch.uint8)
    return codes, x.new_empty((*lead, rows, block_count(k)), dtype=torch.float8_e4m3fn)


def _empty_like(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[.., M, k] for an x [.., M, K], which lies in memory as `oriented_like` x."""
    *lead, rows, _ = x.shape
    if x.stride(-1) == 1:
        return x.new_empty((*lead, rows, k), dtype=dtype)
    return x.new_empty((*lead, k, rows), dtype=dtype).mT


def _fake_hadamard(x: Tensor, signs: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], padded(x.shape[-1])), dtype=torch.bfloat16)


def _fake_amax(x: Tensor, signs: Sequence[int] | None = None) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _fake_quantize(
    x: Tensor,
    amax: Tensor,
    block: Sequence[int],
    rounding: str,
    signs: Sequence[int] | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
    layout: str = Layout.LINEAR.value,
) -> tuple[Tensor, Tensor]:
    if Layout(layout) is Layout.NATIVE:
        codes, scales = _packed_like(x, x.shape[-2], x.shape[-1])
        return codes, scales.new_empty((*x.shape[:-2], *swizzled_shape(*scales.shape[-2:])))
    k = x.shape[-1]
    return _empty_like(x, padded(k) // 2, torch.uint8), _empty_like(x, block_count(k), torch.float8_e4m3fn)


def _fake_transpose(codes: Tensor, scales: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _packed_like(codes, k, codes.shape[-2])


def _fake_dequantize(codes: Tensor, scales: Tensor, amax: Tensor | None, k: int, dtype: torch.dtype) -> Tensor:
    return _empty_like(codes, k, dtype)


def _fake_region(inputs: Sequence[Tensor], amaxes: Sequence[Tensor], seed: Tensor | None, region: str) -> list[Tensor]:
    return empty_outputs(Region.from_json(region), inputs)


def _fake_weight(w: Tensor, dtype: torch.dtype, region: str, sure: bool) -> list[Tensor]:
    found = Region.from_json(region)
    return [part for each in (reduction(found), found) for part in empty_outputs(each, [w])]


def _fake_product(
    a: Tensor,
    b: Tensor,
    a_amax: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype)


def _fake_block_scaled_mm(
    a_codes: Tensor,
    a_scales: Tensor,
    a_amax: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a_codes.new_empty((*a_codes.shape[:-1], b_codes.shape[-2]), dtype=out_dtype)


def _fake_scaled_mm(
    a_codes: Tensor,
    a_scales: Tensor,
    a_amax: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_amax: Tensor,
    k: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a_codes.new_empty((*a_codes.shape[:-1], b_codes.shape[-2]), dtype=out_dtype)


_QUANTIZE_ARGUMENTS = (
    "Tensor x, Tensor amax, int[] block, str rounding, int[]? signs=None, Tensor? seed=None, int stream=0, "
    "str layout='linear'"
)
_OPERATIONS = (
    ("hadamard(Tensor x, int[] signs) -> Tensor", hadamard, _fake_hadamard),
    ("amax(Tensor x, int[]? signs=None) -> Tensor", amax, _fake_amax),
    (f"quantize({_QUANTIZE_ARGUMENTS}) -> (Tensor, Tensor)", quantize, _fake_quantize),
    ("transpose(Tensor codes, Tensor scales, SymInt k) -> (Tensor, Tensor)", transpose, _fake_transpose),
    (
        "dequantize(Tensor codes, Tensor scales, Tensor? amax, SymInt k, ScalarType dtype) -> Tensor",
        dequantize,
        _fake_dequantize,
    ),
    (
        "scaled_mm(Tensor a_codes, Tensor a_scales, Tensor a_amax, Tensor b_codes, Tensor b_scales, Tensor b_amax, "
        "SymInt k, Tensor? bias, ScalarType out_dtype) -> Tensor",
        scaled_mm,
        _fake_scaled_mm,
    ),
    ("region(Tensor[] inputs, Tensor[] amaxes, Tensor? seed, str region) -> Tensor[]", region_outputs, _fake_region),
    ("weight(Tensor w, ScalarType dtype, str region, bool sure) -> Tensor[]", weight, _fake_weight),
    (
        "product(Tensor a, Tensor b, Tensor a_amax, Tensor b_amax, Tensor? bias, Tensor? residual, "
        "ScalarType out_dtype) -> Tensor",
        product,
        _fake_product,
    ),
    (
        "block_scaled_mm(Tensor a_codes, Tensor a_scales, Tensor a_amax, Tensor b_codes, Tensor b_scales, "
        "Tensor b_amax, Tensor? bias, Tensor? residual, ScalarType out_dtype) -> Tensor",
        block_scaled_mm,
        _fake_block_scaled_mm,
    ),
)


def _contiguous(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference with a contiguous result, as its fake promises: a transposed operand would give another."""
    return lambda *args, **kwargs: reference(*args, **kwargs).contiguous()


ORIENTED = (quantize, dequantize, transpose, region_outputs, weight)
"""Those that lay out their results themselves."""

for _schema, _reference, _fake in _OPERATIONS:
    _name = _schema.split("(", 1)[0]
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    _implementation = _reference if _reference in ORIENTED else _contiguous(_reference)
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4::{_name}", _fake, lib=LIBRARY)

HADAMARD = torch.ops.nvfp4.hadamard.default
AMAX = torch.ops.nvfp4.amax.default
QUANTIZE = torch.ops.nvfp4.quantize.default
TRANSPOSE = torch.ops.nvfp4.transpose.default
DEQUANTIZE = torch.ops.nvfp4.dequantize.default
SCALED_MM = torch.ops.nvfp4.scaled_mm.default
REGION = torch.ops.nvfp4.region.default
WEIGHT = torch.ops.nvfp4.weight.default
PRODUCT = torch.ops.nvfp4.product.default
BLOCK_SCALED_MM = torch.ops.nvfp4.block_scaled_mm.default

FAKES: dict[Target, Callable[..., Any]] = {
    getattr(torch.ops.nvfp4, schema.split("(", 1)[0]).default: fake for schema, _, fake in _OPERATIONS
}
"""What gives an operation's results without computing them, under a fake mode: calling it takes far longer."""

RESIDUAL = -2
"""The place of the residual among the arguments of PRODUCT and of BLOCK_SCALED_MM."""

OPERATIONS: frozenset[Target] = frozenset(
    {HADAMARD, AMAX, QUANTIZE, TRANSPOSE, DEQUANTIZE, SCALED_MM, REGION, WEIGHT, PRODUCT, BLOCK_SCALED_MM}
)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments. What each of them is follows from the operation, which FX's own type cannot say."""
    return node.args


def is_dialect(node: fx.Node) -> bool:
    """Whether a node is one of the `nvfp4::` operations."""
    return node.op == "call_function" and node.target in OPERATIONS


def matmul_of(node: fx.Node) -> Matmul | None:
    """What `classify` found out about a node."""
    found = node.meta.get(MATMUL)
    return found if isinstance(found, Matmul) else None


def assignment_of(node: fx.Node) -> Assignment | None:
    """What `assign` decided for a node."""
    found = node.meta.get(ASSIGNMENT)
    return found if isinstance(found, Assignment) else None


def numbers(sizes: Sequence[int | torch.SymInt]) -> tuple[int, ...]:
    """Sizes, symbolic ones at their example values."""
    return tuple(int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in sizes)


@dataclass(frozen=True)
class KernelTable:
    """What `lower` puts in place of the operations on one target.

    Each entry is an operation of the target's own, or a function of tensors that `make_fx` can trace. Arguments and
    results are those of the dialect operation of the same name.

    A target has either `region`, one kernel for all that is computed from a matrix, or the four before it. `operand` is
    quantize followed by dequantize, for an operand whose packed form nobody needs; None where there is none. `weight`
    is a region of a parameter, not computed again while the parameter stays as it is; None where nothing is kept.
    `dequantize` and `operand` return code * scale in `operand_dtype` (exact in BF16), without the global factor.
    block_scaled_mm: for a target that multiplies packed operands itself; then `rewrite` keeps them packed.
    names: what `explain` calls a matmul both of whose operands are quantised, and one of which one is.
    compile_kernels: told every fused graph before it is lowered, so that its kernels can be compiled ahead.
    """

    target: str
    operand_dtype: torch.dtype
    dequantize: Callable[[Tensor, Tensor, int], Tensor]
    product: Callable[..., Tensor]
    names: Mapping[str, str]
    hadamard: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    amax: Callable[..., Tensor] | None = None
    quantize: Callable[..., tuple[Tensor, Tensor]] | None = None
    operand: Callable[..., Tensor] | None = None
    region: OpOverload | None = None
    weight: OpOverload | None = None
    block_scaled_mm: Callable[..., Tensor] | None = None
    compile_kernels: Callable[[fx.Graph], fx.Graph] | None = None

    @property
    def native(self) -> bool:
        """Whether products read packed operands."""
        return self.block_scaled_mm is not None
