"""The block-scaled GEMM and its scale layout against numerics: emulated anywhere, and native on a GPU that has FP4."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import needs_loops
from torch import Tensor

from nvfp4c import dialect, numerics, scale_layout
from nvfp4c.codegen import block_scaled_gemm, kernels
from nvfp4c.codegen.block_scaled_gemm import EMULATED_TILE, TILES, block_scaled_mm
from nvfp4c.dtypes import QUANTIZABLE_DTYPES
from nvfp4c.formats import block_count

INTERPRETED = bool(block_scaled_gemm.INTERPRETED)
swizzled_place = kernels.swizzled_place


pytestmark = needs_loops


def native_tile() -> block_scaled_gemm.GemmTile | None:
    """Of the GPU here, if it has FP4 tensor cores that there is a tile for."""
    if INTERPRETED or not torch.cuda.is_available():
        return None
    return TILES.get("sm_{}{}".format(*torch.cuda.get_device_capability()))


NATIVE = native_tile()
WAYS = [pytest.param(EMULATED_TILE, True, id="emulated")]
if NATIVE is not None:
    WAYS += [pytest.param(NATIVE, False, id="native")]

SHAPES = [(1, 1, 16), (5, 7, 80), (130, 40, 128), (100, 270, 144), (300, 140, 48), (128, 128, 256)]
"""Rows, columns and k: below a tile, whole tiles, several and ragged tiles, rows of codes that TMA cannot read."""
if not INTERPRETED:
    SHAPES += [(1000, 3000, 256), (4096, 512, 192)]


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (32, 3), (129, 5), (300, 11), (2, 140, 9), (2, 3, 5, 1)])
def test_swizzling_can_be_undone(device: torch.device, shape: tuple[int, ...]) -> None:
    scales = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    swizzled = scale_layout.swizzle(scales)
    assert swizzled.shape == (*shape[:-2], -(-shape[-2] // 128) * 128, -(-shape[-1] // 4) * 4)
    assert swizzled.is_contiguous()
    assert torch.equal(scale_layout.unswizzle(swizzled, *shape[-2:]), scales)
    # What was added is 0, and nothing is there twice.
    assert swizzled.sum(dtype=torch.int64) == scales.sum(dtype=torch.int64)
    typed = scales.view(torch.float8_e4m3fn)
    assert torch.equal(scale_layout.swizzle(typed).view(torch.uint8), swizzled)


def test_the_layout_is_the_documented_one(device: torch.device) -> None:
    scales = torch.randint(0, 256, (384, 12), dtype=torch.uint8, device=device)
    documented = scales.view(384 // 128, 4, 32, 192 // 64, 4).permute(0, 3, 2, 1, 4)
    assert torch.equal(scale_layout.swizzle(scales).flatten(), documented.flatten())


@triton.jit
def place_kernel(out, batches, rows, blocks, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    row = index // blocks
    place = swizzled_place(row // rows, row % rows, index % blocks, rows, blocks)
    tl.store(out + index, place, mask=index < batches * rows * blocks)


@pytest.mark.parametrize("shape", [(1, 3, 1), (1, 130, 6), (1, 200, 8), (3, 130, 5)])
def test_kernels_find_each_scale_where_it_is(device: torch.device, shape: tuple[int, int, int]) -> None:
    scales = torch.randint(1, 256, shape, dtype=torch.uint8, device=device)
    places = torch.empty(shape, dtype=torch.int32, device=device)
    place_kernel[(1,)](places, *shape, SIZE=2048)
    assert torch.equal(scale_layout.swizzle(scales).flatten()[places.long()], scales)


def test_bfloat16_holds_every_code_times_every_scale() -> None:
    """So the emulated product multiplies what the FP4 tensor cores do."""
    codes = torch.arange(16, dtype=torch.uint8)
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = numerics.decode_e2m1(codes)[:, None] * scales.float()
    assert torch.equal(values.bfloat16().float(), values)


def exact_operand(shape: tuple[int, ...], k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and amax whose products have exact sums in FP32, in any order.

    Values are multiples of 2^-3 and at most 24, so products are multiples of 2^-6 and at most 576, and 256 of them sum
    to less than 2^18: 24 bits hold them all.
    """
    assert k <= 256
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*shape, k // 2), dtype=torch.uint8, generator=generator)
    powers = torch.randint(-2, 3, (*shape, block_count(k)), generator=generator)
    return codes, torch.exp2(powers.float()).to(torch.float8_e4m3fn), torch.rand((), generator=generator) + 1


