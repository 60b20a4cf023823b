"""Products of packed operands by torch's library, as far as a machine without FP4 tensor cores can tell.

What `scaled_mm` is given is checked against its own rules, and multiplied as its documentation says. The kernel is
tested in `kernels/`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="no triton for this system")

from nvfp4c import dialect, numerics
from nvfp4c.codegen import native_product
from nvfp4c.formats import block_count
from nvfp4c.scale_layout import swizzle, swizzled_shape, unswizzle

Packed = tuple[Tensor, Tensor, Tensor]


def operand(*shape: int, seed: int) -> Packed:
    """Codes, scales and amax whose products have exact sums in FP32, in any order: multiples of 2^-6 below 2^18."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    powers = torch.randint(-2, 3, (*shape[:-1], block_count(shape[-1])), generator=generator)
    scales = swizzle(torch.exp2(powers.float()).to(torch.float8_e4m3fn))
    return codes, scales, torch.rand((), generator=generator) + 1


def multiplied(
    a: Tensor,
    b: Tensor,
    scale_a: list[Tensor],
    recipe_a: list[Any],
    scale_b: list[Tensor],
    recipe_b: list[Any],
    swizzle_a: list[Any],
    swizzle_b: list[Any],
    *,
    output_dtype: torch.dtype,
) -> Tensor:
    """What `scaled_mm` computes, and refuses. Source: ATen/native/cuda/ScaledBlas.cpp; cuBLAS, FP4 matrices."""
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
    codes_a, codes_b = a.view(torch.uint8), b.t().view(torch.uint8)
    assert codes_a.is_contiguous() and codes_b.is_contiguous() and codes_a.shape[1] == codes_b.shape[1]
    assert codes_a.shape[1] % 16 == 0 and len(codes_b) % 16 == 0
    assert recipe_a == recipe_b == [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    assert swizzle_a == swizzle_b == [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    values = []
    for codes, (scales, factor) in ((codes_a, scale_a), (codes_b, scale_b)):
        blocks = codes.shape[1] // 8
        high, wide = swizzled_shape(len(codes), blocks)
        assert scales.dtype is torch.float8_e4m3fn and scales.is_contiguous() and scales.numel() == high * wide
        assert factor.dtype is torch.float32 and factor.numel() == 1
        linear = unswizzle(scales.view(high, wide), len(codes), blocks)
        values.append(numerics.block_values(numerics.unpack(codes), linear))
    return (values[0] @ values[1].T * (scale_a[1] * scale_b[1])).to(output_dtype)


@pytest.mark.parametrize("shape", [(5, 7, 16), (130, 40, 80), (64, 144, 256), (3, 20, 30, 48)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_the_library_is_given_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], out_dtype: torch.dtype
) -> None:
    """Of any size, batches too, and gives what the dialect gives, bit for bit where sums are exact."""
    monkeypatch.setattr(F, "scaled_mm", multiplied)
    *batch, rows, columns, k = shape
    operands = *operand(*batch, rows, k, seed=0), *operand(*batch, columns, k, seed=1)
    found = native_product.library_mm(*operands, out_dtype)
    expected = dialect.BLOCK_SCALED_MM(*operands, None, None, out_dtype)
    assert found.is_contiguous() and found.dtype is out_dtype and torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 5, 16), (5, 0, 16), (5, 4, 0)], ids=str)
def test_the_library_is_not_asked_for_nothing(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    monkeypatch.setattr(F, "scaled_mm", None)
    rows, columns, k = shape
    operands = *operand(rows, k, seed=0), *operand(columns, k, seed=1)
    found = native_product.library_mm(*operands, torch.bfloat16)
    assert torch.equal(found, dialect.BLOCK_SCALED_MM(*operands, None, None, torch.bfloat16))


@pytest.mark.parametrize("product", [native_product.by_triton, native_product.by_library])
@pytest.mark.parametrize("shape", [None, (40,), (), (1,), (70, 1), (70, 40)], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
def test_any_bias_and_residual_are_added_before_the_one_rounding(
    monkeypatch: pytest.MonkeyPatch, product: Any, shape: tuple[int, ...] | None, added: bool
) -> None:
    """The operations are the reference here: what is looked at is what is left to Inductor."""
    given = []

    def reference(*args: Any) -> Tensor:
        *operands, dtype = args
        terms = tuple(operands[6:]) or (None, None)
        given.append((*(term is not None for term in terms), dtype))
        return dialect.BLOCK_SCALED_MM(*operands[:6], *terms, dtype)

    monkeypatch.setattr(native_product, "BLOCK_SCALED_MM", reference)
    monkeypatch.setattr(native_product, "LIBRARY_MM", reference)
    operands = *operand(70, 48, seed=0), *operand(40, 48, seed=1)
    generator = torch.Generator().manual_seed(2)
    bias = None if shape is None else 100 * torch.randn(shape, generator=generator)
    terms = bias, 100 * torch.randn((70, 40), generator=generator).bfloat16() if added else None
    found = product(*operands, *terms, torch.bfloat16)
    assert torch.equal(found, dialect.BLOCK_SCALED_MM(*operands, *terms, torch.bfloat16))
    there = tuple(term is not None for term in terms)
    inside = product is native_product.by_triton and shape in (None, (40,))
    assert given == [(*there, torch.bfloat16) if inside or not any(there) else (False, False, torch.float32)]
