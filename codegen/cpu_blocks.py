"""Quantising on a CPU: the arithmetic of `numerics`, on blocks as Inductor vectorises it.

A matrix is handled as it lies in memory, [R, C] with rows of C elements without gaps. Blocks along its rows are
[blocks, 16], blocks down its columns [R / 16, 16, C], and tiles [R / 16, 16, C / 16, 16]. In these shapes no index is
divided, which would take longer than all the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nvfp4c import numerics, philox
from nvfp4c.codegen.cpu_compiler import compiled
from nvfp4c.formats import BLOCK, E2M1_MAX, TILE_BLOCK, padded


def operand(x: Tensor, amax: Tensor, block: tuple[int, int], seed: Tensor | None, stream: int) -> Tensor:
    """numerics.block_values of numerics.block_codes, with no codes between: float32 [.., M, K], in memory as x is.

    seed: of stochastic rounding; None to round to nearest.
    """
    down = x.stride(-1) != 1
    if not x.numel():
        return torch.empty_like(x, dtype=torch.float32)
    bits = None if seed is None else _random_bytes(x, seed, stream)
    matrix, bits = (x.mT, None if bits is None else bits.mT) if down else (x, bits)
    tiles = block == TILE_BLOCK
    rows, columns = matrix.shape[-2:]
    whole = padded(rows) if tiles or down else rows, padded(columns) if tiles or not down else columns
    encode = numerics.encode_scale(amax)
    factors = encode * (1 / E2M1_MAX), torch.reciprocal(encode)
    values = _quantised(_whole(matrix, whole), None if bits is None else _whole(bits, whole), *factors, tiles, down)
    values = values.reshape(*matrix.shape[:-2], *whole)
    if whole != (rows, columns):
        values = values.narrow(-2, 0, rows).narrow(-1, 0, columns).contiguous()
    return values.mT if down else values


def _quantised(matrix: Tensor, bits: Tensor | None, sixth: Tensor, inverse: Tensor, tiles: bool, down: bool) -> Tensor:
    """Of a matrix of whole blocks, in the shape of its blocks."""
    shape: tuple[int, ...]
    if tiles:
        shape = (-1, BLOCK, matrix.shape[-1] // BLOCK, BLOCK)
    elif down:
        shape = (-1, BLOCK, matrix.shape[-1])
    else:
        shape = (-1, BLOCK)
    blocks, bits = matrix.reshape(shape), None if bits is None else bits.reshape(shape)
    kind = blocks.dtype, bits is None, tuple(min(size, 2) for size in blocks.shape)
    if tiles:
        return compiled(_tiles, kind)(blocks, sixth, inverse, bits)
    if not down:
        return compiled(_rows, kind)(blocks, sixth, inverse, bits)
    # Apart, or every element would work out its block's scale anew.
    scales = compiled(_scales_down, kind)(blocks, sixth)
    return compiled(_rounded_down, kind)(blocks, scales, inverse, bits)


def _rows(blocks: Tensor, sixth: Tensor, inverse: Tensor, bits: Tensor | None) -> Tensor:
    torch._check(blocks.shape[1] == BLOCK)
    return _rounded(blocks, _scales(blocks, sixth, (-1,)), inverse, bits)


def _tiles(blocks: Tensor, sixth: Tensor, inverse: Tensor, bits: Tensor | None) -> Tensor:
    torch._check(blocks.shape[1] == BLOCK)
    torch._check(blocks.shape[3] == BLOCK)
    return _rounded(blocks, _scales(blocks, sixth, (-3, -1)), inverse, bits)


def _scales_down(blocks: Tensor, sixth: Tensor) -> Tensor:
    torch._check(blocks.shape[1] == BLOCK)
    return _scales(blocks, sixth, (1,))


def _rounded_down(blocks: Tensor, scales: Tensor, inverse: Tensor, bits: Tensor | None) -> Tensor:
    torch._check(blocks.shape[1] == BLOCK)
    return _rounded(blocks, scales, inverse, bits)


def _scales(blocks: Tensor, sixth: Tensor, axes: tuple[int, ...]) -> Tensor:
    return numerics.scale_of(blocks.float().abs().amax(axes, keepdim=True), sixth).float()


def _rounded(blocks: Tensor, scales: Tensor, inverse: Tensor, bits: Tensor | None) -> Tensor:
    return numerics.round_e2m1(numerics.scaled(blocks.float(), scales, inverse), bits) * scales


def _whole(matrix: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Padded with zeros to these rows and columns, without gaps."""
    missing = sizes[0] - matrix.shape[-2], sizes[1] - matrix.shape[-1]
    return F.pad(matrix, (0, missing[1], 0, missing[0])) if any(missing) else matrix.contiguous()


def _random_bytes(x: Tensor, seed: Tensor, stream: int) -> Tensor:
    """philox.random_bytes_like, without the bytes beyond the end of a row."""
    blocks = x.shape[:-1].numel() * (padded(x.shape[-1]) // BLOCK)
    words = compiled(_random_words, min(blocks, 2))(seed, torch.tensor(stream), blocks)
    found = words.view(torch.uint8).reshape(*x.shape[:-1], padded(x.shape[-1]))
    return found.narrow(-1, 0, x.shape[-1])


def _random_words(seed: Tensor, stream: Tensor, blocks: int) -> Tensor:
    """int32 [blocks, 4]: in memory, on a little-endian machine, the bytes in their order."""
    return torch.stack(philox.random_words(seed, stream, blocks), dim=-1).to(torch.int32)


def rotated(x: Tensor, signs: Sequence[int]) -> Tensor:
    """numerics.rotate of x [.., M, K] with K whole blocks, whose transpose is without gaps; so is the result's."""
    blocks = x.mT.reshape(-1, BLOCK, x.shape[-2])
    kind = blocks.dtype, tuple(signs), tuple(min(size, 2) for size in blocks.shape)
    return compiled(_rotated_down, kind)(blocks, signs).reshape(x.mT.shape).mT


def _rotated_down(blocks: Tensor, signs: Sequence[int]) -> Tensor:
    torch._check(blocks.shape[1] == BLOCK)
    return numerics.rotated_blocks(blocks.float(), signs, 1).to(torch.bfloat16)
