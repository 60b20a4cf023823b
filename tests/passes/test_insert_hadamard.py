"""insert_hadamard: both operands are rotated along the contraction axis, and the product stays the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import SIGNS, aten, decide, nvfp4, run, run_step, text, trace
from torch import Tensor, fx

from nvfp4c import numerics
from nvfp4c.dialect import Assignment, Matmul, Operand, Quantization, Role, Stage, assignment_of, matmul_of
from nvfp4c.passes.insert_hadamard import insert_hadamard
from nvfp4c.pipeline import Step

STEP = Step("insert_hadamard", insert_hadamard, Stage.ROTATED)
WGRAD = Matmul("fc", Role.WGRAD, (Operand.GRADIENT, Operand.INPUT))
BF16 = Assignment(None, None, "because")


def nvfp4_with(signs: list[int] | None) -> Assignment:
    how = Quantization((1, 16), "nearest", None if signs is None else tuple(signs))
    return Assignment(how, how, "")


def before(function: Callable[..., Tensor], assignment: Assignment, *inputs: Tensor) -> fx.Graph:
    """The graph of a function whose matmuls are all assigned alike."""
    graph = trace(function, *inputs)
    for target in (aten.mm.default, aten.bmm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.meta["nvfp4_matmul"], node.meta["nvfp4_assignment"] = WGRAD, assignment
    return graph


def rotated(function: Callable[..., Tensor], assignment: Assignment, *inputs: Tensor) -> str:
    return text(run_step(before(function, assignment, *inputs), STEP, Stage.ASSIGNED))


DY_T, X = torch.randn(48, 32), torch.randn(32, 64)


def test_mm() -> None:
    def expected(dy_t: Tensor, x: Tensor) -> Tensor:
        a = nvfp4.hadamard(dy_t, SIGNS)
        b = nvfp4.hadamard(aten.permute(x, [1, 0]), SIGNS)
        return aten.mm(a, aten.permute(b, [1, 0]))

    found = rotated(lambda dy_t, x: torch.mm(dy_t, x), nvfp4_with(SIGNS), DY_T, X)
    assert found == text(trace(expected, DY_T, X))


def test_the_product_keeps_its_value_and_decisions() -> None:
    graph = before(lambda dy_t, x: torch.mm(dy_t, x), nvfp4_with(SIGNS), DY_T, X)
    (node,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    value = node.meta["val"]
    run_step(graph, STEP, Stage.ASSIGNED)
    (node,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    assert node.meta["val"] is value
    assert (matmul_of(node), assignment_of(node)) == (WGRAD, nvfp4_with(SIGNS))


def test_a_transposed_operand_is_turned_back() -> None:
    def source(x: Tensor, w: Tensor) -> Tensor:
        return torch.mm(x, aten.permute(w, [1, 0]))

    def expected(x: Tensor, w: Tensor) -> Tensor:
        aten.permute(w, [1, 0])
        a = nvfp4.hadamard(x, SIGNS)
        b = nvfp4.hadamard(w, SIGNS)
        return aten.mm(a, aten.permute(b, [1, 0]))

    w = torch.randn(64, 32)
    graph = before(source, nvfp4_with(SIGNS), DY_T, w)
    (turn,) = graph.find_nodes(op="call_function", target=aten.permute.default)
    run_step(graph, STEP, Stage.ASSIGNED)
    assert not turn.users
    graph.eliminate_dead_code()
    expected_graph = trace(expected, DY_T, w)
    expected_graph.eliminate_dead_code()
    assert text(graph) == text(expected_graph)


def test_bmm() -> None:
    def expected(dy_t: Tensor, x: Tensor) -> Tensor:
        a = nvfp4.hadamard(dy_t, SIGNS)
        b = nvfp4.hadamard(aten.permute(x, [0, 2, 1]), SIGNS)
        return aten.bmm(a, aten.permute(b, [0, 2, 1]))

    inputs = torch.randn(4, 48, 32), torch.randn(4, 32, 64)
    found = rotated(lambda dy_t, x: torch.bmm(dy_t, x), nvfp4_with(SIGNS), *inputs)
    assert found == text(trace(expected, *inputs))


def test_addmm_keeps_its_bias() -> None:
    def expected(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
        left = nvfp4.hadamard(x, SIGNS)
        right = nvfp4.hadamard(aten.permute(w, [1, 0]), SIGNS)
        return aten.addmm(b, left, aten.permute(right, [1, 0]))

    inputs = [given.bfloat16() for given in (torch.randn(64), DY_T, X)]
    found = rotated(lambda b, x, w: torch.addmm(b, x, w), nvfp4_with(SIGNS), *inputs)
    assert found == text(trace(expected, *inputs))


@pytest.mark.parametrize("assignment", [BF16, nvfp4_with(None)])
def test_what_asks_for_no_rotation_stays(assignment: Assignment) -> None:
    def source(dy_t: Tensor, x: Tensor) -> Tensor:
        return torch.mm(dy_t, x)

    assert rotated(source, assignment, DY_T, X) == text(trace(source, DY_T, X))


def test_other_readers_of_an_operand_see_it_as_it_was() -> None:
    def source(dy_t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.mm(dy_t, x), dy_t + 1

    graph = trace(source, DY_T, X)
    decide(graph, aten.mm.default, WGRAD, nvfp4_with(SIGNS))
    run_step(graph, STEP, Stage.ASSIGNED)
    (add,) = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert add.args[0].op == "placeholder"


def test_inserted_nodes_belong_where_their_product_does() -> None:
    graph = before(lambda dy_t, x: torch.mm(dy_t, x), nvfp4_with(SIGNS), DY_T, X)
    (node,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    tags = {"partitioner_tag": "is_backward", "seq_nr": 7, "recompute": 1, "ac_graph_id": 3}
    node.meta.update(tags)
    run_step(graph, STEP, Stage.ASSIGNED)
    calls = graph.find_nodes(op="call_function", target=nvfp4.hadamard.default)
    calls += graph.find_nodes(op="call_function", target=aten.permute.default)
    assert len(calls) == 4
    for call in calls:
        assert {key: call.meta[key] for key in tags} == tags


def product_of_rotated(dy_t: Tensor, x: Tensor) -> Tensor:
    """What a graph gives after the pass; its product is taken in FP64, so that it adds no error of its own."""
    graph = before(lambda dy_t, x: aten.mm(dy_t, x), nvfp4_with(SIGNS), dy_t, x)
    run_step(graph, STEP, Stage.ASSIGNED)
    (node,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    with graph.inserting_before(node):
        for place in (0, 1):
            node.update_arg(place, graph.call_function(torch.Tensor.double, (node.args[place],)))
    (found,) = run(graph, dy_t, x)
    return found


TOKENS = [32, 40, 1]


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_rotation_cancels(tokens: int) -> None:
    """Exactly, where nothing is rounded: sums of 16 integers of -2 to 2 are BF16 numbers. Whole blocks or not."""
    dy_t, x = torch.randint(-2, 3, (48, tokens)).float(), torch.randint(-2, 3, (tokens, 64)).float()
    assert torch.equal(product_of_rotated(dy_t, x), dy_t.double() @ x.double())


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_product_changes_only_by_rounding(tokens: int) -> None:
    # Multiples of 2^-12 below 8 make the FP32 sums of the transform exact: what is left is the rounding to BF16.
    dy_t, x = ((torch.randn(shape) * 2**12).round() / 2**12 for shape in ((48, tokens), (tokens, 64)))
    found, exact = product_of_rotated(dy_t, x), dy_t.double() @ x.double()
    # A rotated element is off by up to 2^-8 of itself, so a product of two by up to 2 * 2^-8 + 2^-16.
    left, right = numerics.rotate(dy_t, SIGNS).double(), numerics.rotate(x.mT, SIGNS).double()
    bound = (left.abs() @ right.abs().mT) * (2 * 2**-8 + 2**-16)
    assert ((found - exact).abs() <= bound).all()
    assert not torch.equal(found, exact)
