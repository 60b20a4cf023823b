"""`nvfp4c.numerics` against recorded vectors and, exhaustively, against arithmetic from tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from nvfp4c import numerics
from nvfp4c.codegen import cpu_blocks, cpu_compiler
from nvfp4c.errors import NumericsError
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK, signs_from_seed, sylvester_hadamard
from nvfp4c.numerics import quantize

VECTORS = load_file(Path(__file__).parent / "data" / "nvfp4.safetensors")
CASES = sorted(key.removesuffix(".codes") for key in VECTORS if key.endswith(".codes"))

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)])
E4M3 = E4M3[:127]  # the 128th code is NaN
FP32_MAX = np.finfo(np.float32).max

# All finite non-negative BF16 values, in order.
BF16 = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def raw(scales: Tensor) -> Tensor:
    """The bytes of E4M3 scales; NaN compares equal as a byte."""
    return scales.view(torch.uint8)


def nearest(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the entry of `table` next to each value; a value halfway goes to the even index.

    Exact: midpoints of E2M1 and E4M3 entries and float32 values are all float64 numbers.
    """
    midpoints = np.append((table[:-1] + table[1:]) / 2, np.inf)
    lower = np.searchsorted(midpoints, values.astype(np.float64), side="left")
    return lower + ((midpoints[lower] == values) & (lower % 2 == 1))


