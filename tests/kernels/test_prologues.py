"""Regions with a prologue: what kernels compute from other tensors is what PyTorch computes operation by operation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from regions import LAYOUTS, laid_out, same, value_bits
from regions import OUTPUTS as DRAWN
from torch import Tensor

from nvfp4c import dialect
from nvfp4c.codegen import operations
from nvfp4c.codegen.emit import Tile
from nvfp4c.codegen.expressions import TEMPLATES
from nvfp4c.formats import DEFAULT_SIGNS
from nvfp4c.prologue import OPERATIONS, Kind, Prologue, Step
from nvfp4c.region import Axis, Form, Output, Region, evaluate

FULL, ROW, COLUMN = Kind.FULL, Kind.ROW, Kind.COLUMN
BF16, FP32 = "bfloat16", "float32"
TILE = Tile(groups=1, columns=32, warps=4)

NORM = Prologue(
    (FULL, ROW, COLUMN),
    (Step("to", (0,), FP32), Step("mul", (3, 1), FP32), Step("mul", (4, 2), FP32), Step("to", (5,), BF16)),
    (6,),
)
"""x * rstd * weight, as a normalisation ends."""

SQUARED_RELU = Prologue((FULL,), (Step("relu", (0,), BF16), Step("square", (1,), BF16)), (2,))
RESIDUAL = Prologue((FULL, FULL), (Step("add", (0, 1), BF16),), (2,))
MASKED = Prologue(
    (FULL, FULL),
    (Step("gt", (1, 0.5), "bool"), Step("where", (2, 0, 0.0), BF16), Step("mul", (3, 1.25), BF16)),
    (4,),
)
SWIGLU = Prologue(
    (FULL, FULL),
    (
        Step("to", (0,), FP32),
        Step("neg", (2,), FP32),
        Step("exp", (3,), FP32),
        Step("add", (4, 1.0), FP32),
        Step("div", (2, 5), FP32),
        Step("to", (6,), BF16),
        Step("mul", (7, 1), BF16),
    ),
    (8,),
)
GELU = Prologue(
    (FULL,),
    (
        Step("to", (0,), FP32),
        Step("mul", (1, 0.7071067811865476), FP32),
        Step("erf", (2,), FP32),
        Step("add", (3, 1.0), FP32),
        Step("mul", (1, 0.5), FP32),
        Step("mul", (5, 4), FP32),
        Step("to", (6,), BF16),
    ),
    (7,),
)
GELU_BY_TANH = Prologue(
    (FULL,),
    (
        Step("to", (0,), FP32),
        Step("cube", (1,), FP32),
        Step("mul", (2, 0.044715), FP32),
        Step("add", (1, 3), FP32),
        Step("mul", (4, 0.7978845608028654), FP32),
        Step("tanh", (5,), FP32),
        Step("add", (6, 1.0), FP32),
        Step("mul", (1, 0.5), FP32),
        Step("mul", (8, 7), FP32),
        Step("to", (9,), BF16),
    ),
    (10,),
)
GATES = Prologue(
    (FULL, FULL, FULL),
    (
        Step("sigmoid", (1,), FP32),
        Step("mul", (1, 3), BF16),
        Step("mul", (0, 4), BF16),
        Step("sub", (0, 3), FP32),
        Step("mul", (6, 2), BF16),
    ),
    (5, 7),
)
"""Two matrices from the same three inputs, as in the backward of a gated layer."""

EXACT = {"norm": NORM, "squared relu": SQUARED_RELU, "residual": RESIDUAL, "masked": MASKED}
CLOSE = {"swiglu": SWIGLU, "gelu": GELU, "gelu by tanh": GELU_BY_TANH, "gates": GATES}
EVERY_PROLOGUE = pytest.mark.parametrize("prologue", (EXACT | CLOSE).values(), ids=EXACT | CLOSE)

OUTPUTS = (
    Output(Form.VALUE),
    Output(Form.AMAX),
    Output(Form.AMAX, Axis.COLUMNS, signs=DEFAULT_SIGNS),
    Output(Form.OPERAND),
    Output(Form.PACKED, Axis.COLUMNS, signs=DEFAULT_SIGNS, amax=1),
)


@dataclass(frozen=True)
class Given:
    """Inputs of a prologue with matrices of this shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    transposed: bool = False
    rows_too: bool = False
    """Numbers for rows have that type too; else they are float32, as what a norm divides by."""

    def inputs(self, prologue: Prologue, device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(len(prologue.steps))
        found = []
        for kind in prologue.inputs:
            shape = {FULL: self.shape, ROW: (*self.shape[:-1], 1), COLUMN: self.shape[-1:]}[kind]
            x = torch.randn(shape, generator=generator)
            x = x if kind is ROW and not self.rows_too else x.to(self.dtype)
            turned = self.transposed and kind is FULL
            found.append(x.mT.contiguous().to(device).mT if turned else x.to(device))
        return found


def every_output(prologue: Prologue) -> Region:
    count = len(prologue.results)
    return Region(tuple(replace(output, matrix=m) for m in range(count) for output in OUTPUTS), prologue)


def agree(prologue: Prologue, given: Given, device: torch.device, tile: Tile | None = TILE) -> None:
    """Values are PyTorch's, and everything else is the reference's for the kernel's own values, bit for bit."""
    inputs = given.inputs(prologue, device)
    region = every_output(prologue)
    exact = [value.cpu() for value in prologue.evaluate(inputs)]
    amaxes = [dialect.amax(exact[0]), dialect.amax(exact[0].mT, DEFAULT_SIGNS)]
    launch = operations.prepare(region, [operations.layout(x) for x in inputs], device, tile)
    found = operations.run(launch, inputs, [amax.to(device) for amax in amaxes], None)
    per_matrix = len(found) // len(exact)
    for m, value in enumerate(exact):
        mine = found[m * per_matrix : (m + 1) * per_matrix]
        assert mine[0].is_contiguous() and mine[0].dtype == value.dtype
        if prologue in EXACT.values():
            assert torch.equal(value_bits(mine[0]), value_bits(value))
        else:
            # float32's exp and quotients are off by some units in their last place, after which a result may round to
            # its neighbour; that may be rounded once more in a product.
            assert torch.allclose(mine[0].cpu(), value, rtol=2 * torch.finfo(value.dtype).eps, atol=1e-6)
        expected = evaluate(Region(OUTPUTS), [mine[0].cpu()], amaxes, None)
        for one, other in zip(mine, expected, strict=True):
            assert torch.equal(value_bits(one), value_bits(other))


@EVERY_PROLOGUE
@pytest.mark.parametrize("given", [Given((20, 35)), Given((2, 16, 33)), Given((32, 64)), Given((1, 1))], ids=str)
def test_every_output_of_every_matrix(prologue: Prologue, given: Given, device: torch.device) -> None:
    agree(prologue, given, device)


@EVERY_PROLOGUE
def test_transposed_inputs(prologue: Prologue, device: torch.device) -> None:
    agree(prologue, Given((20, 35), transposed=True), device)


@pytest.mark.skipif(operations.INTERPRETED, reason="too large for the interpreter")
@EVERY_PROLOGUE
def test_as_the_operation_chooses(prologue: Prologue, device: torch.device) -> None:
    agree(prologue, Given((1000, 2056)), device, tile=None)
    agree(prologue, Given((512, 1024)), device, tile=None)


def test_what_lies_beyond_a_matrix_is_zero(device: torch.device) -> None:
    """Whatever the prologue makes of zeros: else a rotated block of the last rows would be another one."""
    plus_one = Prologue((FULL,), (Step("add", (0, 1.0), FP32),), (1,))
    x = torch.zeros(3, 5, device=device)
    outputs = (Output(Form.AMAX), Output(Form.ROTATED, Axis.COLUMNS, signs=DEFAULT_SIGNS))
    region = Region(outputs, plus_one)
    found = operations.REGION([x], [], None, region.to_json())
    for one, other in zip(found, evaluate(region, [x.cpu()], [], None), strict=True):
        assert torch.equal(value_bits(one), value_bits(other))


UNARY = ("abs", "cube", "erf", "exp", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "sqrt", "square", "tanh", "to")
BINARY = ("add", "div", "maximum", "minimum", "mul", "sub")
COMPARISONS = ("eq", "ge", "gt", "le", "lt")


def test_every_operation_has_a_template() -> None:
    assert set(TEMPLATES) == set(OPERATIONS) == {*UNARY, *BINARY, *COMPARISONS, "where"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", [*UNARY, *BINARY, *COMPARISONS])
def test_each_operation(operation: str, dtype: torch.dtype, device: torch.device) -> None:
    """On numbers of many sizes, near 0 too. Quotients, roots and all that is transcendental are approximations."""
    name = str(dtype).removeprefix("torch.")
    count = 1 if operation in UNARY else 2
    steps = [Step(operation, tuple(range(count)), "bool" if operation in COMPARISONS else name)]
    if operation in COMPARISONS:
        steps.append(Step("where", (count, 1.0, 2.0), name))
    prologue = Prologue((FULL,) * count, tuple(steps), (count + len(steps) - 1,))
    x = torch.linspace(-9, 9, 16 * 32).view(16, 32)
    x = torch.where(torch.arange(32) < 8, x * 1e-3, x)
    x = x.abs() if operation in ("rsqrt", "sqrt") else x
    inputs = [x.to(dtype).to(device), x.flip(0, 1).clamp(-3, 2.5).to(dtype).to(device)][:count]
    (expected,) = prologue.evaluate(inputs)
    (found,) = operations.REGION(inputs, [], None, Region((Output(Form.VALUE),), prologue).to_json())
    assert found.dtype == dtype
    if operation in ("div", "erf", "exp", "reciprocal", "rsqrt", "sigmoid", "sqrt", "tanh"):
        # 2e-6: of exp's argument 9 the 24th bit; a result that is rounded once more may round to its neighbour.
        assert torch.allclose(found, expected, rtol=2e-6 + (0 if dtype is torch.float32 else torch.finfo(dtype).eps))
    else:
        assert torch.equal(value_bits(found), value_bits(expected))


def values(count: int) -> st.SearchStrategy[int]:
    return st.integers(0, count - 1)


@st.composite
def prologues(draw: st.DrawFn) -> Prologue:
    """Of operations that are rounded correctly, in any order, with one or two results."""
    kinds = (FULL, *draw(st.lists(st.sampled_from(Kind), max_size=2)))
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 5))):
        before = len(kinds) + len(steps)
        operation = draw(st.sampled_from(("add", "sub", "mul", "maximum", "minimum", "relu", "neg", "abs", "square")))
        arguments = [draw(values(before))]
        if operation in ("add", "sub", "mul", "maximum", "minimum"):
            arguments.append(draw(values(before) | st.floats(-4, 4, width=32)))
        steps.append(Step(operation, tuple(arguments), draw(st.sampled_from((FP32, BF16, "float16")))))
    last = len(kinds) + len(steps) - 1
    # A first step that makes a matrix of numbers, should all others be numbers for rows or columns.
    steps.append(Step("add", (0, last), BF16))
    return Prologue(kinds, tuple(steps), (last + 1,) if draw(st.booleans()) else (last + 1, last + 1))


