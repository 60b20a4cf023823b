# mypy: allow-untyped-defs
# (Triton compiles the kernel from its source; its arguments are not Python values.)
"""The NVFP4 matrix product on Blackwell: packed codes and swizzled scales go straight to the FP4 tensor cores.

Everything moves through TMA descriptors. They compile for sm_100, 103 and 120, need no registers for addresses and
masks (through pointers the epilogue spills), and read zeros and write nothing outside of a tensor, at any size. Scales
are read as E4M3 numbers and whole 512-byte tiles: only so does Triton copy them from shared to tensor memory
(`tcgen05.cp`) and let one step's product run while the next step's operands arrive; as bytes, or through pointers, they
pass registers, and every step waits. TMA needs rows of a multiple of 16 bytes: codes of an odd number of blocks are
copied into wider rows first, and a result with other rows is copied out of wider ones.

EMULATED replaces the one call of `tl.dot_scaled` by unpacking, multiplying by the scales and `tl.dot`, which gives the
same product: code * scale has six significant bits, so BF16 holds it exactly. All else is the same code, and runs in
Triton's interpreter and on GPUs without FP4. Either way products are exact and summed in FP32; the order differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from nvfp4c import dialect
from nvfp4c.codegen.assembly import Assembly, assemble
from nvfp4c.codegen.device_math import (
    bits_float,
    e4m3_value,
    float_bits,
    global_factor,
    to_bfloat16,
    to_float32,
)
from nvfp4c.codegen.e2m1 import e2m1_value
from nvfp4c.errors import TargetError
from nvfp4c.scale_layout import TILE_BLOCKS

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
GROUP = tl.constexpr(8)
"""Tiles of rows that are gone through together, so that what they read of b is still in the cache."""

TMA_BYTES = 16
"""Rows and addresses that TMA reads are multiples of this."""


@dataclass(frozen=True)
class GemmTile:
    """What one program computes at a time, [rows, columns], taking `depth` of the contraction axis a step.

    rows and columns are multiples of 128, depth of 64: whole tiles of scales. stages: how many steps are under way at
    once, each with operands in shared memory.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {
    "sm_100": GemmTile(128, 256, 256, warps=8, stages=3),
    "sm_103": GemmTile(128, 256, 256, warps=8, stages=3),
    "sm_120": GemmTile(128, 128, 128, warps=8, stages=4),
}
"""For each target a tile that spills no registers and fits into shared memory, with or without bias, in any dtype."""

EMULATED_TILE = GemmTile(128, 128, 64, warps=8, stages=2)
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTERPRETED_PROGRAMS = 3
"""Fewer than there are tiles, so that the interpreter runs the loop over tiles."""


