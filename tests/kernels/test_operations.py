"""Emitted regions, `nvfp4_triton::dequantize` and `product` against the references on the CPU, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import needs_dropped_nan
from regions import LAYOUTS, OUTPUTS, bits, laid_out, same
from torch import Tensor
from torch.library import opcheck

from nvfp4c import dialect
from nvfp4c.codegen import operations
from nvfp4c.codegen.emit import Tile
from nvfp4c.dtypes import QUANTIZABLE_DTYPES
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK, signs_from_seed
from nvfp4c.region import Axis, Form, Layout, Output, Region, evaluate

SPECIAL_VALUES = (0.0, -0.0, 1e-45, -3e-42, 2.0**-126, 6e4, -6e4, 3e38, torch.nan, torch.inf, -torch.inf)
SMALL = Tile(groups=1, columns=32, warps=4)
WIDE = Tile(groups=2, columns=64, warps=4)

ROWS = (
    Output(Form.AMAX),
    Output(Form.OPERAND),
    Output(Form.PACKED, rounding="stochastic", stream=7, amax=1),
    Output(Form.OPERAND, block=TILE_BLOCK),
    Output(Form.PACKED, block=TILE_BLOCK),
    Output(Form.AMAX, signs=DEFAULT_SIGNS),
    Output(Form.ROTATED, signs=DEFAULT_SIGNS),
    Output(Form.OPERAND, rounding="stochastic", signs=DEFAULT_SIGNS, stream=1),
    Output(Form.PACKED, block=TILE_BLOCK, rounding="stochastic", signs=signs_from_seed(1), stream=2),
)
NATIVE = (
    Output(Form.PACKED, layout=Layout.NATIVE),
    Output(Form.PACKED, block=TILE_BLOCK, layout=Layout.NATIVE),
    Output(Form.PACKED, rounding="stochastic", signs=DEFAULT_SIGNS, stream=2, amax=1, layout=Layout.NATIVE),
)
COLUMNS = tuple(Output(**{**vars(output), "axis": Axis.COLUMNS}) for output in ROWS)
TRAINING = (
    Output(Form.OPERAND),
    Output(Form.PACKED, Axis.COLUMNS, signs=DEFAULT_SIGNS, amax=1),
    Output(Form.OPERAND, Axis.COLUMNS, rounding="stochastic", signs=DEFAULT_SIGNS, amax=1, stream=3),
)
NATIVE_COLUMNS = tuple(Output(**{**vars(output), "axis": Axis.COLUMNS}) for output in NATIVE)
REGIONS = {
    "rows": Region(ROWS),
    "columns": Region(COLUMNS),
    "training": Region(TRAINING),
    "native": Region((*NATIVE, *NATIVE_COLUMNS)),
}
EVERY_REGION = pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)


def launch(region: Region, x: Tensor, amaxes: list[Tensor], seed: Tensor | None, tile: Tile | None) -> list[Tensor]:
    return launch_on(region, [x], amaxes, seed, tile)


def launch_on(
    region: Region, inputs: list[Tensor], amaxes: list[Tensor], seed: Tensor | None, tile: Tile | None
) -> list[Tensor]:
    prepared = operations.prepare(region, [operations.layout(x) for x in inputs], inputs[0].device, tile)
    return operations.run(prepared, inputs, amaxes, seed)


def agree(
    region: Region,
    x: Tensor,
    amaxes: list[Tensor] | None = None,
    seed: int = -5,
    tile: Tile | None = SMALL,
) -> None:
    """A region on x, wherever it lies, gives what the reference gives on the CPU. amaxes: x's own if None.

    tile: what a program handles; None for what the operation chooses.
    """
    here = x.cpu()
    used = amaxes or [dialect.amax(here), dialect.amax(here.mT, DEFAULT_SIGNS)]
    key = torch.tensor(seed, dtype=torch.int64)
    found = iter(launch(region, x, [amax.to(x.device) for amax in used], key.to(x.device), tile))
    expected = iter(evaluate(region, [here], used, key))
    for output in region.outputs:
        for _ in range(output.tensors):
            assert same(output, next(found), next(expected)), output
    assert next(found, None) is None


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, str]:
    """Matrices or batches of them with sizes around one tile, any magnitude, outliers and special values."""
    batch = draw(st.sampled_from([(), (), (1,), (2,)]))
    shape = (*batch, draw(st.integers(1, 40)), draw(st.integers(1, 70)))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 1 << 20))))
    # float16's range, float32's beyond it, and numbers so small that the scale factors are subnormal.
    values *= 2.0 ** draw(st.sampled_from([-140, -126, -120, -60, -14, -6, 0, 0, 0, 3, 15, 60, 124]))
    flat = values.view(-1)
    for special in draw(st.lists(st.sampled_from(SPECIAL_VALUES), max_size=3)):
        flat[draw(st.integers(0, flat.numel() - 1))] = special
    if draw(st.booleans()):
        flat[draw(st.integers(0, flat.numel() - 1))] *= 1e4
    return values.to(draw(st.sampled_from(QUANTIZABLE_DTYPES))), draw(st.sampled_from(LAYOUTS))


@settings(max_examples=30)  # on a GPU each is compiled, for seconds
@given(
    inputs(),
    st.lists(OUTPUTS, min_size=1, max_size=4),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.sampled_from([SMALL, WIDE]),
)
def test_any_region_agrees_with_the_reference(
    device: torch.device, given_x: tuple[Tensor, str], outputs: list[Output], seed: int, tile: Tile
) -> None:
    x, layout = given_x
    agree(Region(tuple(outputs)), laid_out(x, layout, device), seed=seed, tile=tile)


@EVERY_REGION
def test_every_output_at_once(device: torch.device, region: Region) -> None:
    """On sizes that are no multiples of anything."""
    x = torch.randn(2, 37, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    agree(region, x.to(device), tile=WIDE)


@EVERY_REGION
def test_tiles_that_fit(device: torch.device, region: Region) -> None:
    """Then nothing is masked."""
    x = torch.randn(2 * 16 * WIDE.groups, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    agree(region, x.to(device), tile=WIDE)


@pytest.mark.parametrize(
    "amax",
    [
        *(0.0, 1e-45, 1e-38, 1.0, 1e30, 3.4e38),
        pytest.param(torch.inf, marks=needs_dropped_nan),
        pytest.param(torch.nan, marks=needs_dropped_nan),
    ],
)
def test_they_agree_when_another_tensor_gave_the_amax(device: torch.device, amax: float) -> None:
    """So a block may be larger than the amax, scales may all be 0, or NaN by the amax alone."""
    x = torch.randn(17, 20, generator=torch.Generator().manual_seed(4))
    both = [output for output in (*ROWS, *COLUMNS) if output.quantised]
    agree(Region(tuple(both[::3])), x.to(device), [torch.tensor(amax), torch.tensor(0.5)])


@pytest.mark.skipif(operations.INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize(
    ("name", "shape", "layout"),
    [
        *itertools.product(["training"], [(2048, 4096), (4095, 1000), (1, 8192), (40, 100, 520)], ["rows", "columns"]),
        *itertools.product(["rows", "columns", "native"], [(1023, 1000)], ["rows", "columns"]),
    ],
)
def test_as_the_operation_chooses(device: torch.device, name: str, shape: tuple[int, ...], layout: str) -> None:
    region = REGIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    agree(region, laid_out(x, layout, device), tile=None)


@pytest.mark.skipif(operations.INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("axis", list(Axis))
def test_more_elements_than_an_int32_counts(device: torch.device, axis: Axis) -> None:
    """The last rows of 2^31 elements and more, where offsets of 32 bits would have wrapped."""
    x = torch.randn((1 << 16) + 48, 1 << 15, dtype=torch.bfloat16, device=device)
    region = Region(
        (
            Output(Form.AMAX),
            Output(Form.PACKED, axis, TILE_BLOCK),
            Output(Form.OPERAND, axis),
            Output(Form.PACKED, axis),
        )
    )
    amax = torch.tensor(5.0)
    found = operations.REGION([x], [amax.to(device)], None, region.to_json())
    assert torch.equal(found[0], x.abs().amax().float())
    last = [tensor[-(64 * tensor.shape[0] // x.shape[0]) :] for tensor in found[1:]]
    expected = evaluate(region, [x[-64:].cpu()], [amax], None)[1:]
    outputs = [output for output in region.outputs[1:] for _ in range(output.tensors)]
    for output, one, other in zip(outputs, last, expected, strict=True):
        assert same(output, one, other), output
    down = axis is Axis.COLUMNS
    k = x.shape[0] if down else x.shape[1]
    values = operations.DEQUANTIZE(found[4], found[5], k, down)
    assert torch.equal(values[-64:] + 0.0, found[3][-64:] + 0.0)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 33), (2, 3, 4, 17), (2, 0, 3, 4)])
def test_the_plain_amax_of_any_shape(device: torch.device, shape: tuple[int, ...]) -> None:
    """In whichever order its elements lie."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    region = Region((Output(Form.AMAX),)).to_json()
    for turned in (x, x.permute(tuple(reversed(range(x.dim())))), x.mT if x.dim() > 1 else x):
        (found,) = operations.REGION([turned], [], None, region)
        assert torch.equal(found.cpu(), dialect.AMAX(x.cpu()))


