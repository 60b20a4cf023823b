"""cache_weights: regions of a weight become one operation that a cache can serve, in both graphs, and nothing else.

Where products read packed operands too: the same pass, for it takes regions as they are.
"""

from __future__ import annotations

from dataclasses import replace
from operator import getitem
from typing import Any

import pytest
import torch
from exact import run_exactly
from graphs import (
    aten,
    bf16,
    captured,
    copied,
    example_inputs,
    nvfp4,
    partitioned,
    run_step,
    run_until,
    same_bits,
    targets,
    text,
    trace,
)
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from nvfp4c.capture import CapturedGraph
from nvfp4c.dialect import QUANTIZE, REGION, WEIGHT, Stage, arguments
from nvfp4c.passes.cache_weights import MARK, MarkWeights, Trust, cache_weights
from nvfp4c.passes.fuse import fuse
from nvfp4c.passes.graph_edit import swapped
from nvfp4c.passes.native import native
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES, Recipe
from nvfp4c.region import Axis, Region
from nvfp4c.sites import ModelNames

STEP = Step("cache_weights", cache_weights, Stage.FUSED)
ALL = RECIPES["nvfp4-all"]
TILES = [16, 16]


def cached(graph: fx.Graph, *weights: str, sure: bool = False) -> fx.Graph:
    """A graph of SCALED operations after fuse and the pass, with these inputs marked; no bit of its results changes."""
    for node in graph.find_nodes(op="placeholder"):
        if node.name in weights:
            node.meta[MARK] = Trust.EVERYWHERE if sure else Trust.NOWHERE
    fuse(graph)
    inputs = example_inputs(graph)
    expected = run_exactly(copied(graph), *inputs)
    run_step(graph, STEP, Stage.FUSED)
    assert same_bits(run_exactly(graph, *inputs), expected)
    once = text(graph)
    assert text(cache_weights(graph)) == once
    return graph


def weights_of(graph: fx.Graph) -> list[str]:
    """What weights a graph asks for, and in which forms."""
    return [line.partition("nvfp4.weight")[2] for line in text(graph).splitlines() if "nvfp4.weight(" in line]


