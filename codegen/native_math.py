# mypy: allow-untyped-defs
# (Triton compiles these functions from their source; their arguments are not Python values.)
"""Packed E2M1 codes, eight to a word: by the instructions of sm_100 and newer, and where they lack by `e2m1`.

Either way they are the same. NATIVE: what the chip converts itself, as in `chips`.

Source: the PTX ISA, `cvt`. `cvt.rn.satfinite.e2m1x2` needs PTX 8.6 and sm_100, 103, 110 or 120. It rounds to nearest,
ties to even, saturates at 6 and gives code 7 for NaN, all as `numerics.encode_e2m1` does; but it keeps the sign of
-0.0, which in our contract has code 0. Adding +0.0 first makes +0.0 of it and leaves every other number as it is.

`cvt.rs.satfinite.e2m1x4` needs PTX 8.7 and sm_100 or sm_103: sm_120 and sm_121 lack it. It adds a random byte to the
bits that rounding discards, and rounds away from zero if that carries. In units of 1/256 of the gap between codes, with
f the distance from the lower one: up if floor(f) + byte >= 256. Taken as it is this is biased towards zero, by 1/512 of
the gap on average. Ours is up if f > byte + 1/2. So the magnitude is raised by just under half a unit and the byte
replaced by 255 - byte; then floor(f + 1/2 - tiny) >= byte + 1 says the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4c.codegen import chips
from nvfp4c.codegen.device_math import random_byte
from nvfp4c.codegen.e2m1 import e2m1_code, e2m1_stochastic_code

NEAREST, STOCHASTIC = tl.constexpr(chips.NEAREST), tl.constexpr(chips.STOCHASTIC)


@triton.jit
def _convert_nearest(y0, y1, y2, y3, y4, y5, y6, y7):
    """`nearest_word` by `cvt.rn`."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b8 byte<4>;
        cvt.rn.satfinite.e2m1x2.f32 byte0, $2, $1;
        cvt.rn.satfinite.e2m1x2.f32 byte1, $4, $3;
        cvt.rn.satfinite.e2m1x2.f32 byte2, $6, $5;
        cvt.rn.satfinite.e2m1x2.f32 byte3, $8, $7;
        mov.b32 $0, {byte0, byte1, byte2, byte3};
        }
        """,
        "=r,f,f,f,f,f,f,f,f",
        [y0 + 0.0, y1 + 0.0, y2 + 0.0, y3 + 0.0, y4 + 0.0, y5 + 0.0, y6 + 0.0, y7 + 0.0],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def raise_to_carry(y):
    """float32 y, farther from 0 by just less than 1/512 of the gap between the codes around it; +0.0 for -0.0.

    Below 1 it is first rounded to a multiple of 2^-23, by adding 1, as `numerics.encode_e2m1` does. The last sum is
    rounded towards zero, so it reaches a multiple of 1/256 of the gap only if the exact sum does.
    """
    y = y + 0.0
    bits = y.to(tl.int32, bitcast=True)
    sign = bits & -0x80000000
    # Above 1 the gap is half of 1, 2 or 4, the largest power of two not above the magnitude. One less than the bits of
    # its 1/1024 is the next smaller float. Below 1 the gap is 1/2, and the float is 2^-10 - 2^-24 - 1.
    above = (bits & 0x7F800000) - 0x05000001
    below = tl.abs(y) < 1.0
    lift = tl.where(below, 0x3F800000, 0) | sign
    step = tl.where(below, -0x40803FFF, above) ^ sign
    return tl.inline_asm_elementwise(
        "add.rz.f32 $0, $1, $2;",
        "=f,f,f",
        [y + lift.to(tl.float32, bitcast=True), step.to(tl.float32, bitcast=True)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _convert_stochastic(y0, y1, y2, y3, y4, y5, y6, y7, low, high):
    """`stochastic_word` by `cvt.rs`.

    The PTX ISA gives the operands e and f (here the elements 1 and 0) the lower bytes
    of a random word's two halves, and a and b (3 and 2) the upper bytes; `prmt` moves our bytes there. That the higher
    half is the one of e and of a is inferred from the 16-bit formats, for the text leaves it open. Were it the lower,
    each element would be rounded with its neighbour's byte: as random as before, but not the reference's.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b16 half<2>;
        .reg .b32 random<2>;
        not.b32 random0, $9;
        not.b32 random1, $10;
        prmt.b32 random0, random0, 0, 0x3120;
        prmt.b32 random1, random1, 0, 0x3120;
        cvt.rs.satfinite.e2m1x4.f32 half0, {$4, $3, $2, $1}, random0;
        cvt.rs.satfinite.e2m1x4.f32 half1, {$8, $7, $6, $5}, random1;
        mov.b32 $0, {half0, half1};
        }
        """,
        "=r,f,f,f,f,f,f,f,f,r,r",
        [
            raise_to_carry(y0),
            raise_to_carry(y1),
            raise_to_carry(y2),
            raise_to_carry(y3),
            raise_to_carry(y4),
            raise_to_carry(y5),
            raise_to_carry(y6),
            raise_to_carry(y7),
            low,
            high,
        ],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _word(q0, q1, q2, q3, q4, q5, q6, q7):
    low = q0 | (q1 << 4) | (q2 << 8) | (q3 << 12)
    return low | (q4 << 16) | (q5 << 20) | (q6 << 24) | (q7 << 28)


@triton.jit
def nearest_word(y0, y1, y2, y3, y4, y5, y6, y7, NATIVE: tl.constexpr):
    """int32 words of the nearest codes of eight float32 tensors, y0's in the lowest four bits."""
    if NATIVE >= NEAREST:
        word = _convert_nearest(y0, y1, y2, y3, y4, y5, y6, y7)
    else:
        word = _word(
            e2m1_code(y0),
            e2m1_code(y1),
            e2m1_code(y2),
            e2m1_code(y3),
            e2m1_code(y4),
            e2m1_code(y5),
            e2m1_code(y6),
            e2m1_code(y7),
        )
    return word