@triton.jit
def load_scales(scales, row_tile, block_tile, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Scales [ROWS, BLOCKS] from the tiles [.., .., 2, 256] that `scale_layout.swizzle` makes."""
    tiles = tl.reshape(scales.load([row_tile, block_tile, 0, 0]), [ROWS // 128, BLOCKS // 4, 32, 4, 4])
    return tl.reshape(tl.permute(tiles, [0, 3, 2, 1, 4]), [ROWS, BLOCKS])


@triton.jit
def dequantized(codes, scales):
    """code * scale [R, K] of packed codes [R, K / 2] and scales [R, K / 16], both bytes."""
    pairs = tl.join(codes.to(tl.int32), codes.to(tl.int32) >> 4)
    values = e2m1_value(tl.reshape(pairs, [scales.shape[0], scales.shape[1], 16]))
    values = values * e4m3_value(scales.to(tl.int32))[:, :, None]
    values = tl.reshape(values, [codes.shape[0], 2 * codes.shape[1]])
    # The interpreter multiplies float32 matrices only.
    return values if INTERPRETED else to_bfloat16(values)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in another type: nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion truncates.
        bits = float_bits(x)
        x = tl.where(x == x, bits_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000), x)
    return x.to(dtype)


@triton.jit
def store_result(out, product, factor, bias, residual, batch, row, column, columns):
    """Writes the epilogue of a product [R, C], whose corner lies at row and column of a matrix of the batch."""
    result = product * factor
    if bias is not None:
        place = column + tl.arange(0, product.shape[1])
        result = result + to_float32(tl.load(bias + place, mask=place < columns, other=0.0))[None, :]
    if residual is not None:
        result = result + to_float32(tl.reshape(residual.load([batch, row, column]), product.shape))
    result = tl.reshape(rounded(result, out.dtype), [1, product.shape[0], product.shape[1]])
    out.store([batch, row, column], result)


@triton.jit
def block_scaled_gemm(
    a,
    a_scales,
    a_amax,
    b,
    b_scales,
    b_amax,
    bias,
    residual,
    out,
    batches,
    rows,
    columns,
    k,
    EMULATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [batches, rows, columns] = a times the transpose of b, times the global factor, plus bias, plus residual.

    a, b: descriptors of codes, all batches' rows one below the other, k / 2 bytes each. a_scales, b_scales: descriptors
    of tiles of scales, likewise. residual, out: descriptors whose box is half a tile. As many programs as fit on the
    GPU go through all tiles. What a tile reads beyond its own matrix is the next one's, and ends in rows and columns
    that are not written.
    """
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(columns, COLUMNS)
    row_tiles = tl.cdiv(rows, 128)
    column_tiles = tl.cdiv(columns, 128)
    factor = global_factor(tl.load(a_amax), tl.load(b_amax))
    for tile in tl.range(tl.program_id(0), batches * down * across, tl.num_programs(0)):
        batch = tile // (down * across)
        within = tile % (down * across)
        first = within // (GROUP * across) * GROUP
        group = tl.minimum(down - first, GROUP)
        row = (first + within % (GROUP * across) % group) * ROWS
        column = within % (GROUP * across) // group * COLUMNS

        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in tl.range(0, tl.cdiv(k, DEPTH), num_stages=STAGES):
            left = a.load([batch * rows + row, step * (DEPTH // 2)])
            right = b.load([batch * columns + column, step * (DEPTH // 2)])
            block_tile = step * (DEPTH // 64)
            left_scales = load_scales(a_scales, batch * row_tiles + row // 128, block_tile, ROWS, DEPTH // 16)
            right_scales = load_scales(b_scales, batch * column_tiles + column // 128, block_tile, COLUMNS, DEPTH // 16)
            if EMULATED:
                x = dequantized(left, left_scales)
                y = dequantized(right, right_scales)
                product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
            else:
                product = tl.dot_scaled(left, left_scales, "e2m1", right.T, right_scales, "e2m1", product)

        # In halves, for each passes through shared memory on its way out.
        left, right = tl.split(tl.permute(tl.reshape(product, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
        store_result(out, left, factor, bias, residual, batch, row, column, columns)
        store_result(out, right, factor, bias, residual, batch, row, column + COLUMNS // 2, columns)


def block_scaled_mm(
    a_codes: Tensor,
    a_scales: Tensor,
    a_amax: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    tile: GemmTile,
    emulated: bool = False,
) -> Tensor:
    """The product of packed operands: `nvfp4.scaled_mm` with scales in the swizzled layout.

    a_codes: uint8 [M, K / 2] or [B, M, K / 2], K a multiple of 16; b_codes the same with N rows. a_scales, b_scales:
    what `scale_layout.swizzle` gives. a_amax, b_amax: float32 scalars. bias: [N], or None. residual: of the result's
    shape, or None. tile: one of TILES, or EMULATED_TILE where `emulated`, for GPUs without FP4. Returns [M, N] or
    [B, M, N] in out_dtype.
    """
    lead, rows, columns = a_codes.shape[:-2], a_codes.shape[-2], b_codes.shape[-2]
    k = 2 * a_codes.shape[-1]
    if k == 0 or 0 in (*lead, rows, columns):
        nothing = a_codes.new_zeros((*lead, rows, columns), dtype=torch.float32)
        return dialect.scale_product(nothing, a_amax, b_amax, bias, residual, out_dtype)
    batches = lead.numel()
    out = a_codes.new_empty((batches, rows, _wide(columns, out_dtype)), dtype=out_dtype)[..., :columns]
    box = (1, tile.rows, tile.columns // 2)
    tiles = batches * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    with torch.cuda.device_of(a_codes):
        block_scaled_gemm[(min(tiles, _programs(a_codes.device)),)](
            _codes_descriptor(a_codes, tile.rows, tile),
            _scales_descriptor(a_scales, tile.rows, tile, emulated),
            a_amax,
            _codes_descriptor(b_codes, tile.columns, tile),
            _scales_descriptor(b_scales, tile.columns, tile, emulated),
            b_amax,
            bias,
            None if residual is None else _descriptor(_for_tma(residual.reshape(batches, rows, columns)), box),
            _descriptor(out, box),
            batches,
            rows,
            columns,
            k,
            EMULATED=emulated,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            STAGES=tile.stages,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )
    return out.reshape(*lead, rows, columns).contiguous()


def _programs(device: torch.device) -> int:
    """One for each multiprocessor: a program's shared memory leaves no place for a second."""
    return INTERPRETED_PROGRAMS if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def _wide(columns: int, dtype: torch.dtype) -> int:
    """How long rows of so many elements are for TMA."""
    return -columns % (TMA_BYTES // dtype.itemsize) + columns


def _for_tma(x: Tensor) -> Tensor:
    """A batch of matrices, or a copy of it in wider rows, whose rows and addresses TMA takes."""
    *steps, within = (step * x.element_size() for step in x.stride())
    if within == x.element_size() and all(step > 0 and step % TMA_BYTES == 0 for step in (*steps, x.data_ptr())):
        return x
    wide = x.new_empty((*x.shape[:-1], _wide(x.shape[-1], x.dtype)))
    return wide[..., : x.shape[-1]].copy_(x)


def _codes_descriptor(codes: Tensor, rows: int, tile: GemmTile) -> TensorDescriptor:
    codes = F.pad(codes, (0, -codes.shape[-1] % TMA_BYTES)).flatten(0, -2).contiguous()
    if codes.data_ptr() % TMA_BYTES:
        codes = codes.clone()
    return _descriptor(codes, (rows, tile.depth // 2))


def _scales_descriptor(scales: Tensor, rows: int, tile: GemmTile, emulated: bool) -> TensorDescriptor:
    # TMA takes a box's sides of at most 256.
    tiles = scales.reshape(-1, scales.shape[-1] // TILE_BLOCKS, 2, 256)
    if tiles.data_ptr() % TMA_BYTES:
        tiles = tiles.clone()
    block = (rows // 128, tile.depth // 64, 2, 256)
    return _descriptor(tiles.view(torch.uint8 if emulated else torch.float8_e4m3fn), block)


def assemble_gemm(
    target: str, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, residual_dtype: torch.dtype | None
) -> Assembly:
    """The kernel as `target` would run it, without a GPU. bias_dtype, residual_dtype: None where there is none.

    Raises TargetError for a target without FP4 tensor cores.
    """
    if target not in TILES:
        raise TargetError(f"target {target!r} has no FP4 tensor cores; use one of {', '.join(TILES)}")
    return _assemble(target, TILES[target], out_dtype, bias_dtype, residual_dtype, emulated=False)


def assemble_emulated_gemm(
    target: str, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, residual_dtype: torch.dtype | None
) -> Assembly:
    """The same with the product emulated, for any target that Triton knows."""
    return _assemble(target, EMULATED_TILE, out_dtype, bias_dtype, residual_dtype, emulated=True)


def _assemble(
    target: str,
    tile: GemmTile,
    out_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    emulated: bool,
) -> Assembly:
    scale = "u8" if emulated else "fp8e4nv"
    box = f"[1, {tile.rows}, {tile.columns // 2}]"
    types = {
        "a": f"tensordesc<u8[{tile.rows}, {tile.depth // 2}]>",
        "b": f"tensordesc<u8[{tile.columns}, {tile.depth // 2}]>",
        "a_scales": f"tensordesc<{scale}[{tile.rows // 128}, {tile.depth // 64}, 2, 256]>",
        "b_scales": f"tensordesc<{scale}[{tile.columns // 128}, {tile.depth // 64}, 2, 256]>",
        "out": f"tensordesc<{TRITON_NAMES[out_dtype]}{box}>",
        **dict.fromkeys(("a_amax", "b_amax"), "*fp32"),
        **dict.fromkeys(("batches", "rows", "columns", "k"), "i32"),
    }
    constants: dict[str, Any] = {
        "EMULATED": emulated,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "STAGES": tile.stages,
    }
    if bias_dtype is None:
        constants["bias"] = None
    else:
        types["bias"] = f"*{TRITON_NAMES[bias_dtype]}"
    if residual_dtype is None:
        constants["residual"] = None
    else:
        types["residual"] = f"tensordesc<{TRITON_NAMES[residual_dtype]}{box}>"
    return assemble(block_scaled_gemm, target, types, constants, num_warps=tile.warps)
