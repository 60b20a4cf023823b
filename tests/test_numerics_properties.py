"""What holds for every tensor: properties of `nvfp4c.numerics`, checked with hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nvfp4c import numerics
from nvfp4c.formats import DEFAULT_SIGNS, E2M1_MAGNITUDES, padded, signs_from_seed
from nvfp4c.numerics import NVFP4Tensor, quantize

BLOCKS = st.sampled_from([(1, 16), (16, 16)])
SIGNS = st.sampled_from([None, DEFAULT_SIGNS, signs_from_seed(1)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def raw(scales: Tensor) -> Tensor:
    """The bytes of E4M3 scales; NaN compares equal as a byte."""
    return scales.view(torch.uint8)


def codes_of(tensor: NVFP4Tensor) -> Tensor:
    return numerics.unpack(tensor.codes)


def values_of(kind: str, rows: int, k: int, generator: torch.Generator) -> Tensor:
    """float32 [rows, k] with magnitudes between 2**-12 and 2**12, and zeros."""
    normal = torch.randn(rows, k, generator=generator)
    if kind == "heavy-tailed":
        normal = normal * torch.randn(rows, k, generator=generator).mul(2).exp()
    if kind == "outliers":
        normal = torch.where(torch.rand(rows, k, generator=generator) < 0.02, normal * 500, normal)
    if kind == "integers":  # many equal ratios, many ties
        normal = (normal * 3).round()
    if kind == "sparse":
        normal = torch.where(torch.rand(rows, k, generator=generator) < 0.8, 0.0, normal)
    normal = torch.where(normal.abs() < 2**-12, 0.0, normal)
    return normal.clamp(-(2.0**12), 2.0**12)


@st.composite
def matrices(draw: st.DrawFn, min_size: int = 1, aligned: bool = False) -> Tensor:
    rows, k = draw(st.integers(min_size, 40)), draw(st.integers(min_size, 70))
    if aligned:
        k = padded(k)
    kind = draw(st.sampled_from(["normal", "heavy-tailed", "outliers", "integers", "sparse"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return values_of(kind, rows, k, generator).to(draw(DTYPES))


def random_bits(x: Tensor, seed: int) -> Tensor:
    shape = (x.shape[0], padded(x.shape[1]))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_same(found: NVFP4Tensor, expected: NVFP4Tensor) -> None:
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(raw(found.scales), raw(expected.scales))


# ---- tiles


@given(matrices(min_size=0))
def test_tiles_of_the_transpose_hold_the_same_codes(w: Tensor) -> None:
    rows, k = w.shape
    straight, transposed = quantize(w, block=(16, 16)), quantize(w.T, block=(16, 16))
    assert torch.equal(codes_of(transposed)[:, :rows], codes_of(straight)[:, :k].T)
    assert torch.equal(transposed.amax, straight.amax)
    assert torch.equal(transposed.dequantize(), straight.dequantize().T)
    codes, scales = numerics.tile_transpose(straight.codes, straight.scales, k)
    assert_same(NVFP4Tensor(codes, scales, straight.amax, (k, rows)), transposed)


@given(matrices(min_size=0))
def test_transposing_tiles_twice_changes_nothing(w: Tensor) -> None:
    rows, k = w.shape
    straight = quantize(w, block=(16, 16))
    back = numerics.tile_transpose(*numerics.tile_transpose(straight.codes, straight.scales, k), rows)
    assert_same(NVFP4Tensor(*back, straight.amax, (rows, k)), straight)


@given(matrices())
def test_scales_of_a_tile_are_equal_and_bound_those_of_its_rows(w: Tensor) -> None:
    tiles, rows = quantize(w, block=(16, 16)).scales.float(), quantize(w).scales.float()
    for first in range(0, w.shape[0], 16):
        tile = tiles[first : first + 16]
        assert torch.equal(tile, tile[:1].expand_as(tile))
        assert torch.equal(tile[0], rows[first : first + 16].amax(0))


# ---- rotation


@given(matrices(), st.integers(1, 20), st.integers(0, 2**32 - 1), SIGNS)
def test_rotating_both_operands_leaves_the_product(
    a: Tensor, columns: int, seed: int, signs: tuple[int, ...] | None
) -> None:
    b = torch.randn(columns, a.shape[1], generator=torch.Generator().manual_seed(seed))
    signs = signs or DEFAULT_SIGNS
    exact = a.double() @ b.double().T
    rotated = numerics.hadamard(a, signs).double() @ numerics.hadamard(b, signs).double().T
    # The rotation is orthonormal, so but for rounding both norms and the product stay. Each rotated element
    # is rounded to bfloat16, a relative error of 2**-8 at most; the float32 sum of 16 before it adds less than
    # 2**-19 of the block's norm. So |error of a row| <= u |row|, and by Cauchy-Schwarz the product is off by
    # (2 u + u**2) |a| |b| at most.
    u = 2**-8 + 2**-19
    bound = (2 * u + u**2) * a.double().norm(dim=1, keepdim=True) * b.double().norm(dim=1)
    assert ((rotated - exact).abs() <= bound).all()


@given(matrices(), SIGNS)
def test_rotation_keeps_each_block_norm(x: Tensor, signs: tuple[int, ...] | None) -> None:
    rotated = numerics.hadamard(x, signs or DEFAULT_SIGNS).double().unflatten(1, (-1, 16)).norm(dim=-1)
    blocks = F.pad(x.double(), (0, rotated.shape[1] * 16 - x.shape[1])).unflatten(1, (-1, 16)).norm(dim=-1)
    # As above: every element is off by 2**-8 of itself at most, and so is the norm.
    assert ((rotated - blocks).abs() <= (2**-8 + 2**-19) * blocks).all()


# ---- what is not finite, and zeros


@given(
    matrices(),
    st.sampled_from([torch.nan, -torch.nan, torch.inf, -torch.inf]),
    st.integers(0, 2**20),
    BLOCKS,
    SIGNS,
    st.booleans(),
)
def test_not_finite_never_becomes_finite(
    x: Tensor,
    poison: float,
    place: int,
    block: tuple[int, int],
    signs: tuple[int, ...] | None,
    stochastic: bool,
) -> None:
    x.view(-1)[place % x.numel()] = poison
    bits = random_bits(x, place) if stochastic else None
    found = quantize(x, block=block, rounding="stochastic" if stochastic else "nearest", signs=signs, random_bits=bits)
    assert (raw(found.scales) == 0x7F).all()
    assert found.dequantize().isnan().all()
    other = quantize(torch.ones(3, x.shape[1]), signs=signs)
    assert numerics.scaled_mm(found, other).isnan().all()
    assert numerics.scaled_mm(other, found, torch.ones(x.shape[0])).isnan().all()


@given(st.integers(0, 40), st.integers(0, 70), DTYPES, BLOCKS, SIGNS, st.booleans(), st.booleans())
def test_zero_stays_zero(
    rows: int,
    k: int,
    dtype: torch.dtype,
    block: tuple[int, int],
    signs: tuple[int, ...] | None,
    negative: bool,
    stochastic: bool,
) -> None:
    x = torch.full((rows, k), -0.0 if negative else 0.0, dtype=dtype)
    bits = random_bits(x, 0) if stochastic else None
    found = quantize(x, block=block, rounding="stochastic" if stochastic else "nearest", signs=signs, random_bits=bits)
    assert float(found.amax) == 0
    assert not found.codes.any() and not raw(found.scales).any()
    assert not found.dequantize().any()


@given(matrices(), BLOCKS)
def test_zeros_within_a_tensor_get_code_zero(x: Tensor, block: tuple[int, int]) -> None:
    x = torch.where(x == 0, torch.tensor(-0.0, dtype=x.dtype), x)
    codes = codes_of(quantize(x, block=block))
    assert not codes[:, : x.shape[1]][x == 0].any()
    assert not codes[:, x.shape[1] :].any()


# ---- padding


@given(matrices(min_size=0), BLOCKS, SIGNS, st.booleans())
def test_missing_columns_are_zeros(
    x: Tensor, block: tuple[int, int], signs: tuple[int, ...] | None, stochastic: bool
) -> None:
    whole = F.pad(x, (0, padded(x.shape[1]) - x.shape[1]))
    bits = random_bits(x, 1) if stochastic else None
    rounding = "stochastic" if stochastic else "nearest"
    found = quantize(x, block=block, rounding=rounding, signs=signs, random_bits=bits)
    expected = quantize(whole, block=block, rounding=rounding, signs=signs, random_bits=bits)
    assert_same(found, expected)
    assert torch.equal(found.amax, expected.amax)
    assert torch.equal(found.dequantize(), expected.dequantize()[:, : found.shape[1]])


@given(matrices(), BLOCKS)
def test_missing_rows_are_zeros(x: Tensor, block: tuple[int, int]) -> None:
    rows = x.shape[0]
    found, whole = quantize(x, block=block), quantize(F.pad(x, (0, 0, 0, padded(rows) - rows)), block=block)
    assert torch.equal(found.codes, whole.codes[:rows])
    assert torch.equal(raw(found.scales), raw(whole.scales)[:rows])


# ---- scaling and sign


@given(matrices(), st.integers(-60, 60), BLOCKS, SIGNS)
def test_a_power_of_two_changes_only_the_amax(
    x: Tensor, exponent: int, block: tuple[int, int], signs: tuple[int, ...] | None
) -> None:
    x = x.float() if x.dtype == torch.float16 else x  # float16 has no room for the exponents
    assume(bool(x.any()))
    factor = 2.0**exponent
    before, after = quantize(x, block=block, signs=signs), quantize(x * factor, block=block, signs=signs)
    assert_same(after, before)
    assert float(after.amax) == float(before.amax) * factor
    assert torch.equal(after.dequantize(), before.dequantize() * factor)


@given(matrices(), BLOCKS, st.booleans())
def test_the_sign_is_one_bit(x: Tensor, block: tuple[int, int], stochastic: bool) -> None:
    bits = random_bits(x, 2) if stochastic else None
    rounding = "stochastic" if stochastic else "nearest"
    plus = quantize(x, block=block, rounding=rounding, random_bits=bits)
    minus = quantize(-x, block=block, rounding=rounding, random_bits=bits)
    assert torch.equal(raw(plus.scales), raw(minus.scales))
    assert torch.equal(plus.amax, minus.amax)
    flipped = codes_of(plus) ^ codes_of(minus)
    expected = torch.where(x != 0, 8, 0).to(torch.uint8)
    assert torch.equal(flipped, F.pad(expected, (0, flipped.shape[1] - x.shape[1])))


# ---- accuracy


def steps_of(tensor: NVFP4Tensor) -> Tensor:
    """Value of one unit of code magnitude for each element, float64 [M, ceil16(K)]."""
    return (tensor.scales.double() * tensor.amax.double() / 2688).repeat_interleave(16, dim=1)


@given(matrices(aligned=True), BLOCKS)
def test_nearest_error_is_half_a_gap(x: Tensor, block: tuple[int, int]) -> None:
    found = quantize(x, block=block)
    step = steps_of(found)
    # With a scale under 2**-6 (subnormal) or 0 the format has no such precision; those blocks are left out.
    normal = (found.scales.float() >= 2**-6).repeat_interleave(16, dim=1)
    y = torch.where(normal, x.double().abs() / step, 0.0)
    # Rounding to four significant bits makes the scale no smaller than 1 / (1 + 2**-4) of what maps the amax
    # to 6; the last term is for six float32 roundings on the way.
    assert (y <= 6 * (1 + 2**-4) * (1 + 6 * 2**-24)).all()
    half_gap = torch.where(y < 2, 0.25, torch.where(y < 4, 0.5, 1.0))
    half_gap = torch.where(y > 6, y - 6, half_gap)
    error = torch.where(normal, (found.dequantize().double() - x.double()).abs() / step, 0.0)
    # Eight float32 roundings, of numbers under 8: five for the multiplier and its product, three to dequantise.
    assert (error <= half_gap + 8 * 8 * 2**-24).all()


@given(matrices(aligned=True), BLOCKS, st.integers(0, 2**20))
def test_stochastic_rounding_stays_on_the_neighbours(x: Tensor, block: tuple[int, int], seed: int) -> None:
    found = quantize(x, block=block, rounding="stochastic", random_bits=random_bits(x, seed))
    nearest = quantize(x, block=block)
    assert torch.equal(raw(found.scales), raw(nearest.scales))
    up, down = (
        codes_of(quantize(x, block=block, rounding="stochastic", random_bits=torch.full(x.shape, byte).byte()))
        for byte in (0, 255)
    )
    assert ((up - down) <= 1).all()
    for codes in (codes_of(found), codes_of(nearest)):
        assert ((codes == up) | (codes == down)).all()


@given(st.lists(st.integers(8, 126), min_size=1, max_size=6), st.integers(-40, 40), st.integers(0, 2**20))
def test_what_is_on_the_grid_never_moves(scales: list[int], exponent: int, seed: int) -> None:
    scale_bytes = torch.tensor([126, *scales], dtype=torch.uint8).unsqueeze(0)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (1, 16 * scale_bytes.numel()), dtype=torch.uint8, generator=generator)
    codes[codes == 8] = 0
    codes[:, ::16] = 7  # so that each block needs its whole scale
    x = numerics.block_values(codes, scale_bytes.view(torch.float8_e4m3fn)) * 2.0**exponent
    for found in (quantize(x), quantize(x, rounding="stochastic", random_bits=random_bits(x, seed))):
        assert torch.equal(codes_of(found), codes)
        assert torch.equal(raw(found.scales), scale_bytes)
        assert torch.equal(found.dequantize(), x)


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "outliers"])
def test_stochastic_rounding_is_unbiased(kind: str) -> None:
    x = values_of(kind, 64, 64, torch.Generator().manual_seed(0))
    draws = 512
    total = torch.zeros_like(x, dtype=torch.float64)
    for seed in range(draws):
        total += quantize(x, rounding="stochastic", random_bits=random_bits(x, seed)).dequantize().double()
    found = quantize(x)
    step = steps_of(found)
    inside = (step > 0) & (x.double().abs() <= 6 * step)  # elsewhere the clamp at 6, not the rounding, decides
    gap = torch.where(x.abs() < 2 * step, 0.5, torch.where(x.abs() < 4 * step, 1.0, 2.0))
    error = ((total / draws - x.double()) / (step * gap))[inside]
    # In units of the gap one draw has a standard deviation of 1/2 at most, the mean of 512 draws 1/45. Six of
    # these bound all 4096 elements, and a byte resolves 1/512.
    assert error.abs().max() < 6 * 0.5 / draws**0.5 + 1 / 512
    # Over all elements the deviation falls by the root of their number, and the resolution averages out.
    assert error.mean().abs() < 6 * 0.5 / (draws * error.numel()) ** 0.5


# ---- products


@given(matrices(), st.integers(1, 20), st.integers(0, 2**32 - 1), BLOCKS)
def test_product_is_that_of_the_dequantised(a: Tensor, columns: int, seed: int, block: tuple[int, int]) -> None:
    k = a.shape[1]
    b = values_of("normal", columns, k, torch.Generator().manual_seed(seed))
    left, right = quantize(a), quantize(b, block=block)
    factor = float(left.amax) * float(right.amax) / 2688**2
    left_values, right_values = (numerics.block_values(codes_of(t), t.scales).double() for t in (left, right))
    exact = left_values @ right_values.T * factor
    found = numerics.scaled_mm(left, right, out_dtype=torch.float32).double()
    # K float32 additions of exact products, and four roundings for the factor and its product.
    bound = (k + 4) * 2**-24 * (left_values.abs() @ right_values.abs().T) * factor
    assert ((found - exact).abs() <= bound).all()


@given(st.integers(0, 255), st.sampled_from(range(127)))
def test_code_times_scale_is_exact_in_bf16(byte: int, scale: int) -> None:
    codes = numerics.unpack(torch.tensor([[byte] * 8], dtype=torch.uint8))
    scales = torch.tensor([[scale]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = numerics.block_values(codes, scales)
    assert torch.equal(values.bfloat16().float(), values)
    low, high = byte & 15, byte >> 4
    wanted = [(-1) ** (code >> 3) * E2M1_MAGNITUDES[code & 7] * float(scales) for code in (low, high)]
    assert values[0, :2].tolist() == wanted
