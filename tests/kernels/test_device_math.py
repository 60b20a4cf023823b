"""The helpers of the Triton kernels, each alone and on all its inputs where possible, against torch and numerics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from interpreter import needs_dropped_nan
from torch import Tensor

from nvfp4c import numerics, philox
from nvfp4c.codegen import chips, device_math, e2m1, operations
from nvfp4c.formats import BLOCK, DEFAULT_SIGNS, E2M1_MAX, E4M3_MAX, FP32_MAX, ROW_BLOCK, signs_from_seed

SIZE = 1024

HAS_E4M3 = not operations.INTERPRETED and chips.conversions(torch.cuda.get_device_capability()) >= chips.E4M3
NATIVE = [False, True] if HAS_E4M3 else [False]
"""Whether E4M3 bytes are made by the chip's own conversion."""

block_amax = device_math.block_amax
block_scale = device_math.block_scale
bfloat16_pair = device_math.bfloat16_pair
e2m1_bytes = e2m1.e2m1_bytes
e2m1_code = e2m1.e2m1_code
e2m1_rounded = e2m1.e2m1_rounded
e2m1_stochastic_bytes = e2m1.e2m1_stochastic_bytes
e2m1_stochastic_code = e2m1.e2m1_stochastic_code
e2m1_stochastic_rounded = e2m1.e2m1_stochastic_rounded
e2m1_value = e2m1.e2m1_value
e4m3_byte = device_math.e4m3_byte
e4m3_byte_native = device_math.e4m3_byte_native
e4m3_value = device_math.e4m3_value
encode_scale = device_math.encode_scale
float_bits = device_math.float_bits
halves = device_math.halves
larger = device_math.larger
larger_half = device_math.larger_half
larger_pair = device_math.larger_pair
load_blocks = device_math.load_blocks
raise_amax = device_math.raise_amax
random_byte = device_math.random_byte
random_bytes = device_math.random_bytes
random_words = device_math.random_words
rotate = device_math.rotate
to_bfloat16 = device_math.to_bfloat16
to_float32 = device_math.to_float32


@triton.jit
def place_of(SIZE: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def e4m3_byte_kernel(x, out, NATIVE: tl.constexpr, SIZE: tl.constexpr):
    place = place_of(SIZE)
    found = tl.load(x + place)
    tl.store(out + place, e4m3_byte_native(found) if NATIVE else e4m3_byte(found))


@triton.jit
def e4m3_value_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, e4m3_value(tl.load(x + place)))


@triton.jit
def e2m1_value_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, e2m1_value(tl.load(x + place)))


@triton.jit
def nearest_kernel(x, code, value, both, turned, NATIVE: tl.constexpr, SIZE: tl.constexpr):
    place = place_of(SIZE)
    y = tl.load(x + place)
    tl.store(code + place, e2m1_code(y))
    tl.store(value + place, e2m1_rounded(y, NATIVE))
    tl.store(both + place, e2m1_bytes(y, 1.5 - y))
    tl.store(turned + place, e2m1_bytes(1.5 - y, y))


@triton.jit
def stochastic_kernel(x, random, code, value, both, turned_both, NATIVE: tl.constexpr, SIZE: tl.constexpr):
    place = place_of(SIZE)
    y = tl.load(x + place)
    octet = tl.load(random + place)
    tl.store(code + place, e2m1_stochastic_code(y, octet))
    tl.store(value + place, e2m1_stochastic_rounded(y, octet, NATIVE))
    word = (octet | ((255 - octet) << 8)).to(tl.uint32)
    turned = (((255 - octet) << 16) | (octet << 24)).to(tl.uint32)
    tl.store(both + place, e2m1_stochastic_bytes(y, 1.5 - y, word, 0))
    tl.store(turned_both + place, e2m1_stochastic_bytes(1.5 - y, y, turned, 2))


@triton.jit
def bfloat16_pair_kernel(x, y, rounded, other, narrow, SIZE: tl.constexpr):
    place = place_of(SIZE)
    first, second = halves(bfloat16_pair(tl.load(x + place), tl.load(y + place)))
    tl.store(rounded + place, first)
    tl.store(other + place, second)
    tl.store(narrow + place, to_bfloat16(first))


