"""share: each tensor is reduced and quantised once for each form in which it is needed, and no number changes."""

from __future__ import annotations

from typing import Any

import torch
from graphs import (
    SIGNS,
    aten,
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

from nvfp4c.dialect import Stage
from nvfp4c.passes.share import merge_equal, share
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES

STEP = Step("share", share, Stage.SCALED)
ALL = RECIPES["nvfp4-all"]
Packed = tuple[Tensor, Tensor]


def shared(graph: fx.Graph) -> fx.Graph:
    """A graph after the pass; it gives the same results, bit for bit."""
    inputs = example_inputs(graph)
    expected = run(copied(graph), *inputs)
    run_step(graph, STEP, Stage.SCALED)
    assert same_bits(run(graph, *inputs), expected)
    return graph


def unchanged(function: Any, *inputs: Tensor) -> bool:
    return text(shared(trace(function, *inputs))) == text(trace(function, *inputs))


X, W, V = torch.randn(16, 32).bfloat16(), torch.randn(48, 32).bfloat16(), torch.randn(64, 32).bfloat16()


def test_an_input_of_two_layers() -> None:
    """Both layers reduce and quantise it alike: once is enough."""

    def before(x: Tensor) -> tuple[Packed, Packed]:
        return (
            nvfp4.quantize(x, nvfp4.amax(x), [1, 16], "nearest"),
            nvfp4.quantize(x, nvfp4.amax(x), [1, 16], "nearest"),
        )

    def expected(x: Tensor) -> tuple[Packed, Packed]:
        packed = nvfp4.quantize(x, nvfp4.amax(x), [1, 16], "nearest")
        return packed, packed

    assert text(shared(trace(before, X))) == text(trace(expected, X))


def test_a_rotated_input_of_two_layers() -> None:
    """Equal turns and transforms before it are merged first."""

    def before(x: Tensor) -> list[Tensor]:
        rotated = [nvfp4.hadamard(aten.permute(x, [1, 0]), SIGNS) for _ in range(2)]
        return [nvfp4.quantize(z, nvfp4.amax(z), [1, 16], "nearest")[0] for z in rotated]

    def expected(x: Tensor) -> list[Tensor]:
        z = nvfp4.hadamard(aten.permute(x, [1, 0]), SIGNS)
        packed = nvfp4.quantize(z, nvfp4.amax(z), [1, 16], "nearest")[0]
        return [packed, packed]

    assert text(shared(trace(before, X))) == text(trace(expected, X))


def test_forms_that_differ_are_kept() -> None:
    """Another block, rotation or rounding is another form."""

    def source(x: Tensor) -> list[Tensor]:
        z = nvfp4.hadamard(x, SIGNS)
        other = nvfp4.hadamard(x, [1] * 16)
        amax = nvfp4.amax(x)
        return [
            nvfp4.quantize(x, amax, [1, 16], "nearest")[0],
            nvfp4.quantize(x, amax, [16, 16], "nearest")[0],
            nvfp4.quantize(z, nvfp4.amax(z), [1, 16], "nearest")[0],
            nvfp4.quantize(other, nvfp4.amax(other), [1, 16], "nearest")[0],
        ]

    assert unchanged(source, X)


def test_stochastic_quantisations_are_never_merged() -> None:
    """Each has a stream of its own, so that the errors of two products are independent."""

    def source(x: Tensor, seed: Tensor) -> list[Tensor]:
        amax = nvfp4.amax(x)
        return [nvfp4.quantize(x, amax, [1, 16], "stochastic", None, seed, stream)[0] for stream in (0, 1)]

    assert unchanged(source, X, torch.tensor(5))


def test_stochastic_tiles_are_not_turned() -> None:
    """Turning would give both products the same random errors."""

    def source(w: Tensor, seed: Tensor) -> list[Tensor]:
        amax = nvfp4.amax(w)
        turned = aten.permute(w, [1, 0])
        return [
            nvfp4.quantize(given, amax, [16, 16], "stochastic", None, seed, stream)[0]
            for stream, given in enumerate((w, turned))
        ]

    assert unchanged(source, W, torch.tensor(5))


def test_arithmetic_is_left_alone() -> None:
    """Only what passes insert is merged; equal operations of the model, copies too, are its own affair."""

    def source(x: Tensor) -> list[Tensor]:
        return [x * 2, x * 2, aten.clone(x), aten.clone(x)]

    assert unchanged(source, X)


def test_numbers_of_different_types_are_different_arguments() -> None:
    """1 and 1.0 are equal in Python, but a tensor full of one is not a tensor full of the other."""

    def source(x: Tensor) -> list[Tensor]:
        return [x, aten.full([2], 1), aten.full([2], 1.0), aten.full([2], 1)]

    graph = trace(source, X)
    merge_equal(graph, frozenset({aten.full.default}))
    assert targets(graph)["aten.full"] == 2


def test_a_weight_serves_both_orientations() -> None:
    """The data gradient reads the tiles of the forward, turned."""

    def before(w: Tensor) -> tuple[Packed, Packed]:
        turned = aten.permute(w, [1, 0])
        return (
            nvfp4.quantize(w, nvfp4.amax(w), [16, 16], "nearest"),
            nvfp4.quantize(turned, nvfp4.amax(w), [16, 16], "nearest"),
        )

    def expected(w: Tensor) -> tuple[Packed, Packed]:
        aten.permute(w, [1, 0])
        codes, scales = nvfp4.quantize(w, nvfp4.amax(w), [16, 16], "nearest")
        return (codes, scales), nvfp4.transpose(codes, scales, 32)

    assert text(shared(trace(before, W))) == text(trace(expected, W))


def test_a_weight_stored_transposed() -> None:
    """The forward may be the one that reads the weight turned; the data gradient then reads it as it is."""

    def before(w_t: Tensor) -> tuple[Packed, Packed]:
        turned = aten.permute(w_t, [1, 0])
        return (
            nvfp4.quantize(turned, nvfp4.amax(w_t), [16, 16], "nearest"),
            nvfp4.quantize(w_t, nvfp4.amax(w_t), [16, 16], "nearest"),
        )

    def expected(w_t: Tensor) -> tuple[Packed, Packed]:
        turned = aten.permute(w_t, [1, 0])
        codes, scales = nvfp4.quantize(turned, nvfp4.amax(w_t), [16, 16], "nearest")
        return (codes, scales), nvfp4.transpose(codes, scales, 48)

    assert text(shared(trace(before, W))) == text(trace(expected, W))


def test_batches_of_tiles() -> None:
    def before(w: Tensor) -> list[Tensor]:
        amax = nvfp4.amax(w)
        turned = aten.permute(w, [0, 2, 1])
        return [*nvfp4.quantize(w, amax, [16, 16], "nearest"), *nvfp4.quantize(turned, amax, [16, 16], "nearest")]

    graph = shared(trace(before, torch.randn(3, 40, 24)))
    assert (targets(graph)["nvfp4.quantize"], targets(graph)["nvfp4.transpose"]) == (1, 1)


def test_rows_are_not_turned() -> None:
    """1x16 blocks of a matrix are not those of its transpose."""

    def source(w: Tensor) -> list[Tensor]:
        amax = nvfp4.amax(w)
        turned = aten.permute(w, [1, 0])
        return [nvfp4.quantize(given, amax, [1, 16], "nearest")[0] for given in (w, turned)]

    assert unchanged(source, W)


def test_rotated_tiles_are_not_turned() -> None:
    """A rotation along one axis is none along the other."""

    def source(w: Tensor) -> list[Tensor]:
        z = nvfp4.hadamard(w, SIGNS)
        amax = nvfp4.amax(z)
        turned = aten.permute(z, [1, 0])
        return [nvfp4.quantize(given, amax, [16, 16], "nearest")[0] for given in (z, turned)]

    assert unchanged(source, W)


def test_tiles_with_another_amax_are_not_turned() -> None:
    def source(w: Tensor, amax: Tensor) -> list[Tensor]:
        turned = aten.permute(w, [1, 0])
        return [
            nvfp4.quantize(w, nvfp4.amax(w), [16, 16], "nearest")[0],
            nvfp4.quantize(turned, amax, [16, 16], "nearest")[0],
        ]

    graph = trace(source, W, torch.tensor(3.0))
    before = text(graph)
    assert text(run_step(graph, STEP, Stage.SCALED)) == before


def test_a_second_run_changes_nothing() -> None:
    found = captured(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(16, 32))
    once = text(run_until(found, "share", ALL))
    assert text(share(found.graph)) == once


class Attention(nn.Module):
    """Three layers that read one input, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        return self.o(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))


def test_a_training_graph() -> None:
    """q, k and v share their input in the forward, and rotated in the backward; each weight is quantised once."""
    found = captured(Attention(), torch.randn(2, 8, 32))
    graph = run_until(found, "insert_scaling", ALL)
    before = targets(graph)
    # 5 layers, each with 3 roles of 2 operands; the first layer has no data gradient.
    assert before["nvfp4.quantize"] == 2 * (3 * 5 - 1)
    after = targets(shared(graph))
    weights, inputs, rotated_inputs = 5, 3, 3  # the inputs of pre, of q k v, and of o
    gradients = 4 + 5  # of dgrad and wgrad, each with a stream of its own
    assert after["nvfp4.quantize"] == weights + inputs + rotated_inputs + gradients
    assert after["nvfp4.transpose"] == 4
    # A data gradient reduces dy as it is, a weight gradient reduces it rotated.
    assert after["nvfp4.amax"] == weights + inputs + rotated_inputs + gradients


def test_a_weight_used_twice() -> None:
    """Two calls of a layer quantise its weight once, and turn it once."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(torch.relu(self.fc(x)))))

    graph = shared(run_until(captured(Twice(), torch.randn(16, 32)), "insert_scaling", ALL))
    tiles = [node for node in graph.nodes if node.target is nvfp4.quantize.default and node.args[2] == [16, 16]]
    assert len(tiles) == 1
    assert targets(graph)["nvfp4.transpose"] == 1
