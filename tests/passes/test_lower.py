"""lower: the dialect becomes a target's kernels, and the graph still gives what it gave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from eager_target import EAGER, PACKED, PLAIN, REGIONS, eager
from exact import product, run_exactly
from graphs import (
    SIGNS,
    bf16,
    captured,
    copied,
    dialect_nodes,
    example_inputs,
    nvfp4,
    partitioned,
    run,
    run_step,
    run_until,
    same_bits,
    targets,
    text,
    trace,
)
from torch import Tensor, fx, nn

from nvfp4c.codegen.targets import TARGETS, kernel_table
from nvfp4c.dialect import KernelTable, Stage
from nvfp4c.passes.lower import Lower
from nvfp4c.pipeline import lowering
from nvfp4c.recipe import RECIPES, Recipe

ALL = RECIPES["nvfp4-all"]
WEIGHT_ONLY = RECIPES["nvfp4-weight-only"]


def lowered(graph: fx.Graph, table: KernelTable = EAGER, inputs: list[Any] | None = None) -> fx.Graph:
    """A graph after the pass, and those before it where the table has regions; it gives the same results, bit for bit,
    but for what `fold_residual` rounds only once.

    inputs: random where not given.
    """
    inputs = inputs or example_inputs(graph)
    expected = run_exactly(copied(graph), *inputs)
    stage = Stage.SCALED
    for step in lowering(table):
        folds = step.name == "fold_residual"
        assert not folds or same_bits(run_exactly(copied(graph), *inputs), expected)
        run_step(graph, step, stage)
        expected = run_exactly(copied(graph), *inputs) if folds else expected
        stage = step.stage
    assert dialect_nodes(graph) == []
    assert same_bits(run(graph, *inputs), expected)
    return graph


def packed(x: Tensor, block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    amax = nvfp4.amax(x)
    return (*nvfp4.quantize(x, amax, block, "nearest"), amax)


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return nvfp4.scaled_mm(*packed(x, [1, 16]), *packed(w, [16, 16]), x.shape[-1], b, torch.bfloat16)


EPILOGUE = """\
%mul = aten.mul.Tensor(%amax, %amax_2)
%div = aten.div.Tensor(%mul, 7225344.0)
%mul_2 = aten.mul.Tensor(%convert_element_type_3, %div)
%convert_element_type_4 = prims.convert_element_type(%b, torch.float32)
%add = aten.add.Tensor(%mul_2, %convert_element_type_4)
%convert_element_type_5 = prims.convert_element_type(%add, torch.bfloat16)
return %convert_element_type_5"""
"""The global factor of both operands, then the bias, in FP32, then one rounding."""


def test_a_linear_layer() -> None:
    """Nobody reads the packed forms, so none is made."""
    graph = lowered(trace(linear, bf16(16, 32), bf16(48, 32), bf16(48)))
    assert text(graph) == (
        """\
%x = placeholder
%w = placeholder
%b = placeholder
%amax = nvfp4_eager.amax(%x)
%amax_2 = nvfp4_eager.amax(%w)
%operand = nvfp4_eager.operand(%x, %amax, [1, 16], nearest)
%operand_2 = nvfp4_eager.operand(%w, %amax_2, [16, 16], nearest)
%convert_element_type = prims.convert_element_type(%operand, torch.float64)
%convert_element_type_2 = prims.convert_element_type(%operand_2, torch.float64)
%permute = aten.permute(%convert_element_type_2, [1, 0])
%mm = aten.mm(%convert_element_type, %permute)
%convert_element_type_3 = prims.convert_element_type(%mm, torch.float32)
"""
        + EPILOGUE
    )


def test_a_target_without_an_unpacked_form() -> None:
    """Then operands are packed, and dequantised from that."""
    graph = lowered(trace(linear, bf16(16, 32), bf16(48, 32), bf16(48)), PACKED)
    assert text(graph) == (
        """\
