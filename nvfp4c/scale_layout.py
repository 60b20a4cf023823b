"""The order in which Blackwell's matrix units read block scales.

Scales [M, K/16] are cut into tiles of 128 rows and 4 blocks. A tile is 512 consecutive bytes: rows 0, 32, 64 and 96
with their 4 scales each, then rows 1, 33, 65 and 97, and so on. Tiles of the same rows follow one another.
Source: the block scaling factors layout of the cuBLAS documentation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nvfp4c.formats import Size

TILE_ROWS = 128
TILE_BLOCKS = 4
QUARTER = TILE_ROWS // 4
"""Rows of a tile that lie this far apart are neighbours in memory."""


def swizzled_shape(rows: Size, blocks: Size) -> tuple[Size | int, ...]:
    """[ceil(rows / 128), ceil(blocks / 4), 32, 4, 4]: tiles down and across, a row's place in its quarter of a tile,
    the quarter, and the block. Works on symbolic sizes."""
    down, across = (rows + (TILE_ROWS - 1)) // TILE_ROWS, (blocks + (TILE_BLOCKS - 1)) // TILE_BLOCKS
    return (down, across, QUARTER, TILE_ROWS // QUARTER, TILE_BLOCKS)


def swizzle(scales: Tensor) -> Tensor:
    """Scales [.., M, B], one byte each, as [.., *swizzled_shape(M, B)], padded with zeros."""
    *lead, rows, blocks = scales.shape
    octets = F.pad(scales.view(torch.uint8), (0, -blocks % TILE_BLOCKS, 0, -rows % TILE_ROWS))
    down, across, in_quarter, quarters, in_tile = swizzled_shape(rows, blocks)
    tiles = octets.reshape(*lead, down, quarters, in_quarter, across, in_tile)
    return tiles.transpose(-4, -2).contiguous().view(scales.dtype)


def unswizzle(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """Inverse of `swizzle` for scales [.., rows, blocks]."""
    tiles = swizzled.view(torch.uint8).transpose(-4, -2).flatten(-5, -3).flatten(-2)
    return tiles[..., :rows, :blocks].contiguous().view(swizzled.dtype)