def packed(x: Tensor, block: list[int], of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    amax = nvfp4.amax(x if of is None else of)
    return (*nvfp4.quantize(x, amax, block, "nearest"), amax)


def linear(x: Tensor, w: Tensor) -> Tensor:
    return nvfp4.scaled_mm(*packed(x, [1, 16]), *packed(w, TILES), x.shape[-1], None, torch.bfloat16)


def under_autocast(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, torch.ops.prims.convert_element_type(w, torch.bfloat16))


def test_a_linear_layer() -> None:
    graph = cached(trace(linear, bf16(16, 32), bf16(48, 32)), "w")
    assert (
        text(graph)
        == """\
%x = placeholder
%w = placeholder
%region = nvfp4.region(%x, [], None, amax)
%getitem = getitem(%region, 0)
%region_2 = nvfp4.region(%x, [%getitem], None, operand)
%getitem_2 = getitem(%region_2, 0)
%weight = nvfp4.weight(%w, torch.bfloat16, operand tiles, False)
%getitem_3 = getitem(%weight, 0)
%getitem_4 = getitem(%weight, 1)
%product = nvfp4.product(%getitem_2, %getitem_4, %getitem, %getitem_3, None, None, torch.bfloat16)
return %product"""
    )


def test_a_cast_is_part_of_it() -> None:
    """The matrix that autocast makes is no input of the graph, but what it is made of is."""
    graph = cached(trace(under_autocast, bf16(16, 32), torch.randn(48, 32)), "w")
    assert targets(graph)["nvfp4.weight"] == 1
    assert "nvfp4.weight(%w, torch.bfloat16, operand tiles, False)" in text(graph)
    assert "convert_element_type" not in text(graph)


def test_a_weight_may_be_trusted_from_the_start() -> None:
    graph = cached(trace(linear, bf16(16, 32), bf16(48, 32)), "w", sure=True)
    assert "operand tiles, True)" in text(graph)


def test_two_ways_of_quantising_one_weight() -> None:
    """By rows for one product, turned by columns for another: an operation for each, and one amax."""

    def source(x: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        turned = aten.permute(w, [1, 0])
        y = nvfp4.scaled_mm(*packed(x, [1, 16]), *packed(w, [1, 16]), 32, None, torch.bfloat16)
        dx = nvfp4.scaled_mm(*packed(dy, [1, 16]), *packed(turned, [1, 16], of=w), 48, None, torch.bfloat16)
        return y, dx

    graph = cached(trace(source, bf16(16, 32), bf16(16, 48), bf16(48, 32)), "w")
    assert weights_of(graph) == [
        "(%w, torch.bfloat16, operand, False)",
        "(%w, torch.bfloat16, operand columns, False)",
    ]


def test_what_is_packed_for_another_graph() -> None:
    def source(x: Tensor, w: Tensor) -> list[Tensor]:
        codes, scales, amax = packed(w, TILES)
        y = nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, 32, None, torch.bfloat16)
        return [y, codes, scales, amax]

    graph = cached(trace(source, bf16(16, 32), bf16(48, 32)), "w")
    assert "nvfp4.weight(%w, torch.bfloat16, packed tiles; operand tiles, False)" in text(graph)
    assert text(graph).endswith("return [%product, %getitem_3, %getitem_4, %getitem_2]")


def both_directions(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """A layer and its data gradient, as where the backward computes a part of the forward again."""
    codes, scales, amax = packed(w, TILES)
    y = nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, 40, None, torch.bfloat16)
    tiles = nvfp4.transpose(codes, scales, 40)
    return y, nvfp4.scaled_mm(*packed(dy, [1, 16]), *tiles, amax, 70, None, torch.bfloat16)


def test_operands_that_products_read_packed() -> None:
    """Along the rows for one product, down the columns for the other: an operation for each, and one amax."""
    graph = native(trace(both_directions, bf16(5, 40), bf16(70, 40), bf16(5, 70)))
    assert (
        text(cached(graph, "w"))
        == """\
%x = placeholder
%w = placeholder
%dy = placeholder
%region = nvfp4.region(%x, [], None, amax)
%getitem = getitem(%region, 0)
%weight = nvfp4.weight(%w, torch.bfloat16, packed tiles native, False)
%getitem_2 = getitem(%weight, 0)
%getitem_3 = getitem(%weight, 1)
%getitem_4 = getitem(%weight, 2)
%weight_2 = nvfp4.weight(%w, torch.bfloat16, packed columns tiles native, False)
%getitem_5 = getitem(%weight_2, 1)
%getitem_6 = getitem(%weight_2, 2)
%region_2 = nvfp4.region(%x, [%getitem], None, packed native)
%getitem_7 = getitem(%region_2, 0)
%getitem_8 = getitem(%region_2, 1)
%block_scaled_mm = nvfp4.block_scaled_mm(%getitem_7, %getitem_8, %getitem, %getitem_3, %getitem_4, %getitem_2, None, \
None, torch.bfloat16)
%region_3 = nvfp4.region(%dy, [], None, amax)
%getitem_9 = getitem(%region_3, 0)
%region_4 = nvfp4.region(%dy, [%getitem_9], None, packed native)
%getitem_10 = getitem(%region_4, 0)
%getitem_11 = getitem(%region_4, 1)
%block_scaled_mm_2 = nvfp4.block_scaled_mm(%getitem_10, %getitem_11, %getitem_9, %getitem_5, %getitem_6, %getitem_2, \
None, None, torch.bfloat16)
return [%block_scaled_mm, %block_scaled_mm_2]"""
    )


def test_one_that_is_read_dequantised_too() -> None:
    """A weight that another matmul only stores in FP4: each form in its own layout."""

    def source(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales, amax = packed(w, TILES)
        y = nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, 32, None, torch.bfloat16)
        return y, nvfp4.dequantize(codes, scales, None, 32, torch.bfloat16)

    graph = cached(native(trace(source, bf16(16, 32), bf16(48, 32))), "w")
    assert weights_of(graph) == [
        "(%w, torch.bfloat16, packed tiles native, False)",
        "(%w, torch.bfloat16, operand tiles, False)",
    ]


def with_amax_of_another_graph(x: Tensor, w: Tensor, amax: Tensor) -> Tensor:
    codes, scales = nvfp4.quantize(w, amax, TILES, "nearest")
    return nvfp4.scaled_mm(*packed(x, [1, 16]), codes, scales, amax, 32, None, torch.bfloat16)


def rounded_at_random(x: Tensor, w: Tensor, seed: Tensor) -> Tensor:
    amax = nvfp4.amax(w)
    pair = nvfp4.quantize(w, amax, [1, 16], "stochastic", None, seed, 0)
    return nvfp4.scaled_mm(*packed(x, [1, 16]), *pair, amax, 32, None, torch.bfloat16)


def computed(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, aten.mul.Tensor(w, 2.0))


def viewed(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, aten.view(w, [48, 32]))


@pytest.mark.parametrize("prepare", [lambda graph: graph, native], ids=["dequantised", "packed"])
@pytest.mark.parametrize(
    ("source", "inputs"),
    [
        (with_amax_of_another_graph, (bf16(16, 32), bf16(48, 32), torch.tensor(3.0))),
        (rounded_at_random, (bf16(16, 32), bf16(48, 32), torch.tensor(3))),
        (computed, (bf16(16, 32), bf16(48, 32))),
        (viewed, (bf16(16, 32), bf16(3, 16, 32))),
    ],
)
def test_what_must_stay(source: Any, inputs: tuple[Tensor, ...], prepare: Any) -> None:
    graph = prepare(trace(source, *inputs))
    before = text(fuse(copied(graph)))
    assert text(cached(graph, "w")) == before


def test_only_marked_inputs() -> None:
    """Anything else that a graph is given may hold something new at each call."""
    graph = trace(linear, bf16(16, 32), bf16(48, 32))
    before = text(fuse(copied(graph)))
    assert text(cached(graph)) == before


class Layers(nn.Module):
    """A weight used twice, one only cast, a batch of weights, and inputs that are no weights."""

    def __init__(self, dtype: torch.dtype, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.up, self.down = nn.Linear(24, 40, dtype=dtype), nn.Linear(40, 24, bias=False, dtype=dtype)
        self.experts = nn.Parameter(torch.randn(2, 24, 24, dtype=dtype) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + (checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x))
        return torch.bmm(x + self.block(x), self.experts)

    def block(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


WEIGHTS = 3


def marked(found: CapturedGraph, recipe: Recipe = ALL, inference: bool = False, packed: bool = False) -> fx.Graph:
    """A captured graph after all passes on it. packed: for a target whose products read packed operands."""
    step = Step("mark_weights", MarkWeights(found.names, inference), Stage.SCALED)
    return run_step(run_until(found, "place", recipe, packed=packed), step, Stage.SCALED)


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


@pytest.mark.parametrize(
    ("dtype", "checkpointed", "call"),
    [(torch.bfloat16, False, None), (torch.bfloat16, True, None), (torch.float32, False, autocast)],
    ids=["bf16", "checkpointed", "autocast"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["dequantised", "packed"])
def test_training(dtype: torch.dtype, checkpointed: bool, call: Any, packed: bool) -> None:
    """Both graphs ask for every weight, cast to the same type, so that the backward finds what the forward has left.

    In the same way where products read dequantised operands; else along the rows and down the columns.
    """
    found = captured(Layers(dtype, checkpointed), torch.randn(2, 9, 24, dtype=dtype), call=call)
    graph = marked(found, packed=packed)
    forward, backward = partitioned(graph)
    inputs = example_inputs(graph)
    primals = inputs[: len(forward.find_nodes(op="placeholder"))]
    saved = run_exactly(copied(forward), *primals)[1:]
    kinds = []
    for one, given in ((forward, primals), (backward, [*saved, *inputs[len(primals) :]])):
        expected = run_exactly(copied(one), *given)
        fuse(one)
        run_step(one, STEP, Stage.FUSED)
        assert same_bits(run_exactly(one, *given), expected)
        weights = one.find_nodes(op="call_function", target=WEIGHT)
        kinds.append({(node.args[0].name, *node.args[1:3]) for node in weights})
        outputs = [output for node in weights for output in Region.from_json(node.args[2]).outputs]
        assert {output.native for output in outputs} == {packed}
        assert {node.args[3] for node in weights} == {one is backward}
        assert not any(MARK in arguments(node)[0][0].meta for node in one.find_nodes(op="call_function", target=REGION))
    assert len(kinds[0]) == WEIGHTS
    assert {kind[:2] for kind in kinds[0]} == {kind[:2] for kind in kinds[1]}
    if packed:
        axes = [{(kind[0], Region.from_json(kind[2]).outputs[0].axis) for kind in half} for half in kinds]
        assert {(name, *(axis for axis in Axis if axis is not used)) for name, used in axes[0]} <= axes[1]
    else:
        assert kinds[0] == kinds[1]
    # Nothing of a weight is saved, for both graphs are given the weight itself.
    (output,) = forward.find_nodes(op="output")
    assert not any(arguments(node)[0].target is WEIGHT for node in output.all_input_nodes if node.target is getitem)


@pytest.mark.parametrize("packed", [False, True], ids=["dequantised", "packed"])
@pytest.mark.parametrize(
    ("recipe", "trust"), [("nvfp4-all", Trust.BACKWARD), ("nvfp4-backward", Trust.NOWHERE)], ids=str
)
def test_a_backward_trusts_only_what_its_forward_has_left(recipe: str, trust: Trust, packed: bool) -> None:
    """One whose forward does not quantise a weight would find what the backward of another step has left."""
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).bfloat16()
    graph = marked(
        captured(model, bf16(16, 32)), replace(RECIPES[recipe], bf16_last_share=0, keep_head=False), packed=packed
    )
    quantised = {
        (swapped(node.args[0]) or node.args[0]) for node in graph.find_nodes(op="call_function", target=QUANTIZE)
    }
    assert {node.meta[MARK] for node in quantised if MARK in node.meta} == {trust}
    backward = fuse(partitioned(graph)[1])
    run_step(backward, STEP, Stage.FUSED)
    (weight,) = backward.find_nodes(op="call_function", target=WEIGHT)
    assert weight.args[3] == (trust is Trust.BACKWARD)


def test_inference_is_left_alone_unless_asked_for() -> None:
    found = captured(Layers(torch.bfloat16), bf16(2, 9, 24), train=False)
    once = marked(found)
    assert not any(MARK in node.meta for node in once.nodes)
    graph = fuse(MarkWeights(found.names, inference=True)(once))
    run_step(graph, STEP, Stage.FUSED)
    weights = graph.find_nodes(op="call_function", target=WEIGHT)
    assert {node.args[3] for node in weights} == {True}
    assert len({node.args[0] for node in weights}) == WEIGHTS


def test_marks_are_all_that_changes() -> None:
    found = captured(Layers(torch.bfloat16), bf16(2, 9, 24))
    graph = run_until(found, "place", ALL)
    before = text(graph)
    MarkWeights(found.names, False)(graph)
    assert text(graph) == before
    assert {node.name for node in graph.nodes if MARK in node.meta} == {f"primals_{place}" for place in range(1, 6)} - {
        node.name for node, given in zip(graph.nodes, found.names.inputs, strict=False) if not given.is_weight
    }
    again = [node for node in graph.find_nodes(op="call_function", target=QUANTIZE) if tuple(node.args[2]) == (16, 16)]
    assert again
    for node in again:
        assert node.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE
        assert node.args[1].meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE


def test_a_graph_of_no_known_model() -> None:
    graph = trace(linear, bf16(16, 32), bf16(48, 32))
    MarkWeights(ModelNames(), True)(graph)
    assert not any(MARK in node.meta for node in graph.nodes)