%x = placeholder
%w = placeholder
%b = placeholder
%amax = nvfp4_eager.amax(%x)
%quantize = nvfp4_eager.quantize(%x, %amax, [1, 16], nearest)
%getitem = getitem(%quantize, 0)
%getitem_2 = getitem(%quantize, 1)
%amax_2 = nvfp4_eager.amax(%w)
%quantize_2 = nvfp4_eager.quantize(%w, %amax_2, [16, 16], nearest)
%getitem_3 = getitem(%quantize_2, 0)
%getitem_4 = getitem(%quantize_2, 1)
%dequantize = nvfp4_eager.dequantize(%getitem, %getitem_2, 32)
%dequantize_2 = nvfp4_eager.dequantize(%getitem_3, %getitem_4, 32)
%convert_element_type = prims.convert_element_type(%dequantize, torch.float64)
%convert_element_type_2 = prims.convert_element_type(%dequantize_2, torch.float64)
%permute = aten.permute(%convert_element_type_2, [1, 0])
%mm = aten.mm(%convert_element_type, %permute)
%convert_element_type_3 = prims.convert_element_type(%mm, torch.float32)
"""
        + EPILOGUE
    )


def test_an_operand_needed_packed_and_unpacked() -> None:
    """It is quantised once: what is saved for the backward is also what the product reads."""

    def source(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales, amax = packed(w, [16, 16])
        y = nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, 32, b, torch.bfloat16)
        return y, codes, scales

    graph = lowered(trace(source, bf16(16, 32), bf16(48, 32), bf16(48)))
    found = targets(graph)
    assert (found["nvfp4_eager.quantize"], found["nvfp4_eager.operand"], found["nvfp4_eager.dequantize"]) == (1, 1, 1)


def test_a_shared_operand_is_emitted_once() -> None:
    def source(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a = packed(x, [1, 16])
        return tuple(nvfp4.scaled_mm(*a, *packed(given, [16, 16]), 32, None, torch.bfloat16) for given in (w, v))

    graph = lowered(trace(source, bf16(16, 32), bf16(48, 32), bf16(64, 32)))
    assert targets(graph)["nvfp4_eager.operand"] == 3


def test_both_operands_are_the_same() -> None:
    def source(x: Tensor) -> Tensor:
        a = packed(x, [1, 16])
        return nvfp4.scaled_mm(*a, *a, 32, None, torch.float32)

    assert targets(lowered(trace(source, bf16(16, 32))))["nvfp4_eager.operand"] == 1


def test_operands_of_equal_shapes() -> None:
    """Kernels are traced once for both, and yet each operand keeps its own amax."""
    graph = lowered(trace(linear, bf16(32, 32), bf16(32, 32), bf16(32)))
    assert "aten.mul.Tensor(%amax, %amax_2)" in text(graph)


def turned(x: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and data gradient: the second reads the first's tiles, turned."""
    codes, scales, amax = packed(w, [16, 16])
    y = nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, w.shape[1], None, torch.bfloat16)
    other = nvfp4.transpose(codes, scales, w.shape[1])
    return y, nvfp4.scaled_mm(*packed(dy, [1, 16]), *other, amax, w.shape[0], None, torch.bfloat16)


@pytest.mark.parametrize("shape", [(16, 32, 48), (5, 23, 39), (1, 1, 1)])
def test_transposed_tiles(shape: tuple[int, int, int]) -> None:
    """The dequantised weight is read through a transpose: no bytes are moved."""
    m, k, n = shape
    graph = lowered(trace(turned, bf16(m, k), bf16(m, n), bf16(n, k)))
    assert targets(graph)["nvfp4_eager.operand"] == 3
    assert targets(graph)["nvfp4_eager.quantize"] == 0
    assert not {"aten.bitwise_and.Scalar", "aten.view.dtype"} & set(targets(graph))


def test_transposed_tiles_of_another_graph() -> None:
    """The backward graph is given codes that the forward saved."""

    def source(dy: Tensor, codes: Tensor, scales: Tensor, amax: Tensor) -> Tensor:
        return nvfp4.scaled_mm(
            *packed(dy, [1, 16]), *nvfp4.transpose(codes, scales, 32), amax, 48, None, torch.bfloat16
        )

    inputs = [bf16(16, 48), *packed(bf16(48, 32), [16, 16])]
    assert targets(lowered(trace(source, *inputs), EAGER, inputs))["nvfp4_eager.dequantize"] == 1


def test_transposed_tiles_that_are_saved() -> None:
    """The forward graph may be asked for the turned bytes themselves."""

    def source(w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales, _ = packed(w, [16, 16])
        return nvfp4.transpose(codes, scales, 32)

    assert targets(lowered(trace(source, bf16(48, 32))))["nvfp4_eager.quantize"] == 1


def test_tiles_read_here_and_saved_transposed() -> None:
    """The turned bytes need the packed tiles, so the product reads those too."""

    def source(x: Tensor, w: Tensor) -> list[Tensor]:
        codes, scales, amax = packed(w, [16, 16])
        y = nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, 32, None, torch.float32)
        return [y, *nvfp4.transpose(codes, scales, 32)]

    found = targets(lowered(trace(source, bf16(16, 32), bf16(48, 32))))
    assert (found["nvfp4_eager.quantize"], found["nvfp4_eager.operand"], found["nvfp4_eager.dequantize"]) == (1, 1, 1)


