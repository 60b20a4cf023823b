"""fold_residual: a product takes over the sum that follows it, which is rounded once instead of twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import exact_product, run_exactly
from graphs import (
    aten,
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

from nvfp4c import dialect
from nvfp4c.dialect import RESIDUAL, Stage, matmul_of
from nvfp4c.passes.fold_residual import fold_residual
from nvfp4c.passes.fuse import fuse
from nvfp4c.pipeline import Step
from nvfp4c.recipe import RECIPES

FUSE = Step("fuse", fuse, Stage.FUSED)
STEP = Step("fold_residual", fold_residual, Stage.FUSED)
ALL = RECIPES["nvfp4-all"]
GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(rows, 48, generator=GENERATOR).bfloat16() for rows in (16, 32))
X = torch.randn(16, 32, generator=GENERATOR)
AMAX = torch.tensor(1000.0)
"""So that the product of A and B is about as large as X: sqrt(48) (1000 / 2688)^2 is near 1."""


def folded(graph: fx.Graph, inputs: list[Any] | None = None) -> fx.Graph:
    """A graph after the pass, which finds nothing to do a second time.

    No result is further from what the graph gave than two roundings to its type; an FP32 result is the same to the
    last bit. inputs: random where not given.
    """
    inputs = inputs or example_inputs(graph)
    expected = run_exactly(copied(graph), *inputs)
    run_step(graph, STEP, Stage.FUSED)
    for found, before in zip(run_exactly(graph, *inputs), expected, strict=True):
        assert found.dtype is before.dtype
        assert same_bits(found, before) if found.dtype is torch.float32 else near(found, before)
    once = text(graph)
    assert text(fold_residual(graph)) == once
    return graph


def near(found: Tensor, before: Tensor) -> bool:
    """Up to three terms and sums were rounded on their own, each to half a unit in its last place; none was more than
    twice as large as the largest result."""
    unit = torch.finfo(before.dtype).eps * float(before.abs().max())
    return bool(((found.double() - before.double()).abs() <= 3 * unit).all())


def residuals(graph: fx.Graph) -> int:
    """How many products add something."""
    products = (nvfp4.product.default, nvfp4.block_scaled_mm.default)
    return sum(node.target in products and node.args[RESIDUAL] is not None for node in graph.nodes)


def product(a: Tensor, b: Tensor, amax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return nvfp4.product(a, b, amax, amax, None, None, dtype)


def test_a_residual_connection() -> None:
    """What the product is given has its shape."""

    def source(a: Tensor, b: Tensor, amax: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        before = aten.relu(x)
        y = aten.view(nvfp4.product(a, b, amax, amax, bias, None, torch.float32), [2, 8, 32])
        return aten.mul(aten.add(before, aten.unsqueeze(y, 0)), 2)

    assert (
        text(folded(trace(source, A, B, AMAX, torch.randn(32), X.view(1, 2, 8, 32))))
        == """\
