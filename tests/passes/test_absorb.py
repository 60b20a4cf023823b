"""absorb: a matrix is computed in the kernels that reduce and quantise it where that is cheaper, and no bit changes."""

from __future__ import annotations

from collections.abc import Callable
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

from nvfp4c.cost import MACHINES, Machine
from nvfp4c.dialect import REGION, Stage
from nvfp4c.passes.absorb import FUSION, Absorb, Fusion, Way
from nvfp4c.passes.fuse import fuse
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES

H100 = MACHINES["sm_90"]
ALL = RECIPES["nvfp4-all"]


def absorbed(graph: fx.Graph, machine: Machine = H100, inputs: list[Any] | None = None) -> fx.Graph:
    """A graph after `fuse` and the pass; the pass changes no bit of the results, and finds nothing to do a second time.

    inputs: random where not given.
    """
    inputs = inputs or example_inputs(graph)
    run_step(graph, Step("fuse", fuse, Stage.FUSED), Stage.SCALED)
    expected = run_exactly(copied(graph), *inputs)
    run_step(graph, Step("absorb", Absorb(machine), Stage.FUSED), Stage.FUSED)
    assert same_bits(run_exactly(graph, *inputs), expected)
    once = text(graph)
    assert text(Absorb(machine)(graph)) == once
    return graph


def fusions(graph: fx.Graph) -> list[Fusion]:
    return [node.meta[FUSION] for node in graph.nodes if FUSION in node.meta]


def quantised(x: Tensor) -> list[Tensor]:
    """What a layer's input becomes in training: codes along its rows, rotated codes down its columns."""
    amax, rotated = nvfp4.amax(x), nvfp4.amax(turned(x), SIGNS)
    rows = nvfp4.quantize(x, amax, [1, 16], "nearest")
    return [*rows, amax, *nvfp4.quantize(turned(x), rotated, [1, 16], "nearest", SIGNS), rotated]


def gated(gate: Tensor, up: Tensor) -> list[Tensor]:
    h = aten.mul(aten.mul(aten.sigmoid(gate), gate), up)
    return quantised(aten.view(h, [40, 32]))


def test_a_gated_layer_is_computed_where_it_is_reduced() -> None:
    """Two inputs: read once by the kernel that writes the matrix and both its amaxes."""
    graph = trace(gated, bf16(2, 20, 32), bf16(2, 20, 32))
    before = copied(graph)
    assert targets(before)["aten.sigmoid"] == 1
    absorbed(graph)
    assert (
        text(graph)
        == """\
%gate = placeholder
%up = placeholder
%reshape = aten.reshape(%gate, [40, 32])
%reshape_2 = aten.reshape(%up, [40, 32])
%region = nvfp4.region([%reshape, %reshape_2], [], None, amax; amax columns with SIGNS; value of 0 full, 1 full: \
2 = sigmoid(0) bfloat16; 3 = mul(2, 0) bfloat16; 4 = mul(3, 1) bfloat16 -> 4)
%getitem = getitem(%region, 0)
%getitem_2 = getitem(%region, 1)
%getitem_3 = getitem(%region, 2)
%region_2 = nvfp4.region(%getitem_3, [%getitem, %getitem_2], None, packed; packed columns with SIGNS by amax 1)
%getitem_4 = getitem(%region_2, 0)
%getitem_5 = getitem(%region_2, 1)
%getitem_6 = getitem(%region_2, 2)
%getitem_7 = getitem(%region_2, 3)
%permute = aten.permute(%getitem_6, [1, 0])
%permute_2 = aten.permute(%getitem_7, [1, 0])
return [%getitem_4, %getitem_5, %getitem, %permute, %permute_2, %getitem_2]"""
    )
    (fusion,) = fusions(graph)
    assert fusion.way is Way.KEPT
    assert fusion.operations == ("sigmoid", "mul")
    # 40 x 32 elements: apart, two inputs are read and the matrix written, which then is read twice.
    moved = {way: fusion.bytes(way) for way in Way}
    assert moved[Way.APART] - moved[Way.KEPT] == 40 * 32 * 2


def test_one_input_is_read_again_rather_than_written() -> None:
    graph = absorbed(trace(lambda x: quantised(aten.mul(aten.relu(x), aten.relu(x))), bf16(40, 32)))
    assert regions(graph) == [
        "(%x, [], None, amax; amax columns with SIGNS of 0 full: "
        "1 = relu(0) bfloat16; 2 = relu(0) bfloat16; 3 = mul(1, 2) bfloat16 -> 3)",
        "(%x, [%getitem, %getitem_2], None, packed; packed columns with SIGNS by amax 1 of 0 full: "
        "1 = relu(0) bfloat16; 2 = relu(0) bfloat16; 3 = mul(1, 2) bfloat16 -> 3)",
    ]
    assert [fusion.way for fusion in fusions(graph)] == [Way.REPEATED] * 2


