"""insert_scaling: operands are quantised along the contraction axis and multiplied with their scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import (
    SEED_VALUE,
    SIGNS,
    aten,
    bf16,
    captured,
    decide,
    example_inputs,
    nvfp4,
    run,
    run_step,
    run_until,
    same_bits,
    text,
    trace,
)
from torch import Tensor, fx, nn

from nvfp4c import numerics, philox
from nvfp4c.dialect import (
    QUANTIZE,
    SCALED_MM,
    Assignment,
    Matmul,
    Operand,
    Quantization,
    Role,
    Stage,
    assignment_of,
    matmul_of,
)
from nvfp4c.formats import padded
from nvfp4c.numerics import NVFP4Tensor
from nvfp4c.passes.insert_hadamard import insert_hadamard
from nvfp4c.passes.insert_scaling import SEED, insert_scaling
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES

STEP = Step("insert_scaling", insert_scaling, Stage.SCALED)
MATMUL = Matmul("fc", Role.FPROP, (Operand.INPUT, Operand.WEIGHT))
ROW = Quantization((1, 16), "nearest", None)
TILE = Quantization((16, 16), "nearest", None)
RANDOM = Quantization((1, 16), "stochastic", None)
MATMULS = {"mm": aten.mm.default, "addmm": aten.addmm.default, "bmm": aten.bmm.default, "baddbmm": aten.baddbmm.default}

Pair = tuple[Quantization | None, Quantization | None]


def before(function: Callable[..., Any], pair: Pair, *inputs: Tensor) -> fx.Graph:
    """The graph of a function whose matmuls are all quantised alike."""
    graph = trace(function, *inputs)
    for node in graph.nodes:
        if node.target in MATMULS.values():
            node.meta["nvfp4_matmul"], node.meta["nvfp4_assignment"] = MATMUL, Assignment(*pair, "")
    return graph


def scaled(function: Callable[..., Any], pair: Pair, *inputs: Tensor) -> fx.Graph:
    graph = before(function, pair, *inputs)
    assert text(graph) == text(trace(function, *inputs))
    return run_step(graph, STEP, Stage.ROTATED)


def test_mm() -> None:
    """The right operand is turned; both are then quantised along their last axis."""

    def expected(x: Tensor, w_t: Tensor) -> Tensor:
        w = aten.permute(w_t, [1, 0])
        xa = nvfp4.amax(x)
        xc, xs = nvfp4.quantize(x, xa, [1, 16], "nearest")
        wa = nvfp4.amax(w_t)
        wc, ws = nvfp4.quantize(w, wa, [16, 16], "nearest")
        return nvfp4.scaled_mm(xc, xs, xa, wc, ws, wa, 32, None, torch.bfloat16)

    inputs = bf16(16, 32), bf16(32, 48)
    assert text(scaled(lambda x, w_t: aten.mm(x, w_t), (ROW, TILE), *inputs)) == text(trace(expected, *inputs))


def test_addmm_of_views() -> None:
    """A linear layer: the turned weight is turned back, and the amax is of what a view only rearranges."""

    def source(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aten.addmm(b, aten.view(x, [32, 32]), aten.permute(w, [1, 0]))

    def expected(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        flat = aten.view(x, [32, 32])
        xa = nvfp4.amax(x)
        xc, xs = nvfp4.quantize(flat, xa, [1, 16], "nearest")
        wa = nvfp4.amax(w)
        wc, ws = nvfp4.quantize(w, wa, [1, 16], "nearest")
        return nvfp4.scaled_mm(xc, xs, xa, wc, ws, wa, 32, b, torch.float32)

    inputs = torch.randn(2, 16, 32), torch.randn(48, 32), torch.randn(48)
    assert text(scaled(source, (ROW, ROW), *inputs)) == text(trace(expected, *inputs))


def test_bmm() -> None:
    def expected(x: Tensor, w: Tensor) -> Tensor:
        w_t = aten.permute(w, [0, 2, 1])
        xa = nvfp4.amax(x)
        xc, xs = nvfp4.quantize(x, xa, [1, 16], "nearest")
        wa = nvfp4.amax(w)
        wc, ws = nvfp4.quantize(w_t, wa, [16, 16], "nearest")
        return nvfp4.scaled_mm(xc, xs, xa, wc, ws, wa, 32, None, torch.bfloat16)

    inputs = bf16(4, 16, 32), bf16(4, 32, 48)
    assert text(scaled(lambda x, w: aten.bmm(x, w), (ROW, TILE), *inputs)) == text(trace(expected, *inputs))


def test_other_permutations_are_not_undone() -> None:
    """Only an exchange of the last two axes is a transpose."""

    def source(x: Tensor, w: Tensor) -> Tensor:
        return aten.bmm(x, aten.permute(w, [1, 2, 0]))

    def expected(x: Tensor, w: Tensor) -> Tensor:
        w_t = aten.permute(aten.permute(w, [1, 2, 0]), [0, 2, 1])
        xa = nvfp4.amax(x)
        xc, xs = nvfp4.quantize(x, xa, [1, 16], "nearest")
        wa = nvfp4.amax(w)
        wc, ws = nvfp4.quantize(w_t, wa, [1, 16], "nearest")
        return nvfp4.scaled_mm(xc, xs, xa, wc, ws, wa, 32, None, torch.bfloat16)

    inputs = bf16(4, 16, 32), bf16(48, 4, 32)
    assert text(scaled(source, (ROW, ROW), *inputs)) == text(trace(expected, *inputs))


def test_stochastic_operands_share_a_seed_and_have_streams_of_their_own() -> None:
    def source(dy: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shifted = dy + 1
        return aten.mm(shifted, w), aten.mm(shifted, v)

    graph = scaled(source, (RANDOM, ROW), bf16(16, 32), bf16(32, 48), bf16(32, 64))
    (seed,) = graph.find_nodes(op="call_function", target=SEED)
    assert next(node for node in graph.nodes if node.op != "placeholder") is seed
    random = [node for node in graph.nodes if node.target is QUANTIZE and node.args[3] == "stochastic"]
    assert [node.args[4:] for node in random] == [(None, seed, 0), (None, seed, 1)]


def test_what_stays_bf16_is_not_touched() -> None:
    def source(x: Tensor, w: Tensor) -> Tensor:
        return aten.mm(x, w)

    inputs = bf16(16, 32), bf16(32, 48)
    graph = trace(source, *inputs)
    decide(graph, aten.mm.default, MATMUL, Assignment(None, None, "because"))
    assert text(run_step(graph, STEP, Stage.ROTATED)) == text(trace(source, *inputs))


def test_only_the_weight() -> None:
    """The weight is quantised and dequantised, and the matmul stays what it was."""

    def source(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aten.addmm(b, x, aten.permute(w, [1, 0]))

    def expected(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        wa = nvfp4.amax(w)
        wc, ws = nvfp4.quantize(w, wa, [1, 16], "nearest")
        values = nvfp4.dequantize(wc, ws, wa, 32, torch.bfloat16)
        return aten.addmm(b, x, aten.permute(values, [1, 0]))

    inputs = bf16(16, 32), bf16(48, 32), bf16(48)
    assert text(scaled(source, (None, ROW), *inputs)) == text(trace(expected, *inputs))


def test_only_the_left_operand() -> None:
    def expected(w: Tensor, x: Tensor) -> Tensor:
        wa = nvfp4.amax(w)
        wc, ws = nvfp4.quantize(w, wa, [1, 16], "nearest")
        return aten.mm(nvfp4.dequantize(wc, ws, wa, 32, torch.bfloat16), x)

    inputs = bf16(48, 32), bf16(32, 16)
    assert text(scaled(lambda w, x: aten.mm(w, x), (ROW, None), *inputs)) == text(trace(expected, *inputs))


def test_other_readers_of_the_operands_and_the_product() -> None:
    """Who else reads an operand sees it unquantised; who reads the product, reads the scaled one."""

    def source(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = aten.mm(x, w)
        return y + 1, y * 2, x + 3

    graph = scaled(source, (ROW, ROW), bf16(16, 32), bf16(32, 48))
    read = [node.args[0].target for node in graph.nodes if node.target in (aten.add.Tensor, aten.mul.Tensor)]
    assert read == [SCALED_MM, SCALED_MM, "x"]


def test_the_product_keeps_its_decisions() -> None:
    graph = scaled(lambda x, w: aten.mm(x, w), (ROW, ROW), bf16(16, 32), bf16(32, 48))
    (product,) = graph.find_nodes(op="call_function", target=SCALED_MM)
    assert (matmul_of(product), assignment_of(product)) == (MATMUL, Assignment(ROW, ROW, ""))


def test_inserted_nodes_belong_where_their_product_does() -> None:
    graph = before(lambda x, w: aten.mm(x, w), (RANDOM, ROW), bf16(16, 32), bf16(32, 48))
    (node,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    tags = {"partitioner_tag": "is_backward", "seq_nr": 7, "recompute": 1, "ac_graph_id": 3}
    node.meta.update(tags)
    run_step(graph, STEP, Stage.ROTATED)
    for inserted in graph.nodes:
        if inserted.op == "call_function":
            assert {key: inserted.meta[key] for key in tags} == tags


# By hand, with the public functions of nvfp4c.numerics.


def by_hand(x: Tensor, how: Quantization, stream: int) -> NVFP4Tensor:
    """A matrix as `numerics.quantize` packs it, on the bits that the graph's seed gives."""
    bits = None
    if how.rounding == "stochastic":
        blocks = x.shape[0] * padded(x.shape[1]) // 16
        bits = philox.random_bytes(torch.tensor(SEED_VALUE), stream, blocks).reshape(x.shape[0], padded(x.shape[1]))
    return numerics.quantize(x, block=how.block, rounding=how.rounding, signs=how.signs, random_bits=bits)  # type: ignore[arg-type]


