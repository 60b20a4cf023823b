"""native: products read packed operands in the order of the FP4 tensor cores, and no number changes."""

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
    run_step,
    run_until,
    same_bits,
    targets,
    text,
    trace,
    turned,
)
from torch import Tensor, fx, nn

from nvfp4c.dialect import BLOCK_SCALED_MM, DEQUANTIZE, REGION, Stage, arguments
from nvfp4c.passes.fuse import fuse
from nvfp4c.passes.native import native
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES
from nvfp4c.region import Form, Region

STEP = Step("native", native, Stage.SCALED)
FUSE = Step("fuse", fuse, Stage.FUSED)
ALL = RECIPES["nvfp4-all"]


def packed(graph: fx.Graph) -> fx.Graph:
    """A graph after the pass, which gives the same results, bit for bit; a second run finds nothing to do."""
    inputs = example_inputs(graph)
    expected = run_exactly(copied(graph), *inputs)
    run_step(graph, STEP, Stage.SCALED)
    assert same_bits(run_exactly(graph, *inputs), expected)
    once = text(graph)
    assert text(native(graph)) == once
    return graph


def quantised(x: Tensor, block: list[int], *signs: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    amax = nvfp4.amax(x, *signs)
    return (*nvfp4.quantize(x, amax, block, "nearest", *signs), amax)


def both_directions(x: Tensor, w: Tensor, dy: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A layer and its data gradient, which share the weight's tiles."""
    codes, scales, amax = quantised(w, [16, 16])
    y = nvfp4.scaled_mm(*quantised(x, [1, 16]), codes, scales, amax, 40, bias, torch.bfloat16)
    tiles = nvfp4.transpose(codes, scales, 40)
    return y, nvfp4.scaled_mm(*quantised(dy, [1, 16]), *tiles, amax, 70, None, torch.float32)


def test_a_weight_and_its_transpose() -> None:
    """The tiles of a transpose are those of the weight, so they are quantised from it, down its columns."""
    graph = packed(trace(both_directions, bf16(5, 40), bf16(70, 40), bf16(5, 70), bf16(70)))
    assert (
        text(graph)
        == """\
%x = placeholder
%w = placeholder
%dy = placeholder
%bias = placeholder
%amax = nvfp4.amax(%w)
%quantize = nvfp4.quantize(%w, %amax, [16, 16], nearest, None, None, 0, native)
%getitem = getitem(%quantize, 0)
%getitem_2 = getitem(%quantize, 1)
%amax_2 = nvfp4.amax(%x)
%quantize_2 = nvfp4.quantize(%x, %amax_2, [1, 16], nearest, None, None, 0, native)
%getitem_3 = getitem(%quantize_2, 0)
%getitem_4 = getitem(%quantize_2, 1)
%block_scaled_mm = nvfp4.block_scaled_mm(%getitem_3, %getitem_4, %amax_2, %getitem, %getitem_2, %amax, %bias, \
None, torch.bfloat16)
%permute = aten.permute(%w, [1, 0])
%quantize_3 = nvfp4.quantize(%permute, %amax, [16, 16], nearest, None, None, 0, native)
%getitem_5 = getitem(%quantize_3, 0)
%getitem_6 = getitem(%quantize_3, 1)
%amax_3 = nvfp4.amax(%dy)
%quantize_4 = nvfp4.quantize(%dy, %amax_3, [1, 16], nearest, None, None, 0, native)
%getitem_7 = getitem(%quantize_4, 0)
%getitem_8 = getitem(%quantize_4, 1)
%block_scaled_mm_2 = nvfp4.block_scaled_mm(%getitem_7, %getitem_8, %amax_3, %getitem_5, %getitem_6, %amax, None, \
None, torch.float32)
return [%block_scaled_mm, %block_scaled_mm_2]"""
    )


def test_fused() -> None:
    """One kernel reads a weight for both of its orientations; nothing is dequantised or moved."""
    graph = packed(trace(both_directions, bf16(5, 40), bf16(70, 40), bf16(5, 70), bf16(70)))
    inputs = example_inputs(graph)
    expected = run_exactly(copied(graph), *inputs)
    run_step(graph, FUSE, Stage.SCALED)
    assert same_bits(run_exactly(graph, *inputs), expected)
    assert (
        text(graph)
        == """\
%x = placeholder
%w = placeholder
%dy = placeholder
%bias = placeholder
%region = nvfp4.region(%w, [], None, amax)
%getitem = getitem(%region, 0)
%region_2 = nvfp4.region(%x, [], None, amax)
%getitem_2 = getitem(%region_2, 0)
%region_3 = nvfp4.region(%w, [%getitem], None, packed tiles native; packed columns tiles native)
%getitem_3 = getitem(%region_3, 0)
%getitem_4 = getitem(%region_3, 1)
%getitem_5 = getitem(%region_3, 2)
%getitem_6 = getitem(%region_3, 3)
%region_4 = nvfp4.region(%x, [%getitem_2], None, packed native)
%getitem_7 = getitem(%region_4, 0)
%getitem_8 = getitem(%region_4, 1)
%block_scaled_mm = nvfp4.block_scaled_mm(%getitem_7, %getitem_8, %getitem_2, %getitem_3, %getitem_4, %getitem, %bias, \
None, torch.bfloat16)
%region_5 = nvfp4.region(%dy, [], None, amax)
%getitem_9 = getitem(%region_5, 0)
%region_6 = nvfp4.region(%dy, [%getitem_9], None, packed native)
%getitem_10 = getitem(%region_6, 0)
%getitem_11 = getitem(%region_6, 1)
%block_scaled_mm_2 = nvfp4.block_scaled_mm(%getitem_10, %getitem_11, %getitem_9, %getitem_5, %getitem_6, %getitem, \
None, None, torch.float32)
return [%block_scaled_mm, %block_scaled_mm_2]"""
    )


def test_an_operand_that_is_read_dequantised_too() -> None:
    """A weight that another matmul only stores in FP4: that one keeps the layout of the tensor."""

    def source(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales, amax = quantised(w, [16, 16])
        y = nvfp4.scaled_mm(*quantised(x, [1, 16]), codes, scales, amax, 32, None, torch.bfloat16)
        return y, nvfp4.dequantize(codes, scales, amax, 32, torch.bfloat16)

    graph = packed(trace(source, bf16(16, 32), bf16(48, 32)))
    assert [node.args[7:] for node in dialect_nodes(graph) if node.target is nvfp4.quantize.default] == [
        ("native",),
        (),
        ("native",),
    ]
    run_step(graph, FUSE, Stage.SCALED)
    assert "nvfp4.region(%w, [%getitem], None, packed tiles native; operand tiles)" in text(graph)


def test_an_operand_of_several_products_is_packed_once() -> None:
    def source(x: Tensor, q: Tensor, k: Tensor) -> list[Tensor]:
        a = quantised(x, [1, 16])
        return [nvfp4.scaled_mm(*a, *quantised(w, [16, 16]), 32, None, torch.bfloat16) for w in (q, k)]

    graph = packed(trace(source, bf16(16, 32), bf16(48, 32), bf16(16, 32)))
    assert targets(graph)["nvfp4.quantize"] == 3


def test_graphs_without_products_stay() -> None:
    def source(x: Tensor, w: Tensor) -> Tensor:
        codes, scales, amax = quantised(w, [1, 16])
        return aten.mm(x, turned(nvfp4.dequantize(codes, scales, amax, 32, x.dtype)))

    assert text(packed(trace(source, bf16(16, 32), bf16(48, 32)))) == text(trace(source, bf16(16, 32), bf16(48, 32)))


class Layers(nn.Module):
    """Shapes that are no multiples of 16, three layers that share an input, a weight used twice, and a batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(24, 40, dtype=dtype) for _ in range(3))
        self.down = nn.Linear(40, 24, bias=False, dtype=dtype)
        self.experts = nn.Parameter(torch.randn(2, 24, 24, dtype=dtype) / 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self.up)
        x = x + self.down(q * torch.relu(k) + v)
        return torch.bmm(x + self.down(torch.relu(q)), self.experts)


def native_outputs(graph: fx.Graph) -> list[bool]:
    """Of all packed outputs of a graph's regions, whether they are in the native layout."""
    nodes = graph.find_nodes(op="call_function", target=REGION)
    outputs = [output for node in nodes for output in Region.from_json(arguments(node)[3]).outputs]
    return [output.native for output in outputs if output.form is not Form.AMAX]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(dtype: torch.dtype) -> None:
    """The joint graph gives what it gave; its halves are fused; and what is saved is never repacked."""
    x = torch.randn(2, 9, 24, dtype=dtype)
    plain = run_until(captured(Layers(dtype), x), "place", ALL)
    graph = run_until(captured(Layers(dtype), x), "place", ALL, packed=True)
    inputs = example_inputs(graph)
    expected = run_exactly(plain, *inputs)
    assert all(same_bits(one, other) for one, other in zip(run_exactly(graph, *inputs), expected, strict=True))
    forward, backward = partitioned(graph)
    primals = inputs[: len(forward.find_nodes(op="placeholder"))]
    for half in (forward, backward):
        run_step(half, FUSE, Stage.SCALED)
        assert {node.target for node in dialect_nodes(half)} == {REGION, BLOCK_SCALED_MM}
        assert native_outputs(half) and all(native_outputs(half))
    result, *saved = run_exactly(forward, *primals)
    found: list[Any] = [result, *run_exactly(backward, *saved, *inputs[len(primals) :])]
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
    scales = [tensor for tensor in saved if isinstance(tensor, Tensor) and tensor.dtype is torch.float8_e4m3fn]
    assert scales and all(tensor.shape[-2] % 128 == 0 for tensor in scales)


def test_symbolic_sizes() -> None:
    """One graph serves every token count."""
    x = torch.randn(24, 32)
    torch._dynamo.mark_dynamic(x, 0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    graph = run_until(captured(model, x), "place", ALL, packed=True)
    before = copied(graph)
    run_step(graph, FUSE, Stage.SCALED)
    for tokens in (24, 17, 2, 130):
        inputs = example_inputs(graph, symbol=tokens)
        pairs = zip(run_exactly(graph, *inputs), run_exactly(before, *inputs), strict=True)
        assert all(found is expected or same_bits(found, expected) for found, expected in pairs)


def test_rotated_by_a_transform_of_its_own() -> None:
    """A transform that is not folded is read like any other matrix."""

    def source(x: Tensor, w: Tensor) -> list[Tensor]:
        a, b = nvfp4.hadamard(x, SIGNS), nvfp4.hadamard(w, SIGNS)
        return [nvfp4.scaled_mm(*quantised(a, [1, 16]), *quantised(b, [1, 16]), 32, None, torch.float32), a]

    graph = packed(trace(source, bf16(16, 32), bf16(48, 32)))
    run_step(graph, FUSE, Stage.SCALED)
    assert targets(graph)["nvfp4.block_scaled_mm"] == 1 and not graph.find_nodes(op="call_function", target=DEQUANTIZE)