def test_weights_only() -> None:
    """A dequantised weight carries its global factor, and is rounded once."""

    def source(x: Tensor, w: Tensor) -> Tensor:
        codes, scales, amax = packed(w, [1, 16])
        return torch.ops.aten.mm(x, torch.ops.aten.permute(nvfp4.dequantize(codes, scales, amax, 32, x.dtype), [1, 0]))

    graph = lowered(trace(source, bf16(16, 32), bf16(48, 32)))
    assert (
        text(graph)
        == """\
%x = placeholder
%w = placeholder
%amax = nvfp4_eager.amax(%w)
%operand = nvfp4_eager.operand(%w, %amax, [1, 16], nearest)
%div = aten.div.Tensor(%amax, 2688.0)
%mul = aten.mul.Tensor(%operand, %div)
%convert_element_type = prims.convert_element_type(%mul, torch.bfloat16)
%permute = aten.permute(%convert_element_type, [1, 0])
%mm = aten.mm(%x, %permute)
return %mm"""
    )


def test_dequantised_without_a_global_factor() -> None:
    def source(w: Tensor) -> Tensor:
        codes, scales, _ = packed(w, [1, 16])
        return nvfp4.dequantize(codes, scales, None, 32, torch.bfloat16)

    assert targets(lowered(trace(source, bf16(48, 32))))["aten.mul.Tensor"] == 0


def test_a_transform_that_was_not_folded() -> None:
    def source(x: Tensor) -> tuple[Tensor, Tensor]:
        z = nvfp4.hadamard(x, SIGNS)
        return nvfp4.amax(z), z + 1

    assert targets(lowered(trace(source, bf16(16, 40))))["nvfp4_eager.hadamard"] == 1


def test_a_rotated_tensor_is_written_once() -> None:
    """Kernels that need the rotated tensor share it, as the CPU's amax and quantise do."""

    def rotated(x: Tensor, signs: Any) -> Tensor:
        return x if signs is None else eager.hadamard(x, signs)

    table = replace(
        EAGER,
        amax=lambda x, signs=None: eager.amax(rotated(x, signs)),
        operand=lambda x, amax, block, rounding, signs=None, *rest: eager.operand(
            rotated(x, signs), amax, block, rounding, None, *rest
        ),
    )

    def source(x: Tensor, y: Tensor) -> Tensor:
        a, b = (nvfp4.amax(given, SIGNS) for given in (x, y))
        operands = ((*nvfp4.quantize(given, amax, [1, 16], "nearest", SIGNS), amax) for given, amax in ((x, a), (y, b)))
        return nvfp4.scaled_mm(*next(operands), *next(operands), 48, None, torch.float32)

    graph = lowered(trace(source, bf16(16, 40), bf16(32, 40)), table)
    assert targets(graph)["nvfp4_eager.hadamard"] == 2