def table_quantize(x: np.ndarray, amax: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale bytes of float32 x [blocks, 16]: the contract in numpy float32."""
    one, sixth, f32 = np.float32(1), np.float32(1 / 6), np.float32
    with np.errstate(all="ignore"):
        encode = np.minimum(f32(2688) / amax, FP32_MAX) if amax else one
        per_block = encode * sixth
        wanted = np.minimum(np.abs(x).max(-1) * per_block, f32(448))
        scale_bytes = nearest(E4M3, wanted)
        scales = E4M3[scale_bytes].astype(np.float32)
        decode = one / encode
        multiplier = np.minimum(one / (scales * decode), FP32_MAX)
        y = np.clip(x * multiplier[:, None], f32(-6), f32(6))
    assert y.dtype == np.float32
    return (nearest(E2M1, np.abs(y)) | np.where(y < 0, 8, 0)).astype(np.uint8), scale_bytes.astype(np.uint8)


# ---- recorded vectors


@pytest.mark.parametrize("name", CASES)
def test_vector(name: str) -> None:
    x = VECTORS[f"{name}.x"]
    block = (16, 16) if name.endswith(".16x16") else (1, 16)
    signs = DEFAULT_SIGNS if name.startswith("rht_") else None
    for suffix, tensor, rotation in (("", x, None), ("_t", x.T, signs)):
        found = quantize(tensor, block=block, signs=rotation)
        assert torch.equal(found.codes, VECTORS[f"{name}.codes{suffix}"])
        assert torch.equal(raw(found.scales), VECTORS[f"{name}.scales{suffix}"])
        assert torch.equal(found.amax.reshape(1), VECTORS[f"{name}.amax{suffix}"])
        assert found.shape == tuple(tensor.shape)


def test_every_kind_of_vector_is_there() -> None:
    assert len(CASES) == 13
    assert {"ties_f32.1x16", "zeros_bf16.1x16", "rht_bf16_128x96.1x16", "outliers_bf16.16x16"} < set(CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vector_of_a_product(dtype: torch.dtype) -> None:
    # Bit for bit whatever the order of the sum: every partial sum is a multiple of 64 below 2 ** 26.
    x, w = quantize(VECTORS["gemm.x"]), quantize(VECTORS["gemm.w"], block=(16, 16))
    left, right = (numerics.block_values(numerics.unpack(t.codes), t.scales).double() for t in (x, w))
    assert float((left.abs() @ right.abs().T).max()) < 2**26
    assert torch.equal(left % 8, torch.zeros_like(left)) and torch.equal(right % 8, torch.zeros_like(right))
    suffix = "f32" if dtype == torch.float32 else "bf16"
    assert torch.equal(numerics.scaled_mm(x, w, out_dtype=dtype), VECTORS[f"gemm.y_{suffix}"])


# ---- elements


def midpoints_and_neighbours() -> Tensor:
    """Grid values, midpoints between them, and the float32 numbers on both sides of each, in [0, 6]."""
    points = torch.tensor(np.concatenate([E2M1, (E2M1[:-1] + E2M1[1:]) / 2]), dtype=torch.float32)
    around = [points, torch.nextafter(points, torch.tensor(-1.0)), torch.nextafter(points, torch.tensor(9.0))]
    return torch.cat(around).clamp(0, 6)


MAGNITUDES = torch.cat([BF16[BF16 <= 6].float(), midpoints_and_neighbours()])


def test_encode_is_nearest_with_ties_to_even() -> None:
    expected = torch.from_numpy(nearest(E2M1, MAGNITUDES.numpy())).to(torch.uint8)
    assert torch.equal(numerics.encode_e2m1(MAGNITUDES), expected)
    # Negative zero is the one number below whose sign is not kept.
    signed = torch.where(MAGNITUDES == 0, expected, expected | 8)
    assert torch.equal(numerics.encode_e2m1(-MAGNITUDES), signed)


def test_the_contract_ties() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert numerics.decode_e2m1(numerics.encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_rounding_without_codes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, zeros' signs and NaNs included, for both ways to round."""
    grid = torch.cat([torch.linspace(-6, 6, 12 * 512 + 1), torch.tensor([-0.0, torch.nan, 1e-30, -1e-30])])
    for bits in (None, torch.tensor([0, 77, 255], dtype=torch.uint8)):
        y = grid if bits is None else grid[:, None].expand(-1, 3)
        expected = numerics.decode_e2m1(numerics.encode_e2m1(y, bits))
        assert torch.equal(numerics.round_e2m1(y, bits).view(torch.int32), expected.view(torch.int32))
    monkeypatch.setattr(cpu_compiler, "compile_kind", lambda function, kind: function)
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    for block in (ROW_BLOCK, TILE_BLOCK):
        codes, scales = numerics.block_codes(x, numerics.tensor_amax(x), block)
        rounded = cpu_blocks.operand(numerics.pad_last(x), numerics.tensor_amax(x), block, None, 0)
        assert torch.equal(rounded, numerics.block_values(codes, scales))


def test_signs_of_zero() -> None:
    y = torch.tensor([0.0, -0.0, -1e-45, -0.25, 1e-45, torch.nan, -torch.nan])
    assert numerics.encode_e2m1(y).tolist() == [0, 0, 8, 8, 0, 7, 7]
    bits = torch.full((7,), 255, dtype=torch.uint8)
    assert numerics.encode_e2m1(y, bits).tolist() == [0, 0, 8, 8, 0, 7, 7]


def test_decode_of_all_codes_and_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = numerics.decode_e2m1(codes)
    assert values.tolist() == [*E2M1, *(-E2M1)]
    assert torch.equal(torch.signbit(values), codes > 7)
    codes[8] = 0  # -0.0 is encoded as 0
    assert torch.equal(numerics.encode_e2m1(values), codes)


def test_pack_of_all_bytes() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    codes = numerics.unpack(packed)
    assert codes.tolist() == [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert torch.equal(numerics.pack(codes), packed)
    batch = codes.reshape(2, 8, 32)
    assert torch.equal(numerics.unpack(numerics.pack(batch)), batch)


def test_stochastic_rounding_over_all_random_bytes() -> None:
    grid = torch.tensor(E2M1, dtype=torch.float64)
    exact = MAGNITUDES.double()
    bits = torch.arange(256, dtype=torch.uint8)
    shape = (len(MAGNITUDES), 256)
    for sign in (1, -1):
        y = (sign * MAGNITUDES).unsqueeze(1).expand(shape)
        rounded = numerics.decode_e2m1(numerics.encode_e2m1(y, bits.expand(shape))).double() * sign
        lower = grid[(torch.searchsorted(grid, exact, right=True) - 1)]
        upper = grid[torch.searchsorted(grid, exact)]
        assert ((rounded == lower.unsqueeze(1)) | (rounded == upper.unsqueeze(1))).all()
        # A small random number never rounds down where a larger one rounds up.
        assert (rounded.diff(dim=1) <= 0).all()
        # 256 random bytes express a probability in steps of 1/256, so the nearest is off by 1/512 at most.
        assert ((rounded.mean(1) - exact).abs() <= (upper - lower) / 512).all()
        # A grid value is its own lower and upper neighbour, so the first check says that it never moves.
        assert (lower == upper).sum() >= len(E2M1)


# ---- blocks

TENSOR_AMAXES = {
    "one": 1.0,
    "not a power of two": 3.140625,
    "small": 2.0**-20 * 1.5,
    "fp16 max": 65504.0,
    "largest": float(BF16[-1]),
    "2688 / amax just finite": 2.0**-116 * 1.3125,
    "2688 / amax overflows": 2.0**-118,
    "smallest normal": 2.0**-126,
    "subnormal": 2.0**-130,
    "smallest": 2.0**-133,
    "not in bf16": 1.2345678,
    "odd float32": 0.99999994,
}


@pytest.mark.parametrize("amax", TENSOR_AMAXES.values(), ids=TENSOR_AMAXES.keys())
def test_blocks_of_every_bf16_amax(amax: float) -> None:
    # One block for each BF16 number up to the tensor's amax, and blocks whose scale lies at or next to the
    # midpoint of two E4M3 values. Their other elements are fractions of the block's amax.
    midpoints = torch.tensor((E4M3[:-1] + E4M3[1:]) / 2 / 448) * amax
    near = [midpoints.float(), midpoints.float() * (1 - 2**-23), midpoints.float() * (1 + 2**-23)]
    block_amaxes = torch.cat([BF16[BF16.float() <= amax].float(), *near, torch.tensor([amax])])
    ratios = torch.rand(15, generator=torch.Generator().manual_seed(0))
    elements = block_amaxes.unsqueeze(1) * torch.cat([torch.ones(1), ratios])
    elements *= torch.tensor([1, -1]).repeat(8)
    found = quantize(elements)
    codes, scales = table_quantize(elements.numpy(), np.float32(amax))
    assert float(found.amax) == np.float32(amax)
    assert torch.equal(raw(found.scales).flatten(), torch.from_numpy(scales))
    assert torch.equal(numerics.unpack(found.codes), torch.from_numpy(codes))


@pytest.mark.parametrize("ceiling", [1e-35, 1.0, 3e38])
def test_blocks_of_any_float32_bits(ceiling: float) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000, 16), generator=generator, dtype=torch.int32)
    x = bits.view(torch.float32)
    x = torch.where(x.abs() <= ceiling, x, ceiling)
    codes, scales = table_quantize(x.numpy(), np.float32(ceiling))
    found = quantize(x)
    assert torch.equal(raw(found.scales).flatten(), torch.from_numpy(scales))
    assert torch.equal(numerics.unpack(found.codes), torch.from_numpy(codes))


