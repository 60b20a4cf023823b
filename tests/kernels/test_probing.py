"""The kernels of the sensitivity probe give what torch's operations give."""

from __future__ import annotations

import pytest
import torch
from interpreter import needs_loops
from torch import Tensor

from nvfp4c import numerics
from nvfp4c.codegen import probing
from nvfp4c.dialect import Quantization
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK
from nvfp4c.sensitivity.compared import terms
from nvfp4c.sensitivity.quantized import Quantized, on_gpu
from nvfp4c.sensitivity.samples import sample, statistics, statistics_on_gpu

SUMS = 1e-5
"""Relative: sums in FP32 of thousands of terms in another order."""


def operand(shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype) -> Quantized:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 3] = 0
    x[..., 5] *= 1e-12
    amax = numerics.tensor_amax(x)
    codes, scales = numerics.block_codes(x, amax, block, None)
    return Quantized(x, numerics.block_values(codes, scales)[..., : x.shape[-1]].bfloat16(), amax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [ROW_BLOCK, TILE_BLOCK])
@pytest.mark.parametrize("shape", [(32, 48), (7, 33), (200, 176), (3, 32, 48)])
@pytest.mark.parametrize("turned", [False, True])
def test_statistics(
    shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype, turned: bool, device: torch.device
) -> None:
    found = operand(shape, block, dtype)
    (expected,) = statistics([sample(found, block)])
    there = (x.to(device) for x in (found.source, found.values))
    source, values = (x.mT.contiguous().mT if turned else x for x in there)
    got = statistics_on_gpu(Quantized(source, values, found.amax.to(device)), block)
    # Sums in FP64 of the same FP32 numbers, and counts.
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("signs", [None, DEFAULT_SIGNS], ids=["plain", "rotated"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("block", [ROW_BLOCK, TILE_BLOCK])
def test_a_transposed_operand(
    block: tuple[int, int], rounding: str, signs: tuple[int, ...] | None, device: torch.device
) -> None:
    """Is quantised as its copy would be, to the bit, without one."""
    x = torch.randn((70, 33), generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    how, seed = Quantization(block, rounding, signs), torch.tensor(3, device=device)
    expected, found = on_gpu(x, how, seed), on_gpu(x.mT.contiguous().mT, how, seed)
    assert torch.equal(found.amax, expected.amax)
    assert torch.equal(found.source, expected.source)
    assert torch.equal(found.values, expected.values)
    assert found.values.mT.is_contiguous()


@needs_loops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantised", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(33, 300), (3, 20, 40), (5, 7)])
def test_comparison(
    shape: tuple[int, ...], quantised: tuple[bool, bool], dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    amaxes = [torch.rand((), generator=generator) if given else None for given in quantised]
    exact = torch.randn(shape, generator=generator).to(dtype)
    gradient = torch.randn(shape, generator=generator).to(dtype)
    known = [amax for amax in amaxes if amax is not None]
    factor = numerics.global_factor(*known) if all(quantised) else known[0] / numerics.GLOBAL_MAX
    product = (exact.float() + 0.1 * torch.randn(shape, generator=generator)) / factor

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    for of_loss in (gradient, gradient.mT.contiguous().mT, None):
        expected, by_row = terms(product * factor, exact, of_loss)
        got, rows = probing.compared(*map(there, (product, exact, of_loss, *amaxes)))  # type: ignore[arg-type]
        got = got[: len(expected)].cpu()
        alike = [place for place in range(len(expected)) if place != 2]
        torch.testing.assert_close(got[alike], expected[alike], rtol=SUMS, atol=0)
        # Terms of the third sum, e y, cancel: together they are at most sqrt(sum of y^2, times sum of e^2) in size.
        size = float((expected[0] * expected[1]).sqrt())
        torch.testing.assert_close(got[2], expected[2], rtol=0, atol=SUMS * size)
        if of_loss is None:
            assert rows is None and by_row is None
        else:
            assert rows is not None and by_row is not None
            # A row's terms cancel: what their sum is off by goes with their size, here about one.
            torch.testing.assert_close(rows.cpu(), by_row, rtol=SUMS, atol=SUMS)
