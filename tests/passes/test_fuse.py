"""fuse: what is computed from one matrix becomes one region, scaled matmuls become products, and no number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import run_exactly
from graphs import (
    SIGNS,
    aten,
    bf16,
    captured,
    copied,
    dialect_nodes,
    example_inputs,
    nvfp4,
    partitioned,
    regions,
    run_step,
    run_until,
    same_bits,
    targets,
    text,
    trace,
    turned,
)
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from nvfp4c.dialect import REGION, Stage
from nvfp4c.passes.fuse import fuse
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES, Recipe

STEP = Step("fuse", fuse, Stage.FUSED)
ALL = RECIPES["nvfp4-all"]
WEIGHT_ONLY = RECIPES["nvfp4-weight-only"]
FP32 = torch.float32


def fused(graph: fx.Graph, inputs: list[Any] | None = None) -> fx.Graph:
    """A graph after the pass; it gives the same results, bit for bit, and a second run finds nothing to do.

    inputs: random where not given.
    """
    inputs = inputs or example_inputs(graph)
    expected = run_exactly(copied(graph), *inputs)
    run_step(graph, STEP, Stage.SCALED)
    assert same_bits(run_exactly(graph, *inputs), expected)
    once = text(graph)
    assert text(fuse(graph)) == once
    return graph


def packed(x: Tensor, block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    amax = nvfp4.amax(x)
    return (*nvfp4.quantize(x, amax, block, "nearest"), amax)


def linear(x: Tensor, w: Tensor) -> Tensor:
    return nvfp4.scaled_mm(*packed(x, [1, 16]), *packed(w, [16, 16]), x.shape[-1], None, torch.bfloat16)


def test_a_linear_layer() -> None:
    """A region for each amax and each operand: they are of two matrices, which no kernel reads together."""
    graph = fused(trace(linear, bf16(16, 32), bf16(48, 32)))
    assert (
        text(graph)
        == """\
%x = placeholder
%w = placeholder
%region = nvfp4.region(%x, [], None, amax)
%getitem = getitem(%region, 0)
%region_2 = nvfp4.region(%w, [], None, amax)
%getitem_2 = getitem(%region_2, 0)
%region_3 = nvfp4.region(%x, [%getitem], None, operand)
%getitem_3 = getitem(%region_3, 0)
%region_4 = nvfp4.region(%w, [%getitem_2], None, operand tiles)
%getitem_4 = getitem(%region_4, 0)
%product = nvfp4.product(%getitem_3, %getitem_4, %getitem, %getitem_2, None, None, torch.bfloat16)
return %product"""
    )


def test_an_input_used_by_rows_and_saved_by_columns() -> None:
    """The forward: one read for both amaxes, one for the operand and for the codes that the weight gradient needs."""

    def source(x: Tensor, w: Tensor) -> list[Tensor]:
        y = linear(x, w)
        amax = nvfp4.amax(turned(x), SIGNS)
        return [y, *nvfp4.quantize(turned(x), amax, [1, 16], "nearest", SIGNS), amax]

    graph = fused(trace(source, bf16(40, 32), bf16(48, 32)))
    assert (
        text(graph)
        == """\
%x = placeholder
%w = placeholder
%region = nvfp4.region(%x, [], None, amax; amax columns with SIGNS)
%getitem = getitem(%region, 0)
%getitem_2 = getitem(%region, 1)
%region_2 = nvfp4.region(%w, [], None, amax)
%getitem_3 = getitem(%region_2, 0)
%region_3 = nvfp4.region(%x, [%getitem, %getitem_2], None, operand; packed columns with SIGNS by amax 1)
%getitem_4 = getitem(%region_3, 0)
%getitem_5 = getitem(%region_3, 1)
%getitem_6 = getitem(%region_3, 2)
%permute = aten.permute(%getitem_5, [1, 0])
%permute_2 = aten.permute(%getitem_6, [1, 0])
%region_4 = nvfp4.region(%w, [%getitem_3], None, operand tiles)
%getitem_7 = getitem(%region_4, 0)
%product = nvfp4.product(%getitem_4, %getitem_7, %getitem, %getitem_3, None, None, torch.bfloat16)
return [%product, %permute, %permute_2, %getitem_2]"""
    )


def backward(dy: Tensor, w: Tensor, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients of a linear layer, of 48 tokens."""
    amax = nvfp4.amax(dy)
    rows = nvfp4.quantize(dy, amax, [1, 16], "stochastic", None, seed, 4)
    dx = nvfp4.scaled_mm(*rows, amax, *packed(turned(w), [16, 16]), w.shape[0], None, torch.bfloat16)
    amax, x_amax = nvfp4.amax(turned(dy), SIGNS), nvfp4.amax(turned(x), SIGNS)
    columns = nvfp4.quantize(turned(dy), amax, [1, 16], "stochastic", SIGNS, seed, 5)
    x_columns = nvfp4.quantize(turned(x), x_amax, [1, 16], "nearest", SIGNS)
    return dx, nvfp4.scaled_mm(*columns, amax, *x_columns, x_amax, 48, None, torch.float32)


