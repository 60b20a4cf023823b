"""The `nvfp4_triton::` operations: those of the dialect, launched as Triton kernels on the tensors' own GPU.

Schemas and fakes are the dialect's. With TRITON_INTERPRET=1 in the environment before triton is first imported they run
on CPU tensors too, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nvfp4c import dialect
from nvfp4c.codegen import kernels
from nvfp4c.formats import BLOCK, TILE_BLOCK, block_count, padded

LIBRARY = torch.library.Library("nvfp4_triton", "DEF")

INTERPRETED = bool(triton.knobs.runtime.interpret)
DISPATCH_KEYS = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)

CODES_PER_WORD = 8
LOAD_BYTES = 16
"""What one thread loads at once."""


@dataclass(frozen=True)
class Tile:
    """What one program handles: rows, blocks of 16 columns, elements of a block in one load, and by how many warps."""

    rows: int
    blocks: int
    width: int
    warps: int


def tile_of(x: Tensor) -> Tile:
    """A tile that is contiguous in memory along x's contiguous axis: 512 bytes of a row, or 64 rows of a column.

    Eight blocks a row are 64 bytes of codes, so both shapes fill the 32-byte sectors that they write.
    """
    if x.stride(-1) == 1:
        return Tile(rows=16, blocks=16, width=LOAD_BYTES // max(x.element_size(), 2), warps=4)
    return Tile(rows=64, blocks=8, width=1, warps=8)


DEQUANTIZE_TILE = Tile(rows=16, blocks=16, width=CODES_PER_WORD, warps=4)


def grid_of(batch: int, rows: int, columns: int, tile: Tile) -> tuple[int]:
    """The number of programs for a batch of matrices."""
    return (batch * triton.cdiv(rows, tile.rows) * triton.cdiv(block_count(columns), tile.blocks),)


def matrices(x: Tensor) -> Tensor:
    """x [M, K] or [B, M, K] as [B, M, K]."""
    return x if x.dim() == 3 else x.unsqueeze(0)


def sign_mask(signs: Sequence[int] | None) -> int:
    """Bit e is set where element e of a block changes its sign."""
    return sum(1 << place for place, sign in enumerate(signs or ()) if sign < 0)


def amax(x: Tensor, signs: Sequence[int] | None = None) -> Tensor:
    x, tile = matrices(x), tile_of(x)
    bits = x.new_zeros((), dtype=torch.int32)
    with torch.cuda.device_of(x):
        kernels.amax_kernel[grid_of(*x.shape, tile)](
            x,
            bits,
            x.shape[1],
            x.shape[2],
            *x.stride(),
            sign_mask(signs),
            ROTATED=signs is not None,
            ROWS=tile.rows,
            BLOCKS=tile.blocks,
            WIDTH=tile.width,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )
    return bits.view(torch.float32)


def hadamard(x: Tensor, signs: Sequence[int]) -> Tensor:
    rotated = x.new_empty((*x.shape[:-1], padded(x.shape[-1])), dtype=torch.bfloat16)
    x, tile = matrices(x), tile_of(x)
    with torch.cuda.device_of(x):
        kernels.hadamard_kernel[grid_of(*x.shape, tile)](
            x,
            rotated,
            x.shape[1],
            x.shape[2],
            *x.stride(),
            sign_mask(signs),
            ROWS=tile.rows,
            BLOCKS=tile.blocks,
            WIDTH=tile.width,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )
    return rotated


def quantize(
    x: Tensor,
    amax: Tensor,
    block: Sequence[int],
    rounding: str,
    signs: Sequence[int] | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    stochastic = rounding == "stochastic"
    assert not stochastic or seed is not None, "stochastic rounding needs a seed"
    blocks = block_count(x.shape[-1])
    words = x.new_empty((*x.shape[:-1], blocks * BLOCK // CODES_PER_WORD), dtype=torch.int32)
    scales = x.new_empty((*x.shape[:-1], blocks), dtype=torch.uint8)
    x, tile = matrices(x), tile_of(x)
    with torch.cuda.device_of(x):
        kernels.quantize_kernel[grid_of(*x.shape, tile)](
            x,
            amax,
            seed if stochastic else None,
            words,
            scales,
            x.shape[1],
            x.shape[2],
            *x.stride(),
            sign_mask(signs),
            stream,
            ROTATED=signs is not None,
            TILED=tuple(block) == TILE_BLOCK,
            STOCHASTIC=stochastic,
            ROWS=tile.rows,
            BLOCKS=tile.blocks,
            WIDTH=tile.width,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )
    return words.view(torch.uint8), scales.view(torch.float8_e4m3fn)


def dequantize(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    """code * scale, bfloat16 [.., M, k]: exact, without the global factor."""
    values = codes.new_empty((*codes.shape[:-1], k), dtype=torch.bfloat16)
    batch, rows, columns = matrices(values).shape
    with torch.cuda.device_of(codes):
        kernels.dequantize_kernel[grid_of(batch, rows, columns, DEQUANTIZE_TILE)](
            codes.contiguous().view(torch.int32),
            scales.contiguous().view(torch.uint8),
            values,
            rows,
            columns,
            ROWS=DEQUANTIZE_TILE.rows,
            BLOCKS=DEQUANTIZE_TILE.blocks,
            num_warps=DEQUANTIZE_TILE.warps,
            enable_fp_fusion=False,
        )
    return values


def _fake_dequantize(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return dialect.DEQUANTIZE(codes, scales, None, k, torch.bfloat16)


def _schema(operation: torch._ops.OpOverload) -> str:
    return str(operation._schema).removeprefix("nvfp4::")


_OPERATIONS = (
    (_schema(dialect.HADAMARD), hadamard, dialect.HADAMARD),
    (_schema(dialect.AMAX), amax, dialect.AMAX),
    (_schema(dialect.QUANTIZE), quantize, dialect.QUANTIZE),
    ("dequantize(Tensor codes, Tensor scales, SymInt k) -> Tensor", dequantize, _fake_dequantize),
)

for _definition, _implementation, _fake in _OPERATIONS:
    _name = _definition.split("(", 1)[0]
    LIBRARY.define(_definition, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    for _key in DISPATCH_KEYS:
        LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"nvfp4_triton::{_name}", _fake, lib=LIBRARY)

HADAMARD = torch.ops.nvfp4_triton.hadamard.default
AMAX = torch.ops.nvfp4_triton.amax.default
QUANTIZE = torch.ops.nvfp4_triton.quantize.default
DEQUANTIZE = torch.ops.nvfp4_triton.dequantize.default