def multiplied(
    a: tuple[Tensor, Tensor, Tensor],
    b: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    way: tuple[block_scaled_gemm.GemmTile, bool],
    device: torch.device,
) -> Tensor:
    """What the kernel makes of codes, scales and amax, on the CPU."""
    a, b = ((codes, scale_layout.swizzle(scales), amax) for codes, scales, amax in (a, b))
    arguments = [None if x is None else x.to(device) for x in (*a, *b, bias, residual)]
    return block_scaled_mm(*arguments, dtype, *way).cpu()


def agree(
    shape: tuple[int, ...],
    k: int,
    columns: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    *where: object,
) -> None:
    """The kernel's result is the reference's, bit for bit, for operands with exact sums."""
    a, b = exact_operand(shape, k, 0), exact_operand((*shape[:-1], columns), k, 1)
    bias = None if bias_dtype is None else (100 * torch.randn(columns)).to(bias_dtype)
    residual = None if residual_dtype is None else (100 * torch.randn(*shape, columns)).to(residual_dtype)
    values = dialect.operand_values(*a[:2]) @ dialect.operand_values(*b[:2]).mT
    expected = dialect.scale_product(values, a[2], b[2], bias, residual, dtype)
    found = multiplied(a, b, bias, residual, dtype, *where)  # type: ignore[arg-type]
    assert found.shape == expected.shape and found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tile, emulated", WAYS)
@pytest.mark.parametrize("dtype", QUANTIZABLE_DTYPES)
@pytest.mark.parametrize("rows, columns, k", SHAPES)
def test_exact_sums_agree_bit_for_bit(
    device: torch.device,
    rows: int,
    columns: int,
    k: int,
    dtype: torch.dtype,
    tile: block_scaled_gemm.GemmTile,
    emulated: bool,
) -> None:
    agree((rows,), k, columns, dtype, None, None, (tile, emulated), device)


