# mypy: allow-untyped-defs
# (Triton compiles `swizzled_place` from its source; its arguments are not Python values.)
"""The order in which Blackwell's matrix units read block scales.

Scales [M, K/16] are cut into tiles of 128 rows and 4 blocks. A tile is 512 consecutive bytes: rows 0, 32, 64 and 96
with their 4 scales each, then rows 1, 33, 65 and 97, and so on. Tiles of the same rows follow one another.
Source: the block scaling factors layout of the cuBLAS documentation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

TILE_ROWS = 128
TILE_BLOCKS = 4
QUARTER = TILE_ROWS // 4
"""Rows of a tile that lie this far apart are neighbours in memory."""


def swizzle(scales: Tensor) -> Tensor:
    """Scales [.., M, B], one byte each, as [.., ceil(M / 128), ceil(B / 4), 32, 4, 4], padded with zeros.

    The last three axes are a row's place in its quarter of a tile, the quarter, and the block.
    """
    octets = scales.view(torch.uint8)
    octets = F.pad(octets, (0, -scales.shape[-1] % TILE_BLOCKS, 0, -scales.shape[-2] % TILE_ROWS))
    tiles = octets.unflatten(-1, (-1, TILE_BLOCKS)).unflatten(-3, (-1, 4, QUARTER))
    return tiles.transpose(-4, -2).contiguous().view(scales.dtype)


def unswizzle(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """Inverse of `swizzle` for scales [.., rows, blocks]."""
    tiles = swizzled.view(torch.uint8).transpose(-4, -2).flatten(-5, -3).flatten(-2)
    return tiles[..., :rows, :blocks].contiguous().view(swizzled.dtype)


@triton.jit
def swizzled_place(row, block, blocks):
    """Where in memory the scale of this row and block lies among those of one matrix with `blocks` blocks a row."""
    tile = row // 128 * tl.cdiv(blocks, 4) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