@triton.jit
def stochastic_word(y0, y1, y2, y3, y4, y5, y6, y7, low, high, NATIVE: tl.constexpr):
    """int32 words of the stochastic codes of eight float32 tensors; element e takes byte e % 4 of `low`, then `high`.

    low, high: 32-bit random words.
    """
    if NATIVE >= STOCHASTIC:
        word = _convert_stochastic(y0, y1, y2, y3, y4, y5, y6, y7, low, high)
    else:
        word = _word(
            e2m1_stochastic_code(y0, random_byte(low, 0)),
            e2m1_stochastic_code(y1, random_byte(low, 1)),
            e2m1_stochastic_code(y2, random_byte(low, 2)),
            e2m1_stochastic_code(y3, random_byte(low, 3)),
            e2m1_stochastic_code(y4, random_byte(high, 0)),
            e2m1_stochastic_code(y5, random_byte(high, 1)),
            e2m1_stochastic_code(y6, random_byte(high, 2)),
            e2m1_stochastic_code(y7, random_byte(high, 3)),
        )
    return word


@triton.jit
def _eighths(y):
    """Float32 [R, B, 16] as eight tensors [R, B, 2]: the elements of each place in a word of eight."""
    y0246, y1357 = tl.split(tl.reshape(y, [y.shape[0], y.shape[1], 2, 2, 2, 2]))
    y04, y26 = tl.split(y0246)
    y15, y37 = tl.split(y1357)
    y0, y4 = tl.split(y04)
    y1, y5 = tl.split(y15)
    y2, y6 = tl.split(y26)
    y3, y7 = tl.split(y37)
    return y0, y1, y2, y3, y4, y5, y6, y7


@triton.jit
def nearest_words(y, NATIVE: tl.constexpr):
    """int32 [R, B, 2] of the nearest codes of float32 y [R, B, 16]: 8 a word, the first in the lowest bits."""
    y0, y1, y2, y3, y4, y5, y6, y7 = _eighths(y)
    return nearest_word(y0, y1, y2, y3, y4, y5, y6, y7, NATIVE)


@triton.jit
def stochastic_words(y, word0, word1, word2, word3, NATIVE: tl.constexpr):
    """The same for stochastic codes, with the random words [R, B] of each block: see `nvfp4c.philox`."""
    y0, y1, y2, y3, y4, y5, y6, y7 = _eighths(y)
    low, high = tl.join(word0, word2), tl.join(word1, word3)
    return stochastic_word(y0, y1, y2, y3, y4, y5, y6, y7, low, high, NATIVE)