@triton.jit
def to_float32_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, to_float32(tl.load(x + place)))


@triton.jit
def larger_kernel(x, y, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, larger(tl.load(x + place), tl.load(y + place)))


@triton.jit
def larger_pair_kernel(x, y, z, low, high, NATIVE: tl.constexpr, SIZE: tl.constexpr):
    place = place_of(SIZE)
    first, other = bfloat16_pair(tl.load(x + place), tl.load(y + place)), tl.load(z + place)
    tl.store(low + place, larger_half(larger_pair(first, bfloat16_pair(other, 0.0 * first), NATIVE)))
    tl.store(high + place, larger_half(larger_pair(first, bfloat16_pair(0.0 * first, other), NATIVE)))


@triton.jit
def block_amax_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE // 16)
    blocks = tl.load(x + (place * 16)[:, None, None] + tl.arange(0, 16)[None, None, :])
    tl.store(out + place[:, None], block_amax(blocks))


@triton.jit
def encode_scale_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, encode_scale(tl.load(x + place)))


@triton.jit
def block_scale_kernel(x, encode, byte, multiplier, NATIVE: tl.constexpr, SIZE: tl.constexpr):
    place = place_of(SIZE)
    found, factor = block_scale(tl.load(x + place), tl.load(encode + place), NATIVE)
    tl.store(byte + place, found)
    tl.store(multiplier + place, factor)


