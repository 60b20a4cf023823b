"""Conversion to E2M1 by the GPU's own instructions.

No machine without them can run them. What their manual says of `cvt.rs` is modelled here, and the model with our
preparation agrees with numerics for every random byte; the preparation itself runs on any GPU; and a GPU that has the
instructions compares them with numerics directly.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4c import numerics
from nvfp4c.codegen import block_scaled_gemm, chips, native_math
from nvfp4c.formats import E2M1_MAX

INTERPRETED = bool(block_scaled_gemm.INTERPRETED)
HERE = chips.conversions(torch.cuda.get_device_capability()) if torch.cuda.is_available() and not INTERPRETED else 0
GAPS = [(0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.5, 2.0), (2.0, 3.0), (3.0, 4.0), (4.0, 6.0)]

nearest_words = native_math.nearest_words
raise_to_carry = native_math.raise_to_carry
stochastic_words = native_math.stochastic_words


def convert_with_carry(y: Tensor, octets: Tensor) -> Tensor:
    """Codes that `cvt.rs.satfinite` gives for float32 y and a random byte each, as the PTX ISA describes it.

    Away from zero if adding the byte to the discarded bits of the mantissa carries. A byte meets the highest eight.
    """
    magnitude = torch.where(y.isnan(), E2M1_MAX, y.abs().clamp(max=E2M1_MAX))
    slope = torch.where(magnitude < 2, 2.0, torch.where(magnitude < 4, 1.0, 0.5))
    offset = torch.where(magnitude < 2, 0, torch.where(magnitude < 4, 2, 4))
    position = magnitude * slope
    below = position.floor()
    discarded = ((position - below) * 256).floor()
    carry = discarded + octets.float() >= 256
    negative = y.signbit() & ~y.isnan()
    return (below.int() + offset + carry.int() + 8 * negative.int()).to(torch.uint8)


def add_towards_zero(x: Tensor, y: Tensor) -> Tensor:
    """float32 x + y, truncated. The sums of this file fit into float64, or lie far from a float32."""
    exact = x.double() + y.double()
    nearest = exact.float()
    too_far = nearest.double().abs() > exact.abs()
    return torch.where(too_far, torch.nextafter(nearest, torch.zeros(())), nearest)


def raised(y: Tensor) -> Tensor:
    """What `raise_to_carry` computes."""
    y = y + 0.0
    sign = torch.where(y < 0, -1.0, 1.0)
    binade = torch.exp2(y.abs().clamp(min=1).log2().floor())
    step = torch.nextafter(binade / 1024, torch.zeros(()))
    below = y.abs() < 1
    lifted = torch.where(below, y + sign, y)
    return add_towards_zero(lifted, sign * torch.where(below, 2.0**-10 - 2.0**-24 - 1, step))


def clamped(x: Tensor) -> Tensor:
    return torch.clamp(x, -E2M1_MAX, E2M1_MAX)


def around(x: Tensor) -> Tensor:
    up, down = (torch.nextafter(x, torch.full_like(x, end)) for end in (torch.inf, -torch.inf))
    return torch.cat([down, x, up])


def every_bfloat16() -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def special_values() -> Tensor:
    return torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-20, 2.0**-11, 1 - 2.0**-24, 6.0, -6.0, torch.nan])


def inputs() -> Tensor:
    """Both sides of every byte's threshold in every gap, all bfloat16 in range, and what is special."""
    edges = [low + (high - low) * (torch.arange(256) + 0.5) / 256 for low, high in GAPS]
    ends = torch.tensor([end for gap in GAPS for end in gap])
    positive = around(torch.cat([*edges, ends]))
    return torch.cat([positive, -positive, clamped(every_bfloat16()), special_values()])


def test_the_prepared_instruction_would_round_as_the_reference() -> None:
    y = inputs()
    for octet in range(256):
        octets = torch.full_like(y, octet, dtype=torch.uint8)
        assert torch.equal(convert_with_carry(raised(y), 255 - octets), numerics.encode_e2m1(y, octets))


def test_the_bare_instruction_is_biased_towards_zero() -> None:
    """By half of 1/256 of the gap on average, which is why there is a preparation."""
    y = 4 + 2 * (torch.arange(1 << 12) + 0.5) / (1 << 12)
    octets = torch.arange(256, dtype=torch.uint8)
    bare = numerics.decode_e2m1(convert_with_carry(y[:, None], octets)).mean()
    prepared = numerics.decode_e2m1(convert_with_carry(raised(y)[:, None], octets)).mean()
    # Means of exact numbers, in float32.
    assert abs(y.mean() - bare - 2 / 512) < 1e-4
    assert abs(y.mean() - prepared) < 1e-4


@triton.jit
def raise_kernel(x, out, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + place, raise_to_carry(tl.load(x + place)))


@triton.jit
def nearest_kernel(x, words, BLOCKS: tl.constexpr):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    y = tl.load(x + block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :])
    tl.store(words + block[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], nearest_words(y, 3))


@triton.jit
def stochastic_kernel(x, random, words, BLOCKS: tl.constexpr):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    y = tl.load(x + block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :])
    first = random + block * 4
    found = stochastic_words(y, tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3), 3)
    tl.store(words + block[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], found)


BLOCKS = 16


def whole_tiles(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % (16 * BLOCKS)))


def packed(kernel: Any, y: Tensor, device: torch.device, *others: Tensor) -> Tensor:
    """The kernel's packed codes of y, as bytes."""
    words = torch.empty(y.numel() // 8, dtype=torch.int32, device=device)
    arguments = [x.to(device) for x in (y, *others)]
    kernel[(y.numel() // (16 * BLOCKS),)](*arguments, words, BLOCKS=BLOCKS, enable_fp_fusion=False)
    return words.cpu().view(torch.uint8)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no assembly")
def test_the_preparation_is_the_modelled_one(device: torch.device) -> None:
    y = whole_tiles(inputs())
    out = torch.empty_like(y, device=device)
    raise_kernel[(y.numel() // 256,)](y.to(device), out, SIZE=256, enable_fp_fusion=False)
    expected, found = raised(y), out.cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int32), expected[number].view(torch.int32))


@pytest.mark.skipif(HERE < chips.NEAREST, reason="needs a GPU that converts to E2M1")
def test_nearest_codes_on_a_gpu_that_has_them(device: torch.device) -> None:
    y = whole_tiles(inputs())
    assert torch.equal(packed(nearest_kernel, y, device), numerics.pack(numerics.encode_e2m1(y)))


@pytest.mark.skipif(HERE < chips.STOCHASTIC, reason="needs a GPU that rounds stochastically")
def test_stochastic_codes_on_a_gpu_that_has_them(device: torch.device) -> None:
    y = whole_tiles(inputs()).repeat(16)
    octets = torch.randint(0, 256, y.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = packed(stochastic_kernel, y, device, octets.view(torch.int32))
    assert torch.equal(found, numerics.pack(numerics.encode_e2m1(y, octets)))
