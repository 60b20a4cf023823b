"""What quantising does to an operand itself, from a sample of its 16 x 16 tiles, for many operands at a time.

One operand's statistics are some fifty small operations. Many operands together need no more of them, so samples are
kept until there are enough, and then looked at together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from nvfp4c import numerics
from nvfp4c.formats import BLOCK, E2M1_MAX, GLOBAL_MAX, TILE_BLOCK, padded
from nvfp4c.sensitivity.measurements import OCTAVES, SCALE_BINS
from nvfp4c.sensitivity.quantized import Quantized

TILES = 64
"""Of an operand, drawn from all of them, or all of a smaller operand."""

TOGETHER = 16
"""Samples that are looked at together: more would take fewer operations, and more memory."""

SHAPES_KEPT = 4096


@dataclass(frozen=True)
class Sample:
    """Tiles of an operand. source, values: float32 [tiles, 16, 16], zeros beyond the operand's edges. elements: of them
    those within. amax: float32 scalar, of all of the operand. block: how it was quantised."""

    source: Tensor
    values: Tensor
    elements: int
    amax: Tensor
    block: tuple[int, int]


def sample(operand: Quantized, block: tuple[int, int]) -> Sample:
    """operand: [.., M, K], blocks along its last axis."""
    rows = operand.source.shape[:-1].numel()
    down, across, elements = drawn(rows, operand.source.shape[-1], operand.source.device)
    source, values = (_tiles(x, down, across).float() for x in (operand.source, operand.values))
    return Sample(source, values, elements, operand.amax, block)


@lru_cache(maxsize=SHAPES_KEPT)
def drawn(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Which tiles, by rows and columns of tiles, and the elements in them. Of many rows the last that make no whole
    tile are left out."""
    rows = _whole(rows)
    across = math.ceil(columns / BLOCK)
    count = math.ceil(rows / BLOCK) * across
    places = sorted(random.Random(0).sample(range(count), min(TILES, count)))
    tiles = [divmod(place, across) for place in places]
    elements = sum(min(BLOCK, rows - BLOCK * i) * min(BLOCK, columns - BLOCK * j) for i, j in tiles)
    down, right = torch.tensor(tiles, dtype=torch.int64).reshape(-1, 2).t().contiguous()
    return down.to(device), right.to(device), elements