@triton.jit
def rotate_kernel(x, out, SIGNS: tl.constexpr, SIZE: tl.constexpr):
    place = (place_of(SIZE // 16) * 16)[:, None, None] + tl.arange(0, 16)[None, None, :]
    tl.store(out + place, rotate(tl.load(x + place), SIGNS))


@triton.jit
def raise_amax_kernel(x, amax, SIZE: tl.constexpr):
    raise_amax(amax, float_bits(tl.load(x + place_of(SIZE))))


@triton.jit
def load_blocks_kernel(x, out, rows, columns, row_stride, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    row = tl.arange(0, 8)[:, None]
    block = tl.arange(0, 4)[None, :]
    values = load_blocks(x, row, block, rows, columns, row_stride, 0, 16, WIDTH, EVEN)
    place = (row * 64)[:, :, None] + 16 * block[:, :, None] + tl.arange(0, 16)[None, None, :]
    tl.store(out + place, values)


@triton.jit
def random_bytes_kernel(seed, block, stream, out, SIZE: tl.constexpr):
    place = place_of(SIZE // 16)
    octets = random_bytes(tl.load(seed), tl.load(block + place)[:, None], stream)
    tl.store(out + (place * 16)[:, None, None] + tl.arange(0, 16)[None, None, :], octets)


@triton.jit
def random_byte_kernel(seed, block, stream, out, SIZE: tl.constexpr):
    place = place_of(SIZE // 16)
    words = random_words(tl.load(seed), tl.load(block + place), stream)
    for word in tl.static_range(4):
        for index in tl.static_range(4):
            tl.store(out + place * 16 + 4 * word + index, random_byte(words[word], index))


def apply_all(
    kernel: Any, device: torch.device, *inputs: Tensor, out: Sequence[torch.dtype], **given: Any
) -> list[Tensor]:
    """An elementwise kernel's results for equally long inputs, on the CPU."""
    count = inputs[0].numel()
    missing = -count % SIZE
    padded = [torch.nn.functional.pad(x, (0, missing)).to(device) for x in inputs]
    results = [torch.empty(count + missing, dtype=dtype, device=device) for dtype in out]
    kernel[((count + missing) // SIZE,)](*padded, *results, **given, SIZE=SIZE, enable_fp_fusion=False)
    return [result[:count].cpu() for result in results]


def apply(kernel: Any, device: torch.device, *inputs: Tensor, out: torch.dtype, **given: Any) -> Tensor:
    """The same for a kernel with one result."""
    (result,) = apply_all(kernel, device, *inputs, out=[out], **given)
    return result


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, except that one NaN is as good as another."""
    nan = expected.isnan()
    integers = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    return torch.equal(found.isnan(), nan) and torch.equal(found.view(integers)[~nan], expected.view(integers)[~nan])


def every_bfloat16() -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def around(x: Tensor) -> Tensor:
    """float32 x and its two neighbours."""
    up, down = (torch.nextafter(x, torch.full_like(x, end)) for end in (torch.inf, -torch.inf))
    return torch.cat([down, x, up])


@pytest.mark.parametrize("native", NATIVE)
def test_e4m3_byte_agrees_on_both_sides_of_every_midpoint(device: torch.device, native: bool) -> None:
    """Rounding is monotonic and constant between midpoints, so these inputs stand for all in [0, 448]."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    edges = around(torch.cat([values, (values[1:] + values[:-1]) / 2]))
    tiny = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 2.0**-30, torch.nan])
    x = torch.cat([edges[(edges >= 0) & (edges <= E4M3_MAX)], tiny])
    expected = torch.where(x.isnan(), 0x7F, x.to(torch.float8_e4m3fn).view(torch.uint8).int())
    assert torch.equal(apply(e4m3_byte_kernel, device, x, out=torch.int32, NATIVE=native), expected)


@pytest.mark.parametrize("native", NATIVE)
def test_e4m3_byte_agrees_on_every_bfloat16(device: torch.device, native: bool) -> None:
    x = every_bfloat16().float()
    x = x[~x.signbit() & (x <= E4M3_MAX)]
    expected = x.to(torch.float8_e4m3fn).view(torch.uint8).int()
    assert torch.equal(apply(e4m3_byte_kernel, device, x, out=torch.int32, NATIVE=native), expected)


def test_e4m3_value_agrees_on_every_byte(device: torch.device) -> None:
    octets = torch.arange(256, dtype=torch.int32)
    expected = octets.to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert same(apply(e4m3_value_kernel, device, octets, out=torch.float32), expected)


def test_e2m1_value_agrees_on_every_code_and_ignores_bits_above(device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.int32)
    expected = numerics.decode_e2m1((codes & 15).to(torch.uint8))
    assert same(apply(e2m1_value_kernel, device, codes, out=torch.float32), expected)


def clamped(x: Tensor) -> Tensor:
    return torch.clamp(x, -E2M1_MAX, E2M1_MAX)


def check_nearest(device: torch.device, x: Tensor, native: bool) -> None:
    outputs = [torch.int32, torch.float32, torch.uint8, torch.uint8]
    codes, values, both, turned = apply_all(nearest_kernel, device, x, out=outputs, NATIVE=native)
    expected, other = numerics.encode_e2m1(clamped(x)), numerics.encode_e2m1(clamped(1.5 - x))
    assert torch.equal(codes, expected.int())
    assert torch.equal(both, expected + 16 * other)
    assert torch.equal(turned, other + 16 * expected)
    # A zero may have lost its sign; what NaN becomes does not matter, for its scale is NaN.
    number = ~x.isnan()
    assert torch.equal(values[number], numerics.decode_e2m1(expected)[number])


@needs_dropped_nan
@pytest.mark.parametrize("native", NATIVE)
def test_nearest_agrees_on_every_bfloat16_and_around_every_tie(device: torch.device, native: bool) -> None:
    ties = torch.arange(0, 6.5, 0.25)
    tiny = torch.tensor([1e-45, -1e-45, 1e-30, -1e-38])
    check_nearest(device, torch.cat([every_bfloat16().float(), around(torch.cat([ties, -ties])), tiny]), native)


def check_stochastic(device: torch.device, x: Tensor, octets: Tensor) -> None:
    outputs = [torch.int32, torch.float32, torch.uint8, torch.uint8]
    expected = numerics.encode_e2m1(clamped(x), octets)
    other = numerics.encode_e2m1(clamped(1.5 - x), 255 - octets)
    number = ~x.isnan()
    for native in NATIVE:
        codes, values, both, turned = apply_all(stochastic_kernel, device, x, octets.int(), out=outputs, NATIVE=native)
        assert torch.equal(codes, expected.int())
        assert torch.equal(values[number], numerics.decode_e2m1(expected)[number])
        assert torch.equal(both, expected + 16 * other)
        assert torch.equal(turned, other + 16 * expected)


@pytest.mark.parametrize("low, high", [(0.0, 0.5), (0.5, 1.0), (1.5, 2.0), (2.0, 3.0), (3.0, 4.0), (4.0, 6.0)])
def test_stochastic_agrees_around_the_threshold_of_every_byte(device: torch.device, low: float, high: float) -> None:
    """Next to a threshold in steps of a float32, and in steps of 2^-23, to which numbers below 1 are rounded first."""
    random = torch.arange(256)
    edges = low + (high - low) * (random + 0.5) / 256
    steps = torch.cat([edges + step * 2.0**-25 for step in range(-9, 10)])
    x = torch.cat(
        [steps, around(torch.cat([edges, -edges, torch.full_like(edges, low), torch.full_like(edges, high)]))]
    )
    check_stochastic(device, x, random.to(torch.uint8).repeat(x.numel() // 256))


def test_stochastic_agrees_on_random_numbers(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20 * SIZE, generator=generator) * torch.logspace(-8, 1, 20 * SIZE, base=2)
    check_stochastic(device, x, torch.randint(0, 256, x.shape, generator=generator).to(torch.uint8))


@needs_dropped_nan
def test_stochastic_agrees_on_special_values(device: torch.device) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-20, 6.0, -6.0, 1e30, torch.inf, -torch.inf, torch.nan])
    x = values.repeat_interleave(256)
    check_stochastic(device, x, torch.arange(256).to(torch.uint8).repeat(values.numel()))


@pytest.mark.parametrize("below", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_bfloat16_pair_agrees_for_every_upper_half(device: torch.device, below: int) -> None:
    """below: the lower half of the float32, on, next to and far from the tie. The two results do not mix."""
    bits = (torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16) | below
    x = bits.view(torch.float32)
    y = x.flip(0).contiguous()
    outputs = [torch.float32, torch.float32, torch.bfloat16]
    first, second, narrow = apply_all(bfloat16_pair_kernel, device, x, y, out=outputs)
    assert same(first, x.bfloat16().float())
    assert same(second, y.bfloat16().float())
    assert same(narrow, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_float32_agrees_on_every_value(device: torch.device, dtype: torch.dtype) -> None:
    x = every_bfloat16().view(dtype)
    assert same(apply(to_float32_kernel, device, x, out=torch.float32), x.float())


def test_the_larger_of_two_is_nan_if_one_is(device: torch.device) -> None:
    values = torch.tensor([0.0, 1.0, 2.0**-149, 3e38, torch.inf, torch.nan])
    x, y = values.repeat(values.numel()), values.repeat_interleave(values.numel())
    assert same(apply(larger_kernel, device, x, y, out=torch.float32), torch.maximum(x, y))


@pytest.mark.parametrize("native", NATIVE)
def test_the_larger_of_two_pairs(device: torch.device, native: bool) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-133, -3e38, torch.inf, -torch.inf, torch.nan]).bfloat16().float()
    x, y, z = (one.reshape(-1) for one in torch.meshgrid(values, values, values, indexing="ij"))
    expected = torch.maximum(torch.maximum(x.abs(), y.abs()), z.abs())
    for found in apply_all(larger_pair_kernel, device, x, y, z, out=[torch.float32] * 2, NATIVE=native):
        assert same(found, expected)


def test_the_amax_of_blocks(device: torch.device) -> None:
    x = torch.randn(SIZE, BLOCK, generator=torch.Generator().manual_seed(2))
    for row, value in enumerate((0.0, torch.inf, -torch.inf, torch.nan, -(2.0**-149), 3.4e38)):
        x[row] = 0.0 if row < 5 else x[row]
        x[row, 3 * row] = value
    out = torch.empty(SIZE, dtype=torch.int32, device=device)
    block_amax_kernel[(1,)](x.to(device), out, SIZE=SIZE * BLOCK)
    assert same(out.cpu().view(torch.float32), x.abs().amax(1))


MAGNITUDES = torch.cat([torch.tensor([0.0, torch.inf, torch.nan, 3.4e38]), 2.0 ** torch.arange(-149.0, 128.0, 0.5)])
"""Every binade of float32, subnormals too."""


def test_encode_scale_agrees(device: torch.device) -> None:
    found = apply(encode_scale_kernel, device, MAGNITUDES, out=torch.float32)
    assert same(found, numerics.encode_scale(MAGNITUDES))


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-40, 1e-36, 0.37, 1.0, 1e5, 3.4e38, torch.nan])
def test_block_scale_agrees(device: torch.device, amax: float, native: bool) -> None:
    """For blocks of any magnitude: one of 16 equal elements has their scale and multiplier."""
    encode = numerics.encode_scale(torch.tensor(amax)).expand(MAGNITUDES.shape).contiguous()
    found = apply_all(block_scale_kernel, device, MAGNITUDES, encode, out=[torch.int32, torch.float32], NATIVE=native)
    blocks = MAGNITUDES[:, None].expand(-1, BLOCK)
    _, scales = numerics.block_codes(blocks, torch.tensor(amax), ROW_BLOCK)
    assert torch.equal(found[0], scales.view(torch.uint8)[:, 0].int())
    values = torch.reciprocal(scales.float() * torch.reciprocal(numerics.encode_scale(torch.tensor(amax))))
    assert same(found[1], torch.clamp(values[:, 0], max=FP32_MAX))


@pytest.mark.parametrize("signs", [DEFAULT_SIGNS, signs_from_seed(5)])
def test_rotation_agrees(device: torch.device, signs: tuple[int, ...]) -> None:
    """Over so wide a range that another order of summation would be seen."""
    x = (
        torch.randn(2 * SIZE, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-12, 12, 37, base=2).repeat(56)[: 2 * SIZE]
    )
    negative = sum(1 << place for place, sign in enumerate(signs) if sign < 0)
    found = apply(rotate_kernel, device, x, out=torch.float32, SIGNS=negative)
    assert same(found, numerics.rotate(x.reshape(-1, BLOCK), signs).float().flatten())


@pytest.mark.parametrize("special", [1.0, 3e38, torch.inf, torch.nan])
def test_the_amax_of_several_programs(device: torch.device, special: float) -> None:
    x = torch.rand(5 * SIZE, generator=torch.Generator().manual_seed(2))
    x[2345] = special
    amax = torch.zeros((), device=device)
    raise_amax_kernel[(5,)](x.to(device), amax, SIZE=SIZE)
    assert same(amax.cpu(), x.amax())


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("rows, columns", [(8, 64), (5, 39), (1, 1)])
def test_blocks_are_loaded_whatever_the_width(device: torch.device, width: int, rows: int, columns: int) -> None:
    """And nothing beyond rows and columns is read. A tile that lies wholly within needs no mask."""
    x = torch.full((8, 70), torch.nan)
    x[:rows, :columns] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    out = torch.empty(8, 64, device=device)
    load_blocks_kernel[(1,)](x.to(device), out, rows, columns, 70, WIDTH=width, EVEN=(rows, columns) == (8, 64))
    expected = torch.zeros(8, 64)
    expected[:rows, :columns] = x[:rows, :columns]
    assert same(out.cpu(), expected)


@pytest.mark.parametrize("kernel", [random_bytes_kernel, random_byte_kernel], ids=["a block", "one by one"])
@pytest.mark.parametrize("seed", [0, 1, -1, 0x123456789ABCDEF, -(1 << 63), 1 << 32])
@pytest.mark.parametrize("stream", [0, 7, 1 << 20])
def test_random_bytes_are_those_of_the_reference(device: torch.device, seed: int, stream: int, kernel: Any) -> None:
    """Block numbers on both sides of 32 bits, and far above."""
    count = SIZE // BLOCK
    block = torch.cat([torch.arange(start, start + count // 2) for start in ((1 << 32) - 9, 1 << 40)])
    out = torch.empty(count, BLOCK, dtype=torch.uint8, device=device)
    key = torch.tensor(seed, dtype=torch.int64)
    kernel[(1,)](key.to(device), block.to(device), stream, out, SIZE=SIZE)
    zero = torch.zeros_like(block)
    words = torch.stack(philox.philox(key, (block & philox.MASK, block >> 32, zero + stream, zero)), dim=-1)
    expected = (words.unsqueeze(-1) >> torch.arange(0, 32, 8)) & 0xFF
    assert torch.equal(out.cpu(), expected.flatten(-2).to(torch.uint8))
