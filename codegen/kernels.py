# mypy: allow-untyped-defs
# (Triton compiles these functions from their source; their arguments are not Python values.)
"""Triton kernels on sm_80, sm_89 and sm_90: amax, Hadamard, quantise, dequantise.

A program handles a tile of ROWS rows and BLOCKS blocks of 16 columns of one matrix of a batch. x is read through its
strides, so that a transposed view needs no copy; all else is contiguous. Packed codes are int32 words, two a block.

Each thread holds whole blocks, so neither the butterfly nor a block's amax nor its random bytes cross threads. This
comes from how x is read: WIDTH neighbouring elements of a block at a time, as many as one thread's load may hold
(16 bytes along rows; 1 element where columns are contiguous, and the rows across threads make the load coalesced).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4c.codegen.device_math import (
    bits_float,
    block_scale,
    e2m1_code,
    e2m1_value,
    e4m3_value,
    encode_scale,
    float_bits,
    pack_words,
    random_bytes,
    rotate,
    to_bfloat16,
    to_float32,
    unpack_words,
)


@triton.jit
def tile_place(rows, blocks, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """The number of this program's matrix, its rows [ROWS] and its blocks [BLOCKS], all int64."""
    across = tl.cdiv(blocks, BLOCKS)
    down = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    batch = (program // (across * down)).to(tl.int64)
    row = (program // across % down).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = (program % across).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    return batch, row, block


@triton.jit
def block_place(batch, row, block, rows, blocks):
    """[ROWS, BLOCKS]: the number of each block among all of the batch, int64, and whether it exists."""
    place = (batch * rows + row)[:, None] * blocks + block[None, :]
    return place, (row < rows)[:, None] & (block < blocks)[None, :]


@triton.jit
def load_elements(
    first, inside, column, columns, column_stride, FROM: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr
):
    """COUNT elements of each block, starting at FROM: [ROWS, BLOCKS, COUNT].

    first: pointers to the first elements, inside: whether the row exists, column: of the first elements.
    """
    if COUNT == WIDTH:
        element = FROM + tl.arange(0, WIDTH).to(tl.int64)[None, None, :]
        found = tl.load(first + element * column_stride, mask=inside & (column + element < columns), other=0.0)
    else:
        low = load_elements(first, inside, column, columns, column_stride, FROM, COUNT // 2, WIDTH)
        high = load_elements(first, inside, column, columns, column_stride, FROM + COUNT // 2, COUNT // 2, WIDTH)
        found = tl.permute(tl.join(low, high), [0, 1, 3, 2])
        found = tl.reshape(found, [low.shape[0], low.shape[1], COUNT])
    return found


@triton.jit
def load_tile(x, batch, row, block, rows, columns, batch_stride, row_stride, column_stride, WIDTH: tl.constexpr):
    """float32 [ROWS, BLOCKS, 16] of the matrices at x, 0 outside of them."""
    row = row[:, None, None]
    column = block[None, :, None] * 16
    first = x + batch * batch_stride + row * row_stride + column * column_stride
    return to_float32(load_elements(first, row < rows, column, columns, column_stride, 0, 16, WIDTH))


@triton.jit(do_not_specialize=["signs"])
def amax_kernel(
    x,
    amax_bits,
    rows,
    columns,
    batch_stride,
    row_stride,
    column_stride,
    signs,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Raises `amax_bits`, a float32's bits that start as 0, to the largest magnitude; NaN counts as larger than all.

    A maximum does not depend on the order of its operands, so neither does the result on the order of programs.
    """
    batch, row, block = tile_place(rows, tl.cdiv(columns, 16), ROWS, BLOCKS)
    values = load_tile(x, batch, row, block, rows, columns, batch_stride, row_stride, column_stride, WIDTH)
    if ROTATED:
        values = rotate(values, signs)
    bits = tl.reshape(float_bits(tl.abs(values)), [ROWS * BLOCKS * 16])
    tl.atomic_max(amax_bits, tl.max(bits, 0), sem="relaxed")


@triton.jit(do_not_specialize=["signs"])
def hadamard_kernel(
    x,
    rotated,
    rows,
    columns,
    batch_stride,
    row_stride,
    column_stride,
    signs,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes the Hadamard transform of x, bfloat16 with its columns padded to whole blocks."""
    blocks = tl.cdiv(columns, 16)
    batch, row, block = tile_place(rows, blocks, ROWS, BLOCKS)
    place, inside = block_place(batch, row, block, rows, blocks)
    values = load_tile(x, batch, row, block, rows, columns, batch_stride, row_stride, column_stride, WIDTH)
    offset = place[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    tl.store(rotated + offset, to_bfloat16(rotate(values, signs)), mask=inside[:, :, None])


@triton.jit(do_not_specialize=["signs", "stream"])
def quantize_kernel(
    x,
    amax,
    seed,
    words,
    scales,
    rows,
    columns,
    batch_stride,
    row_stride,
    column_stride,
    signs,
    stream,
    ROTATED: tl.constexpr,
    TILED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes packed codes and E4M3 scale bytes of x. ROWS is a multiple of 16, so 16x16 tiles lie in one program."""
    blocks = tl.cdiv(columns, 16)
    batch, row, block = tile_place(rows, blocks, ROWS, BLOCKS)
    place, inside = block_place(batch, row, block, rows, blocks)
    values = load_tile(x, batch, row, block, rows, columns, batch_stride, row_stride, column_stride, WIDTH)
    if ROTATED:
        values = rotate(values, signs)

    block_bits = tl.max(float_bits(tl.abs(values)), 2)
    if TILED:
        tile_bits = tl.max(tl.reshape(block_bits, [ROWS // 16, 16, BLOCKS]), 1)
        repeated = tl.broadcast_to(tile_bits[:, None, :], [ROWS // 16, 16, BLOCKS])
        block_bits = tl.reshape(repeated, [ROWS, BLOCKS])
    scale, multiplier = block_scale(bits_float(block_bits), encode_scale(tl.load(amax)))
    tl.store(scales + place, scale.to(tl.uint8), mask=inside)

    random = random_bytes(tl.load(seed), place, stream) if STOCHASTIC else None
    codes = e2m1_code(values * multiplier[:, :, None], random, STOCHASTIC)
    offset = place[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(words + offset, pack_words(codes), mask=inside[:, :, None])


@triton.jit
def dequantize_kernel(words, scales, values, rows, columns, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Writes code * scale as bfloat16, where it is exact, trimmed to `columns`."""
    blocks = tl.cdiv(columns, 16)
    batch, row, block = tile_place(rows, blocks, ROWS, BLOCKS)
    place, inside = block_place(batch, row, block, rows, blocks)
    offset = place[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    codes = unpack_words(tl.load(words + offset, mask=inside[:, :, None], other=0))
    scale = e4m3_value(tl.load(scales + place, mask=inside, other=0).to(tl.int32))
    column = block[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    out = (batch * rows + row)[:, None, None] * columns + column
    kept = (row < rows)[:, None, None] & (column < columns)
    tl.store(values + out, to_bfloat16(e2m1_value(codes) * scale[:, :, None]), mask=kept)
