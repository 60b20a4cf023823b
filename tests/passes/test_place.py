"""place: what the partitioner is told about inserted nodes, and that its two graphs still compute the same."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import (
    SIGNS,
    captured,
    example_inputs,
    partitioned,
    run,
    run_step,
    run_until,
    same_bits,
    targets,
    text,
)
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from nvfp4c.dialect import QUANTIZE, Stage, is_dialect
from nvfp4c.passes.graph_edit import ORIGIN_META, arrangement_base
from nvfp4c.passes.insert_scaling import SEED
from nvfp4c.passes.place import place
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES, Recipe

STEP = Step("place", place, Stage.SCALED)
ALL = RECIPES["nvfp4-all"]
RANDOM_INPUTS = replace(ALL, input_rounding="stochastic")


class Blocks(nn.Module):
    """Two residual blocks, checkpointed or not."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


def joint(model: nn.Module, last: str = "fold_hadamard", recipe: Recipe = ALL) -> fx.Graph:
    """The joint graph of a model after the pass called `last`."""
    return run_until(captured(model, torch.randn(4, 16, 32)), last, recipe)


def placed(model: nn.Module, recipe: Recipe = ALL) -> fx.Graph:
    return run_step(joint(model, recipe=recipe), STEP, Stage.SCALED)


