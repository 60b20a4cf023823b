"""The `nvfp4_triton::` operations against the dialect's on the CPU, bit for bit, the same seeds included."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from nvfp4c import dialect
from nvfp4c.codegen import operations
from nvfp4c.formats import DEFAULT_SIGNS, QUANTIZABLE_DTYPES, ROW_BLOCK, TILE_BLOCK, padded, signs_from_seed

LAYOUTS = ("rows", "columns", "strided", "repeated")
SPECIAL_VALUES = (0.0, -0.0, 1e-45, -3e-42, 2.0**-126, 6e4, -6e4, 3e38, torch.nan, torch.inf, -torch.inf)


@dataclass(frozen=True)
class How:
    """The arguments of `quantize` after x and amax."""

    block: tuple[int, int]
    rounding: str
    signs: tuple[int, ...] | None = None
    seed: int = 0
    stream: int = 0


HOWS = [
    How(block, rounding, signs, seed=-5, stream=3)
    for block, signs in ((ROW_BLOCK, DEFAULT_SIGNS), (TILE_BLOCK, None))
    for rounding in ("nearest", "stochastic")
]
SHAPES = [(2, 70, 260)]
"""Several programs along batch, rows and columns, the last of each partly empty, whichever tile is used."""
if not operations.INTERPRETED:
    SHAPES += [(2048, 4096), (4095, 1000), (1, 8192), (40, 100, 520)]


def laid_out(x: Tensor, layout: str, device: torch.device) -> Tensor:
    """A tensor of x's values, or of its first row's, on the device and with other strides."""
    if layout == "columns":
        return x.transpose(-1, -2).contiguous().to(device).transpose(-1, -2)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 3::2] = x
        return wide.to(device)[..., 3::2]
    if layout == "repeated":
        return x[..., :1, :].to(device).expand(x.shape)
    return x.to(device)


def bits(x: Tensor) -> Tensor:
    """x's bits on the CPU, with one NaN for all: which NaN an operation makes is up to the processor."""
    x = x.cpu()
    x = torch.where(x.isnan(), torch.nan, x)
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def agree(x: Tensor, how: How, amax: Tensor | None = None) -> None:
    """Every operation on x, wherever it lies, gives what the reference gives on the CPU. amax: x's own if None."""
    here = x.cpu()
    found_amax = operations.AMAX(x, how.signs)
    assert torch.equal(bits(found_amax), bits(dialect.amax(here, how.signs)))
    used = (found_amax if amax is None else amax).cpu()
    seed = torch.tensor(how.seed, dtype=torch.int64)

    codes, scales = operations.QUANTIZE(
        x, used.to(x.device), how.block, how.rounding, how.signs, seed.to(x.device), how.stream
    )
    expected = dialect.quantize(here, used, how.block, how.rounding, how.signs, seed, how.stream)
    assert torch.equal(scales.view(torch.uint8).cpu(), expected[1].view(torch.uint8))
    assert torch.equal(codes.cpu(), expected[0])
    assert codes.is_contiguous() and scales.is_contiguous()

    k = x.shape[-1]
    values = operations.DEQUANTIZE(codes, scales, k)
    assert torch.equal(bits(values), bits(dialect.dequantize(*expected, None, k, torch.bfloat16)))
    if how.signs is not None:
        assert torch.equal(bits(operations.HADAMARD(x, how.signs)), bits(dialect.hadamard(here, how.signs)))


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, str]:
    """Matrices or batches of them with sizes around one tile, any magnitude, outliers and special values."""
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*batch, draw(st.integers(1, 70)), draw(st.integers(1, 50)))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 1 << 20))))
    # float16's range, float32's beyond it, and numbers so small that the scale factors are subnormal.
    values *= 2.0 ** draw(st.sampled_from([-140, -126, -120, -60, -14, -6, 0, 0, 0, 3, 15, 60, 124]))
    flat = values.view(-1)
    for special in draw(st.lists(st.sampled_from(SPECIAL_VALUES), max_size=3)):
        flat[draw(st.integers(0, flat.numel() - 1))] = special
    if draw(st.booleans()):
        flat[draw(st.integers(0, flat.numel() - 1))] *= 1e4
    return values.to(draw(st.sampled_from(QUANTIZABLE_DTYPES))), draw(st.sampled_from(LAYOUTS))


hows = st.builds(
    How,
    block=st.sampled_from([ROW_BLOCK, TILE_BLOCK]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    signs=st.none() | st.just(DEFAULT_SIGNS) | st.integers(0, 99).map(signs_from_seed),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    stream=st.integers(0, 40),
)


@settings(max_examples=40)
@given(inputs(), hows)
def test_operations_agree_with_the_reference(device: torch.device, given_x: tuple[Tensor, str], how: How) -> None:
    x, layout = given_x
    agree(laid_out(x, layout, device), how)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 1.0, 1e30, 3.4e38, torch.inf, torch.nan])
