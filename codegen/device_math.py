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
GLOBAL_SQUARE = tl.constexpr(formats.GLOBAL_MAX * formats.GLOBAL_MAX)
E2M1_MAX = tl.constexpr(formats.E2M1_MAX)
E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
ROUNDS = tl.constexpr(formats.PHILOX_ROUNDS)
HADAMARD_NORM = tl.constexpr(formats.HADAMARD_NORM)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TWO_TO_120 = tl.constexpr(2.0**120)


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
    # Assembly takes two at a time, and a tile's value for its one row is alone.
    if INTERPRETED or x.numel % 2:
        x = bits_float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        x = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return x


@triton.jit
def to_float32(x):
    """float32 of a float32, bfloat16 or float16 x."""
    return _widen_bfloat16(x) if x.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def bfloat16_pair(x, y):
    """float32 x and y rounded to the nearest bfloat16, ties to even, in the halves of an int32, x in the lower one. Two
    at a time: so GPUs convert."""
    if INTERPRETED:
        pair = ((float_bits(_round_bfloat16_bits(x)) >> 16) & 0xFFFF) | float_bits(_round_bfloat16_bits(y))
    else:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )
    return pair


@triton.jit
def halves(pair):
    """The two of a `bfloat16_pair`, as float32."""
    return bits_float(pair << 16), bits_float(pair & -0x10000)


@triton.jit
def larger_pair(a, b, NATIVE: tl.constexpr):
    """The larger magnitudes of two `bfloat16_pair`s, half by half, with any sign; NaN counts as larger than all."""
    if INTERPRETED:
        low_a, high_a = halves(a)
        low_b, high_b = halves(b)
        pair = bfloat16_pair(larger(tl.abs(low_a), tl.abs(low_b)), larger(tl.abs(high_a), tl.abs(high_b)))
    elif NATIVE:
        pair = tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; abs.bf16x2 a, $1; abs.bf16x2 b, $2; max.NaN.bf16x2 $0, a, b; }",
            "=r,r,r",
            [a, b],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return pair


@triton.jit
def larger_half(pair):
    """The larger magnitude of a pair, as float32; NaN counts as larger than all."""
    low, high = halves(pair)
    return larger(tl.abs(low), tl.abs(high))


@triton.jit
def _round_bfloat16_bits(x):
    """For the interpreter, which has no assembly, and whose own conversion truncates."""
    bits = float_bits(x)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return bits_float(tl.where(x == x, rounded, 0x7FC00000) & -0x10000)


@triton.jit
def to_bfloat16(x):
    """bfloat16 of a float32 x that has such a value: nothing is rounded."""
    # The interpreter's own conversion loses subnormals.
    return (float_bits(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True) if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def rounded_bfloat16(x):
    """float32 x rounded to the nearest bfloat16, ties to even, as float32."""
    return _round_bfloat16_bits(x) if INTERPRETED else _widen_bfloat16(x.to(tl.bfloat16))


@triton.jit
def rounded_float16(x):
    """float32 x rounded to the nearest float16, ties to even, as float32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def to_dtype(x, DTYPE: tl.constexpr):
    """A float32 x that has such a value, in DTYPE: nothing is rounded."""
    return to_bfloat16(x) if tl.bfloat16 == DTYPE else x.to(DTYPE)


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
def larger(a, b):
    """The larger of two numbers; NaN counts as larger than all."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """The smaller of two numbers; NaN counts as smaller than all."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    """The hyperbolic tangent, within 3e-6 of its size."""
    # The quotient cancels near 0, where two terms of the series leave a relative error of 2 / 15 * x^4.
    far = 1.0 - tl.math.div_rn(2.0, 1.0 + tl.exp(2.0 * x))
    return tl.where(tl.abs(x) < 0.05, x - x * x * x * (1.0 / 3.0), far)


@triton.jit
def encode_scale(amax):
    """S_enc of a tensor with this amax, both float32: see `numerics.encode_scale`."""
    scale = tl.math.div_rn(GLOBAL_MAX, amax)
    scale = tl.where(scale > FP32_MAX, FP32_MAX, scale)
    scale = tl.where(amax == 0.0, 1.0, scale)
    return tl.where(amax <= FP32_MAX, scale, float("nan"))


@triton.jit
def global_factor(a_amax, b_amax):
    """What a product of two operands' code * scale is multiplied by, float32: see `numerics.global_factor`."""
    return tl.math.div_rn(a_amax * b_amax, GLOBAL_SQUARE)


@triton.jit
def e4m3_byte_native(x):
    """`e4m3_byte` by the conversion of compute capability 8.9 and up."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, $1; cvt.u32.u16 $0, pair; }",
        "=r,f",
        [x],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def block_scale(block_amax, encode, NATIVE: tl.constexpr):
    """E4M3 bytes (int32) of the scales of blocks with these amax, and what their elements are multiplied by."""
    scale = block_amax * (encode * (1 / E2M1_MAX))
    scale = tl.where(scale > E4M3_MAX, E4M3_MAX, scale)
    byte = e4m3_byte_native(scale) if NATIVE else e4m3_byte(scale)
    multiplier = tl.math.div_rn(1.0, e4m3_value(byte) * tl.math.div_rn(1.0, encode))
    return byte, tl.where(multiplier > FP32_MAX, FP32_MAX, multiplier)


@triton.jit
def rotated_pair(total, other):
    """Two sums of 16 signed elements as elements of their rotated blocks: scaled, and a `bfloat16_pair`."""
    return bfloat16_pair(total * HADAMARD_NORM, other * HADAMARD_NORM)


@triton.jit
def rotated(total, other):
    """A `rotated_pair` as float32."""
    return halves(rotated_pair(total, other))


@triton.jit
def rotate(x, SIGNS: tl.constexpr):
    """Random Hadamard transform of each 16 elements of float32 x [R, B, 16], rounded to bfloat16, as float32.

    SIGNS: an int whose bit e is set where element e changes its sign. Sums are taken in the order of `numerics.rotate`.
    """
    negative = (SIGNS >> tl.arange(0, 16)) & 1
    x = x * (1 - 2 * negative).to(tl.float32)[None, None, :]
    # A step adds and subtracts neighbours and puts the sums before the differences, which moves the next stride's
    # pairs together: four steps are the strides 1, 2, 4 and 8, after which every element is back in its place.
    for _ in tl.static_range(4):
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 8, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 1, 3, 2]), x.shape)
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 8, 2]))
    even, odd = rotated(even, odd)
    return tl.reshape(tl.join(even, odd), x.shape)


@triton.jit
def random_words(seed, block, stream):
    """The four uint32 random words of the blocks with these int64 numbers [R, B]: see `nvfp4c.philox`."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero, n_rounds=ROUNDS)


@triton.jit
def spread_like(number, like):
    """int32 `number`, unchanged, but spread over threads as the float32 tile `like` is.

    What is computed from places alone Triton spreads as it pleases, and would pass sixteen tiles of random bytes
    between threads, with two barriers each. An assembly instruction, of which it knows nothing, ties it to `like`.
    """
    if INTERPRETED:
        spread = number
    else:
        spread = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,f", [number, like], dtype=tl.int32, is_pure=True, pack=1
        )
    return spread


