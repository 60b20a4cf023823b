"""Statistics of many operands at a time are those of each, from the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nvfp4c import numerics
from nvfp4c.formats import E2M1_MAX, GLOBAL_MAX, ROW_BLOCK, TILE_BLOCK
from nvfp4c.sensitivity.compared import Compared
from nvfp4c.sensitivity.measurements import OCTAVES, SCALE_BINS
from nvfp4c.sensitivity.quantized import Quantized
from nvfp4c.sensitivity.samples import TILES, octaves, sample, statistics

SHAPES = [(32, 48), (40, 48), (7, 33), (2, 16, 40), (16, 5)]
"""Whole tiles, rows that fill none, columns that fill no block, a batch, and less than one tile."""


def operand(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0) -> Quantized:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**seed
    x[..., 3] = 0
    amax = numerics.tensor_amax(x)
    codes, scales = numerics.block_codes(x, amax, block, None)
    return Quantized(x, numerics.block_values(codes, scales)[..., : x.shape[-1]], amax)


def expected(found: Quantized, block: tuple[int, int]) -> list[float]:
    """All of it, but for the last rows that fill no tile where there are more."""
    rows = found.source.shape[:-1].numel()
    rows = rows if rows < 16 else rows // 16 * 16
    x, values = (each.reshape(-1, each.shape[-1])[:rows].double() for each in (found.source, found.values))
    scales = numerics.block_scales(x.float(), found.amax, block)
    factor = found.amax / GLOBAL_MAX  # in FP32, for some elements lie on a limit
    limits = (E2M1_MAX * factor * scales.float()).repeat_interleave(16, -1)[:, : x.shape[1]]
    head = [
        float(x.numel()),
        float(x.square().sum()),
        float((values * factor - x).square().sum()),
        float(x.pow(4).sum()),
        float(((values == 0) & (x != 0)).sum()),
        float((x.abs() > limits).sum()),
        float((x == 0).sum()),
    ]

    def by_octave(magnitudes: Tensor) -> list[float]:
        ratios = found.amax / magnitudes[magnitudes > 0].float()  # quantised ones lie on the edges of octaves
        kept = ratios.double().log2().floor().clamp(0, OCTAVES - 1)
        return torch.bincount(kept.long(), minlength=OCTAVES).double().tolist()

    # A tile's scale counts sixteen times, however many rows it has.
    padded = numerics.block_scales(F.pad(x.float(), (0, 0, 0, -rows % 16)), found.amax, block)
    exponents = padded.view(torch.uint8)[padded.float() > 0] >> 3
    counted = torch.bincount(exponents.long(), minlength=SCALE_BINS).double().tolist()
    return [*head, *by_octave(x.abs()), *by_octave((values.float() * factor).abs()), *counted]


@pytest.mark.parametrize("block", [ROW_BLOCK, TILE_BLOCK])
def test_of_small_operands_everything_counts(block: tuple[int, int]) -> None:
    operands = [operand(shape, block, seed) for seed, shape in enumerate(SHAPES)]
    together = statistics([sample(each, block) for each in operands])
    for found, each in zip(together, operands, strict=True):
        # Sums in FP64 of numbers rounded to FP32, where a quantised value is a product of three.
        assert found.tolist() == pytest.approx(expected(each, block), rel=1e-5)


def test_a_sample_of_a_large_operand_is_of_all_of_it() -> None:
    """Its shares are those of the whole, within what 16384 random elements say; its tiles lie where they do."""
    whole = operand((1024, 512), ROW_BLOCK)
    drawn = sample(whole, ROW_BLOCK)
    assert drawn.elements == TILES * 16 * 16
    found, all_of_it = statistics([drawn])[0].tolist(), expected(whole, ROW_BLOCK)
    # A sum of squares of n numbers spreads by sqrt(2 / n): 1.1%; of errors, which are uniform in each gap, by less.
    for place in (1, 2):
        assert found[place] / found[0] == pytest.approx(all_of_it[place] / all_of_it[0], rel=0.05)
    tiles = whole.source.reshape(64, 16, 32, 16).transpose(1, 2).flatten(0, 1)
    assert all((tile == tiles).flatten(1).all(1).any() for tile in drawn.source)


def test_octaves_count_everything_but_zeros() -> None:
    found = octaves(torch.tensor([8.0, 5.0, 4.0, 1.0, 0.0, 1e-30]), torch.tensor(8.0))
    assert found.tolist() == [0, 0, 1, 3, OCTAVES, OCTAVES - 1]
    assert octaves(torch.zeros(7), torch.tensor(0.0)).tolist() == 7 * [OCTAVES]


def test_a_product_without_rows_has_no_error() -> None:
    """Such as that of an expert that no token was sent to."""
    left, right = (operand((rows, 32), ROW_BLOCK) for rows in (16, 48))
    none = left.narrow(-2, 0, 0)
    gradient = torch.empty(0, 48)
    compared = Compared((none.source, right.source), (none, right), None, gradient, 0, False)
    assert compared.sums().tolist() == 7 * [0.0]