def sampled(shape: torch.Size, rotated: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The places that `statistics_on_gpu` reads of an operand [.., M, K] of this shape. One that is rotated has whole
    blocks."""
    return drawn(shape[:-1].numel(), padded(shape[-1]) if rotated else shape[-1], device)[:2]


def _whole(rows: int) -> int:
    """Of many rows those that make whole tiles, of few all."""
    return rows if rows < BLOCK else rows // BLOCK * BLOCK


def _tiles(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Those tiles of a matrix [.., M, K]."""
    x = x.reshape(-1, x.shape[-1])
    x = x[: _whole(x.shape[0])]
    missing = -x.shape[0] % BLOCK, -x.shape[1] % BLOCK
    if any(missing):
        x = F.pad(x, (0, missing[1], 0, missing[0]))
    tiles = x.unflatten(1, (x.shape[1] // BLOCK, BLOCK)).unflatten(0, (x.shape[0] // BLOCK, BLOCK))
    return tiles[down, :, across]


def statistics_on_gpu(operand: Quantized, block: tuple[int, int]) -> Tensor:
    """`statistics` of the sample of one operand on a GPU, a row of it: by one kernel, so nothing has to be kept."""
    from nvfp4c.codegen.probing import tile_statistics  # imports triton, which a machine without a GPU need not have

    source, values = (x.reshape(-1, x.shape[-1]) for x in (operand.source, operand.values))
    rows = _whole(source.shape[0])
    down, across, _ = drawn(*source.shape, source.device)
    places = source[:rows], values[:rows], down, across
    return tile_statistics(*places, operand.amax, block == TILE_BLOCK, OCTAVES, SCALE_BINS)


def statistics(samples: Sequence[Sample]) -> Tensor:
    """Of each sample a row, float64: elements, signal, noise, fourth, vanished, saturated, zeros, then the histograms
    before, after and of scales: see `OperandMeasure`. All samples are on one device and have blocks of one kind."""
    x = pad_sequence([one.source for one in samples], batch_first=True)  # [samples, tiles, 16, 16]
    values = pad_sequence([one.values for one in samples], batch_first=True)
    amax = torch.stack([one.amax for one in samples]).reshape(-1, 1, 1, 1)
    packed_scales = numerics.block_scales(x, amax, samples[0].block)  # [samples, tiles, 16, 1]
    scales = packed_scales.float()
    factor = amax / GLOBAL_MAX
    magnitudes, quantised = x.abs(), values.abs() * factor
    elements = torch.tensor([one.elements for one in samples], dtype=torch.float64, device=x.device)
    nonzero = _sum(x != 0)
    exponents = torch.where(scales > 0, packed_scales.view(torch.uint8) >> 3, SCALE_BINS)
    head = (
        elements,
        _power_sum(x, 2),
        _power_sum(values * factor - x, 2),
        _power_sum(x, 4),
        nonzero - _sum(values != 0),
        _sum(magnitudes > E2M1_MAX * factor * scales),
        elements - nonzero,
    )
    histograms = (
        _counts(octaves(magnitudes, amax), OCTAVES + 1)[:, :OCTAVES],
        _counts(octaves(quantised, amax), OCTAVES + 1)[:, :OCTAVES],
        _counts(exponents, SCALE_BINS + 1)[:, :SCALE_BINS],
    )
    return torch.cat([torch.stack(head, dim=1), *histograms], dim=1)


def octaves(magnitudes: Tensor, amax: Tensor) -> Tensor:
    """The octave below amax in which each magnitude lies, the last also for all below it; OCTAVES for a zero."""
    # The exponent of an FP32 number is floor(log2) of it; that of an infinite one is the largest, as that of a NaN of
    # either sign.
    found = ((amax / magnitudes).view(torch.int32) >> 23).bitwise_and_(255).sub_(127).clamp_(0, OCTAVES - 1)
    return found.masked_fill_(magnitudes == 0, OCTAVES)


def _sum(x: Tensor) -> Tensor:
    """Over each sample, float64."""
    return x.flatten(1).sum(1, dtype=torch.float64)


def _power_sum(x: Tensor, power: int) -> Tensor:
    """Of each sample, float64: the fourth power of a small gradient is below what FP32 holds."""
    return torch.linalg.vector_norm(x.flatten(1), power, dim=1, dtype=torch.float64) ** power


def _counts(bins: Tensor, amount: int) -> Tensor:
    """How many elements of each sample are in each bin; float64 [samples, amount]."""
    count = bins.shape[0]
    own = amount * torch.arange(count, device=bins.device).reshape(-1, 1, 1, 1)
    return torch.bincount((bins + own).flatten(), minlength=count * amount).reshape(count, amount).double()


class Samples:
    """Samples of operands until there are enough to look at, each with the list that its statistics go to."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[torch.device, tuple[int, int]], list[tuple[list[Tensor], Sample]]] = {}

    def add(self, target: list[Tensor], operand: Quantized, block: tuple[int, int]) -> None:
        """operand, block: as in `sample`. On a GPU one kernel looks at an operand, so nothing waits there."""
        if operand.source.is_cuda:
            target.append(statistics_on_gpu(operand, block))
            return
        waiting = self._waiting.setdefault((operand.source.device, block), [])
        waiting.append((target, sample(operand, block)))
        if len(waiting) == TOGETHER:
            self._look(waiting)

    def finish(self) -> None:
        """Look at what still waits."""
        for waiting in self._waiting.values():
            self._look(waiting)

    def _look(self, waiting: list[tuple[list[Tensor], Sample]]) -> None:
        if waiting:
            for (target, _), row in zip(waiting, statistics([found for _, found in waiting]), strict=True):
                target.append(row)
        waiting.clear()