def test_a_scale_on_the_midpoint_of_two_e4m3_values_goes_to_the_even_one() -> None:
    # amax 2688 makes S_enc exactly 1. As 1/6 is no float32 number, a case counts only where the scale before
    # rounding, 6 * midpoint * (1/6), is the midpoint itself.
    midpoints = torch.tensor((E4M3[:-1] + E4M3[1:]) / 2, dtype=torch.float32)
    x = torch.zeros(127, 16)
    x[:126, 0] = midpoints * 6
    x[126, 0] = 2688
    exact = x[:126, 0] * torch.tensor(1 / 6) == midpoints
    assert exact.sum() > 100
    even = torch.arange(126, dtype=torch.uint8)
    even += even % 2
    assert torch.equal(raw(quantize(x).scales).flatten()[:126][exact], even[exact])


def test_underflowed_scale_keeps_codes() -> None:
    x = torch.zeros(3, 16)
    x[0, 0] = 1.0
    x[1, :4] = torch.tensor([2.0**-40, -(2.0**-40), 2.0**-60, 0.0])
    # 448 * 2**-19 is under half of the smallest scale, 2**-9, and 448 * 2**-18 is over half of it.
    x[2, :2] = torch.tensor([2.0**-19, -(2.0**-21)])
    found = quantize(x)
    assert raw(found.scales).flatten().tolist() == [0x7E, 0, 0]
    # 1 / 0 is clamped to FLT_MAX, so anything that is not 0 reaches 6.
    assert numerics.unpack(found.codes)[1, :5].tolist() == [7, 15, 7, 0, 0]
    assert numerics.unpack(found.codes)[2, :3].tolist() == [7, 15, 0]
    assert torch.equal(found.dequantize()[1:], torch.zeros(2, 16))
    x[2, 0] = 2.0**-18
    assert raw(quantize(x).scales).flatten().tolist() == [0x7E, 0, 1]


def test_tile_scale_is_the_largest_of_its_rows_and_repeated() -> None:
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    found = quantize(x, block=(16, 16))
    padded = F.pad(x, (0, 8, 0, 8)).reshape(3, 16, 2, 16).transpose(1, 2).reshape(6, 256)
    # A tile is like one long block: the scale of 16 elements that hold its amax.
    largest = F.pad(padded.abs().amax(1, keepdim=True), (0, 15))
    _, scales = table_quantize(largest.numpy(), np.float32(float(x.abs().max())))
    expected = torch.from_numpy(scales).reshape(3, 1, 2).expand(3, 16, 2).reshape(48, 2)[:40]
    assert torch.equal(raw(found.scales), expected)


# ---- rotation


