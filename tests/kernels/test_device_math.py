"""The helpers of the Triton kernels, each alone and on all its inputs where possible, against torch and numerics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4c import numerics, philox
from nvfp4c.codegen import device_math
from nvfp4c.formats import BLOCK, E2M1_MAX, E4M3_MAX

SIZE = 1024

e4m3_byte = device_math.e4m3_byte
e4m3_value = device_math.e4m3_value
e2m1_code = device_math.e2m1_code
e2m1_value = device_math.e2m1_value
pack_words = device_math.pack_words
random_bytes = device_math.random_bytes
round_bfloat16 = device_math.round_bfloat16
to_bfloat16 = device_math.to_bfloat16
to_float32 = device_math.to_float32
unpack_words = device_math.unpack_words


@triton.jit
def place_of(SIZE: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def e4m3_byte_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, e4m3_byte(tl.load(x + place)))


@triton.jit
def e4m3_value_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, e4m3_value(tl.load(x + place)))


@triton.jit
def e2m1_value_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, e2m1_value(tl.load(x + place)))


@triton.jit
def e2m1_nearest_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, e2m1_code(tl.load(x + place), None, False))


@triton.jit
def e2m1_stochastic_kernel(x, random, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, e2m1_code(tl.load(x + place), tl.load(random + place), True))


@triton.jit
def round_bfloat16_kernel(x, rounded, narrow, SIZE: tl.constexpr):
    place = place_of(SIZE)
    value = round_bfloat16(tl.load(x + place))
    tl.store(rounded + place, value)
    tl.store(narrow + place, to_bfloat16(value))


@triton.jit
def to_float32_kernel(x, out, SIZE: tl.constexpr):
    place = place_of(SIZE)
    tl.store(out + place, to_float32(tl.load(x + place)))


@triton.jit
def pack_words_kernel(codes, words, back, SIZE: tl.constexpr):
    place = (place_of(SIZE // 16) * 16)[:, None, None] + tl.arange(0, 16)[None, None, :]
    packed = pack_words(tl.load(codes + place))
    tl.store(words + (place_of(SIZE // 16) * 2)[:, None, None] + tl.arange(0, 2)[None, None, :], packed)
    tl.store(back + place, unpack_words(packed) & 15)


@triton.jit
def random_bytes_kernel(seed, block, stream, out, SIZE: tl.constexpr):
    place = place_of(SIZE // 16)
    octets = random_bytes(tl.load(seed), tl.load(block + place)[:, None], stream)
    tl.store(out + (place * 16)[:, None, None] + tl.arange(0, 16)[None, None, :], octets)


def apply(kernel: Any, device: torch.device, *inputs: Tensor, out: torch.dtype) -> Tensor:
    """An elementwise kernel's result for equally long inputs, on the CPU."""
    count = inputs[0].numel()
    missing = -count % SIZE
    padded = [torch.nn.functional.pad(given, (0, missing)).to(device) for given in inputs]
    result = torch.empty(count + missing, dtype=out, device=device)
    kernel[((count + missing) // SIZE,)](*padded, result, SIZE=SIZE, enable_fp_fusion=False)
    return result[:count].cpu()


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


def test_e4m3_byte_agrees_on_both_sides_of_every_midpoint(device: torch.device) -> None:
    """Rounding is monotonic and constant between midpoints, so these inputs stand for all in [0, 448]."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    edges = around(torch.cat([values, (values[1:] + values[:-1]) / 2]))
    tiny = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 2.0**-30, torch.nan])
    x = torch.cat([edges[(edges >= 0) & (edges <= E4M3_MAX)], tiny])
    expected = torch.where(x.isnan(), 0x7F, x.to(torch.float8_e4m3fn).view(torch.uint8).int())
    assert torch.equal(apply(e4m3_byte_kernel, device, x, out=torch.int32), expected)


def test_e4m3_byte_agrees_on_every_bfloat16(device: torch.device) -> None:
    x = every_bfloat16().float()
    x = x[~x.signbit() & (x <= E4M3_MAX)]
    expected = x.to(torch.float8_e4m3fn).view(torch.uint8).int()
    assert torch.equal(apply(e4m3_byte_kernel, device, x, out=torch.int32), expected)


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


def test_nearest_codes_agree_on_every_bfloat16_and_around_every_tie(device: torch.device) -> None:
    ties = torch.arange(0, 6.5, 0.25)
    x = torch.cat([every_bfloat16().float(), around(torch.cat([ties, -ties])), torch.tensor([1e-45, -1e-45])])
    expected = numerics.encode_e2m1(clamped(x)).int()
    assert torch.equal(apply(e2m1_nearest_kernel, device, x, out=torch.int32), expected)


@pytest.mark.parametrize("low, high", [(0.0, 0.5), (0.5, 1.0), (1.5, 2.0), (2.0, 3.0), (3.0, 4.0), (4.0, 6.0)])
def test_stochastic_codes_agree_around_the_threshold_of_every_byte(
    device: torch.device, low: float, high: float
) -> None:
    random = torch.arange(256)
    edges = low + (high - low) * (random + 0.5) / 256
    x = around(torch.cat([edges, -edges, torch.full_like(edges, low), torch.full_like(edges, high)]))
    octets = random.to(torch.uint8).repeat(x.numel() // 256)
    expected = numerics.encode_e2m1(clamped(x), octets).int()
    found = apply(e2m1_stochastic_kernel, device, x, octets.int(), out=torch.int32)
    assert torch.equal(found, expected)


def test_stochastic_codes_agree_on_special_values(device: torch.device) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-20, 6.0, -6.0, 1e30, torch.inf, -torch.inf, torch.nan])
    x = values.repeat_interleave(256)
    octets = torch.arange(256).to(torch.uint8).repeat(values.numel())
    expected = numerics.encode_e2m1(clamped(x), octets).int()
    found = apply(e2m1_stochastic_kernel, device, x, octets.int(), out=torch.int32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("below", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_round_bfloat16_agrees_for_every_upper_half(device: torch.device, below: int) -> None:
    """below: the lower half of the float32, on, next to and far from the tie."""
    bits = (torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16) | below
    x = bits.view(torch.float32).to(device)
    rounded, narrow = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    round_bfloat16_kernel[(x.numel() // SIZE,)](x, rounded, narrow, SIZE=SIZE, enable_fp_fusion=False)
    expected = x.cpu().to(torch.bfloat16)
    assert same(narrow.cpu(), expected)
    assert same(rounded.cpu(), expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_float32_agrees_on_every_value(device: torch.device, dtype: torch.dtype) -> None:
    x = every_bfloat16().view(dtype)
    assert same(apply(to_float32_kernel, device, x, out=torch.float32), x.float())


def test_words_are_the_packed_bytes(device: torch.device) -> None:
    codes = torch.randint(0, 16, (2 * SIZE,), dtype=torch.int32, device=device)
    words = torch.empty(codes.numel() // 8, dtype=torch.int32, device=device)
    back = torch.empty_like(codes)
    pack_words_kernel[(2,)](codes, words, back, SIZE=SIZE)
    assert torch.equal(words.view(torch.uint8), numerics.pack(codes.to(torch.uint8)))
    assert torch.equal(back, codes)


@pytest.mark.parametrize("seed", [0, 1, -1, 0x123456789ABCDEF, -(1 << 63), 1 << 32])
@pytest.mark.parametrize("stream", [0, 7, 1 << 20])
def test_random_bytes_are_those_of_the_reference(device: torch.device, seed: int, stream: int) -> None:
    """Block numbers on both sides of 32 bits, and far above."""
    count = SIZE // BLOCK
    block = torch.cat([torch.arange(start, start + count // 2) for start in ((1 << 32) - 9, 1 << 40)])
    out = torch.empty(count, BLOCK, dtype=torch.uint8, device=device)
    key = torch.tensor(seed, dtype=torch.int64)
    random_bytes_kernel[(1,)](key.to(device), block.to(device), stream, out, SIZE=SIZE)
    zero = torch.zeros_like(block)
    words = torch.stack(philox.philox(key, (block & philox.MASK, block >> 32, zero + stream, zero)), dim=-1)
    expected = (words.unsqueeze(-1) >> torch.arange(0, 32, 8)) & 0xFF
    assert torch.equal(out.cpu(), expected.flatten(-2).to(torch.uint8))
