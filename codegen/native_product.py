"""Products of packed operands on the FP4 tensor cores, as operations: `nvfp4_triton::block_scaled_mm` by the kernel of
`block_scaled_gemm`, `nvfp4_triton::library_mm` by torch's `scaled_mm`, which is cuBLAS.

Both give what the dialect's `block_scaled_mm` gives, up to the order of sums. On a GPU without FP4 tensor cores, and in
Triton's interpreter, the kernel runs with its one FP4 instruction emulated: no target asks for that, tests do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from nvfp4c import dialect
from nvfp4c.codegen import block_scaled_gemm, chips
from nvfp4c.codegen.block_scaled_gemm import EMULATED_TILE, TILES, GemmTile
from nvfp4c.codegen.launching import INTERPRETED
from nvfp4c.codegen.operations import DISPATCH_KEYS, LIBRARY
from nvfp4c.dialect import add_terms
from nvfp4c.numerics import global_factor

LIBRARY_BYTES = 16
"""cuBLAS takes rows of codes of a multiple of so many bytes,"""

LIBRARY_ROWS = 16
"""and right operands of a multiple of so many rows."""


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
    """dialect.block_scaled_mm by the kernel. bias: [N] without gaps, or None. residual: [.., M, N], or None."""
    tile, emulated = _tile(a_codes.device)
    operands = a_codes, a_scales, a_amax, b_codes, b_scales, b_amax
    return block_scaled_gemm.block_scaled_mm(*operands, bias, residual, out_dtype, tile, emulated)


def _tile(device: torch.device) -> tuple[GemmTile, bool]:
    """The tile for a device, and whether its FP4 instruction is emulated."""
    target = None if INTERPRETED else chips.newest(torch.cuda.get_device_capability(device))
    return (TILES[target.name], False) if target is not None and target.native_fp4 else (EMULATED_TILE, True)


def library_mm(
    a_codes: Tensor,
    a_scales: Tensor,
    a_amax: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_amax: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """dialect.block_scaled_mm without terms to add, by `torch.nn.functional.scaled_mm`, one matrix of a batch after
    another.

    What cuBLAS does not take is padded with zeros; scales are padded already. Its factor is the product of two, which
    the library is given as ours and 1. It has no product without terms.
    """
    rows, columns = a_codes.shape[-2], b_codes.shape[-2]
    if a_codes.numel() == 0 or b_codes.numel() == 0:
        nothing = a_codes.new_zeros((*a_codes.shape[:-1], columns), dtype=torch.float32)
        return dialect.scale_product(nothing, a_amax, b_amax, None, None, out_dtype)
    factors = global_factor(a_amax, b_amax), torch.ones_like(b_amax)
    short = -a_codes.shape[-1] % LIBRARY_BYTES
    a = F.pad(a_codes, (0, short)).reshape(-1, rows, a_codes.shape[-1] + short)
    b = F.pad(b_codes, (0, short, 0, -columns % LIBRARY_ROWS))
    b = b.reshape(-1, *b.shape[-2:])
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    swizzle = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    found = [
        F.scaled_mm(
            left.view(torch.float4_e2m1fn_x2),
            right.view(torch.float4_e2m1fn_x2).t(),
            [left_scales.flatten(), factors[0]],
            recipe,
            [right_scales.flatten(), factors[1]],
            recipe,
            swizzle,
            swizzle,
            output_dtype=out_dtype,
        )
        for left, right, left_scales, right_scales in zip(
            a, b, a_scales.reshape(len(a), -1), b_scales.reshape(len(b), -1), strict=True
        )
    ]
    return torch.stack(found)[..., :columns].reshape(*a_codes.shape[:-1], columns).contiguous()


def _fake(a_codes: Tensor, a_scales: Tensor, a_amax: Tensor, b_codes: Tensor, *others: Any) -> Tensor:
    return a_codes.new_empty((*a_codes.shape[:-1], b_codes.shape[-2]), dtype=others[-1])


_OPERANDS = "Tensor a_codes, Tensor a_scales, Tensor a_amax, Tensor b_codes, Tensor b_scales, Tensor b_amax"
_OPERATIONS: tuple[tuple[str, str, Callable[..., Tensor]], ...] = (
    ("block_scaled_mm", f"{_OPERANDS}, Tensor? bias, Tensor? residual, ScalarType out_dtype", block_scaled_mm),
    ("library_mm", f"{_OPERANDS}, ScalarType out_dtype", library_mm),
)
for _name, _arguments, _implementation in _OPERATIONS:
    LIBRARY.define(f"{_name}({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    for _key in DISPATCH_KEYS:
        LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"nvfp4_triton::{_name}", _fake, lib=LIBRARY)

BLOCK_SCALED_MM = torch.ops.nvfp4_triton.block_scaled_mm.default
LIBRARY_MM = torch.ops.nvfp4_triton.library_mm.default


def by_triton(
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
    """dialect.block_scaled_mm by the kernel. A bias that is no vector of N is left to Inductor, and what follows it."""
    operands = a_codes, a_scales, a_amax, b_codes, b_scales, b_amax
    vector = bias is not None and bias.dim() == 1 and statically_known_true(bias.shape[0] == b_codes.shape[-2])
    if bias is None or vector:
        return BLOCK_SCALED_MM(*operands, None if bias is None else bias.contiguous(), residual, out_dtype)
    return add_terms(BLOCK_SCALED_MM(*operands, None, None, torch.float32), bias, residual, out_dtype)


def by_library(
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
    """dialect.block_scaled_mm by the library, which is not known to add anything before it rounds: Inductor does."""
    operands = a_codes, a_scales, a_amax, b_codes, b_scales, b_amax
    if bias is None and residual is None:
        return LIBRARY_MM(*operands, out_dtype)
    return add_terms(LIBRARY_MM(*operands, torch.float32), bias, residual, out_dtype)