def test_sylvester_hadamard() -> None:
    indices = torch.arange(16)
    parity = sum((indices.unsqueeze(1) & indices) >> bit & 1 for bit in range(4)) % 2
    assert torch.equal(sylvester_hadamard(), 1.0 - 2.0 * parity)
    for size in (1, 2, 8, 128):
        matrix = sylvester_hadamard(size)
        assert torch.equal(matrix @ matrix.T, size * torch.eye(size))
    for size in (0, -2, 12):
        with pytest.raises(ValueError, match=f"power of two as its order, not {size}"):
            sylvester_hadamard(size)


@pytest.mark.parametrize("signs", [DEFAULT_SIGNS, signs_from_seed(3), (1,) * 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hadamard_is_the_matrix_product_rounded_once(signs: tuple[int, ...], dtype: torch.dtype) -> None:
    # Integers below 2**10 make every float32 sum exact: the answer is the double product, rounded once.
    x = torch.randint(-1023, 1024, (64, 48), generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks = x.double().reshape(64, 3, 16) * torch.tensor(signs)
    product = (blocks @ sylvester_hadamard().double() * 0.25).float().bfloat16().reshape(64, 48)
    assert torch.equal(numerics.hadamard(x, signs), product)


def test_hadamard_of_bf16_is_exact_in_float32() -> None:
    # Eight significant bits and exponents within 2**10 of each other: sums of 16 need 8 + 10 + 4 of 24 bits.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(128, 256, (64, 32), generator=generator).float()
    x = x * torch.exp2(torch.randint(0, 11, (64, 32), generator=generator).float())
    x = (x * (1 - 2 * torch.randint(0, 2, (64, 32), generator=generator))).bfloat16()
    blocks = x.double().reshape(64, 2, 16) * torch.tensor(DEFAULT_SIGNS)
    product = (blocks @ sylvester_hadamard().double() * 0.25).float().bfloat16().reshape(64, 32)
    assert torch.equal(numerics.hadamard(x), product)


def test_hadamard_adds_in_one_order() -> None:
    # Where large elements cancel, what is left of the small ones depends on the order of the float32 sum: a
    # butterfly over strides 1, 2, 4, 8.
    generator = torch.Generator().manual_seed(0)
    small, place = torch.randn(256, 16, generator=generator), torch.rand(256, 16, generator=generator)
    x = torch.where(place < 0.5, small, small.sign() * 2**22)
    values = [row.astype(np.float32) for row in (x * torch.tensor(DEFAULT_SIGNS)).numpy().T]
    for stride in (1, 2, 4, 8):
        for low in (place for place in range(16) if not place & stride):
            left, right = values[low], values[low + stride]
            values[low], values[low + stride] = left + right, left - right
    expected = torch.from_numpy(np.stack(values, axis=1) * np.float32(0.25)).bfloat16()
    assert torch.equal(numerics.hadamard(x), expected)
    exact = (x.double() * torch.tensor(DEFAULT_SIGNS) @ sylvester_hadamard().double() * 0.25).float().bfloat16()
    assert not torch.equal(expected, exact)  # otherwise the order is not put to the test


def test_hadamard_pads_and_keeps_leading_axes() -> None:
    x = torch.randn(2, 3, 5, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(numerics.hadamard(x), numerics.hadamard(F.pad(x, (0, 12))))
    assert numerics.hadamard(x).shape == (2, 3, 5, 32)
    assert numerics.hadamard(torch.zeros(0, 20)).shape == (0, 32)
    assert numerics.hadamard(torch.zeros(3, 0)).shape == (3, 0)


def test_signs_from_seed() -> None:
    assert signs_from_seed(1) == signs_from_seed(1)
    drawn = {signs_from_seed(seed) for seed in range(64)}
    assert len(drawn) > 60
    assert {sign for signs in drawn for sign in signs} == {1, -1}


# ---- the two levels of scale


def test_encode_scale() -> None:
    amax = torch.tensor([0.0, 2688.0, 1e-45, 2.0**-117, 3.4e38, torch.inf, torch.nan])
    with np.errstate(over="ignore"):
        small = [float(np.minimum(np.float32(2688) / np.float32(value), FP32_MAX)) for value in (1e-45, 2.0**-117)]
    largest = float(np.float32(2688) / np.float32(3.4e38))
    assert numerics.encode_scale(amax)[:5].tolist() == [1.0, 1.0, *small, largest]
    assert numerics.encode_scale(amax)[5:].isnan().all()
    assert small[0] == FP32_MAX


def test_global_scale_is_applied_in_one_order() -> None:
    amaxes = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) * 100
    left, right = amaxes.numpy()
    factors = numerics.global_factor(*amaxes)
    assert torch.equal(factors, torch.from_numpy(left * right / np.float32(36 * 448 * 448)))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    found = quantize(x)
    codes, scales = numerics.unpack(found.codes).numpy(), found.scales.float().numpy().repeat(16, axis=1)
    values = np.where(codes > 7, -1, 1).astype(np.float32) * E2M1.astype(np.float32)[codes & 7] * scales
    expected = torch.from_numpy(values * (found.amax.numpy() / np.float32(2688)))
    assert torch.equal(found.dequantize(), expected)
    assert torch.equal(found.dequantize(torch.bfloat16), expected.bfloat16())


# ---- products, shapes, errors


def test_product_adds_bias_before_its_one_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    a = quantize(torch.randn(8, 32, generator=generator))
    b = quantize(torch.randn(12, 32, generator=generator))
    bias = torch.randn(12, generator=generator).bfloat16()
    product = numerics.scaled_mm(a, b, out_dtype=torch.float32)
    assert torch.equal(numerics.scaled_mm(a, b, bias, torch.float32), product + bias.float())
    assert torch.equal(numerics.scaled_mm(a, b, bias), (product + bias.float()).bfloat16())
    assert numerics.scaled_mm(a, b).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 16), (0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
@pytest.mark.parametrize("signs", [None, DEFAULT_SIGNS])
def test_empty(shape: tuple[int, int], block: tuple[int, int], signs: tuple[int, ...] | None) -> None:
    rows, k = shape
    found = quantize(torch.zeros(shape), block=block, signs=signs)
    assert found.codes.shape == (rows, (k + 15) // 16 * 8) and found.codes.dtype == torch.uint8
    assert found.scales.shape == (rows, (k + 15) // 16) and found.scales.dtype == torch.float8_e4m3fn
    assert float(found.amax) == 0 and found.amax.dtype == torch.float32 and found.amax.dim() == 0
    assert found.dequantize().shape == (rows, k if signs is None else (k + 15) // 16 * 16)
    other = quantize(torch.ones(3, k), signs=signs)
    assert torch.equal(numerics.scaled_mm(found, other), torch.zeros(rows, 3, dtype=torch.bfloat16))


X = torch.ones(4, 20)
BITS = torch.zeros(4, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(16)), r"expected a 2-D tensor, got 1-D \(16,\); reshape it"),
        (lambda: quantize(torch.ones(1, 2, 16)), r"expected a 2-D tensor, got 3-D \(1, 2, 16\)"),
        (lambda: quantize(X.double()), r"cannot quantise torch.float64; convert to one of torch.float32, "),
        (lambda: quantize(X.int()), r"cannot quantise torch.int32; .*torch.bfloat16, torch.float16"),
        (lambda: quantize(X, block=(16, 1)), r"block must be \(1, 16\) or \(16, 16\), got \(16, 1\)"),
        (lambda: quantize(X, block=(1, 32)), r"block must be \(1, 16\) or \(16, 16\), got \(1, 32\)"),
        (lambda: quantize(X, rounding="up"), r"rounding must be 'nearest' or 'stochastic', got 'up'"),
        (lambda: quantize(X, rounding="stochastic"), r"random_bits must be given for stochastic rounding"),
        (lambda: quantize(X, random_bits=BITS), r"random_bits must be given for .*, and only then"),
        (
            lambda: quantize(X, rounding="stochastic", random_bits=BITS[:, :20]),
            r"random_bits must be uint8 \(4, 32\) \(one byte an element\), got torch.uint8 \(4, 20\)",
        ),
        (
            lambda: quantize(X, rounding="stochastic", random_bits=BITS.int()),
            r"random_bits must be uint8 \(4, 32\) .*got torch.int32 \(4, 32\)",
        ),
        (lambda: quantize(X, signs=(1,) * 15), r"signs must be 16 numbers, each 1 or -1, got \(1, 1"),
        (lambda: numerics.hadamard(X, (1,) * 15 + (2,)), r"signs must be 16 numbers, .*1, 2\)"),
        (lambda: numerics.hadamard(X, (1,) * 15 + (0,)), r"signs must be 16 numbers, .*1, 0\)"),
        (
            lambda: numerics.scaled_mm(quantize(X), quantize(torch.ones(4, 21))),
            r"contraction axes differ: 20 and 21 elements",
        ),
        (
            lambda: numerics.scaled_mm(quantize(X, signs=DEFAULT_SIGNS), quantize(X)),
            r"contraction axes differ: 32 and 20 elements",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        call()
