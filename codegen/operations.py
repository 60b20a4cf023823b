"""The `nvfp4_triton::` operations: those of the dialect, launched as Triton kernels on the tensors' own GPU.

Schemas and fakes are the dialect's. With TRITON_INTERPRET=1 in the environment before triton is first imported they run
on CPU tensors too, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
"""The most that one thread loads at once."""


@dataclass(frozen=True)
class Tile:
    """What one program handles: rows, blocks of 16 columns, and the warps it has for them."""

    rows: int
    blocks: int
    warps: int


ROW_TILE = Tile(rows=16, blocks=16, warps=4)
"""For rows that are contiguous in memory: 512 bytes of each in BF16."""

COLUMN_TILE = Tile(rows=64, blocks=8, warps=8)
"""For columns that are: 128 bytes of each in BF16, and still 64 bytes of codes a row, two whole sectors."""


def _grid(shape: Sequence[int], tile: Tile) -> tuple[int]:
    """The number of programs for a batch of matrices [B, M, K]."""
    return (shape[0] * triton.cdiv(shape[1], tile.rows) * triton.cdiv(block_count(shape[2]), tile.blocks),)


def _as_batch(x: Tensor) -> Tensor:
    """[M, K] or [B, M, K] as [B, M, K]."""
    return x if x.dim() == 3 else x.unsqueeze(0)


def _launch(
    kernel: Any,
    x: Tensor,
    others: Sequence[Tensor | None],
    signs: Sequence[int] | None,
    *numbers: int,
    **constants: bool,
) -> None:
    """Start a kernel that reads x through its strides. others, numbers, constants: its arguments in each such place."""
    x = _as_batch(x)
    along_rows = x.stride(-1) == 1
    tile = ROW_TILE if along_rows else COLUMN_TILE
    negative = sum(1 << place for place, sign in enumerate(signs or ()) if sign < 0)
    with torch.cuda.device_of(x):
        kernel[_grid(x.shape, tile)](
            x,
            *others,
            *x.shape[1:],
            *x.stride(),
            negative,
            *numbers,
            **constants,
            ROWS=tile.rows,
            BLOCKS=tile.blocks,
            WIDTH=LOAD_BYTES // x.element_size() if along_rows else 1,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )


def _in_memory_order(x: Tensor) -> Tensor:
    """The elements of a tensor of any shape as a matrix; no copy of a tensor that fills its memory, however
    arranged."""
    if x.dim() < 2:
        return x.reshape(1, -1)
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).flatten(0, -2)


def hadamard(x: Tensor, signs: Sequence[int]) -> Tensor:
    rotated = x.new_empty((*x.shape[:-1], padded(x.shape[-1])), dtype=torch.bfloat16)
    _launch(kernels.hadamard_kernel, x, (rotated,), signs)
    return rotated


def amax(x: Tensor, signs: Sequence[int] | None = None) -> Tensor:
    bits = x.new_zeros((), dtype=torch.int32)
    if signs is None:
        x = _in_memory_order(x)
    _launch(kernels.amax_kernel, x, (bits,), signs, ROTATED=signs is not None)
    return bits.view(torch.float32)


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
    _launch(
        kernels.quantize_kernel,
        x,
        (amax, seed if stochastic else None, words, scales),
        signs,
        stream,
        ROTATED=signs is not None,
        TILED=tuple(block) == TILE_BLOCK,
        STOCHASTIC=stochastic,
    )
    return words.view(torch.uint8), scales.view(torch.float8_e4m3fn)


def dequantize(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    """code * scale, bfloat16 [.., M, k]: exact, without the global factor."""
    values = codes.new_empty((*codes.shape[:-1], k), dtype=torch.bfloat16)
    shape = _as_batch(values).shape
    with torch.cuda.device_of(codes):
        kernels.dequantize_kernel[_grid(shape, ROW_TILE)](
            codes.contiguous().view(torch.int32),
            scales.contiguous().view(torch.uint8),
            values,
            *shape[1:],
            ROWS=ROW_TILE.rows,
            BLOCKS=ROW_TILE.blocks,
            num_warps=ROW_TILE.warps,
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
