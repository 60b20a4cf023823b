# mypy: allow-untyped-defs
# (Triton compiles these functions from their source; their arguments are not Python values.)
"""Triton kernels that need no emitting: packed operands back to bfloat16, and a product's factor. For others: `emit`.

A program that unpacks handles 16 * GROUPS rows and COLUMNS columns of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4c.codegen.device_math import e4m3_value, global_factor, settle_names, to_bfloat16
from nvfp4c.codegen.e2m1 import e2m1_value


@triton.jit
def tile_place(rows, columns, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """The number of this program's matrix, and the first row and column of its tile, all int64."""
    # Unsigned, which takes half the instructions; there are fewer than 2^31 programs.
    program = tl.program_id(0).to(tl.uint32)
    across = tl.cast(tl.cdiv(columns, COLUMNS), tl.uint32)
    down = tl.cast(tl.cdiv(rows, 16 * GROUPS), tl.uint32)
    line = program // across
    batch = line // down
    row = (line - batch * down).to(tl.int64) * (16 * GROUPS)
    return batch.to(tl.int64), row, (program - line * across).to(tl.int64) * COLUMNS


@triton.jit
def swizzled_place(batch, row, block, rows, blocks):
    """Where the scale of this row and block of a matrix of a batch lies: see `nvfp4c.scale_layout`. rows, blocks: of
    every matrix."""
    tile = (batch * tl.cdiv(rows, 128) + row // 128) * tl.cdiv(blocks, 4) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


@triton.jit
def unpack_rows(codes, scales, values, rows, columns, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes code * scale of blocks along the rows, trimmed to `columns`."""
    batch, first_row, first_column = tile_place(rows, columns, GROUPS, COLUMNS)
    row = (first_row + tl.arange(0, 16 * GROUPS))[:, None]
    block = (first_column // 16 + tl.arange(0, COLUMNS // 16))[None, :]
    place = (batch * rows + row) * tl.cdiv(columns, 16) + block
    inside = (row < rows) & (16 * block < columns)
    scale = e4m3_value(tl.load(scales + place, mask=inside, other=0).to(tl.int32))
    pair = tl.load(codes + place[:, :, None] * 8 + tl.arange(0, 8)[None, None, :], mask=inside[:, :, None], other=0)
    pair = pair.to(tl.int32)
    both = tl.join(e2m1_value(pair), e2m1_value(pair >> 4))
    found = tl.reshape(both, [16 * GROUPS, COLUMNS // 16, 16]) * scale[:, :, None]
    column = 16 * block[:, :, None] + tl.arange(0, 16)[None, None, :]
    kept = (row < rows)[:, :, None] & (column < columns)
    tl.store(values + (batch * rows + row)[:, :, None] * columns + column, to_bfloat16(found), mask=kept)


@triton.jit
def unpack_columns(codes, scales, values, rows, columns, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes code * scale of blocks down the columns, trimmed to `rows`."""
    batch, first_row, first_column = tile_place(rows, columns, GROUPS, COLUMNS)
    blocks = tl.cdiv(rows, 16)
    block = (first_row // 16 + tl.arange(0, GROUPS))[:, None]
    column = (first_column + tl.arange(0, COLUMNS))[None, :]
    inside = (block < blocks) & (column < columns)
    place = (batch * blocks + block) * columns + column
    scale = e4m3_value(tl.load(scales + place, mask=inside, other=0).to(tl.int32))
    for byte in tl.static_range(8):
        line = (batch * blocks + block) * 8 + byte
        pair = tl.load(codes + line * columns + column, mask=inside, other=0).to(tl.int32)
        row = 16 * block + 2 * byte
        place = values + (batch * rows + row) * columns + column
        tl.store(place, to_bfloat16(e2m1_value(pair) * scale), mask=inside & (row < rows))
        tl.store(place + columns, to_bfloat16(e2m1_value(pair >> 4) * scale), mask=inside & (row + 1 < rows))


@triton.jit
def product_factors(a_amax, b_amax, factors):
    """Writes the global factor of two operands, then 0 and 1: what a library is told to multiply a product by, and what
    it adds to that, where there is nothing to add and where there is."""
    tl.store(factors, global_factor(tl.load(a_amax), tl.load(b_amax)))
    tl.store(factors + 1, 0.0)
    tl.store(factors + 2, 1.0)


settle_names(globals())