def test_they_agree_when_another_tensor_gave_the_amax(device: torch.device, amax: float, how: How) -> None:
    """So a block may be larger than the amax, scales may all be 0, or NaN by the amax alone."""
    x = torch.randn(17, 20, generator=torch.Generator().manual_seed(4))
    agree(x.to(device), how, torch.tensor(amax))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES)
def test_several_programs(device: torch.device, shape: tuple[int, ...], layout: str, how: How) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    agree(laid_out(x.bfloat16(), layout, device), how)


@pytest.mark.skipif(operations.INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_more_elements_than_an_int32_counts(device: torch.device, layout: str) -> None:
    """The last rows of 2^31 elements and more, where offsets of 32 bits would have wrapped."""
    x = torch.randn((1 << 16) + 48, 1 << 15, dtype=torch.bfloat16, device=device)
    x = x if layout == "rows" else x.t()
    amax = operations.AMAX(x)
    codes, scales = operations.QUANTIZE(x, amax, TILE_BLOCK, "nearest")
    last = x[-64:].cpu()
    expected = dialect.quantize(last, amax.cpu(), TILE_BLOCK, "nearest")
    assert torch.equal(codes[-64:].cpu(), expected[0])
    assert torch.equal(scales[-64:].view(torch.uint8).cpu(), expected[1].view(torch.uint8))
    values = operations.DEQUANTIZE(codes, scales, x.shape[1])[-64:]
    assert torch.equal(bits(values), bits(dialect.dequantize(*expected, None, x.shape[1], torch.bfloat16)))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5)])
def test_amax_of_tensors_of_other_ranks(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    turned = x.to(device).permute(list(reversed(range(x.dim()))))
    assert torch.equal(bits(operations.AMAX(turned)), bits(dialect.AMAX(x)))


@pytest.mark.parametrize("shape", [(0, 32), (5, 0), (0, 3, 16), (2, 0, 17)])
def test_empty_tensors(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device)
    amax = operations.AMAX(x, DEFAULT_SIGNS)
    assert amax.item() == 0
    codes, scales = operations.QUANTIZE(x, amax, ROW_BLOCK, "nearest")
    columns = padded(shape[-1])
    assert codes.shape == (*shape[:-1], columns // 2) and scales.shape == (*shape[:-1], columns // 16)
    assert operations.DEQUANTIZE(codes, scales, shape[-1]).shape == shape
    assert operations.HADAMARD(x, DEFAULT_SIGNS).shape == (*shape[:-1], columns)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 33), (2, 3, 4, 17), (2, 0, 3, 4)])
def test_amax_of_any_shape(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for turned in (x, x.permute(tuple(reversed(range(x.dim())))), x.mT if x.dim() > 1 else x):
        assert torch.equal(operations.AMAX(turned).cpu(), dialect.AMAX(x.cpu()))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_packed_operands_need_not_be_contiguous(device: torch.device, batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, 32, 40, generator=torch.Generator().manual_seed(3))
    codes, scales = dialect.quantize(x, dialect.amax(x), ROW_BLOCK, "nearest")
    every_other = (codes.to(device)[..., ::2, :], scales.to(device)[..., ::2, :])
    expected = dialect.dequantize(codes, scales, None, 40, torch.bfloat16)[..., ::2, :]
    assert torch.equal(bits(operations.DEQUANTIZE(*every_other, 40)), bits(expected.contiguous()))


def test_stochastic_rounding_needs_a_seed(device: torch.device) -> None:
    x = torch.ones(1, 16, device=device)
    with pytest.raises(AssertionError, match="needs a seed"):
        operations.QUANTIZE(x, operations.AMAX(x), ROW_BLOCK, "stochastic")


def test_fakes_and_schemas_hold(device: torch.device) -> None:
    """Under fake tensors, symbolic sizes too, each operation promises the results that it gives."""
    x = torch.randn(20, 33, device=device)
    amax, seed = operations.AMAX(x), torch.tensor(3, device=device)
    opcheck(operations.AMAX, (x, list(DEFAULT_SIGNS)))
    opcheck(operations.HADAMARD, (x, list(DEFAULT_SIGNS)))
    opcheck(operations.QUANTIZE, (x, amax, [16, 16], "stochastic", None, seed, 2))
    # Without the schema test, which compares arguments with an operation that float8 lacks.
    packed = operations.QUANTIZE(x, amax, [1, 16], "nearest")
    opcheck(operations.DEQUANTIZE, (*packed, 33), test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))