def test_other_nodes_stay() -> None:
    def source(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x + 1

    assert text(lowered(trace(source, bf16(16, 32)))) == text(trace(source, bf16(16, 32)))


def test_a_second_run_changes_nothing() -> None:
    graph = lowered(trace(linear, bf16(16, 32), bf16(48, 32), bf16(48)))
    once = text(graph)
    assert text(Lower(EAGER)(graph)) == once


def test_constants_of_a_kernel() -> None:
    """A kernel may hold a tensor of its own; the graph's module then holds it, under a name that is free."""

    def amax(x: Tensor, signs: Any = None) -> Tensor:
        return torch.maximum(x.abs().amax().float(), torch.tensor(100.0))

    graph = trace(lambda x, w: (nvfp4.amax(x), nvfp4.amax(w)), bf16(16, 32), bf16(48, 32))
    module = fx.GraphModule(nn.Module(), graph)
    module.register_buffer("_nvfp4_constant0", torch.zeros(1))
    Lower(replace(EAGER, amax=amax))(module.graph)
    assert run(module.graph, bf16(16, 32), bf16(48, 32), root=module) == [torch.tensor(100.0)] * 2
    assert torch.equal(module.get_buffer("_nvfp4_constant0"), torch.zeros(1))


def test_kernels_are_traced_once_a_shape() -> None:
    """Copies of one trace serve all equal calls."""
    calls = []

    def counted(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        calls.append((a.shape, b.shape))
        return product(a, b, *rest)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    graph = run_until(captured(Deep(), torch.randn(16, 32), train=False), "place", ALL)
    lowered(graph, replace(EAGER, product=counted))
    assert len(calls) == 1


def test_inserted_nodes_belong_where_their_operation_did() -> None:
    graph = trace(linear, bf16(16, 32), bf16(48, 32), bf16(48))
    for node in dialect_nodes(graph):
        node.meta["partitioner_tag"] = "is_backward"
        node.meta["seq_nr"] = 7
    Lower(EAGER)(graph)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert {(node.meta["partitioner_tag"], node.meta["seq_nr"]) for node in calls} == {("is_backward", 7)}
    assert all("val" in node.meta for node in calls)


class Layers(nn.Module):
    """Shapes that are no multiples of 16, a bias or none, a weight used twice, and a batch of weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40, dtype=dtype)
        self.down = nn.Linear(40, 24, bias=False, dtype=dtype)
        self.experts = nn.Parameter(torch.randn(2, 24, 24, dtype=dtype) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.down(torch.relu(self.up(x)))
        return torch.bmm(x, self.experts)


@pytest.mark.parametrize(
    ("table", "recipe", "dtype"),
    [
        (EAGER, ALL, torch.float32),
        (EAGER, ALL, torch.bfloat16),
        (EAGER, WEIGHT_ONLY, torch.bfloat16),
        (PACKED, ALL, torch.float32),
        (PACKED, WEIGHT_ONLY, torch.float32),
        (PLAIN, ALL, torch.bfloat16),
        (REGIONS, ALL, torch.float32),
        (REGIONS, ALL, torch.bfloat16),
        (REGIONS, WEIGHT_ONLY, torch.bfloat16),
    ],
    ids=lambda given: getattr(given, "target", None) or getattr(given, "name", str(given)),
)
def test_training(table: KernelTable, recipe: Recipe, dtype: torch.dtype) -> None:
    """The forward and the backward graph, lowered apart, give what they gave before, bit for bit."""
    found = captured(Layers(dtype), torch.randn(2, 9, 24, dtype=dtype))
    graph = run_until(found, "place", recipe)
    forward, backward = partitioned(graph)
    inputs = example_inputs(graph)
    primals, tangents = inputs[: len(forward.find_nodes(op="placeholder"))], inputs[-1:]
    saved = run_exactly(forward, *primals)[1:]
    lowered(forward, table, primals)
    lowered(backward, table, [*saved, *tangents])


@pytest.mark.parametrize("table", [EAGER, PACKED, REGIONS], ids=lambda table: table.target)
def test_symbolic_sizes(table: KernelTable) -> None:
    """One lowered graph serves every token count."""
    x = torch.randn(24, 32)
    torch._dynamo.mark_dynamic(x, 0)
    found = captured(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), x)
    graph = run_until(found, "place", ALL)
    before = copied(graph)
    for step in lowering(table):
        step.run(graph)
    assert dialect_nodes(graph) == []
    for tokens in (24, 17, 2):
        inputs = example_inputs(graph, symbol=tokens)
        pairs = zip(run(graph, *inputs), run_exactly(before, *inputs), strict=True)
        assert all(found is expected or same_bits(found, expected) for found, expected in pairs)


def test_the_cpu_target() -> None:
    """The kernels of the CPU on the two operands of a forward, which compile at their first call: bit for bit."""
    cpu = kernel_table(TARGETS["cpu"])
    graph = run_until(captured(nn.Linear(32, 48), torch.randn(40, 32), train=False), "place", ALL)
    found = targets(lowered(graph, replace(cpu, product=product)))
    assert found["nvfp4_cpu.operand"] == 2
    # Small integers have one FP32 sum, whatever its order.
    a, b = torch.arange(-8.0, 8.0).reshape(2, 8), torch.arange(-8.0, 16.0).reshape(3, 8)
    amaxes, bias = (torch.tensor(3.0), torch.tensor(5.0)), torch.arange(3.0)
    for residual in (None, torch.arange(6.0).reshape(2, 3)):
        rest = *amaxes, bias, residual, torch.float32
        assert torch.equal(cpu.product(a, b, *rest), product(a, b, *rest))
