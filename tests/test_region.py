"""Regions: plain data, and a reference that says of each output what the dialect's operations say."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from graphs import same_bits
from torch import Tensor

from nvfp4c import dialect, scale_layout
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK, padded, signs_from_seed
from nvfp4c.prologue import Kind, Prologue, Step
from nvfp4c.region import Axis, Form, Layout, Output, Region, evaluate, shapes

SEED = torch.tensor(-77)
GENERATOR = torch.Generator().manual_seed(0)
OPERANDS = [torch.randn(shape, generator=GENERATOR).bfloat16() for shape in ((37, 20), (3, 16, 33))]
EVERY_OPERAND = pytest.mark.parametrize("x", OPERANDS, ids=["matrix", "batch"])
EVERY_AXIS = pytest.mark.parametrize("axis", list(Axis))
QUANTISED = [
    Output(Form.PACKED, block=block, rounding=rounding, signs=signs, amax=amax, stream=stream)
    for (block, rounding, signs), amax, stream in zip(
        itertools.product((ROW_BLOCK, TILE_BLOCK), ("nearest", "stochastic"), (None, DEFAULT_SIGNS)),
        itertools.cycle((0, 1)),
        itertools.count(),
        strict=False,
    )
]


def on(axis: Axis, x: Tensor) -> Tensor:
    """The matrix whose rows hold the blocks: for blocks down the columns its transpose."""
    return x.mT if axis is Axis.COLUMNS else x


def quantised(output: Output, x: Tensor, amaxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What `quantize` makes of x for an output, blocks along the rows."""
    signs = None if output.signs is None else list(output.signs)
    amax = amaxes[output.amax]
    return dialect.QUANTIZE(x, amax, list(output.block), output.rounding, signs, SEED, output.stream)


def output_with(output: Output, **changes: object) -> Output:
    return Output(**{**vars(output), **changes})


def test_json() -> None:
    """What is read back is what was written; the text is plain data, with a word for each choice."""
    signs = signs_from_seed(3)
    region = Region((Output(Form.AMAX), Output(Form.PACKED, Axis.COLUMNS, TILE_BLOCK, "stochastic", signs, 1, 5)))
    assert Region.from_json(region.to_json()) == region
    data = json.loads(region.to_json())["outputs"]
    assert data[1] == {
        "form": "packed",
        "axis": "columns",
        "block": [16, 16],
        "rounding": "stochastic",
        "signs": list(signs),
        "amax": 1,
        "stream": 5,
        "matrix": 0,
        "layout": "linear",
    }


def test_how_many_amaxes_are_read() -> None:
    packed, amax = Output(Form.PACKED, amax=2), Output(Form.AMAX, amax=7)
    assert Region((amax,)).amax_count == 0
    assert Region((amax, packed, Output(Form.OPERAND))).amax_count == 3


@EVERY_OPERAND
@EVERY_AXIS
@pytest.mark.parametrize("signs", [None, DEFAULT_SIGNS])
def test_amax(x: Tensor, axis: Axis, signs: tuple[int, ...] | None) -> None:
    (found,) = evaluate(Region((Output(Form.AMAX, axis, signs=signs),)), [x], [], None)
    assert same_bits(found, dialect.AMAX(on(axis, x), None if signs is None else list(signs)))


@EVERY_OPERAND
@EVERY_AXIS
def test_rotated(x: Tensor, axis: Axis) -> None:
    (found,) = evaluate(Region((Output(Form.ROTATED, axis, signs=DEFAULT_SIGNS),)), [x], [], None)
    assert same_bits(on(axis, found), dialect.HADAMARD(on(axis, x), list(DEFAULT_SIGNS)))