@EVERY_REGION
@pytest.mark.parametrize("shape", [(0, 32), (5, 0), (0, 3, 16), (2, 0, 17)])
def test_empty_tensors(device: torch.device, shape: tuple[int, ...], region: Region) -> None:
    x = torch.empty(shape)
    amaxes = [torch.zeros(()), torch.zeros(())]
    arguments = (amaxes, torch.tensor(1), region.to_json())
    found = operations.REGION(
        [x.to(device)], [amax.to(device) for amax in amaxes], torch.tensor(1).to(device), arguments[2]
    )
    expected = dialect.REGION([x], *arguments)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.numel() == 0 or torch.equal(bits(one), bits(other))


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    x = torch.randn(40, 70, generator=torch.Generator().manual_seed(5)).to(device)
    amaxes, seed = [torch.tensor(4.0, device=device)] * 2, torch.tensor(9, device=device)
    first, second = (launch(REGIONS["training"], x, amaxes, seed, WIDE) for _ in range(2))
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(first, second, strict=True))


def test_regions_that_differ_in_streams_share_a_kernel(device: torch.device) -> None:
    one, other = (Region((Output(Form.PACKED, rounding="stochastic", stream=stream),)) for stream in (1, 2))
    assert operations.emitted(one) is operations.emitted(other)
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(6)).to(device)
    for region in (one, other):
        agree(region, x)


