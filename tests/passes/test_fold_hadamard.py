"""fold_hadamard: a transform is folded into the reductions and quantisations that read it, and no number changes."""

from __future__ import annotations

import torch
from graphs import (
    SIGNS,
    captured,
    copied,
    example_inputs,
    nvfp4,
    run,
    run_step,
    run_until,
    same_bits,
    targets,
    text,
    trace,
)
from torch import Tensor, fx, nn

from nvfp4c.dialect import HADAMARD, Stage
from nvfp4c.passes.fold_hadamard import SIZE, fold_hadamard
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES

STEP = Step("fold_hadamard", fold_hadamard, Stage.SCALED)
X = torch.randn(16, 40).bfloat16()


def fused(graph: fx.Graph) -> fx.Graph:
    """A graph after the pass; it gives the same results, bit for bit."""
    inputs = example_inputs(graph)
    expected = run(copied(graph), *inputs)
    run_step(graph, STEP, Stage.SCALED)
    assert same_bits(run(graph, *inputs), expected)
    return graph


def test_all_readers_can_rotate() -> None:
    def before(x: Tensor) -> tuple[Tensor, Tensor]:
        z = nvfp4.hadamard(x, SIGNS)
        return nvfp4.quantize(z, nvfp4.amax(z), [1, 16], "nearest")

    def expected(x: Tensor) -> tuple[Tensor, Tensor]:
        return nvfp4.quantize(x, nvfp4.amax(x, SIGNS), [1, 16], "nearest", SIGNS)

    assert text(fused(trace(before, X))) == text(trace(expected, X))


def test_several_readers() -> None:
    """Every reader gets the signs; a stochastic one keeps its seed and stream."""

    def before(x: Tensor, seed: Tensor) -> list[Tensor]:
        z = nvfp4.hadamard(x, SIGNS)
        amax = nvfp4.amax(z)
        return [
            *nvfp4.quantize(z, amax, [1, 16], "nearest"),
            *nvfp4.quantize(z, amax, [1, 16], "stochastic", None, seed, 3),
        ]

    def expected(x: Tensor, seed: Tensor) -> list[Tensor]:
        amax = nvfp4.amax(x, SIGNS)
        return [
            *nvfp4.quantize(x, amax, [1, 16], "nearest", SIGNS),
            *nvfp4.quantize(x, amax, [1, 16], "stochastic", SIGNS, seed, 3),
        ]

    inputs = X, torch.tensor(5)
    assert text(fused(trace(before, *inputs))) == text(trace(expected, *inputs))


def test_a_reader_that_cannot_rotate() -> None:
    """Then the rotated tensor is written anyway, so everybody reads that."""

    def source(x: Tensor) -> tuple[Tensor, Tensor]:
        z = nvfp4.hadamard(x, SIGNS)
        return nvfp4.amax(z), z + 1

    assert text(fused(trace(source, X))) == text(trace(source, X))


def test_what_is_not_rotated_stays() -> None:
    def source(x: Tensor) -> tuple[Tensor, Tensor]:
        return nvfp4.quantize(x, nvfp4.amax(x), [16, 16], "nearest")

    assert text(fused(trace(source, X))) == text(trace(source, X))


def test_a_transform_that_nobody_reads_goes() -> None:
    def source(x: Tensor) -> Tensor:
        nvfp4.hadamard(x, SIGNS)
        return x

    assert text(fused(trace(source, X))) == "%x = placeholder\nreturn %x"


def test_a_training_graph() -> None:
    """After the pass no transform of the recipe's is left, and a second run finds nothing to do."""
    found = captured(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(16, 32))
    graph = run_until(found, "share", RECIPES["nvfp4-all"])
    assert targets(graph)["nvfp4.hadamard"] == 4
    once = text(fused(graph))
    assert "hadamard" not in once
    assert text(fold_hadamard(graph)) == once


def test_a_length_needs_no_transform() -> None:
    """With symbolic sizes the contraction axis is read off the rotated tensor; it is its source's, in whole blocks."""
    x = torch.randn(24, 32)
    torch._dynamo.mark_dynamic(x, 0)
    found = captured(nn.Linear(32, 48), x)
    graph = run_until(found, "share", RECIPES["nvfp4-all"])
    assert targets(graph)["nvfp4.hadamard"] == 2
    assert any(
        user.target is SIZE for node in graph.find_nodes(op="call_function", target=HADAMARD) for user in node.users
    )
    once = text(fused(graph))
    assert "hadamard" not in once
    assert "floordiv" in once


def test_codes_of_a_transpose_lie_as_it_does() -> None:
    """A transform is contiguous, its source need not be; values tell later passes how tensors lie in memory."""

    def source(x: Tensor) -> tuple[Tensor, Tensor]:
        z = nvfp4.hadamard(x.t(), SIGNS)
        return nvfp4.quantize(z, nvfp4.amax(z), [1, 16], "nearest")

    graph = fused(trace(source, torch.randn(48, 32)))
    codes, scales = graph.output_node().args[0]
    assert codes.meta["val"].stride() == (1, 32)
    assert scales.meta["val"].stride() == (1, 32)