@EVERY_OPERAND
@EVERY_AXIS
def test_all_quantised_outputs_at_once(x: Tensor, axis: Axis) -> None:
    """Packed and as an operand, each by its own amax: what belongs to blocks down the columns is transposed."""
    amaxes = [dialect.AMAX(x), dialect.AMAX(x) * 0.75]
    packed = [output_with(output, axis=axis) for output in QUANTISED]
    operands = [output_with(output, form=Form.OPERAND) for output in packed]
    found = evaluate(Region((*packed, *operands)), [x], amaxes, SEED)
    assert all(tensor.is_contiguous() for tensor in found)
    for place, output in enumerate(packed):
        codes, scales = quantised(output, on(axis, x), amaxes)
        assert same_bits([on(axis, found[2 * place]), on(axis, found[2 * place + 1])], [codes, scales])
        # Rotated blocks are whole: what rotation makes of the padding is a part of them.
        k = on(axis, x).shape[-1]
        values = dialect.DEQUANTIZE(codes, scales, None, k if output.signs is None else padded(k), torch.bfloat16)
        assert found[2 * len(packed) + place].dtype is torch.bfloat16
        assert torch.equal(on(axis, found[2 * len(packed) + place]), values)


@EVERY_OPERAND
@EVERY_AXIS
def test_the_native_layout_holds_what_the_linear_one_does(x: Tensor, axis: Axis) -> None:
    """Codes with the contraction axis last, whichever way the blocks run, and scales in swizzled tiles."""
    amaxes = [dialect.AMAX(x), dialect.AMAX(x) * 0.75]
    linear = [output_with(output, axis=axis) for output in QUANTISED]
    native = [output_with(output, layout=Layout.NATIVE) for output in linear]
    expected, found = (evaluate(Region(tuple(outputs)), [x], amaxes, SEED) for outputs in (linear, native))
    promised = [shape for output in native for shape in shapes(output, x.shape, x.dtype)]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in found] == promised
    assert all(tensor.is_contiguous() for tensor in found)
    for codes, scales, other_codes, other_scales in zip(
        found[::2], found[1::2], expected[::2], expected[1::2], strict=True
    ):
        assert same_bits(codes, on(axis, other_codes))
        assert same_bits(scales, scale_layout.swizzle(on(axis, other_scales)))


def test_stochastic_rounding_needs_a_seed() -> None:
    region = Region((Output(Form.PACKED, rounding="stochastic"),))
    with pytest.raises(AssertionError, match="needs a seed"):
        evaluate(region, [OPERANDS[0]], [torch.tensor(3.0)], None)


@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_product_is_scaled_mm_of_what_is_dequantised(bias: Tensor | None) -> None:
    """Halves up to 6, and a 6 in every block, so all scales are equal and every sum is exact in FP32."""
    x, w = (torch.randint(-12, 13, (rows, 20), generator=GENERATOR).bfloat16() / 2 for rows in (7, 5))
    x[:, ::16] = w[:, ::16] = 6
    a, b = (dialect.QUANTIZE(given, dialect.AMAX(given), [1, 16], "nearest") for given in (x, w))
    values = [dialect.DEQUANTIZE(*given, None, 20, torch.bfloat16) for given in (a, b)]
    amaxes = dialect.AMAX(x), dialect.AMAX(w)
    expected = dialect.SCALED_MM(*a, amaxes[0], *b, amaxes[1], 20, bias, torch.float32)
    assert same_bits(dialect.PRODUCT(*values, *amaxes, bias, None, torch.float32), expected)


def test_what_a_prologue_makes_is_known_without_making_it() -> None:
    steps = (Step("mul", (0, 1), "float32"), Step("to", (3,), "bfloat16"), Step("mul", (4, 2), "float16"))
    prologue = Prologue((Kind.FULL, Kind.ROW, Kind.COLUMN), steps, (5, 4, 3, 0))
    inputs = [torch.ones(2, 6, 8, dtype=torch.bfloat16), torch.ones(2, 6, 1), torch.ones(8, dtype=torch.float64)]
    made = prologue.evaluate(inputs)
    assert prologue.result_types([x.dtype for x in inputs]) == [x.dtype for x in made]
    assert {x.shape for x in made} == {inputs[0].shape}