%a = placeholder
%b = placeholder
%amax = placeholder
%bias = placeholder
%x = placeholder
%relu = aten.relu(%x)
%reshape = aten.reshape(%relu, [16, 32])
%product = nvfp4.product(%a, %b, %amax, %amax, %bias, %reshape, torch.float32)
%view = aten.view(%product, [2, 8, 32])
%unsqueeze = aten.unsqueeze(%view, 0)
%mul = aten.mul.Tensor(%unsqueeze, 2)
return %mul"""
    )


def test_without_views_nothing_is_added() -> None:
    """Either operand of a sum may be the product."""

    def source(a: Tensor, b: Tensor, amax: Tensor, x: Tensor) -> list[Tensor]:
        return [aten.add(product(a, b, amax), x), aten.add(x, product(a, b, amax))]

    def expected(a: Tensor, b: Tensor, amax: Tensor, x: Tensor) -> list[Tensor]:
        return [nvfp4.product(a, b, amax, amax, None, x, torch.float32) for _ in range(2)]

    given = A, B, AMAX, X
    assert text(folded(trace(source, *given))) == text(trace(expected, *given))


def test_of_two_products_the_later_takes_the_other() -> None:
    """Wherever it stands in the sum; sums of three become a chain."""

    def source(a: Tensor, b: Tensor, c: Tensor, d: Tensor, amax: Tensor) -> Tensor:
        first, second, third = (product(a, other, amax) for other in (b, c, d))
        return aten.add(third, aten.add(second, first))

    def expected(a: Tensor, b: Tensor, c: Tensor, d: Tensor, amax: Tensor) -> Tensor:
        found = product(a, b, amax)
        for other in (c, d):
            found = nvfp4.product(a, other, amax, amax, None, found, torch.float32)
        return found

    given = A, B, B.clone(), B.clone(), AMAX
    assert text(folded(trace(source, *given))) == text(trace(expected, *given))


def test_products_whose_views_follow_both() -> None:
    """The later one takes the other as it is, not the view of it, which comes later still."""

    def source(a: Tensor, b: Tensor, c: Tensor, amax: Tensor) -> Tensor:
        first, second = product(a, b, amax), product(a, c, amax)
        return aten.add(aten.view(first, [2, 8, 32]), aten.view(second, [2, 8, 32]))

    def expected(a: Tensor, b: Tensor, c: Tensor, amax: Tensor) -> Tensor:
        first = product(a, b, amax)
        return aten.view(nvfp4.product(a, c, amax, amax, None, first, torch.float32), [2, 8, 32])

    graph = folded(trace(source, A, B, B.clone(), AMAX))
    graph.eliminate_dead_code()
    assert text(graph) == text(trace(expected, A, B, B.clone(), AMAX))


def test_a_later_product_that_adds_something_already() -> None:
    """An earlier one would have to wait for it."""

    def source(a: Tensor, b: Tensor, amax: Tensor, x: Tensor) -> Tensor:
        first = product(a, b, amax)
        return aten.add(first, nvfp4.product(a, b, amax, amax, None, x, torch.float32))

    graph = trace(source, A, B, AMAX, X)
    before = text(graph)
    assert text(folded(graph)) == before


def test_products_of_packed_operands() -> None:
    def source(codes: Tensor, scales: Tensor, amax: Tensor, x: Tensor) -> Tensor:
        y = nvfp4.block_scaled_mm(codes, scales, amax, codes, scales, amax, None, None, torch.float32)
        return aten.add(x, aten.unsqueeze(y, 0))

    operand = nvfp4.quantize(torch.randn(16, 32), AMAX, [1, 16], "nearest", layout="native")
    given = *operand, AMAX, torch.randn(1, 16, 16)
    graph = trace(source, *given)
    assert (
        text(folded(graph, list(given)))
        == """\
%codes = placeholder
%scales = placeholder
%amax = placeholder
%x = placeholder
%reshape = aten.reshape(%x, [16, 16])
%block_scaled_mm = nvfp4.block_scaled_mm(%codes, %scales, %amax, %codes, %scales, %amax, None, %reshape, torch.float32)
%unsqueeze = aten.unsqueeze(%block_scaled_mm, 0)
return %unsqueeze"""
    )


def test_a_sum_is_rounded_once() -> None:
    """In BF16 it is what the dialect says: no rounding between the product and the sum, or between sums."""

    def source(a: Tensor, b: Tensor, amax: Tensor, x: Tensor) -> Tensor:
        return aten.add(x, product(a, b, amax, torch.bfloat16))

    given = [A, B, AMAX, X.bfloat16()]
    graph = trace(source, *given)
    twice = run_exactly(copied(graph), *given)[0]
    found = run_exactly(folded(graph, given), *given)[0]
    wide = dialect.scale_product(exact_product(A, B), AMAX, AMAX, None, None, torch.float32)
    assert same_bits(found, (wide + given[3].float()).bfloat16())
    assert not same_bits(found, twice)


def added(y: Tensor, x: Tensor) -> Tensor:
    return aten.add(y, x)


def changed(
    change: Callable[[Tensor, Tensor], Any] = added,
    residual: Callable[[Tensor], Tensor] = lambda x: x,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Any]:
    """A graph that does something with a product and what was made of an input of its shape before."""

    def source(a: Tensor, b: Tensor, amax: Tensor, x: Tensor) -> Any:
        before = residual(x)
        return change(product(a, b, amax, dtype), before)

    return source


STAYS: dict[str, Callable[..., Any]] = {
    "a product that is broadcast": changed(residual=lambda x: aten.unsqueeze(aten.cat([x, x]).view(2, 16, 32), 1)),
    "a residual that is broadcast": changed(residual=lambda x: aten.select(x, 0, 0)),
    "a residual that is one row": changed(residual=lambda x: aten.expand(aten.slice(x, 0, 0, 1), [16, 32])),
    "a residual that comes later": changed(lambda y, x: aten.add(y, aten.relu(x))),
    "a number": changed(lambda y, x: aten.add(y, 2.0)),
    "a product that others read": changed(lambda y, x: [aten.add(y, x), aten.relu(y)]),
    "a product that is given back": changed(lambda y, x: [aten.add(y, x), y]),
    "a view that others read": changed(lambda y, x: [aten.add(v := aten.view(y, [16, 32]), x), aten.relu(v)]),
    "a product and itself": changed(lambda y, x: aten.add(y, y)),
    "a factor": changed(lambda y, x: aten.add(y, x, alpha=2)),
    "another type": changed(dtype=torch.bfloat16),
    "another type of the residual": changed(residual=lambda x: aten._to_copy(x, dtype=torch.float16)),
    "another order in memory": changed(residual=lambda x: aten.t(aten.view(x, [32, 16]))),
    "a product that is rearranged": changed(
        lambda y, x: aten.add(aten.t(y), x), residual=lambda x: aten.view(x, [32, 16])
    ),
    "a difference": changed(lambda y, x: aten.sub(y, x)),
}


def test_the_same_without_a_change_is_folded() -> None:
    assert residuals(folded(trace(changed(), A, B, AMAX, X))) == 1


@pytest.mark.parametrize("source", STAYS.values(), ids=STAYS)
def test_what_stays_as_it_is(source: Callable[..., Any]) -> None:
    graph = trace(source, A, B, AMAX, X)
    before = text(graph)
    assert text(folded(graph)) == before


def test_a_product_adds_one_thing() -> None:
    """What is added to its sum stays an addition."""

    def source(a: Tensor, b: Tensor, amax: Tensor, x: Tensor) -> Tensor:
        return aten.add(x, aten.add(x, product(a, b, amax)))

    graph = folded(trace(source, A, B, AMAX, X))
    assert text(graph).endswith(
        "%product = nvfp4.product(%a, %b, %amax, %amax, None, %x, torch.float32)\n"
        "%add = aten.add.Tensor(%x, %product)\n"
        "return %add"
    )


class Block(nn.Module):
    """Three layers that share an input, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.side, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y) + torch.relu(self.side(y)))