ROTATED_ROW = replace(ROW, signs=tuple(SIGNS))
ROTATED_RANDOM = replace(RANDOM, signs=tuple(SIGNS))
PAIRS = {
    "fprop": (ROW, TILE),
    "dgrad": (RANDOM, TILE),
    "wgrad": (ROTATED_RANDOM, ROTATED_ROW),
    "rows": (ROW, ROW),
    "both random": (RANDOM, RANDOM),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(32, 64, 48), (5, 23, 7), (1, 16, 1)])
def test_equals_numerics_by_hand(pair: str, dtype: torch.dtype, m: int, k: int, n: int) -> None:
    """The product of a scaled graph is that of `numerics.quantize` and `numerics.scaled_mm`, bit for bit."""
    left, right = PAIRS[pair]
    inputs = [torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)]
    graph = before(lambda x, w, b: aten.addmm(b, x, aten.permute(w, [1, 0])), PAIRS[pair], *inputs)
    run_step(graph, Step("insert_hadamard", insert_hadamard, Stage.ROTATED), Stage.ASSIGNED)
    run_step(graph, STEP, Stage.ROTATED)
    x, w, b = example_inputs(graph)
    streams = iter(range(2))
    a_by_hand = by_hand(x, left, next(streams) if left.rounding == "stochastic" else 0)
    b_by_hand = by_hand(w, right, next(streams) if right.rounding == "stochastic" else 0)
    expected = numerics.scaled_mm(a_by_hand, b_by_hand, b, dtype)
    assert same_bits(run(graph, x, w, b), [expected])