def from_tangents(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that only the backward can compute."""
    found = {node for node in graph.find_nodes(op="placeholder") if node.target.startswith("tangents")}
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def inserted(graph: fx.Graph) -> list[fx.Node]:
    """Operations of the dialect and their parts."""
    return [node for node in graph.nodes if is_dialect(node) or any(map(is_dialect, node.all_input_nodes))]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_depends_on_no_tangent_is_forward(checkpointed: bool) -> None:
    """Also the rotated input of a weight gradient, which nothing else in the forward needs."""
    graph = placed(Blocks(checkpointed))
    late = from_tangents(graph)
    calls = [node for node in graph.nodes if is_dialect(node)]
    for node in calls:
        assert node.meta["partitioner_tag"] == ("is_backward" if node in late else "is_forward"), node
    rotated = [node for node in calls if node.target is QUANTIZE and node.args[4:] == (SIGNS,)]
    assert len(rotated) == 4  # the inputs of the four layers
    assert late.isdisjoint(rotated)


def tags(nodes: Iterable[fx.Node]) -> list[dict[str, object]]:
    return [{key: node.meta.get(key) for key in ORIGIN_META} for node in nodes]


def test_only_tags_of_inserted_nodes_change() -> None:
    graph = joint(Blocks(checkpointed=True))
    new = {*inserted(graph), *(source for node in graph.nodes if is_dialect(node) for source in node.all_input_nodes)}
    own = [node for node in graph.nodes if node not in new]
    before, own_before = text(graph), tags(own)
    place(graph)
    assert text(graph) == before
    assert tags(own) == own_before


def test_a_second_run_changes_nothing() -> None:
    graph = placed(Blocks(checkpointed=True))
    once = tags(graph.nodes)
    assert tags(place(graph).nodes) == once


def test_checkpointed_tensors_pass_their_tags_on() -> None:
    """What is made from a tensor to be computed again is computed again too, in the same region."""
    graph = placed(Blocks(checkpointed=True))
    late = from_tangents(graph)
    regions = set()
    for node in inserted(graph):
        sources = [
            source for source in node.all_input_nodes if "recompute" in source.meta and source.target is not SEED
        ]
        if node in late or not sources:
            continue
        assert node.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE, node
        assert node.meta["ac_graph_id"] in {source.meta["ac_graph_id"] for source in sources}, node
        regions.add(node.meta["ac_graph_id"])
    assert len(regions) == 2


def test_nothing_is_tagged_without_checkpointing() -> None:
    """But the seed, and what is made from the graph's inputs. What reads the seed does not pass on that it is saved."""
    graph = placed(Blocks(checkpointed=False), RANDOM_INPUTS)
    tagged = [node for node in graph.nodes if "recompute" in node.meta]
    assert [node.target for node in tagged if node.target not in (QUANTIZE, operator.getitem)] == [SEED]
    assert all(arrangement_base(node.args[0]).op == "placeholder" for node in tagged if node.target is QUANTIZE)


def test_weights_are_quantised_again_for_the_data_gradient() -> None:
    """Nothing of a weight but its amax is saved; the backward quantises the weight that it is given."""
    forward, backward = partitioned(placed(Blocks(False)))
    weights = {node.meta["val"].shape for node in forward.find_nodes(op="placeholder") if node.meta["val"].dim() == 2}
    again = [node for node in backward.find_nodes(op="call_function", target=QUANTIZE) if node.args[2] == [16, 16]]
    assert {arrangement_base(node.args[0]).meta["val"].shape for node in again} == weights
    assert {arrangement_base(node.args[0]).op for node in again} == {"placeholder"}


def test_the_seed_is_saved() -> None:
    (seed,) = placed(Blocks(checkpointed=True)).find_nodes(op="call_function", target=SEED)
    assert seed.meta["recompute"] is CheckpointPolicy.MUST_SAVE


def test_inference() -> None:
    """A graph without a backward needs no tags."""
    graph = run_until(captured(Blocks(checkpointed=False), torch.randn(4, 16, 32), train=False), "fold_hadamard", ALL)
    before = text(graph)
    place(graph)
    assert text(graph) == before
    assert not [node for node in graph.nodes if "partitioner_tag" in node.meta or "recompute" in node.meta]


class Square(torch.autograd.Function):
    """A layer with a backward of its own, whose nodes AOTAutograd leaves without tags."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.mm(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return torch.mm(dy, w.t()), torch.mm(x.t(), dy)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.w = nn.Parameter(torch.randn(32, 48))

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.fc(x).flatten(0, 1), self.w)


def test_a_custom_autograd_function() -> None:
    graph = placed(Custom())
    late = from_tangents(graph)
    early = [node for node in graph.nodes if is_dialect(node) and node not in late]
    assert {node.meta["partitioner_tag"] for node in early} == {"is_forward"}


def run_both(forward: fx.Graph, backward: fx.Graph, inputs: list[Any]) -> list[Any]:
    """Forward, then backward on what it saved: outputs and gradients, as the joint graph gives them."""
    primals = len(forward.find_nodes(op="placeholder"))
    output, *saved = run(forward, *inputs[:primals])
    return [output, *run(backward, *saved, *inputs[primals:])]


@pytest.mark.parametrize("recipe", [ALL, RANDOM_INPUTS], ids=["", "random inputs"])
@pytest.mark.parametrize("model", [Blocks(False), Blocks(True), Custom()], ids=["plain", "checkpointed", "custom"])
def test_the_two_graphs_compute_what_the_joint_graph_does(model: nn.Module, recipe: Recipe) -> None:
    """Bit for bit, whatever was saved and whatever is computed again."""
    graph = placed(model, recipe)
    inputs = example_inputs(graph)
    assert same_bits(run_both(*partitioned(graph), inputs), run(graph, *inputs))


def test_packed_codes_are_saved_instead_of_tensors() -> None:
    """Without checkpointing the rotated inputs of weight gradients are quantised in the forward, and saved packed."""
    forward, _ = partitioned(placed(Blocks(False)))
    saved = forward.output_node().args[0][1:]
    packed = [node for node in saved if node.meta["val"].dtype is torch.uint8]
    assert len(packed) == 3, "of four inputs one is the graph's own, and kept anyway"
    # Of each layer's input only the pre-activation of the GELU is kept as it is, which the GELU's own gradient needs.
    made = [node.meta["val"] for node in saved if arrangement_base(node).op != "placeholder"]
    assert sum(value.dim() > 1 and value.dtype is torch.float32 for value in made) == 2


def test_checkpointing_saves_no_codes() -> None:
    """Only what lies at the boundary of a region is saved, as without NVFP4."""
    forward, backward = partitioned(placed(Blocks(True)))
    plain, _ = partitioned(joint(Blocks(True), last="assign"))
    saved, expected = ([node.meta["val"] for node in graph.output_node().args[0]] for graph in (forward, plain))
    assert sorted(str(tuple(value.shape)) for value in saved) == sorted(str(tuple(value.shape)) for value in expected)
    assert {value.dtype for value in saved} == {torch.float32}
    assert targets(backward)["nvfp4.quantize"] > targets(forward)["nvfp4.quantize"]


def test_a_seed_that_both_graphs_need_is_drawn_once() -> None:
    """A region computed again draws the same random bits, for it is given the forward's seed."""
    forward, backward = partitioned(placed(Blocks(True), RANDOM_INPUTS))
    assert len(forward.find_nodes(op="call_function", target=SEED)) == 1
    assert len(backward.find_nodes(op="call_function", target=SEED)) == 0