# ---- dequantize


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("shape", [(70, 53), (2, 33, 150), (1, 1), (3, 16, 32)])
def test_dequantize(device: torch.device, shape: tuple[int, ...], down: bool, rotated: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    source = x.mT if down else x
    signs = list(DEFAULT_SIGNS) if rotated else None
    codes, scales = dialect.QUANTIZE(source, dialect.AMAX(source, signs), [1, 16], "nearest", signs)
    k = 2 * codes.shape[-1] if rotated else source.shape[-1]
    expected = dialect.DEQUANTIZE(codes, scales, None, k, torch.bfloat16)
    found = operations.dequantized(laid_out_like(codes, device), laid_out_like(scales, device), k)
    assert torch.equal(bits(found), bits(expected))
    turned = codes.stride(-1) != 1
    assert (found.mT if turned else found).is_contiguous()


def laid_out_like(x: Tensor, device: torch.device) -> Tensor:
    """x on a device with its strides."""
    return x.to(device) if x.is_contiguous() else x.mT.to(device).mT


@pytest.mark.parametrize("shape", [(0, 32), (5, 0), (0, 3, 16)])
def test_dequantize_of_nothing(device: torch.device, shape: tuple[int, ...]) -> None:
    codes, scales = dialect.QUANTIZE(torch.empty(shape), torch.tensor(0.0), [1, 16], "nearest")
    assert operations.DEQUANTIZE(codes.to(device), scales.to(device), shape[-1], False).shape == shape


def test_every_code_and_scale_is_dequantised_exactly(device: torch.device) -> None:
    """But NaN scales, of which any NaN will do."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32).contiguous().view(torch.float8_e4m3fn)
    expected = dialect.DEQUANTIZE(codes, scales, None, 512, torch.bfloat16)
    assert torch.equal(bits(operations.DEQUANTIZE(codes.to(device), scales.to(device), 512, False)), bits(expected))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_packed_operands_need_not_be_contiguous(device: torch.device, batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, 32, 40, generator=torch.Generator().manual_seed(3))
    codes, scales = dialect.quantize(x, dialect.amax(x), ROW_BLOCK, "nearest")
    every_other = (codes.to(device)[..., ::2, :], scales.to(device)[..., ::2, :])
    expected = dialect.dequantize(codes, scales, None, 40, torch.bfloat16)[..., ::2, :]
    assert torch.equal(bits(operations.dequantized(*every_other, 40)), bits(expected.contiguous()))


# ---- product


def codes_of(*shape: int, seed: int) -> Tensor:
    """Integers up to 12 times 2^-2: their products are multiples of 1/16 below 9, so that sums of up to 2^16 of them
    are exact in FP32 whatever their order."""
    values = torch.randint(-12, 13, shape, generator=torch.Generator().manual_seed(seed))
    return (values / 4).bfloat16()


def turned(x: Tensor, device: torch.device, columns: bool) -> Tensor:
    return x.mT.contiguous().to(device).mT if columns else x.to(device)


def terms_of(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/8 up to 25: so are the products above, scaled by a half, of 1/32; so FP32 holds every sum of
    them, whatever is added first, and BF16 has to round."""
    return torch.randint(-200, 201, shape, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(
    "shape",
    [((), 64, 48, 32), ((), 37, 23, 19), ((), 1, 1, 1), ((), 33, 128, 256), ((3,), 40, 24, 16), ((2,), 5, 7, 9)],
)
def test_product(
    device: torch.device,
    shape: tuple[tuple[int, ...], int, int, int],
    biased: bool,
    summed: bool,
    out_dtype: torch.dtype,
) -> None:
    """Either operand by rows or columns, aligned or not; the factor, bias and residual, and then one rounding."""
    batch, m, n, k = shape
    a, b = codes_of(*batch, m, k, seed=0), codes_of(*batch, n, k, seed=1)
    bias = terms_of(n, seed=2).to(out_dtype) if biased else None
    residual = terms_of(*batch, m, n, seed=3).to(out_dtype) if summed else None
    # A power of two: what the product is multiplied by rounds nothing, so it does not matter when.
    amaxes = torch.tensor(2688.0), torch.tensor(1344.0)
    expected = dialect.PRODUCT(a, b, *amaxes, bias, residual, out_dtype)
    terms = [None if term is None else term.to(device) for term in (bias, residual)]
    for columns in itertools.product((False, True), repeat=2):
        there = [turned(given, device, flag) for given, flag in zip((a, b), columns, strict=True)]
        found = operations.PRODUCT(*there, *(amax.to(device) for amax in amaxes), *terms, out_dtype)
        assert found.is_contiguous()
        assert torch.equal(bits(found), bits(expected)), columns
    assert residual is None or torch.equal(bits(terms[1]), bits(residual)), "it is only read"


def spread(x: Tensor, gap: int) -> Tensor:
    """x with so many elements between its rows, and as many before the first."""
    wide = x.new_empty((*x.shape[:-1], x.shape[-1] + gap))
    wide[..., gap:] = x
    return wide[..., gap:]


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows apart": lambda x: spread(x, 16),
    "rows apart, nowhere aligned": lambda x: spread(x, 3),
    "every other row": lambda x: x.repeat_interleave(2, dim=-2)[..., ::2, :],
    "one row for all": lambda x: x[..., :1, :].expand(x.shape),
    "one matrix for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("layout", PLACES.values(), ids=PLACES)
def test_a_residual_may_lie_anywhere(
    device: torch.device,
    layout: Callable[[Tensor], Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    batch: tuple[int, ...],
) -> None:
    """And be of another type than the result."""
    a, b = codes_of(*batch, 40, 64, seed=0), codes_of(*batch, 48, 64, seed=1)
    amaxes = torch.tensor(2688.0), torch.tensor(1344.0)
    residual = layout(terms_of(*batch, 40, 48, seed=2).to(dtypes[0]).to(device))
    expected = dialect.PRODUCT(a, b, *amaxes, None, residual.cpu(), dtypes[1])
    there = [given.to(device) for given in (a, b, *amaxes)]
    found = operations.PRODUCT(*there, None, residual, dtypes[1])
    assert found.is_contiguous()
    assert torch.equal(bits(found), bits(expected))


def test_the_same_product_with_and_without_a_residual(device: torch.device) -> None:
    """What is remembered of one is not taken for the other."""
    a, b = codes_of(40, 64, seed=0), codes_of(48, 64, seed=1)
    amaxes = torch.tensor(2688.0), torch.tensor(1344.0)
    there = [given.to(device) for given in (a, b, *amaxes)]
    for seed in (2, None, 3, None):
        residual = None if seed is None else terms_of(40, 48, seed=seed).bfloat16()
        expected = dialect.PRODUCT(a, b, *amaxes, None, residual, torch.bfloat16)
        found = operations.PRODUCT(*there, None, None if residual is None else residual.to(device), torch.bfloat16)
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("shape", [(32, 48), (1,), (48,), (32, 1), (1, 48), (4, 1, 48), (4, 32, 48)])
def test_a_bias_of_any_shape(device: torch.device, shape: tuple[int, ...]) -> None:
    """addmm and baddbmm take whatever can be broadcast to their result. A residual is added to that."""
    batch = (4,) if len(shape) == 3 else ()
    a, b = codes_of(*batch, 32, 64, seed=0), codes_of(*batch, 48, 64, seed=1)
    bias = terms_of(*shape, seed=2).bfloat16()
    amaxes = torch.tensor(2688.0), torch.tensor(1344.0)
    there = [given.to(device) for given in (a, b, *amaxes, bias)]
    for residual in (None, terms_of(*batch, 32, 48, seed=3).bfloat16()):
        expected = dialect.PRODUCT(a, b, *amaxes, bias, residual, torch.bfloat16)
        found = operations.PRODUCT(*there, None if residual is None else residual.to(device), torch.bfloat16)
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("shape", [((0, 16), (8, 16)), ((8, 16), (0, 16)), ((8, 0), (4, 0)), ((2, 3, 0), (2, 4, 0))])
def test_product_of_nothing(device: torch.device, shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.empty(each, dtype=torch.bfloat16) for each in shape)
    amax, bias = torch.tensor(3.0), torch.arange(float(b.shape[-2]))
    there = [given.to(device) for given in (a, b, amax, amax, bias)]
    for residual in (None, torch.ones(*a.shape[:-1], b.shape[-2])):
        expected = dialect.PRODUCT(a, b, amax, amax, bias, residual, torch.float32)
        found = operations.PRODUCT(*there, None if residual is None else residual.to(device), torch.float32)
        assert torch.equal(bits(found), bits(expected))


def test_the_factor_is_the_references(device: torch.device) -> None:
    """Rounded as numerics rounds it, for amaxes whose factor is a normal number."""
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    amaxes = torch.logspace(-15, 15, 25, dtype=torch.float32)
    for a_amax, b_amax in zip(amaxes, amaxes.roll(7), strict=True):
        found = operations.PRODUCT(*(x.to(device) for x in (ones, ones, a_amax, b_amax)), None, None, torch.float32)
        assert torch.equal(bits(found), bits(dialect.PRODUCT(ones, ones, a_amax, b_amax, None, None, torch.float32)))


def test_cublas_is_told_to_add_nothing_or_once(device: torch.device) -> None:
    factors = torch.full((3,), torch.nan, device=device)
    amaxes = [torch.tensor(value, device=device) for value in (2688.0, 1344.0)]
    operations.product_factors(device)((*amaxes, factors))
    assert factors.tolist() == [0.5, 0.0, 1.0]


def test_products_that_are_not_exact_are_summed_in_fp32(device: torch.device) -> None:
    a, b = (torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (20, 36))
    amax = torch.tensor(2688.0, device=device)
    found = operations.PRODUCT(a.to(device), b.to(device), amax, amax, None, None, torch.float32)
    # 300 exact products added in FP32, each addition off by half an ulp (6e-8) at most of a partial sum below 300 * 16.
    torch.testing.assert_close(found.cpu().double(), a.double() @ b.double().mT, rtol=0, atol=300 * 300 * 16 * 6e-8)


# ---- what torch.compile relies on


def test_fakes_and_schemas_hold(device: torch.device) -> None:
    """Under fake tensors, symbolic sizes too, each operation promises the results that it gives."""
    # Without the schema test, which compares arguments with an operation that float8 lacks.
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")
    x = torch.randn(20, 33, device=device)
    amaxes, seed = [torch.tensor(3.0, device=device)] * 2, torch.tensor(3, device=device)
    outputs = (Output(Form.AMAX), Output(Form.PACKED, Axis.COLUMNS, TILE_BLOCK, "stochastic"), Output(Form.OPERAND))
    opcheck(operations.REGION, ([x], amaxes, seed, Region(outputs).to_json()), test_utils=tests)
    codes, scales = operations.REGION([x], amaxes, None, Region((Output(Form.PACKED),)).to_json())
    opcheck(operations.DEQUANTIZE, (codes, scales, 33, False), test_utils=tests)
    a, b = (torch.randn(rows, 16, device=device).bfloat16() for rows in (8, 24))
    residual = torch.randn(8, 24, device=device).bfloat16()
    for added in (None, residual):
        opcheck(operations.PRODUCT, (a, b, *amaxes, None, added, torch.bfloat16), test_utils=tests)
