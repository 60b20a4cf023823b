"""The order in which Blackwell's matrix units read block scales.

Scales [M, K/16] are cut into tiles of 128 rows and 4 blocks. A tile is 512 consecutive bytes: rows 0, 32, 64 and 96
with their 4 scales each, then rows 1, 33, 65 and 97, and so on. Tiles of the same rows follow one another.
Source: the block scaling factors layout of the cuBLAS documentation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4c.formats import Size

TILE_ROWS = 128
TILE_BLOCKS = 4
QUARTER = TILE_ROWS // 4
"""Rows of a tile that lie this far apart are neighbours in memory."""


def swizzled_shape(rows: Size, blocks: Size) -> tuple[Size, Size]:
    """What scales [rows, blocks] are padded to: whole tiles. Works on symbolic sizes."""
    padded_rows = (rows + (TILE_ROWS - 1)) // TILE_ROWS * TILE_ROWS
    return padded_rows, (blocks + (TILE_BLOCKS - 1)) // TILE_BLOCKS * TILE_BLOCKS


def swizzle(scales: Tensor) -> Tensor:
    """Scales [.., M, B], one byte each, padded with zeros and put into this order: [.., *swizzled_shape(M, B)].

    Only its memory says what belongs where; a row of the result is no row of the scales.
    """
    *lead, rows, blocks = scales.shape
    high, wide = swizzled_shape(rows, blocks)
    octets = torch.zeros((*lead, high * wide), dtype=torch.uint8, device=scales.device)
    octets[..., _places(rows, blocks, scales.device)] = scales.view(torch.uint8)
    return octets.reshape(*lead, high, wide).view(scales.dtype)


def unswizzle(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """Inverse of `swizzle` for scales [.., rows, blocks]."""
    octets = swizzled.view(torch.uint8).flatten(-2)
    return octets[..., _places(rows, blocks, swizzled.device)].view(swizzled.dtype)


def _places(rows: int, blocks: int, device: torch.device) -> Tensor:
    """Where in memory each scale of a matrix [rows, blocks] lies."""
    row, block = torch.arange(rows, device=device)[:, None], torch.arange(blocks, device=device)
    tile = row // TILE_ROWS * ((blocks + (TILE_BLOCKS - 1)) // TILE_BLOCKS) + block // TILE_BLOCKS
    within = row % QUARTER * (TILE_ROWS // QUARTER * TILE_BLOCKS) + row % TILE_ROWS // QUARTER * TILE_BLOCKS
    return tile * (TILE_ROWS * TILE_BLOCKS) + within + block % TILE_BLOCKS
