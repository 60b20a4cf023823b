"""The `nvfp4::` operations: registration, fakes, symbolic sizes, and agreement with `nvfp4c.numerics`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from nvfp4c import dialect, numerics, philox
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK, padded
from nvfp4c.region import Axis, Form, Layout, Output, Region

SIGNS = list(DEFAULT_SIGNS)


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def raw(tensor: Tensor) -> Tensor:
    """E4M3 scales as bytes, which can be compared; anything else as it is."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


Arguments = dict[str, Tensor | int | list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One way to call an operation. arguments: made from an operand x [.., M, K]; constants: the others, by name."""

    op: torch._ops.OpOverload
    arguments: Callable[[Tensor], Arguments]
    constants: dict[str, object] = field(default_factory=dict)

    @property
    def reference(self) -> Callable[..., object]:
        return dialect.region_outputs if self.op is dialect.REGION else getattr(dialect, self.op._opname)

    @property
    def oriented(self) -> bool:
        """Whether results lie in memory as x does; else they are contiguous."""
        return self.op in (dialect.QUANTIZE, dialect.DEQUANTIZE) and self.constants.get("layout") != "native"

    def on(self, x: Tensor) -> dict[str, object]:
        return {**self.arguments(x), **self.constants}


def tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    return dialect.QUANTIZE(x, numerics.tensor_amax(x), [16, 16], "nearest")


def of_x(x: Tensor) -> Arguments:
    return {"x": x}


def of_x_and_amax(x: Tensor) -> Arguments:
    return {"x": x, "amax": numerics.tensor_amax(x)}


def of_x_and_seed(x: Tensor) -> Arguments:
    return {**of_x_and_amax(x), "seed": torch.tensor(1234)}


def of_packed(x: Tensor) -> Arguments:
    codes, scales = tiles(x)
    return {"codes": codes, "scales": scales, "k": x.shape[-1]}


def of_packed_and_amax(x: Tensor) -> Arguments:
    return {**of_packed(x), "amax": numerics.tensor_amax(x)}


def of_two_operands(x: Tensor) -> Arguments:
    names = ("a_codes", "a_scales", "a_amax", "b_codes", "b_scales", "b_amax")
    amax = numerics.tensor_amax(x)
    return {**dict(zip(names, (*tiles(x), amax, *tiles(-x), amax.clone()), strict=True)), "k": x.shape[-1]}


def of_two_operands_and_bias(x: Tensor) -> Arguments:
    return {**of_two_operands(x), "bias": matrix(x.shape[-2], seed=3)}


def of_native_operands(x: Tensor) -> Arguments:
    amax = numerics.tensor_amax(x)
    a, b = (dialect.QUANTIZE(given, amax, [16, 16], "nearest", layout="native") for given in (x, -x))
    names = ("a_codes", "a_scales", "a_amax", "b_codes", "b_scales", "b_amax")
    return dict(zip(names, (*a, amax, *b, amax.clone()), strict=True))


def of_native_operands_and_bias(x: Tensor) -> Arguments:
    return {**of_native_operands(x), "bias": matrix(x.shape[-2], seed=3)}


def of_native_operands_and_residual(x: Tensor) -> Arguments:
    return {**of_native_operands_and_bias(x), "residual": residual(x)}


def residual(x: Tensor) -> Tensor:
    """Of the shape of a product of x and itself, transposed in memory."""
    return matrix(*x.shape[:-1], x.shape[-2], seed=4).bfloat16().mT


def of_region(x: Tensor) -> Arguments:
    return {"inputs": [x], "amaxes": [numerics.tensor_amax(x), torch.tensor(3.0)], "seed": torch.tensor(1234)}


def of_weight(x: Tensor) -> Arguments:
    return {"w": x}


def of_product(x: Tensor) -> Arguments:
    """An operand and its negative, which both are exact in bfloat16."""
    amax = numerics.tensor_amax(x)
    a, b = (dialect.DEQUANTIZE(*tiles(given), None, x.shape[-1], torch.bfloat16) for given in (x, -x))
    return {"a": a, "b": b, "a_amax": amax, "b_amax": amax.clone()}


def of_product_and_bias(x: Tensor) -> Arguments:
    return {**of_product(x), "bias": matrix(x.shape[-2], seed=3)}


def of_product_and_residual(x: Tensor) -> Arguments:
    return {**of_product_and_bias(x), "residual": residual(x)}


def every_output(axis: Axis, signs: tuple[int, ...] | None) -> dict[str, object]:
    """A region with each form, both roundings and both blocks."""
    plain = [
        Output(form, axis, block, rounding, signs, amax, stream)
        for form, block, rounding, amax, stream in (
            (Form.AMAX, ROW_BLOCK, "nearest", 0, 0),
            (Form.PACKED, ROW_BLOCK, "stochastic", 1, 3),
            (Form.OPERAND, TILE_BLOCK, "nearest", 0, 0),
            (Form.PACKED, TILE_BLOCK, "nearest", 0, 0),
            (Form.OPERAND, ROW_BLOCK, "stochastic", 0, 4),
        )
    ]
    plain += [Output(Form.PACKED, axis, TILE_BLOCK, signs=signs, layout=Layout.NATIVE)]
    turned = [] if signs is None else [Output(Form.ROTATED, axis, signs=signs)]
    return {"region": Region((*plain, *turned)).to_json()}


def packed_and_operand(axis: Axis, signs: tuple[int, ...] | None) -> dict[str, object]:
    """Both forms of a weight, which is rounded first."""
    outputs = tuple(Output(form, axis, TILE_BLOCK, signs=signs) for form in (Form.OPERAND, Form.PACKED))
    return {"dtype": torch.bfloat16, "region": Region(outputs).to_json(), "sure": False}


def packed_natively(axis: Axis) -> dict[str, object]:
    """A weight as products that read it packed ask for it."""
    outputs = (Output(Form.PACKED, axis, TILE_BLOCK, layout=Layout.NATIVE),)
    return {"dtype": torch.bfloat16, "region": Region(outputs).to_json(), "sure": False}


ROWS, TILES = {"block": [1, 16], "rounding": "nearest"}, {"block": [16, 16], "rounding": "nearest"}
STOCHASTIC = {"block": [1, 16], "rounding": "stochastic", "stream": 3}
CASES = {
    "hadamard": Case(dialect.HADAMARD, of_x, {"signs": SIGNS}),
    "amax": Case(dialect.AMAX, of_x),
    "amax rotated": Case(dialect.AMAX, of_x, {"signs": SIGNS}),
    "quantize rows": Case(dialect.QUANTIZE, of_x_and_amax, ROWS),
    "quantize tiles": Case(dialect.QUANTIZE, of_x_and_amax, TILES),
    "quantize stochastic": Case(dialect.QUANTIZE, of_x_and_seed, STOCHASTIC),
    "quantize rotated": Case(dialect.QUANTIZE, of_x_and_seed, {**STOCHASTIC, "signs": SIGNS}),
    "quantize native": Case(dialect.QUANTIZE, of_x_and_seed, {**STOCHASTIC, "layout": "native"}),
    "transpose": Case(dialect.TRANSPOSE, of_packed),
    "dequantize": Case(dialect.DEQUANTIZE, of_packed_and_amax, {"dtype": torch.float32}),
    "dequantize to bf16": Case(dialect.DEQUANTIZE, of_packed, {"amax": None, "dtype": torch.bfloat16}),
    "scaled_mm": Case(dialect.SCALED_MM, of_two_operands, {"bias": None, "out_dtype": torch.bfloat16}),
    "scaled_mm with bias": Case(dialect.SCALED_MM, of_two_operands_and_bias, {"out_dtype": torch.float32}),
    "block_scaled_mm": Case(
        dialect.BLOCK_SCALED_MM, of_native_operands, {"bias": None, "residual": None, "out_dtype": torch.bfloat16}
    ),
    "block_scaled_mm with bias": Case(
        dialect.BLOCK_SCALED_MM, of_native_operands_and_bias, {"residual": None, "out_dtype": torch.float32}
    ),
    "block_scaled_mm with residual": Case(
        dialect.BLOCK_SCALED_MM, of_native_operands_and_residual, {"out_dtype": torch.bfloat16}
    ),
    "region by rows": Case(dialect.REGION, of_region, every_output(Axis.ROWS, None)),
    "region by columns": Case(dialect.REGION, of_region, every_output(Axis.COLUMNS, None)),
    "region by rows, rotated": Case(dialect.REGION, of_region, every_output(Axis.ROWS, DEFAULT_SIGNS)),
    "region by columns, rotated": Case(dialect.REGION, of_region, every_output(Axis.COLUMNS, DEFAULT_SIGNS)),
    "weight by rows": Case(dialect.WEIGHT, of_weight, packed_and_operand(Axis.ROWS, None)),
    "weight by columns, rotated": Case(dialect.WEIGHT, of_weight, packed_and_operand(Axis.COLUMNS, DEFAULT_SIGNS)),
    "weight by columns, native": Case(dialect.WEIGHT, of_weight, packed_natively(Axis.COLUMNS)),
    "product": Case(dialect.PRODUCT, of_product, {"bias": None, "residual": None, "out_dtype": torch.bfloat16}),
    "product with bias": Case(dialect.PRODUCT, of_product_and_bias, {"residual": None, "out_dtype": torch.float32}),
    "product with residual": Case(dialect.PRODUCT, of_product_and_residual, {"out_dtype": torch.bfloat16}),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

OPERANDS = {
    "aligned": matrix(32, 64),
    "ragged": matrix(5, 40),
    "one column": matrix(16, 1),
    "batch": matrix(3, 17, 23),
    "transposed": matrix(40, 48).T,
    "transposed batch": matrix(2, 24, 17).transpose(1, 2),
    "no rows": matrix(0, 16),
    "no columns": matrix(4, 0),
}
EVERY_OPERAND = pytest.mark.parametrize("x", OPERANDS.values(), ids=OPERANDS.keys())


def test_every_operation_has_a_case() -> None:
    assert {case.op for case in CASES.values()} == dialect.OPERATIONS


@EVERY_CASE
@EVERY_OPERAND
def test_opcheck(case: Case, x: Tensor) -> None:
    # opcheck's test_schema compares inputs with allclose, which CPUs lack for float8; the next test does its work.
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(case.op, (), case.on(x), test_utils=utilities)


def lies_as_promised(case: Case, x: Tensor, result: Tensor) -> bool:
    turned = case.oriented and x.stride(-1) != 1
    return (result.mT if turned else result).is_contiguous()


@EVERY_CASE
@EVERY_OPERAND
def test_results_are_new_memory_and_inputs_stay(case: Case, x: Tensor) -> None:
    arguments = case.on(x)
    inputs = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    before = [leaf.clone() for leaf in inputs]
    results = pytree.tree_leaves(case.op(**arguments))
    used = {leaf.untyped_storage().data_ptr() for leaf in inputs if leaf.numel()}
    for result in results:
        assert lies_as_promised(case, x, result)
        if result.numel():
            address = result.untyped_storage().data_ptr()
            assert address not in used
            used.add(address)
    assert all(torch.equal(raw(now), raw(then)) for now, then in zip(inputs, before, strict=True))


# ---- fakes and symbolic sizes


def places(tensor: Tensor) -> list[int]:
    """Strides of a tensor that has elements, of the axes that have several."""
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in axes if size > 1] if tensor.numel() else []


@EVERY_CASE
@EVERY_OPERAND
def test_fakes_agree(case: Case, x: Tensor) -> None:
    arguments = case.on(x)
    real = pytree.tree_leaves(case.op(**arguments))
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        found = pytree.tree_leaves(case.op(**fakes))
    assert len(found) == len(real)
    for fake, result in zip(found, real, strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (result.shape, result.dtype, result.device)
        assert places(fake) == places(result)


def trace(function: Callable[..., object], case: Case, x: Tensor) -> fx.GraphModule:
    """`function` on the case's arguments, all sizes symbolic."""
    arguments = case.arguments(x)

    def call(*values: object) -> object:
        return function(**dict(zip(arguments, values, strict=True)), **case.constants)

    return make_fx(call, tracing_mode="symbolic")(*arguments.values())


def guards_hold(graph: fx.GraphModule, case: Case, x: Tensor) -> bool:
    """Whether a graph traced with symbolic sizes is declared fit for the case on x."""
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    environment = next(val.fake_mode.shape_env for val in inputs if isinstance(val, Tensor))
    return environment.evaluate_guards_for_args(inputs, pytree.tree_leaves(case.arguments(x)))


TRACED = (37, 40)
# Sizes 0 and 1 are special to torch's tracing, and so is a single block; no other size may be.
SEVERAL_BLOCKS = [(37, 40), (21, 20), (100, 1001), (38, 41)]
ALIGNED = [(48, 64), (32, 40), (37, 32)]
SMALL = [(1, 1), (2, 16), (16, 16), (17, 5)]


@EVERY_CASE
def test_fakes_put_no_guard_on_sizes(case: Case) -> None:
    graph = trace(case.op, case, matrix(*TRACED))
    assert [node.target for node in graph.graph.nodes if dialect.is_dialect(node)] == [case.op]
    # test_faketensor of opcheck has seen what the fakes return; here, that they ask nothing of a size.
    for size in SEVERAL_BLOCKS + ALIGNED:
        assert guards_hold(graph, case, matrix(*size)), size


@EVERY_CASE
def test_references_trace_with_symbolic_sizes(case: Case) -> None:
    graph = trace(case.reference, case, matrix(*TRACED))
    assert not any(dialect.is_dialect(node) for node in graph.graph.nodes)
    # Cutting the padding off looks at whether there is any, so these may tell aligned sizes from ragged ones.
    cuts = case.op in (dialect.TRANSPOSE, dialect.DEQUANTIZE, dialect.REGION, dialect.WEIGHT)
    for size in SEVERAL_BLOCKS if cuts else SEVERAL_BLOCKS + ALIGNED:
        assert guards_hold(graph, case, matrix(*size)), size
    for size in SEVERAL_BLOCKS + ALIGNED + SMALL:
        x = matrix(*size, seed=1)
        found = pytree.tree_leaves(graph(*case.arguments(x).values()))
        expected = pytree.tree_leaves(case.op(**case.on(x)))
        for result, answer in zip(found, expected, strict=True):
            assert result.dtype == answer.dtype and torch.equal(raw(result), raw(answer)), size


# ---- agreement with the public numerics

SEED = torch.tensor(-1234)
FLAT = pytest.mark.parametrize(
    "x", [x for x in OPERANDS.values() if x.dim() == 2], ids=[name for name in OPERANDS if "batch" not in name]
)


@FLAT
@pytest.mark.parametrize("signs", [None, SIGNS])
@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_quantize_is_numerics_quantize(
    x: Tensor, signs: list[int] | None, block: tuple[int, int], rounding: str
) -> None:
    rows, k = x.shape
    bits = philox.random_bytes(SEED, 5, rows * padded(k) // 16).reshape(rows, padded(k))
    expected = numerics.quantize(
        x, block=block, rounding=rounding, signs=signs, random_bits=bits if rounding == "stochastic" else None
    )
    amax = dialect.AMAX(x, signs)
    codes, scales = dialect.QUANTIZE(x, amax, block, rounding, signs, SEED, 5)
    assert torch.equal(amax, expected.amax)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(raw(scales), raw(expected.scales))
    if signs is not None:
        rotated = dialect.HADAMARD(x, signs)
        assert torch.equal(rotated, numerics.hadamard(x, signs))
        again = dialect.QUANTIZE(rotated, dialect.AMAX(rotated), block, rounding, None, SEED, 5)
        assert torch.equal(again[0], codes) and torch.equal(raw(again[1]), raw(scales))


@FLAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_is_numerics_dequantize(x: Tensor, dtype: torch.dtype) -> None:
    expected = numerics.quantize(x)
    found = dialect.DEQUANTIZE(expected.codes, expected.scales, expected.amax, x.shape[1], dtype)
    assert torch.equal(found, expected.dequantize(dtype))
    # Without the amax it is code * scale, exact in either dtype.
    values = dialect.DEQUANTIZE(expected.codes, expected.scales, None, x.shape[1], dtype)
    assert torch.equal(values.float() * (expected.amax / 2688), expected.dequantize())


@FLAT
def test_transpose_is_quantize_of_the_transpose(x: Tensor) -> None:
    expected = numerics.quantize(x.T, block=(16, 16))
    codes, scales = dialect.TRANSPOSE(*tiles(x), x.shape[1])
    assert torch.equal(codes, expected.codes)
    assert torch.equal(raw(scales), raw(expected.scales))


@FLAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_scaled_mm_is_numerics_scaled_mm(x: Tensor, dtype: torch.dtype, biased: bool) -> None:
    bias = matrix(7, seed=2) if biased else None
    a, b = numerics.quantize(x), numerics.quantize(matrix(7, x.shape[1], seed=1), block=(16, 16))
    found = dialect.SCALED_MM(a.codes, a.scales, a.amax, b.codes, b.scales, b.amax, x.shape[1], bias, dtype)
    assert torch.equal(found, numerics.scaled_mm(a, b, bias, dtype))


def test_a_batch_is_its_matrices_with_one_amax() -> None:
    x, w = matrix(3, 17, 23), matrix(3, 20, 23, seed=1)
    amax, w_amax = dialect.AMAX(x), dialect.AMAX(w)
    assert float(amax) == float(x.abs().max())
    for block in ([1, 16], [16, 16]):
        codes, scales = dialect.QUANTIZE(x, amax, block, "nearest")
        turned, turned_scales = dialect.TRANSPOSE(codes, scales, 23)
        w_codes, w_scales = dialect.QUANTIZE(w, w_amax, [16, 16], "nearest")
        product = dialect.SCALED_MM(codes, scales, amax, w_codes, w_scales, w_amax, 23, None, torch.bfloat16)
        for index in range(3):
            alone = dialect.QUANTIZE(x[index], amax, block, "nearest")
            assert torch.equal(codes[index], alone[0]) and torch.equal(raw(scales[index]), raw(alone[1]))
            turned_alone = dialect.TRANSPOSE(*alone, 23)
            assert torch.equal(turned[index], turned_alone[0])
            assert torch.equal(raw(turned_scales[index]), raw(turned_alone[1]))
            right = (w_codes[index], w_scales[index], w_amax)
            assert torch.equal(product[index], dialect.SCALED_MM(*alone, amax, *right, 23, None, torch.bfloat16))


def test_random_bytes_follow_the_place_in_a_batch() -> None:
    x = matrix(3, 17, 23)
    amax = dialect.AMAX(x)
    batch = dialect.QUANTIZE(x, amax, [1, 16], "stochastic", None, SEED, 2)[0]
    flat = dialect.QUANTIZE(x.reshape(51, 23), amax, [1, 16], "stochastic", None, SEED, 2)[0]
    assert torch.equal(batch.reshape(51, -1), flat)


@pytest.mark.parametrize("signs", [None, SIGNS])
def test_a_seed_and_a_stream_decide_the_rounding(signs: list[int] | None) -> None:
    x = matrix(32, 64)
    amax = dialect.AMAX(x, signs)

    def codes(seed: int, stream: int) -> Tensor:
        return dialect.QUANTIZE(x, amax, [1, 16], "stochastic", signs, torch.tensor(seed), stream)[0]

    assert torch.equal(codes(1, 0), codes(1, 0))
    drawn = [codes(1, 0), codes(2, 0), codes(1, 1), codes(2, 1)]
    for index, first in enumerate(drawn):
        assert not any(torch.equal(first, second) for second in drawn[index + 1 :])


# ---- what passes write on nodes


def test_node_helpers() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    amax = graph.call_function(dialect.AMAX, (x,))
    product = graph.call_function(torch.ops.aten.mm.default, (x, x))
    assert [dialect.is_dialect(node) for node in (x, amax, product)] == [False, True, False]
    assert dialect.matmul_of(product) is None and dialect.assignment_of(product) is None
    matmul = dialect.Matmul("layer", dialect.Role.FPROP, (dialect.Operand.INPUT, dialect.Operand.WEIGHT))
    rows = dialect.Quantization((1, 16), "nearest", None)
    assignment = dialect.Assignment(rows, None, "")
    product.meta.update({dialect.MATMUL: matmul, dialect.ASSIGNMENT: assignment})
    assert dialect.matmul_of(product) is matmul and dialect.assignment_of(product) is assignment
    product.meta.update({dialect.MATMUL: "layer", dialect.ASSIGNMENT: None})
    assert dialect.matmul_of(product) is None and dialect.assignment_of(product) is None
    assert assignment.precision == "nvfp4"
    assert replace(assignment, left=None).precision == "bf16"
    assert replace(assignment, left=None, right=rows).precision == "nvfp4"


def test_stages_are_in_order() -> None:
    assert [stage.value for stage in dialect.Stage] == list(range(len(dialect.Stage)))