def test_a_batch_shares_one_amax() -> None:
    """The operands of a bmm are quantised with one amax for all matrices of the batch."""
    inputs = bf16(3, 16, 32), bf16(3, 32, 48)
    graph = scaled(lambda x, w: aten.bmm(x, w), (ROW, TILE), *inputs)
    x, w = inputs[0] * torch.tensor([1, 10, 100]).view(3, 1, 1).bfloat16(), inputs[1]
    (found,) = run(graph, x, w)
    for index in range(3):
        a, b = (
            numerics.block_codes(matrix, whole.abs().max().float(), how.block)
            for matrix, whole, how in ((x[index], x, ROW), (w[index].mT, w, TILE))
        )
        expected = numerics.scaled_mm(
            NVFP4Tensor(numerics.pack(a[0]), a[1], x.abs().max().float(), (16, 32)),
            NVFP4Tensor(numerics.pack(b[0]), b[1], w.abs().max().float(), (48, 32)),
        )
        assert same_bits(found[index], expected)


@pytest.mark.parametrize("column", [False, True])
def test_weights_only_by_hand(column: bool) -> None:
    inputs = bf16(16, 24), bf16(48, 24)
    graph = scaled(lambda x, w: aten.mm(x, aten.permute(w, [1, 0])), (None, TILE if column else ROW), *inputs)
    x, w = example_inputs(graph)
    expected = x @ numerics.quantize(w, block=(16, 16) if column else (1, 16)).dequantize(torch.bfloat16).mT
    assert same_bits(run(graph, x, w), [expected])


def test_nan_reaches_the_product() -> None:
    graph = scaled(lambda x, w: aten.mm(x, w), (ROW, TILE), bf16(16, 32), bf16(32, 48))
    x, w = example_inputs(graph)
    x[3, 5] = torch.nan
    (found,) = run(graph, x, w)
    assert found.isnan().all()


def test_symbolic_sizes() -> None:
    """One graph serves every token count: it gives what a graph captured with that count gives, bit for bit."""

    def scaled_mlp(tokens: int, dynamic: bool) -> fx.Graph:
        x = torch.randn(tokens, 32)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        found = captured(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), x)
        return run_until(found, "insert_scaling", RECIPES["nvfp4-all"])

    graph = scaled_mlp(24, dynamic=True)
    lengths = [node.args[6] for node in graph.find_nodes(op="call_function", target=SCALED_MM)]
    assert [type(length) for length in lengths] == [int, int, int, fx.Node, fx.Node]
    for tokens in (24, 17, 2):
        inputs = example_inputs(graph, symbol=tokens)
        tensors = [given for given in inputs if isinstance(given, Tensor)]
        results = run(graph, *inputs), run(scaled_mlp(tokens, dynamic=False), *tensors)
        found, expected = ([result for result in each if result is not None] for each in results)
        assert len(found) == 5  # the output, and the gradients of two weights and two biases
        assert same_bits(found, expected)