def test_a_gradient_used_by_rows_and_columns() -> None:
    """The backward: dy is read once for its amaxes and once for its operands, each with a stream of its own."""
    graph = fused(trace(backward, bf16(48, 64), bf16(64, 32), bf16(48, 32), torch.tensor(3)))
    assert regions(graph) == [
        "(%dy, [], None, amax; amax columns with SIGNS)",
        "(%w, [], None, amax)",
        "(%dy, [%getitem, %getitem_2], %seed, operand stochastic 4; operand columns with SIGNS stochastic 5 by amax 1)",
        "(%w, [%getitem_3], None, operand columns tiles)",
        "(%x, [], None, amax columns with SIGNS)",
        "(%x, [%getitem_7], None, operand columns with SIGNS)",
    ]
    assert text(graph).count("aten.permute") == 3  # of operands: no tensor is moved before it is quantised


def test_the_plain_amax_is_taken_of_the_view_that_is_rotated() -> None:
    """An amax does not depend on the arrangement."""

    def source(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = aten.view(x, [40, 32])
        return nvfp4.amax(x), nvfp4.amax(turned(flat), SIGNS)

    graph = fused(trace(source, bf16(2, 20, 32)))
    assert regions(graph) == ["(%view, [], None, amax; amax columns with SIGNS)"]


def test_a_view_that_comes_too_late() -> None:
    def source(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        amax = nvfp4.amax(x)
        flat = aten.view(x, [40, 32])
        return amax + 1, nvfp4.amax(turned(flat), SIGNS), flat

    graph = fused(trace(source, bf16(2, 20, 32)))
    assert regions(graph) == ["(%x, [], None, amax)", "(%view, [], None, amax columns with SIGNS)"]


def test_three_layers_share_their_input() -> None:
    """q, k and v: after `share` they read one operand."""

    def source(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        a = packed(x, [1, 16])
        return [nvfp4.scaled_mm(*a, *packed(w, [16, 16]), 32, None, torch.bfloat16) for w in (q, k, v)]

    graph = fused(trace(source, bf16(16, 32), bf16(48, 32), bf16(16, 32), bf16(16, 32)))
    assert [line for line in regions(graph) if line.startswith("(%x")] == [
        "(%x, [], None, amax)",
        "(%x, [%getitem], None, operand)",
    ]
    assert targets(graph)["nvfp4.region"] == 8


def test_a_weight_and_its_transpose() -> None:
    """The data gradient reads the forward's operand, turned: nothing is packed."""

    def source(x: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales, amax = packed(w, [16, 16])
        y = nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, 32, None, torch.bfloat16)
        other = nvfp4.transpose(codes, scales, 32)
        return y, nvfp4.scaled_mm(*packed(dy, [1, 16]), *other, amax, 48, None, torch.bfloat16)

    graph = fused(trace(source, bf16(16, 32), bf16(16, 48), bf16(48, 32)))
    assert "(%w, [%getitem], None, operand tiles)" in regions(graph)
    assert targets(graph)["nvfp4.transpose"] == 0
    assert "packed" not in text(graph)


@pytest.mark.parametrize("early", [True, False])
def test_a_weight_whose_transposed_bytes_are_saved_too(early: bool) -> None:
    """Then it is packed for them, and its operand made in the same kernel, wherever the transpose stands."""

    def source(x: Tensor, w: Tensor) -> list[Tensor]:
        codes, scales, amax = packed(w, [16, 16])
        saved = nvfp4.transpose(codes, scales, 32) if early else ()
        y = nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, 32, None, torch.bfloat16)
        return [y, *(saved or nvfp4.transpose(codes, scales, 32))]

    graph = fused(trace(source, bf16(16, 32), bf16(48, 32)))
    assert "(%w, [%getitem], None, packed tiles; operand tiles)" in regions(graph)
    assert targets(graph)["nvfp4.transpose"] == 1


def test_a_transpose_that_is_multiplied_and_saved() -> None:
    def source(dy: Tensor, w: Tensor) -> list[Tensor]:
        codes, scales, amax = packed(w, [16, 16])
        other = nvfp4.transpose(codes, scales, 32)
        return [nvfp4.scaled_mm(*packed(dy, [1, 16]), *other, amax, 48, None, torch.bfloat16), *other]

    graph = fused(trace(source, bf16(16, 48), bf16(48, 32)))
    assert "(%w, [%getitem], None, packed tiles; operand tiles)" in regions(graph)
    assert targets(graph)["nvfp4.dequantize"] == 0


def test_codes_that_are_multiplied_and_saved() -> None:
    """One kernel gives both: the product does not unpack what was just packed."""

    def source(x: Tensor, w: Tensor) -> list[Tensor]:
        a = packed(x, [1, 16])
        return [nvfp4.scaled_mm(*a, *packed(w, [16, 16]), 32, None, FP32), *a]

    graph = fused(trace(source, bf16(16, 32), bf16(48, 32)))
    assert "(%x, [%getitem], None, packed; operand)" in regions(graph)
    assert targets(graph)["nvfp4.dequantize"] == 0


def test_codes_of_another_graph() -> None:
    """They are dequantised once, before the first product, in either orientation."""

    def source(dy: Tensor, x: Tensor, codes: Tensor, scales: Tensor, amax: Tensor) -> list[Tensor]:
        other = nvfp4.transpose(codes, scales, 32)
        a, b = packed(dy, [1, 16]), packed(x, [1, 16])
        return [
            nvfp4.scaled_mm(*a, *other, amax, 48, None, FP32),
            nvfp4.scaled_mm(*b, codes, scales, amax, 32, None, FP32),
            nvfp4.scaled_mm(*b, codes, scales, amax, 32, None, torch.bfloat16),
        ]

    inputs = [bf16(16, 48), bf16(16, 32), *packed(bf16(48, 32), [16, 16])]
    graph = fused(trace(source, *inputs), inputs)
    assert "%dequantize = nvfp4.dequantize(%codes, %scales, None, 32, torch.bfloat16)" in text(graph)
    assert targets(graph)["nvfp4.dequantize"] == 1
    assert targets(graph)["aten.permute"] == 1


def test_codes_of_another_graph_by_columns() -> None:
    """Saved as the transpose that they are, and read so: that is how the backward gets a rotated input."""
    x = bf16(48, 32)
    amax = nvfp4.amax(turned(x), SIGNS)
    codes, scales = nvfp4.quantize(turned(x), amax, [1, 16], "nearest", SIGNS)

    def source(dy: Tensor, codes: Tensor, scales: Tensor, amax: Tensor) -> Tensor:
        dy_amax = nvfp4.amax(turned(dy), SIGNS)
        columns = nvfp4.quantize(turned(dy), dy_amax, [1, 16], "nearest", SIGNS)
        return nvfp4.scaled_mm(*columns, dy_amax, codes, scales, amax, 48, None, FP32)

    inputs = [bf16(48, 64), codes, scales, amax]
    graph = fused(trace(source, *inputs), inputs)
    (found,) = graph.find_nodes(op="call_function", target=nvfp4.dequantize.default)
    assert found.meta["val"].stride() == (1, 32)


def test_weights_only() -> None:
    """A dequantised weight carries its global factor, and is rounded once."""

    def source(x: Tensor, w: Tensor) -> Tensor:
        codes, scales, amax = packed(w, [1, 16])
        return aten.mm(x, aten.permute(nvfp4.dequantize(codes, scales, amax, 32, x.dtype), [1, 0]))

    graph = fused(trace(source, bf16(16, 32), bf16(48, 32)))
    assert (
        text(graph)
        == """\
%x = placeholder
%w = placeholder
%region = nvfp4.region(%w, [], None, amax)
%getitem = getitem(%region, 0)
%region_2 = nvfp4.region(%w, [%getitem], None, operand)
%getitem_2 = getitem(%region_2, 0)
%convert_element_type = prims.convert_element_type(%getitem_2, torch.float32)
%div = aten.div.Tensor(%getitem, 2688.0)
%mul = aten.mul.Tensor(%convert_element_type, %div)
%convert_element_type_2 = prims.convert_element_type(%mul, torch.bfloat16)
%permute = aten.permute(%convert_element_type_2, [1, 0])
%mm = aten.mm(%x, %permute)
return %mm"""
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
def test_dequantised_without_a_global_factor(dtype: torch.dtype) -> None:
    def source(w: Tensor) -> Tensor:
        codes, scales, _ = packed(w, [1, 16])
        return nvfp4.dequantize(codes, scales, None, 32, dtype)

    graph = fused(trace(source, bf16(48, 32)))
    assert regions(graph)[1] == "(%w, [%getitem], None, operand)"
    assert targets(graph)["nvfp4.dequantize"] == targets(graph)["nvfp4.quantize"] == 0


def test_transforms_that_were_not_folded() -> None:
    """The rotated matrix is written, and then is a matrix like any other."""

    def source(x: Tensor) -> list[Tensor]:
        z, columns = nvfp4.hadamard(x, SIGNS), nvfp4.hadamard(turned(x), SIGNS)
        return [z + 1, columns, *packed(columns, [1, 16])]

    assert (
        text(fused(trace(source, bf16(20, 40))))
        == """\
%x = placeholder
%region = nvfp4.region(%x, [], None, rotated with SIGNS)
%getitem = getitem(%region, 0)
%region_2 = nvfp4.region(%x, [], None, rotated columns with SIGNS)
%getitem_2 = getitem(%region_2, 0)
%permute = aten.permute(%getitem_2, [1, 0])
%add = aten.add.Tensor(%getitem, 1)
%region_3 = nvfp4.region(%permute, [], None, amax)
%getitem_3 = getitem(%region_3, 0)
%region_4 = nvfp4.region(%getitem_2, [%getitem_3], None, packed columns)
%getitem_4 = getitem(%region_4, 0)
%getitem_5 = getitem(%region_4, 1)
%permute_2 = aten.permute(%getitem_4, [1, 0])
%permute_3 = aten.permute(%getitem_5, [1, 0])
return [%add, %permute, %permute_2, %permute_3, %getitem_3]"""
    )


def test_an_amax_that_comes_after_the_first_product() -> None:
    """The first product does not wait for it, so the matrix is read twice."""

    def source(x: Tensor, w: Tensor, other: Tensor) -> list[Tensor]:
        y = linear(x, w)
        amax = other * nvfp4.amax(y)
        return [y, *nvfp4.quantize(x, amax, [1, 16], "nearest")]

    graph = fused(trace(source, bf16(16, 32), bf16(48, 32), torch.tensor(2.0)))
    assert [line for line in regions(graph) if line.startswith("(%x")] == [
        "(%x, [], None, amax)",
        "(%x, [%getitem], None, operand)",
        "(%x, [%mul], None, packed)",
    ]


def test_one_amax_given_to_two_quantisations() -> None:
    """It is read once."""

    def source(x: Tensor, amax: Tensor) -> list[Tensor]:
        return [*nvfp4.quantize(x, amax, [16, 16], "nearest"), *nvfp4.quantize(turned(x), amax, [1, 16], "nearest")]

    graph = fused(trace(source, bf16(16, 32), torch.tensor(2.0)))
    assert regions(graph) == ["(%x, [%amax], None, packed tiles; packed columns)"]


def test_batches() -> None:
    """Of experts: the transpose is of the last two axes."""

    def source(x: Tensor, w: Tensor) -> list[Tensor]:
        y = nvfp4.scaled_mm(*packed(x, [1, 16]), *packed(turned(w), [16, 16]), 32, None, torch.bfloat16)
        amax = nvfp4.amax(turned(x), SIGNS)
        return [y, *nvfp4.quantize(turned(x), amax, [1, 16], "nearest", SIGNS)]

    graph = fused(trace(source, bf16(3, 20, 32), bf16(3, 32, 48)))
    assert regions(graph)[2:] == [
        "(%x, [%getitem, %getitem_2], None, operand; packed columns with SIGNS by amax 1)",
        "(%w, [%getitem_3], None, operand columns tiles)",
    ]
    assert text(graph).count("[0, 2, 1])") == 3


def test_what_nobody_reads_goes() -> None:
    def source(x: Tensor) -> Tensor:
        packed(x, [1, 16])
        nvfp4.hadamard(x, SIGNS)
        return x

    assert text(fused(trace(source, bf16(16, 32)))) == "%x = placeholder\nreturn %x"


def test_other_nodes_stay() -> None:
    def source(x: Tensor) -> tuple[Tensor, Tensor]:
        return turned(x) * 2, aten.mm(x, turned(x))

    assert text(fused(trace(source, bf16(16, 32)))) == text(trace(source, bf16(16, 32)))


def test_inserted_nodes_belong_where_their_operation_did() -> None:
    graph = trace(backward, bf16(48, 64), bf16(64, 32), bf16(48, 32), torch.tensor(3))
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not aten.permute.default:
            node.meta["partitioner_tag"] = "is_backward"
            node.meta["seq_nr"] = 7
    fuse(graph)
    assert {(node.meta["partitioner_tag"], node.meta["seq_nr"]) for node in dialect_nodes(graph)} == {
        ("is_backward", 7)
    }


class Layers(nn.Module):
    """Shapes that are no multiples of 16, a weight used twice, three layers that share an input, and a batch."""

    def __init__(self, dtype: torch.dtype, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.up = nn.ModuleList(nn.Linear(24, 40, dtype=dtype) for _ in range(3))
        self.down = nn.Linear(40, 24, bias=False, dtype=dtype)
        self.experts = nn.Parameter(torch.randn(2, 24, 24, dtype=dtype) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + (checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x))
        return torch.bmm(x + self.down(torch.relu(self.up[0](x))), self.experts)

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self.up)
        return self.down(q * torch.relu(k) + v)


@pytest.mark.parametrize(
    ("recipe", "dtype", "checkpointed"),
    [
        (ALL, FP32, False),
        (ALL, torch.bfloat16, False),
        (ALL, torch.bfloat16, True),
        (WEIGHT_ONLY, torch.bfloat16, False),
    ],
)
def test_training(recipe: Recipe, dtype: torch.dtype, checkpointed: bool) -> None:
    """The forward and the backward graph, fused apart, give what they gave before, bit for bit."""
    graph = run_until(captured(Layers(dtype, checkpointed), torch.randn(2, 9, 24, dtype=dtype)), "place", recipe)
    forward, backward = partitioned(graph)
    inputs = example_inputs(graph)
    primals = inputs[: len(forward.find_nodes(op="placeholder"))]
    saved = run_exactly(copied(forward), *primals)[1:]
    for one, given in ((forward, primals), (backward, [*saved, *inputs[len(primals) :]])):
        fused(one, given)
        kinds = {node.target for node in dialect_nodes(one)}
        assert kinds <= {REGION, nvfp4.product.default, nvfp4.dequantize.default, nvfp4.transpose.default}


def test_every_matrix_is_read_once_for_its_amaxes() -> None:
    """In a whole training step: and at most once for its operands, and codes that are saved for another graph."""
    graph = run_until(captured(Layers(torch.bfloat16), torch.randn(2, 9, 24).bfloat16()), "place", ALL)
    for one in partitioned(graph):
        fuse(one)
        read = [
            (node.args[0][0], node.args[3].startswith('{"outputs": [{"form": "amax"'))
            for node in one.find_nodes(op="call_function", target=REGION)
        ]
        assert read
        assert len(read) == len(set(read))


def test_symbolic_sizes() -> None:
    """One fused graph serves every token count."""
    x = torch.randn(24, 32)
    torch._dynamo.mark_dynamic(x, 0)
    graph = run_until(captured(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), x), "place", ALL)
    before = copied(graph)
    run_step(graph, STEP, Stage.SCALED)
    for tokens in (24, 17, 2):
        inputs = example_inputs(graph, symbol=tokens)
        pairs = zip(run_exactly(graph, *inputs), run_exactly(before, *inputs), strict=True)
        assert all(found is expected or same_bits(found, expected) for found, expected in pairs)