def normalised(x: Tensor, weight: Tensor) -> tuple[list[Tensor], Tensor]:
    wide = torch.ops.prims.convert_element_type(x, torch.float32)
    rstd = aten.rsqrt(aten.add(aten.mean(aten.pow(wide, 2), [-1], True), 1e-5))
    y = torch.ops.prims.convert_element_type(aten.mul(aten.mul(wide, rstd), weight), torch.bfloat16)
    return quantised(y), rstd


def test_the_end_of_a_normalisation() -> None:
    """A number for each row, one for each column; the reduction stays Inductor's, and the cast serves both."""
    graph = absorbed(trace(normalised, bf16(48, 64), bf16(64)))
    assert regions(graph)[0] == (
        "([%x, %rsqrt, %weight], [], None, amax; amax columns with SIGNS of 0 full, 1 row, 2 column: "
        "3 = to(0) float32; 4 = mul(3, 1) float32; 5 = mul(4, 2) float32; 6 = to(5) bfloat16 -> 6)"
    )
    assert {fusion.way for fusion in fusions(graph)} == {Way.REPEATED}
    assert targets(graph)["aten.mean.dim"] == 1
    assert targets(graph)["aten.mul.Tensor"] == 0


def gates(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    sigmoid = aten.sigmoid(gate)
    return quantised(aten.mul(dh, aten.mul(gate, sigmoid))), quantised(aten.mul(aten.mul(dh, up), sigmoid))


def test_two_matrices_of_the_same_tensors_share_a_region() -> None:
    """Which reads each of the three once."""
    graph = absorbed(trace(gates, bf16(32, 48), bf16(32, 48), bf16(32, 48)))
    first, *others = regions(graph)
    assert first.startswith(
        "([%dh, %gate, %up], [], None, amax; amax columns with SIGNS; value; "
        "amax of matrix 1; amax columns with SIGNS of matrix 1; value of matrix 1 of 0 full, 1 full, 2 full: "
    )
    assert first.endswith("-> 5, 7)")
    assert [line.split(",")[0] for line in others] == ["(%getitem_3", "(%getitem_6"]
    assert "aten." not in "".join(line for line in text(graph).splitlines() if "permute" not in line)


def test_a_matrix_that_others_read_is_written() -> None:
    def source(x: Tensor) -> tuple[list[Tensor], Tensor]:
        y = aten.relu(x)
        return quantised(y), aten.neg(y)

    graph = absorbed(trace(source, bf16(40, 32)))
    assert [fusion.way for fusion in fusions(graph)] == [Way.KEPT]
    assert "%neg = aten.neg(%getitem_3)" in text(graph)


def test_what_others_need_is_not_taken_in() -> None:
    """Its result is read instead, from memory, where it has to be anyway."""

    def source(x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        total = aten.add(x, y)
        return quantised(aten.relu(total)), aten.mm(total, turned(total))

    graph = absorbed(trace(source, bf16(40, 32), bf16(40, 32)))
    assert regions(graph)[0].startswith("(%add, [], None, amax; amax columns with SIGNS of 0 full: 1 = relu(0)")


STAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a matrix that is given": lambda x, y: quantised(x),
    "a product": lambda x, y: quantised(aten.mm(x, turned(y))),
    "an operation that no prologue has": lambda x, y: quantised(aten.cumsum(x, 0)),
    "a transposed matrix": lambda x, y: quantised(turned(aten.mul(x, turned(aten.clone(turned(y)))))),
    "a number for all elements": lambda x, y: quantised(aten.mul(x, aten.sum(y))),
}


@pytest.mark.parametrize("source", STAYS.values(), ids=STAYS)
def test_what_stays_as_it_is(source: Callable[[Tensor, Tensor], Any]) -> None:
    graph = trace(source, bf16(40, 32), bf16(40, 32))
    fused = text(fuse(copied(graph)))
    assert text(absorbed(graph)) == fused


def test_what_exists_only_in_registers_is_not_written_for_us() -> None:
    """A wide sum of two tensors, of which Inductor also takes the mean: it has it at hand, and we would have to ask."""

    def source(x: Tensor, y: Tensor) -> list[Tensor]:
        total = aten.add(torch.ops.prims.convert_element_type(x, torch.float32), y)
        centred = aten.sub(total, aten.mean(total, [-1], True))
        return quantised(torch.ops.prims.convert_element_type(centred, torch.bfloat16))

    graph = trace(source, bf16(4096, 512), torch.randn(4096, 512))
    absorbed(graph)
    (fusion,) = fusions(graph)
    assert fusion.way is Way.APART
    # The region would read 4 bytes an element that were written for it, where apart 2 are written and read.
    kept, apart = (fusion.bytes(way) for way in (Way.KEPT, Way.APART))
    assert kept > apart


def test_a_machine_that_computes_slowly_leaves_it_apart() -> None:
    """By the cost model: the same graph, but arithmetic is what counts, and repeating it costs most."""
    slow = Machine(bandwidth=1e15, operations=1e9, launch=0.0)
    source = trace(lambda x: quantised(aten.exp(x)), bf16(640, 320))
    assert {fusion.way for fusion in fusions(absorbed(copied(source)))} == {Way.REPEATED}
    assert {fusion.way for fusion in fusions(absorbed(source, slow))} == {Way.KEPT}


class Block(nn.Module):
    """A normalisation, a gated layer and a residual connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_training_step(dtype: torch.dtype) -> None:
    """Forward: the norm's end and the gate; backward: both gradients of the gate, from one read."""
    x = torch.randn(2, 24, 32, dtype=dtype, requires_grad=True)
    graph = run_until(captured(Block(32, 64).to(dtype), x), "place", ALL)
    inputs = example_inputs(graph)
    forward, backward = partitioned(graph)
    primals = inputs[: len(forward.find_nodes(op="placeholder"))]
    saved = run_exactly(copied(forward), *primals)[1:]
    absorbed(forward, inputs=primals)
    absorbed(backward, inputs=[*saved, *inputs[len(primals) :]])
    assert [fusion.way for fusion in fusions(forward)] == [Way.REPEATED, Way.REPEATED, Way.KEPT]
    assert Way.KEPT in [fusion.way for fusion in fusions(backward)]
    shared = [node for node in backward.find_nodes(op="call_function", target=REGION) if len(node.args[0]) == 3]
    assert len(shared) == 1


def test_symbolic_sizes() -> None:
    """One graph serves every token count, and costs are expressions of it."""
    x = torch.randn(2, 24, 32).bfloat16()
    torch._dynamo.mark_dynamic(x, 1)
    graph = run_until(captured(Block(32, 64).bfloat16(), x, train=False), "place", ALL)
    before = copied(graph)
    for one in (before, graph):
        fuse(one)
    run_step(graph, Step("absorb", Absorb(H100), Stage.FUSED), Stage.FUSED)
    found = fusions(graph)
    assert found
    assert all(fusion.bytes(fusion.way).free_symbols for fusion in found)
    for tokens in (17, 64):
        inputs = example_inputs(graph, symbol=tokens)
        assert same_bits(run_exactly(copied(graph), *inputs), run_exactly(copied(before), *inputs))


def transposed_in_memory(*shape: int) -> Tensor:
    return torch.randn(shape).mT.contiguous().mT


CHANGES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], list[Way]]] = {
    "a constant first": (
        lambda x: quantised(aten.maximum(aten.full([], 0.25), aten.sub(1, x))),
        (bf16(40, 32),),
        [Way.REPEATED] * 2,
    ),
    "a constant that its own type rounds": (
        lambda x: quantised(aten.add(x, aten.full([], 0.1, dtype=torch.bfloat16))),
        (torch.randn(40, 32),),
        [Way.REPEATED] * 2,
    ),
    "numbers of rows and columns, computed for the matrix alone": (
        lambda x, y, w: quantised(aten.mul(aten.mul(x, aten.exp(aten.mean(y, [-1], True))), aten.exp(w))),
        (torch.randn(40, 32), torch.randn(40, 32), torch.randn(1, 32)),
        [Way.REPEATED] * 2,
    ),
    "a factor of the second operand": (lambda x: quantised(aten.add.Scalar(x, 2.0, 3.0)), (bf16(40, 32),), []),
    "a sum of bools": (
        lambda x: quantised(torch.ops.prims.convert_element_type(aten.add(aten.gt(x, 0), aten.gt(x, 1)), x.dtype)),
        (bf16(40, 32),),
        [],
    ),
    "a matrix that others read transposed": (
        lambda x: (quantised(y := aten.relu(x)), aten.view(turned(y), [40 * 32])),
        (transposed_in_memory(40, 32),),
        [Way.APART],
    ),
    "axes that are no view, beside one of size 1": (
        lambda x, y: quantised(aten.view(aten.add(x, y), [6, 32])),
        (torch.randn(2, 1, 3, 32), transposed_in_memory(2, 1, 3, 32)),
        [],
    ),
    "axes that are no view": (
        lambda x, y: quantised(aten.view(aten.add(x, y), [6, 32])),
        (torch.randn(2, 3, 32), transposed_in_memory(2, 3, 32)),
        [],
    ),
}


@pytest.mark.parametrize(("source", "inputs", "ways"), CHANGES.values(), ids=CHANGES)
def test_what_is_rare(source: Callable[..., Any], inputs: tuple[Tensor, ...], ways: list[Way]) -> None:
    graph = absorbed(trace(source, *inputs), inputs=list(inputs))
    assert [fusion.way for fusion in fusions(graph)] == ways


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_size_that_depends_on_data() -> None:
    """It has no example, and the same graph serves every size."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(32, 64).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x[x[:, 0] > 0])

    graph = run_until(captured(Chosen(), bf16(24, 32), train=False), "place", ALL)
    assert fusions(absorbed(graph))