# On a GPU every example is a new kernel to compile, so a failing one is shown as it was found.
@settings(
    max_examples=10 if operations.INTERPRETED else 30,
    phases=list(Phase) if operations.INTERPRETED else [Phase.explicit, Phase.generate],
)
@given(
    prologues(),
    st.tuples(st.integers(1, 40), st.integers(1, 70)) | st.tuples(st.just(2), st.integers(1, 20), st.integers(1, 40)),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.booleans(),
    st.lists(DRAWN, min_size=1, max_size=3),
    st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3),
    st.integers(-(1 << 63), (1 << 63) - 1),
)
def test_any_prologue(
    device: torch.device,
    prologue: Prologue,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows_too: bool,
    drawn: list[Output],
    layouts: list[str],
    seed: int,
) -> None:
    """With any outputs of each matrix, of inputs that lie in any way."""
    inputs = Given(shape, dtype, rows_too=rows_too).inputs(prologue, torch.device("cpu"))
    inputs = [
        laid_out(x, layout, device) if kind is FULL else x.to(device)
        for x, kind, layout in zip(inputs, prologue.inputs, layouts, strict=False)
    ]
    here = [x.cpu() for x in inputs]
    outputs = [
        replace(output, matrix=m) for m in range(len(prologue.results)) for output in (Output(Form.VALUE), *drawn)
    ]
    region = Region(tuple(outputs), prologue)
    value, *_ = prologue.evaluate(here)
    amaxes, key = [dialect.amax(value), dialect.amax(value.mT, DEFAULT_SIGNS)], torch.tensor(seed, dtype=torch.int64)
    launch = operations.prepare(region, [operations.layout(x) for x in inputs], device, TILE)
    found = iter(operations.run(launch, inputs, [amax.to(device) for amax in amaxes], key.to(device)))
    expected = iter(evaluate(region, here, amaxes, key))
    for output in outputs:
        for _ in range(output.tensors):
            one, other = next(found), next(expected)
            if output.form is Form.VALUE:  # zeros without a sign
                one, other = one + 0.0, other + 0.0
            assert same(output, one, other), output


def test_a_constant_is_no_place(device: torch.device) -> None:
    """Python has 2 == 2.0, so kernels must not be remembered by that."""
    x, y = torch.randn(16, 32, device=device), torch.randn(16, 32, device=device)
    for last, expected in ((2, (x * y) * (x * y)), (2.0, (x * y) * 2.0)):
        prologue = Prologue((FULL, FULL), (Step("mul", (0, 1), FP32), Step("mul", (2, last), FP32)), (3,))
        region = Region((Output(Form.VALUE),), prologue)
        (found,) = operations.REGION([x, y], [], None, region.to_json())
        assert torch.equal(found, expected)


def test_bools_become_numbers(device: torch.device) -> None:
    """As a mask is multiplied."""
    steps = (Step("gt", (0, 0.5), "bool"), Step("mul", (1, 0), BF16), Step("where", (1, 1.0, 0.0), BF16))
    prologue = Prologue((FULL,), (*steps, Step("add", (2, 3), BF16)), (4,))
    x = torch.randn(16, 32, device=device).bfloat16()
    (found,) = operations.REGION([x], [], None, Region((Output(Form.VALUE),), prologue).to_json())
    assert torch.equal(found, torch.where(x > 0.5, x + 1, 0))
