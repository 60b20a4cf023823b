# mypy: allow-untyped-defs
# (Triton compiles the kernels from their source; their arguments are not Python values.)
"""Kernels of the sensitivity probe: what quantising does to tiles of an operand, and to a product.

A probe asks this at every matmul. As operations of torch it would be some fifty launches each, which take the processor
far longer than the GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4c.codegen.device_math import (
    E2M1_MAX,
    GLOBAL_MAX,
    block_scale,
    e4m3_value,
    encode_scale,
    float_bits,
    global_factor,
    to_float32,
)
from nvfp4c.codegen.launching import Launch
from nvfp4c.codegen.operations import SHAPES_KEPT, Layout, layout

SUMS = tl.constexpr(7)
"""elements, signal, noise, fourth, vanished, saturated, zeros."""

LINES, WIDTH = 8, 256
"""Of a product, that one program of `compare` handles at a time; it goes on along the lines."""

TERMS = tl.constexpr(4)
"""Sums of y^2, e^2, e y and (g e)^2."""


@triton.jit
def _in_bins(bins, inside, COUNT: tl.constexpr):
    """How many elements of a tile lie in each of COUNT bins, int32 [COUNT]."""
    bins = tl.reshape(tl.where(inside, bins, COUNT), [256, 1])
    return tl.sum((bins == tl.arange(0, COUNT)[None, :]).to(tl.int32), 0)


@triton.jit
def _octave(magnitude, amax, OCTAVES: tl.constexpr):
    """See `sensitivity.samples.octaves`; anything for a zero."""
    exponent = (float_bits(tl.math.div_rn(amax, magnitude)) >> 23) & 255
    return tl.minimum(tl.maximum(exponent - 127, 0), OCTAVES - 1)


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def tiles(
    source,
    values,
    down,
    across,
    amax,
    found,
    rows,
    columns,
    source_row,
    source_column,
    values_row,
    values_column,
    TILED: tl.constexpr,
    OCTAVES: tl.constexpr,
    SCALE_BINS: tl.constexpr,
):
    """A program writes a line of `found`, float64: the sums of a tile, then its histograms. TILED: the block is all of
    the tile, not a row of it."""
    tile = tl.program_id(0)
    row = (16 * tl.load(down + tile) + tl.arange(0, 16))[:, None]
    column = (16 * tl.load(across + tile) + tl.arange(0, 16))[None, :]
    inside = (row < rows) & (column < columns)
    x = to_float32(tl.load(source + row * source_row + column * source_column, mask=inside, other=0.0))
    value = to_float32(tl.load(values + row * values_row + column * values_column, mask=inside, other=0.0))
    largest, magnitude = tl.load(amax), tl.abs(x)
    # A NaN counts as larger than all: bits are ordered so.
    block = tl.max(float_bits(magnitude), 1)
    if TILED:
        block = tl.zeros_like(block) + tl.max(block, 0)
    byte, _ = block_scale(block.to(tl.float32, bitcast=True), encode_scale(largest), False)
    scale, factor = e4m3_value(byte), tl.math.div_rn(largest, GLOBAL_MAX)
    quantised = value * factor
    square = x.to(tl.float64) * x.to(tl.float64)  # the fourth power of a small gradient is below what FP32 holds
    error = (quantised - x).to(tl.float64)
    line = found + tile.to(tl.int64) * (SUMS + 2 * OCTAVES + SCALE_BINS)
    tl.store(line, _total(inside.to(tl.float64)))
    tl.store(line + 1, _total(square))
    tl.store(line + 2, _total(error * error))
    tl.store(line + 3, _total(square * square))
    tl.store(line + 4, _total(((x != 0.0) & (value == 0.0)).to(tl.float64)))
    tl.store(line + 5, _total((magnitude > (factor * E2M1_MAX * scale)[:, None]).to(tl.float64)))
    tl.store(line + 6, _total((inside & (x == 0.0)).to(tl.float64)))
    octave = tl.arange(0, OCTAVES)
    before = _in_bins(_octave(magnitude, largest, OCTAVES), x != 0.0, OCTAVES)
    tl.store(line + SUMS + octave, before.to(tl.float64))
    after = _in_bins(_octave(tl.abs(quantised), largest, OCTAVES), quantised != 0.0, OCTAVES)
    tl.store(line + SUMS + OCTAVES + octave, after.to(tl.float64))
    bins = tl.arange(0, SCALE_BINS)
    counted = (byte[:, None] >> 3 == bins[None, :]) & (scale > 0.0)[:, None]
    tl.store(line + SUMS + 2 * OCTAVES + bins, tl.sum(counted.to(tl.int32), 0).to(tl.float64))


def tile_statistics(
    source: Tensor,
    values: Tensor,
    down: Tensor,
    across: Tensor,
    amax: Tensor,
    tiled: bool,
    octaves: int,
    scale_bins: int,
) -> Tensor:
    """`sensitivity.samples.statistics` of one operand; float64 [SUMS + 2 * octaves + scale_bins].

    source, values: [M, K], any strides. down, across: int64, rows and columns of tiles of 16 x 16. tiled: blocks are
    16 x 16, else 1 x 16. octaves, scale_bins: bins of the histograms, powers of two.
    """
    found = amax.new_empty((down.numel(), SUMS.value + 2 * octaves + scale_bins), dtype=torch.float64)
    launch = _of_tiles(layout(source), layout(values), down.numel(), tiled, octaves, scale_bins, source.device)
    launch((source, values, down, across, amax, found))
    return found.sum(0)


@lru_cache(maxsize=SHAPES_KEPT)
def _of_tiles(
    source: Layout,
    values: Layout,
    programs: int,
    tiled: bool,
    octaves: int,
    scale_bins: int,
    device: torch.device,
) -> Launch:
    """device: apart, for compiled kernels belong to one."""
    return Launch(
        kernel=tiles,
        programs=programs,
        types=(source[2], values[2], torch.int64, torch.int64, torch.float32, torch.float64),
        numbers=(*source[0], *source[1], *values[1]),
        constants={"TILED": tiled, "OCTAVES": octaves, "SCALE_BINS": scale_bins},
        warps=4,
    )


@triton.jit
def compare(
    product,
    exact,
    gradient,
    left_amax,
    right_amax,
    found,
    by_row,
    rows,
    columns,
    exact_batch,
    exact_row,
    exact_column,
    gradient_batch,
    gradient_row,
    gradient_column,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program writes the terms of LINES rows of a product, and of each row what it does to the loss."""
    across = tl.cdiv(rows, LINES)
    batch = (tl.program_id(0) // across).to(tl.int64)
    row = ((tl.program_id(0) % across).to(tl.int64) * LINES + tl.arange(0, LINES))[:, None]
    factor = _factor(left_amax, right_amax)
    signal = tl.zeros([LINES, WIDTH], tl.float32)
    noise = tl.zeros([LINES, WIDTH], tl.float32)
    aligned = tl.zeros([LINES, WIDTH], tl.float32)
    change = tl.zeros([LINES, WIDTH], tl.float32)
    diagonal = tl.zeros([LINES, WIDTH], tl.float32)
    for start in range(0, columns, WIDTH):
        column = (start + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
        inside = (row < rows) & (column < columns)
        place = exact + batch * exact_batch + row * exact_row + column * exact_column
        y = to_float32(tl.load(place, mask=inside, other=0.0))
        error = tl.load(product + (batch * rows + row) * columns + column, mask=inside, other=0.0) * factor - y
        signal += y * y
        noise += error * error
        aligned += error * y
        if gradient is not None:
            place = gradient + batch * gradient_batch + row * gradient_row + column * gradient_column
            part = error * to_float32(tl.load(place, mask=inside, other=0.0))
            change += part
            diagonal += part * part
    line = found + tl.program_id(0).to(tl.int64) * TERMS
    tl.store(line, _total(signal))
    tl.store(line + 1, _total(noise))
    tl.store(line + 2, _total(aligned))
    tl.store(line + 3, _total(diagonal))
    if gradient is not None:
        lines = tl.arange(0, LINES) + (tl.program_id(0) % across) * LINES
        tl.store(by_row + batch * rows + lines, tl.sum(change, 1), mask=lines < rows)


@triton.jit
def _factor(left_amax, right_amax):
    """Of a product of code * scale; an operand that is not quantised has no amax."""
    if left_amax is None:
        factor = tl.math.div_rn(tl.load(right_amax), GLOBAL_MAX)
    elif right_amax is None:
        factor = tl.math.div_rn(tl.load(left_amax), GLOBAL_MAX)
    else:
        factor = global_factor(tl.load(left_amax), tl.load(right_amax))
    return factor


def compared(
    product: Tensor,
    exact: Tensor,
    gradient: Tensor | None,
    left_amax: Tensor | None,
    right_amax: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Sums over a product without its factor, float32 [.., M, N], beside the exact one of the same shape and any type.

    gradient: of the result, of the same shape. left_amax, right_amax: of the operands that were quantised, at least
    one. Returns float32 [4]: sums of y^2, e^2, e y and (g e)^2, for y exact and e the error; and float32 [.., M]: the
    sum of g e in each row, None without a gradient.
    """
    count, (rows, columns) = product.shape[:-2].numel(), product.shape[-2:]
    product = product.contiguous()
    exact = exact.reshape(count, rows, columns)
    gradient = None if gradient is None else gradient.reshape(count, rows, columns)
    by_row = None if gradient is None else product.new_empty(product.shape[:-1])
    own = None if gradient is None else layout(gradient)
    amaxes = left_amax is not None, right_amax is not None
    launch = _of_products(layout(exact), own, amaxes, product.device)
    found = product.new_empty((launch.programs, TERMS.value))
    launch((product, exact, gradient, left_amax, right_amax, found, by_row))
    return found.sum(0), by_row


@lru_cache(maxsize=SHAPES_KEPT)
def _of_products(exact: Layout, gradient: Layout | None, amaxes: tuple[bool, bool], device: torch.device) -> Launch:
    """amaxes: whether there are such. device: apart, for compiled kernels belong to one."""
    (count, rows, columns), strides, dtype = exact
    scalars = (torch.float32 if given else None for given in amaxes)
    return Launch(
        kernel=compare,
        programs=count * triton.cdiv(rows, LINES),
        types=(
            torch.float32,
            dtype,
            gradient and gradient[2],
            *scalars,
            torch.float32,
            torch.float32 if gradient else None,
        ),
        numbers=(rows, columns, *strides, *(gradient[1] if gradient else (0, 0, 0))),
        constants={"LINES": LINES, "WIDTH": WIDTH},
        warps=4,
    )