@pytest.mark.parametrize("tile, emulated", WAYS)
@pytest.mark.parametrize("bias_dtype", QUANTIZABLE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_added_before_the_one_rounding(
    device: torch.device,
    dtype: torch.dtype,
    bias_dtype: torch.dtype,
    tile: block_scaled_gemm.GemmTile,
    emulated: bool,
) -> None:
    agree((50,), 112, 201, dtype, bias_dtype, None, (tile, emulated), device)


@pytest.mark.parametrize("tile, emulated", WAYS)
@pytest.mark.parametrize("residual_dtype", QUANTIZABLE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shape, columns", [((50,), 201), ((150,), 264), ((2, 130), 136)])
def test_a_residual_is_added_before_the_one_rounding(
    device: torch.device,
    shape: tuple[int, ...],
    columns: int,
    bias_dtype: torch.dtype | None,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    tile: block_scaled_gemm.GemmTile,
    emulated: bool,
) -> None:
    """Rows that TMA cannot read as they lie, several tiles, and batches; after the bias."""
    agree(shape, 112, columns, dtype, bias_dtype, residual_dtype, (tile, emulated), device)


@pytest.mark.parametrize("tile, emulated", WAYS)
@pytest.mark.parametrize("rows, columns", [(1, 1), (130, 33), (40, 260)])
def test_batches_do_not_mix(
    device: torch.device, rows: int, columns: int, tile: block_scaled_gemm.GemmTile, emulated: bool
) -> None:
    agree((3, rows), 80, columns, torch.bfloat16, torch.float32, torch.bfloat16, (tile, emulated), device)


@pytest.mark.parametrize("tile, emulated", WAYS)
@settings(max_examples=10)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    blocks=st.integers(1, 16),
    dtype=st.sampled_from(QUANTIZABLE_DTYPES),
    bias=st.none() | st.sampled_from(QUANTIZABLE_DTYPES),
    residual=st.none() | st.sampled_from(QUANTIZABLE_DTYPES),
)
def test_any_size_agrees(
    device: torch.device,
    rows: int,
    columns: int,
    blocks: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    residual: torch.dtype | None,
    tile: block_scaled_gemm.GemmTile,
    emulated: bool,
) -> None:
    agree((rows,), 16 * blocks, columns, dtype, bias, residual, (tile, emulated), device)


@pytest.mark.parametrize("tile, emulated", WAYS)
def test_random_operands_agree_up_to_the_order_of_sums(
    device: torch.device, tile: block_scaled_gemm.GemmTile, emulated: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    k = 500
    a, b = (numerics.quantize(torch.randn(rows, k, generator=generator)) for rows in (70, 90))
    found = multiplied(
        (a.codes, a.scales, a.amax), (b.codes, b.scales, b.amax), None, None, torch.float32, (tile, emulated), device
    )
    expected = numerics.scaled_mm(a, b, None, torch.float32)
    # k sums in FP32, in any order, and two roundings of the epilogue err by at most (k + 2) * 2^-24 of the sum of the
    # magnitudes; two results differ by twice that at most, and by twice again where tensor cores truncate their sums.
    magnitudes = a.dequantize().abs().double() @ b.dequantize().abs().double().T
    assert ((found - expected).abs() <= 4 * (k + 2) * 2.0**-24 * magnitudes).all()


@pytest.mark.parametrize("tile, emulated", WAYS)
def test_nan_stays_in_its_row(device: torch.device, tile: block_scaled_gemm.GemmTile, emulated: bool) -> None:
    """Every scale of a non-finite tensor is NaN; one NaN scale must reach its row, and no other."""
    a, b = exact_operand((20,), 64, 0), exact_operand((30,), 64, 1)
    a[1].view(torch.uint8)[7, 2] = 0x7F
    found = multiplied(a, b, None, None, torch.bfloat16, (tile, emulated), device)
    assert found[7].isnan().all() and not torch.cat([found[:7], found[8:]]).isnan().any()


@pytest.mark.parametrize("rows, columns, k", [(0, 5, 16), (5, 0, 16), (5, 4, 0)])
def test_empty_operands(device: torch.device, rows: int, columns: int, k: int) -> None:
    agree((rows,), k, columns, torch.bfloat16, torch.bfloat16, torch.bfloat16, (EMULATED_TILE, True), device)


def test_operands_may_lie_anywhere_in_memory(device: torch.device) -> None:
    """TMA needs aligned addresses and one step between rows."""
    codes, scales, amax = exact_operand((40,), 64, 0)
    swizzled = scale_layout.swizzle(scales)
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=device)[1:].view(codes.shape)
    shifted.copy_(codes)
    moved = torch.empty(swizzled.numel() + 1, dtype=torch.uint8, device=device)[1:].view(swizzled.shape)
    moved.copy_(swizzled.view(torch.uint8))
    spread = torch.empty(40, 100, dtype=torch.uint8, device=device)[:, 3:35]
    spread.copy_(codes)
    factor = amax.to(device)
    residual = torch.randn(44, 44)
    places = [residual[4:, 4:], residual[3:43, 3:43], residual.T[4:, 4:], residual[:1, :40].expand(40, 40)]
    for added in (None, *places):
        found = block_scaled_mm(
            shifted,
            moved.view(torch.float8_e4m3fn),
            factor,
            spread,
            swizzled.to(device),
            factor,
            None,
            None if added is None else on(device, residual, added),
            torch.float32,
            EMULATED_TILE,
            True,
        )
        product = dialect.scaled_mm(codes, scales, amax, codes, scales, amax, 64, None, torch.float32)
        assert torch.equal(found.cpu(), product if added is None else product + added)


def on(device: torch.device, base: Tensor, view: Tensor) -> Tensor:
    """The same view of a copy of its base elsewhere."""
    return base.to(device).as_strided(view.shape, view.stride(), view.storage_offset())