@triton.jit
def random_byte(word, INDEX: tl.constexpr):
    """Byte INDEX of random words, the lowest first, as int32."""
    return ((word >> (8 * INDEX)) & 0xFF).to(tl.int32)


@triton.jit
def _split_words(seed, block, stream, COUNT: tl.constexpr):
    """The random words of blocks, uint32 [R, B, 4 * COUNT], each as many times, 32 / COUNT bits lower every time."""
    word0, word1, word2, word3 = random_words(seed, block, stream)
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [block.shape[0], block.shape[1], 4])
    shifts = (32 // COUNT * tl.arange(0, COUNT)).to(tl.uint32)
    parts = words[:, :, :, None] >> shifts[None, None, None, :]
    return tl.reshape(parts, [block.shape[0], block.shape[1], 4 * COUNT])


@triton.jit
def random_bytes(seed, block, stream):
    """Random bytes, int32 [R, B, 16], for the blocks with these int64 numbers [R, B]: see `nvfp4c.philox`."""
    return (_split_words(seed, block, stream, 4) & 0xFF).to(tl.int32)


@triton.jit
def random_pairs(seed, block, stream):
    """uint32 [R, B, 8] whose lower halves are the `random_bytes`, two each."""
    return _split_words(seed, block, stream, 2)


@triton.jit
def block_amax(x):
    """Bits of the largest magnitude of each block of float32 x [R, B, 16], NaN counting as larger than all."""
    return tl.max(float_bits(x) & 0x7FFFFFFF, 2) if INTERPRETED else float_bits(tl.reduce(tl.abs(x), 2, larger))


@triton.jit
def raise_amax(amax, bits):
    """Raise the float32 at `amax`, which starts as 0, to the largest of non-negative floats, given as their bits.

    A maximum does not depend on the order of its operands, so neither does the result on the order of programs.
    """
    largest = tl.max(tl.reshape(bits, [bits.numel]), 0)
    tl.atomic_max(amax.to(tl.pointer_type(tl.int32), bitcast=True), largest, sem="relaxed")


@triton.jit
def load_blocks(
    origin,
    row,
    block,
    rows,
    columns,
    row_stride,
    FROM: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """COUNT elements of each block, float32, starting at FROM: [R, B, COUNT], 0 outside of `rows` and `columns`.

    A thread loads WIDTH elements at a time and so holds whole blocks.
    """
    if COUNT == WIDTH:
        element = FROM + tl.arange(0, WIDTH)[None, None, :] + 16 * block[:, :, None]
        place = origin + (row * row_stride)[:, :, None] + element
        if EVEN:
            found = tl.load(place)
        else:
            found = tl.load(place, mask=(row < rows)[:, :, None] & (element < columns), other=0.0)
        found = to_float32(found)  # before parts are joined, for two neighbours lie in a register
    else:
        low = load_blocks(origin, row, block, rows, columns, row_stride, FROM, COUNT // 2, WIDTH, EVEN)
        high = load_blocks(origin, row, block, rows, columns, row_stride, FROM + COUNT // 2, COUNT // 2, WIDTH, EVEN)
        found = tl.permute(tl.join(low, high), [0, 1, 3, 2])
        found = tl.reshape(found, [low.shape[0], low.shape[1], COUNT])
    return found


@triton.jit
def load_line(place, inside, EVEN: tl.constexpr):
    """float32 at these places, 0 where not inside. EVEN: all are inside."""
    return to_float32(tl.load(place) if EVEN else tl.load(place, mask=inside, other=0.0))


@triton.jit
def store(place, values, inside, EVEN: tl.constexpr):
    """Values to these places, where inside. EVEN: all are."""
    if EVEN:
        tl.store(place, values)
    else:
        tl.store(place, values, mask=inside)


def settle_names(functions) -> None:
    """Have Triton work out the names of these functions, a module's, in the order in which they stand.

    Triton 3.6 puts into the name of what it compiles the constants of those functions that it happened to look at
    before. Without this another process would seldom find a compiled kernel.
    """
    for function in tuple(functions.values()):
        if isinstance(function, triton.JITFunction):
            function.cache_key  # noqa: B018  (worked out when first read, then kept)


settle_names(globals())
