# mypy: allow-untyped-defs
# (Triton compiles these functions from their source; their arguments are not Python values.)
"""NVFP4 arithmetic on a tile in registers: the functions that the Triton kernels are made of.

Each equals its namesake in `nvfp4c.numerics` bit for bit, on every GPU and in Triton's interpreter. For that reason
conversions are integer arithmetic on a float's bits: sm_80 has no E4M3 conversion, and the interpreter truncates to
bfloat16 where a GPU rounds. Tiles are [R, B, 16]: R rows of B blocks of 16 elements along the contraction axis.

What a compiler could change, and why it does not: kernels are launched with `enable_fp_fusion=False`, so no product is
merged with a sum into one operation that rounds once instead of twice; `/` is written `div_rn`, which is correctly
rounded; and multiplication, addition and `div_rn` keep subnormals. The tests read all three off the assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4c import formats

FP32_MAX = tl.constexpr(formats.FP32_MAX)
GLOBAL_MAX = tl.constexpr(formats.GLOBAL_MAX)
E2M1_MAX = tl.constexpr(formats.E2M1_MAX)
E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
HADAMARD_NORM = tl.constexpr(formats.HADAMARD_NORM)
TWO_TO_120 = tl.constexpr(2.0**120)
TWO_TO_126 = tl.constexpr(2.0**126)


@triton.jit
def float_bits(x):
    """int32 bits of float32 x. For x >= 0 they are ordered as the numbers are, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(bits):
    """float32 with these int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _widen_bfloat16(x):
    return bits_float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def to_float32(x):
    """float32 of a float32, bfloat16 or float16 x."""
    return _widen_bfloat16(x) if x.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def round_bfloat16(x):
    """float32 x rounded to the nearest bfloat16, ties to even, as float32; every NaN becomes 0x7FC0."""
    bits = float_bits(x)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return bits_float(tl.where(x == x, rounded, 0x7FC00000) & -0x10000)


@triton.jit
def to_bfloat16(x):
    """bfloat16 of a float32 x that has such a value."""
    return (float_bits(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def e4m3_byte(x):
    """E4M3 byte (int32) of float32 x in [0, 448]: nearest, ties to even, 0x7F for NaN."""
    bits = float_bits(x)
    exponent = bits >> 23
    significand = (bits & 0x7FFFFF) | 0x800000
    # Bits to drop: 20, and more below 2^-6 (biased exponent 121), where E4M3 numbers stay 2^-9 apart. Dropping 25
    # leaves nothing, as is right for all below 2^-10; so float32 subnormals, which lack the leading 1, do not matter.
    drop = tl.minimum(tl.maximum(141 - exponent, 20), 25)
    half = (1 << (drop - 1)) - 1 + ((significand >> drop) & 1)
    byte = ((significand + half) >> drop) + 8 * tl.maximum(exponent - 121, 0)
    return tl.where(x == x, byte, 0x7F)


@triton.jit
def e4m3_value(byte):
    """float32 value of an E4M3 byte (int32)."""
    # Aligned with a float32's exponent and fraction, the bits stand for the value times 2^(7 - 127).
    value = bits_float(((byte & 0x7F) << 20) | ((byte & 0x80) << 24)) * TWO_TO_120
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e2m1_value(code):
    """float32 value of an E2M1 code (int32; bits above the fourth are ignored)."""
    # Aligned with a float32's exponent and fraction, the bits stand for the value times 2^(1 - 127).
    return bits_float(((code & 7) << 22) | ((code & 8) << 28)) * TWO_TO_126


@triton.jit
def e2m1_code(y, random, STOCHASTIC: tl.constexpr):
    """E2M1 code (int32) of float32 y clamped to [-6, 6]; random: a byte for each y, used if STOCHASTIC.

    The rules, special values included, are those of `numerics.encode_e2m1`.
    """
    magnitude = tl.abs(y)
    magnitude = tl.where(magnitude < E2M1_MAX, magnitude, E2M1_MAX)
    # Codes are linear in the magnitude within [0, 2), [2, 4) and [4, 6]; `binade` is the float32 1, 2 or 4 there, and
    # subtracting its bits from infinity's gives the slope 2, 1 or 0.5.
    binade = tl.maximum(float_bits(magnitude), 0x3F800000) & 0x7F800000
    position = magnitude * bits_float(0x7F800000 - binade)
    if STOCHASTIC:
        code = position.to(tl.int32)
        above = (position - code.to(tl.float32)) * 256.0 > random.to(tl.float32) + 0.5
        code += above.to(tl.int32)
    else:
        # Floats near 1.5 * 2^23 are 1 apart: this addition rounds to an integer, ties to even, in the lowest bits.
        code = float_bits(position + 12582912.0) - 0x4B400000
    offset = (binade >> 22) - 254
    return code + offset + tl.where(y < 0, 8, 0)


@triton.jit
def encode_scale(amax):
    """S_enc of a tensor with this amax, both float32: see `numerics.encode_scale`."""
    scale = tl.math.div_rn(GLOBAL_MAX, amax)
    scale = tl.where(scale > FP32_MAX, FP32_MAX, scale)
    scale = tl.where(amax == 0.0, 1.0, scale)
    return tl.where(amax <= FP32_MAX, scale, float("nan"))


@triton.jit
def block_scale(block_amax, encode):
    """E4M3 bytes (int32) of the scales of blocks with these amax, and what their elements are multiplied by."""
    scale = block_amax * (encode * (1 / E2M1_MAX))
    byte = e4m3_byte(tl.where(scale > E4M3_MAX, E4M3_MAX, scale))
    multiplier = tl.math.div_rn(1.0, e4m3_value(byte) * tl.math.div_rn(1.0, encode))
    return byte, tl.where(multiplier > FP32_MAX, FP32_MAX, multiplier)


@triton.jit
def rotate(x, signs):
    """Random Hadamard transform of each 16 elements of float32 x [R, B, 16], rounded to bfloat16, as float32.

    signs: an int whose bit e is set where element e changes its sign. Sums are taken in the order of `numerics.rotate`.
    """
    negative = (signs >> tl.arange(0, 16)) & 1
    x = x * (1 - 2 * negative).to(tl.float32)[None, None, :]
    # A step adds and subtracts neighbours and puts the sums before the differences, which moves the next stride's
    # pairs together: four steps are the strides 1, 2, 4 and 8, after which every element is back in its place.
    for _ in tl.static_range(4):
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 8, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 1, 3, 2]), x.shape)
    return round_bfloat16(x * HADAMARD_NORM)


@triton.jit
def random_bytes(seed, block, stream):
    """Random bytes [R, B, 16] for the blocks with these int64 numbers [R, B]: see `nvfp4c.philox`."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    word0, word1, word2, word3 = tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero)
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [block.shape[0], block.shape[1], 4])
    shifts = (8 * tl.arange(0, 4)).to(tl.uint32)
    octets = (words[:, :, :, None] >> shifts[None, None, None, :]) & 0xFF
    return tl.reshape(octets, [block.shape[0], block.shape[1], 16])


@triton.jit
def pack_words(codes):
    """int32 [R, B, 2] of codes [R, B, 16]: 8 codes a word, the first in the lowest bits, as in `numerics.pack`."""
    placed = tl.reshape(codes, [codes.shape[0], codes.shape[1], 2, 8]) << (4 * tl.arange(0, 8))
    return tl.sum(placed, 3)


@triton.jit
def unpack_words(words):
    """Inverse of `pack_words`, with other bits left above each code's four."""
    codes = words[:, :, :, None] >> (4 * tl.arange(0, 8))[None, None, None, :]
    return tl.reshape(codes, [words.shape[0], words.shape[1], 16])
