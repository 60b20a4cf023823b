# mypy: allow-untyped-defs
# (Triton compiles these functions from their source; their arguments are not Python values.)
"""E2M1 on a tile in registers: rounding to it, to nearest and by random bytes, and codes two to a byte.

As in `device_math`, each equals its namesake in `nvfp4c.numerics` bit for bit. For chips that convert to E2M1
themselves see `native_math`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4c import formats
from nvfp4c.codegen.device_math import E2M1_MAX, INTERPRETED, bits_float, float_bits, random_byte, settle_names

TWO_TO_126 = tl.constexpr(2.0**126)
TWO_TO_MINUS_126 = tl.constexpr(2.0**-126)
SUBNORMAL_MAX = tl.constexpr(formats.E2M1_MAX * 2.0**-126)
"""Of E2M1 numbers times 2^-126.

So scaled, those below 1 are float32's subnormals, and bits grow by 2^22 from code to code. Such a product is rounded to
a multiple of 2^-149, ties to even, just as the sum with 1 that `numerics.encode_e2m1` takes below 1 rounds to 2^-23.
"""

TWO_BYTES = tl.constexpr("=h" + 8 * ",r")
"""Of what `_assembled_bytes` gives."""


def _assembled_bytes(codes: int) -> tl.constexpr:
    """Assembly of two bytes of two codes each: from two numbers each that hold the lower and the upper codes in byte
    `codes`, and two float32 each that have their signs."""
    byte, sign = f"0x00{4 + codes}{codes}", "0x0073"
    lines = [
        f"prmt.b32 low, $1, $2, {byte}; prmt.b32 high, $3, $4, {byte}; shl.b32 high, high, 4; add.u32 low, low, high;",
        f"prmt.b32 high, $5, $6, {sign}; shr.u32 high, high, 4; and.b32 high, high, 0x0808; or.b32 low, low, high;",
        f"prmt.b32 high, $7, $8, {sign}; and.b32 high, high, 0x8080; or.b32 low, low, high; cvt.u16.u32 $0, low;",
    ]
    return tl.constexpr("{ .reg .b32 low, high; " + " ".join(lines) + " }")


CODES_IN_BYTE_0, CODES_IN_BYTE_3 = _assembled_bytes(0), _assembled_bytes(3)


@triton.jit
def e2m1_value(code):
    """float32 value of an E2M1 code (int32; bits above the fourth are ignored)."""
    # Aligned with a float32's exponent and fraction, the bits stand for the value times 2^(1 - 127).
    return bits_float(((code & 7) << 22) | ((code & 8) << 28)) * TWO_TO_126


@triton.jit
def clamped(y, LIMIT: tl.constexpr, NATIVE: tl.constexpr):
    """float32 y clamped to [-LIMIT, LIMIT], with the sign of y."""
    if NATIVE and not INTERPRETED:
        y = tl.inline_asm_elementwise(
            "min.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [y, LIMIT], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
    return y


@triton.jit
def _nearest_bits(y):
    """int32 whose lowest byte is the nearest E2M1 code of |float32 y| clamped to 6."""
    magnitude = tl.minimum(tl.abs(y), E2M1_MAX)
    # Codes are linear in the magnitude within [0, 2), [2, 4) and [4, 6], with slopes 2, 1 and 0.5, so a code is the
    # least of three lines. Floats near 1.5 * 2^23 are 1 apart: each sum rounds once, to an integer, ties to even, and
    # lies in the lowest bits.
    first = tl.fma(magnitude, 2.0, 12582912.0)
    second = magnitude + 12582914.0
    third = tl.fma(magnitude, 0.5, 12582916.0)
    return float_bits(tl.minimum(tl.minimum(first, second), third))


@triton.jit
def e2m1_code(y):
    """E2M1 code (int32) of float32 y clamped to [-6, 6], nearest: the rules of `numerics.encode_e2m1`."""
    return (_nearest_bits(y) & 7) + tl.where(y < 0, 8, 0)


@triton.jit
def e2m1_rounded(y, NATIVE: tl.constexpr):
    """float32 y clamped to [-6, 6] and rounded to the nearest E2M1 value, ties to even code; zeros are positive."""
    y = clamped(y, E2M1_MAX, NATIVE)
    # Around 1.5 * 2^22 times a power of two, floats are half of it apart: so far apart are E2M1 values within a binade,
    # and below 1.
    binade = bits_float(float_bits(tl.maximum(tl.abs(y), 1.0)) & 0x7F800000)
    return tl.fma(binade, -6291456.0, tl.fma(binade, 6291456.0, y))


@triton.jit
def _stochastic_gap(random):
    """What to add to such bits: up goes what exceeds (random + 0.5) / 256 of the gap between codes."""
    return 0x3FDFFF - (random << 14)


@triton.jit
def e2m1_stochastic_code(y, random):
    """E2M1 code (int32) of float32 y clamped to [-6, 6], rounded up or down by a random byte: see `encode_e2m1`."""
    bits = float_bits(tl.minimum(tl.abs(y) * TWO_TO_MINUS_126, SUBNORMAL_MAX)) + _stochastic_gap(random)
    return (bits >> 22) + tl.where(y < 0, 8, 0)


@triton.jit
def e2m1_stochastic_rounded(y, random, NATIVE: tl.constexpr):
    """The value of `e2m1_stochastic_code`, float32, with the sign of y."""
    bits = float_bits(clamped(y * TWO_TO_MINUS_126, SUBNORMAL_MAX, NATIVE)) + _stochastic_gap(random)
    return bits_float(bits & -0x400000) * TWO_TO_126


@triton.jit
def e2m1_bytes(low, high):
    """Bytes of two nearest E2M1 codes each, uint8: `e2m1_code` of float32 low and, above it, of high."""
    if INTERPRETED:
        both = (e2m1_code(low) + 16 * e2m1_code(high)).to(tl.uint8)
    else:
        # -0.0 has code 0, and is 0.0 when 0.0 is added; all else keeps its sign.
        both = tl.inline_asm_elementwise(
            CODES_IN_BYTE_0,
            TWO_BYTES,
            [_nearest_bits(low), _nearest_bits(high), low + 0.0, high + 0.0],
            dtype=tl.uint8,
            is_pure=True,
            pack=2,
        )
    return both


@triton.jit
def e2m1_stochastic_bytes(low, high, word, INDEX: tl.constexpr):
    """Bytes of two E2M1 codes each, uint8: `e2m1_stochastic_code` of float32 low by byte INDEX of random words, and,
    above it, of high by the next."""
    if INTERPRETED:
        first = e2m1_stochastic_code(low, random_byte(word, INDEX))
        both = (first + 16 * e2m1_stochastic_code(high, random_byte(word, INDEX + 1))).to(tl.uint8)
    else:
        # A sum with 0.0 makes 0.0 of -0.0, whose code is 0, but leaves what is too small its sign.
        low = tl.fma(low, TWO_TO_MINUS_126, 0.0)
        high = tl.fma(high, TWO_TO_MINUS_126, 0.0)
        both = tl.inline_asm_elementwise(
            CODES_IN_BYTE_3,
            TWO_BYTES,
            [
                4 * float_bits(tl.minimum(tl.abs(low), SUBNORMAL_MAX)) + _random_gap(word, INDEX),
                4 * float_bits(tl.minimum(tl.abs(high), SUBNORMAL_MAX)) + _random_gap(word, INDEX + 1),
                low,
                high,
            ],
            dtype=tl.uint8,
            is_pure=True,
            pack=2,
        )
    return both


@triton.jit
def _random_gap(word, INDEX: tl.constexpr):
    """4 * `_stochastic_gap` of byte INDEX of random words, in one instruction."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0x7FFC, $2;", "=r,r,r", [~word, 0x7054 + 256 * INDEX], dtype=tl.int32, is_pure=True, pack=1
    )


settle_names(globals())