@pytest.mark.parametrize("packed", [False, True], ids=["dequantised", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_training_step(dtype: torch.dtype, packed: bool) -> None:
    """Forward: the residual connection; backward: the gradient of what three layers share. Sites stay known."""
    x = torch.randn(2, 24, 32, dtype=dtype, requires_grad=True)
    graph = run_until(captured(Block().to(dtype), x), "place", ALL, packed=packed)
    inputs = example_inputs(graph)
    forward, backward = partitioned(graph)
    primals = inputs[: len(forward.find_nodes(op="placeholder"))]
    saved = run_exactly(copied(forward), *primals)[1:]
    for half, given, count in ((forward, primals, 1), (backward, [*saved, *inputs[len(primals) :]], 2)):
        run_step(half, FUSE, Stage.SCALED)
        sums, sites = targets(half)["aten.add.Tensor"], sites_of(half)
        expected = run_exactly(copied(half), *given)
        run_step(half, STEP, Stage.FUSED)
        assert residuals(half) == count
        assert targets(half)["aten.add.Tensor"] == sums - count
        assert sites_of(half) == sites
        if dtype is torch.float32:
            assert same_bits(run_exactly(half, *given), expected)


def sites_of(graph: fx.Graph) -> set[str]:
    return {f"{found.site} {found.role.value}" for node in graph.nodes if (found := matmul_of(node)) is not None}


@pytest.mark.parametrize("dynamic", [(1,), (0, 1)], ids=str)
def test_symbolic_sizes(dynamic: tuple[int, ...]) -> None:
    """One graph serves every number of tokens, and of samples."""
    x = torch.randn(3, 24, 32)
    for axis in dynamic:
        torch._dynamo.mark_dynamic(x, axis)
    graph = run_until(captured(Block(), x, train=False), "place", ALL)
    run_step(graph, FUSE, Stage.SCALED)
    before = copied(graph)
    run_step(graph, STEP, Stage.FUSED)
    assert residuals(graph) == 1
    for size in (17, 40):
        inputs = example_inputs(graph, symbol=size)
        assert same_bits(run_exactly(copied(graph), *inputs), run_exactly(copied(before), *inputs))


def test_a_length_is_no_residual() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.shape[0]

    x = torch.randn(24, 32)
    torch._dynamo.mark_dynamic(x, 0)
    graph = run_until(captured(Shifted(32, 48), x, train=False), "place", ALL)
    run_step(graph, FUSE, Stage.SCALED)
    assert targets(graph)["aten.add.Tensor"] == 1
    assert residuals(folded(graph)) == 0


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_size_that_depends_on_data() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x[x[:, 0] > 0])

    graph = run_until(captured(Chosen(), torch.randn(24, 32), train=False), "place", ALL)
    run_step(graph, FUSE, Stage.SCALED)
    assert residuals(folded(graph)) == 1
