"""save_sums: what the backward reads of a residual connection is the sum, so the product can take it over."""

from __future__ import annotations

import pytest
import torch
from graphs import aten, captured, copied, example_inputs, partitioned, run, run_step, run_until, same_bits
from torch import Tensor, fx, nn
from torch._functorch import config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from nvfp4c.dialect import BLOCK_SCALED_MM, PRODUCT, RESIDUAL, Stage, arguments
from nvfp4c.passes.fold_residual import fold_residual
from nvfp4c.passes.fuse import fuse
from nvfp4c.passes.save_sums import save_sums
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES

STEP = Step("save_sums", save_sums, Stage.SCALED)
ALL = RECIPES["nvfp4-all"]


class Blocks(nn.Module):
    """Residual connections of MLPs behind a normalisation, whose backward reads every sum but the last."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


class Shared(nn.Linear):
    """A product that something else reads, and sums of other shapes and types."""

    def forward(self, x: Tensor) -> Tensor:
        y, z = super().forward(x), super().forward(x * 2)
        return (x + y).tanh() * y.exp() + (x[0] + z).tanh() * (x.double() + z).tanh()


def joint(model: nn.Module, train: bool = True, packed: bool = False) -> fx.Graph:
    """The joint graph before the pass, on an input that is kept anyway."""
    x = torch.randn(2, 24, 32)
    return run_until(captured(model, x, train=train), "place", ALL, packed=packed)


def tagged(graph: fx.Graph) -> list[fx.Node]:
    """The sums that are to be saved."""
    sums = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    return [node for node in sums if node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE]


def residuals(graph: fx.Graph) -> int:
    """How many products add something, of a graph that the last passes have seen."""
    products = [node for node in fold_residual(fuse(graph)).nodes if node.target in (PRODUCT, BLOCK_SCALED_MM)]
    return sum(arguments(node)[RESIDUAL] is not None for node in products)


def saved(forward: fx.Graph) -> list[fx.Node]:
    """What a forward graph with one result keeps for its backward."""
    (output,) = forward.find_nodes(op="output")
    return [node for node in arguments(output)[0][1:] if isinstance(node, fx.Node)]


def saved_sums(forward: fx.Graph) -> list[fx.Node]:
    sums = (node for node in saved(forward) if node.target is aten.add.Tensor)
    return [node for node in sums if node.meta["val"].shape[-1] == 32]


def step(halves: tuple[fx.Graph, fx.Graph], joint: fx.Graph) -> list[Tensor]:
    """The result and the gradients, on random inputs of the joint graph."""
    forward, backward = map(copied, halves)
    inputs = example_inputs(joint)
    count = len(forward.find_nodes(op="placeholder"))
    result, *kept = run(forward, *inputs[:count])
    return [result, *run(backward, *kept, *inputs[count:])]


def saved_bytes(forward: fx.Graph) -> int:
    return sum(node.meta["val"].nbytes for node in saved(forward))


@pytest.mark.parametrize("packed", [False, True], ids=["dequantised", "packed"])
def test_every_residual_connection_is_folded(packed: bool) -> None:
    """The first one too, whose product was saved: as many bytes are, and both graphs give what they gave."""
    graph = joint(Blocks(), packed=packed)
    before = partitioned(graph)
    after = partitioned(run_step(graph, STEP, Stage.SCALED))
    assert len(tagged(graph)) == 3
    assert [len(saved_sums(forward)) for forward, _ in (before, after)] == [1, 2]
    assert saved_bytes(after[0]) == saved_bytes(before[0])
    assert same_bits(step(before, graph), step(after, graph))
    assert [residuals(forward) for forward, _ in (before, after)] == [2, 3]


@pytest.mark.parametrize(
    ("model", "train"),
    [(Blocks(checkpointed=True), True), (Blocks(), False), (Shared(32, 32), True)],
    ids=["what is recomputed", "without a backward", "what no product takes over"],
)
def test_what_stays_as_it_is(model: nn.Module, train: bool) -> None:
    graph = joint(model, train)
    tags = [node.meta.get("recompute") for node in graph.nodes]
    run_step(graph, STEP, Stage.SCALED)
    assert [node.meta.get("recompute") for node in graph.nodes] == tags
    assert not tagged(graph)


def test_a_budget_of_memory_is_the_users() -> None:
    """What is tagged would be saved whatever the budget."""
    graph = joint(Blocks())
    with config.patch(activation_memory_budget=0.5):
        assert tagged(save_sums(graph)) == []
    assert tagged(save_sums(graph))
