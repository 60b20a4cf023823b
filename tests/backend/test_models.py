"""What models are made of: types of parameters, autocast, ties, biases, frozen layers, checkpoints, breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from inside import KernelCall, Mlp, Reference, Watched, check_kernels
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import nvfp4c
from nvfp4c import backend
from nvfp4c.recipe import RECIPES

pytestmark = pytest.mark.usefixtures("eager_kernels")

ALL = {"recipe": "nvfp4-all"}
NEAREST = {"recipe": replace(RECIPES["nvfp4-all"], gradient_rounding="nearest")}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_of_parameters(dtype: torch.dtype, kernel_calls: list[KernelCall]) -> None:
    """Outputs and gradients have the type of the model, and are near to what PyTorch gives in FP32.

    NVFP4 is about 0.1 off in each operand, so three products of two operands each in a row are sqrt(6) * 0.1 off; 0.5
    leaves twice that.
    """
    torch.manual_seed(0)
    model, exact = Mlp().to(dtype), Mlp()
    exact.load_state_dict(model.state_dict())
    x = torch.randn(4, 12, 32).to(dtype)
    tangent = torch.randn(4, 12, 32).to(dtype)
    output = torch.compile(model, backend="nvfp4", options=ALL)(x)
    output.backward(tangent)
    check_kernels(kernel_calls)
    expected = exact(x.float())
    expected.backward(tangent.float())
    assert output.dtype is dtype
    assert 0.02 < relative_error(output, expected) < 0.5
    for parameter, judge in zip(model.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype is dtype
        assert relative_error(parameter.grad, judge.grad) < 0.5


def test_autocast(kernel_calls: list[KernelCall]) -> None:
    """Under autocast products are BF16 and parameters stay FP32, also where autocast is entered inside the model."""

    class Inside(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    torch.manual_seed(0)
    outside, inside = Mlp(), Inside()
    inside.load_state_dict(outside.state_dict())
    x = torch.randn(48, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = torch.compile(outside, backend="nvfp4", options=NEAREST)(x)
    output.float().square().mean().backward()
    check_kernels(kernel_calls)
    assert {call.x.dtype for call in kernel_calls if call.kernel == "operand"} == {torch.bfloat16}
    again = torch.compile(inside, backend="nvfp4", options=NEAREST)(x)
    again.float().square().mean().backward()
    assert output.dtype is again.dtype is torch.bfloat16
    assert torch.equal(output, again)
    for one, other in zip(outside.parameters(), inside.parameters(), strict=True):
        assert one.grad.dtype is torch.float32
        assert torch.equal(one.grad, other.grad)


class Mixed(nn.Module):
    """A tied embedding and head, a layer used twice, one that is frozen, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.twice = nn.Linear(32, 32, bias=False)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.middle = nn.Linear(32, 32)
        self.middle.bias.requires_grad_(False)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(self.embedding(tokens))
        x = self.frozen(self.twice(torch.relu(x)))
        return self.head(self.middle(torch.relu(x)))


def test_tied_frozen_and_repeated_layers(kernel_calls: list[KernelCall]) -> None:
    """A step equals the interpreted graph; a frozen weight has no gradient, and a tied one the sum of both."""
    torch.manual_seed(0)
    model = Mixed()
    tokens = torch.randperm(48).view(4, 12)
    watched = Watched(ALL)
    output = torch.compile(model, backend=watched)(tokens)
    tangent = torch.randn_like(output)
    output.backward(tangent)
    check_kernels(kernel_calls)
    seed = next(call.seed for call in kernel_calls if call.seed is not None)
    with torch.no_grad():
        expected, *gradients = Reference(watched.graphs[0], seed).run(*watched.arguments[0], tangent)
    assert torch.equal(output, expected)
    for argument, gradient in zip(watched.arguments[0], gradients, strict=True):
        if isinstance(argument, nn.Parameter):
            assert (argument.grad is None) == (gradient is None) == (not argument.requires_grad)
        if gradient is not None:
            # Sums over 48 tokens (a bias) and of two uses of one weight may be taken in any order.
            torch.testing.assert_close(argument.grad, gradient, rtol=0, atol=48 * 2**-23 * float(gradient.abs().max()))


class Frozen(nn.Module):
    """Adapters on a frozen layer: its weight needs no gradient, its input does."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32).requires_grad_(False)
        self.down = nn.Linear(32, 16, bias=False)
        self.up = nn.Linear(16, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.up(self.down(x))
        return torch.relu(self.base(x))


def test_a_frozen_layer_passes_gradients_on() -> None:
    """dgrad of a frozen layer is there, wgrad is not."""
    model = Frozen()
    roles = {(row.site, row.role) for row in nvfp4c.explain(model, torch.randn(16, 32), recipe="nvfp4-all").rows}
    assert ("base", "dgrad") in roles
    assert ("base", "wgrad") not in roles
    assert {("up", "wgrad"), ("down", "wgrad")} <= roles


def save_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The usual selective checkpoint: matmuls are too dear to be computed twice."""
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE


KINDS: dict[str, Callable[..., Any]] = {
    "plain": lambda block, x: block(x),
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_products)
    ),
}


class Blocks(nn.Module):
    """Two blocks, recomputed in backward or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(2))
        self.call = KINDS[kind]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


def saved_by(model: nn.Module, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Output of one step with its backward, and all that is kept from forward for backward but parameters."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = torch.compile(model, backend="nvfp4", options=options)(x)
    output.square().mean().backward()
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    return output.detach(), [tensor for tensor in saved if tensor.data_ptr() not in addresses]


@pytest.mark.parametrize(
    ("kind", "rounding"), [("checkpoint", "nearest"), ("checkpoint", "stochastic"), ("selective", "nearest")]
)
def test_a_checkpointed_region_saves_nothing_of_ours(kind: str, rounding: str) -> None:
    """Only what the user asked for is saved: inputs of regions, and products where a policy says so. Gradients are
    those of the model without checkpoints."""
    options = {"recipe": replace(RECIPES["nvfp4-all"], gradient_rounding=rounding)}
    torch.manual_seed(0)
    plain, recomputed = Blocks("plain"), Blocks(kind)
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(48, 32)
    torch.manual_seed(1)
    expected, saved = saved_by(plain, x, options)
    torch.manual_seed(1)
    output, kept = saved_by(recomputed, x, options)
    assert {tensor.dtype for tensor in saved} > {torch.uint8, torch.float8_e4m3fn}, "packed operands are saved"
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    shapes = [tuple(tensor.shape) for tensor in kept]
    assert sorted(shapes) == [(48, 32)] * 2 if kind == "checkpoint" else {(48, 32), (48, 64)} == set(shapes)
    assert torch.equal(output, expected)
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad) or one.dim() == 1
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_accumulate() -> None:
    """Two backward passes add up what each of them gives."""
    torch.manual_seed(0)
    model = Mlp()
    compiled = torch.compile(model, backend="nvfp4", options=NEAREST)
    batches = torch.randn(2, 48, 32)

    def gradients(*inputs: Tensor) -> list[Tensor]:
        model.zero_grad()
        for x in inputs:
            compiled(x).square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    first, second, both = gradients(batches[0]), gradients(batches[1]), gradients(*batches)
    for one, other, total in zip(first, second, both, strict=True):
        assert torch.equal(one + other, total)


class Broken(nn.Module):
    """Two graphs with plain Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Mlp()
        self.second = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_graph_breaks(kernel_calls: list[KernelCall]) -> None:
    """Each part of a broken model is compiled; its sites keep their names, so that a plan finds them."""
    torch.manual_seed(0)
    model = Broken()
    x = torch.randn(48, 32)
    plan = {"second.up": "bf16", "first.down": {"wgrad": "bf16"}}
    watched = Watched({**NEAREST, "plan": plan})
    output = torch.compile(model, backend=watched)(x)
    output.square().mean().backward()
    assert len(watched.graphs) == 2
    check_kernels(kernel_calls)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    rows = nvfp4c.explain(model, x, recipe="nvfp4-all", plan=plan).rows
    kept = {(row.site, row.role): row.reason for row in rows if row.precision == "bf16"}
    assert kept == {
        ("second.up", "fprop"): "plan: second.up",
        ("second.up", "dgrad"): "plan: second.up",
        ("second.up", "wgrad"): "plan: second.up",
        ("first.down", "wgrad"): "plan: first.down",
    }


def test_what_a_forward_saves_may_lie_with_gaps() -> None:
    """On a GPU Inductor saves attention's 2 x 4 matrices of 17 x 17 so that each batch begins at an aligned address."""
    gm = make_fx(lambda x: x.view(8, 17, 17).sum(-1), tracing_mode="fake")(torch.randn(2, 4, 17, 17))
    (node,) = gm.graph.find_nodes(op="placeholder")
    with node.meta["val"].fake_mode:
        given = torch.empty_strided((2, 4, 17, 17), (1184, 289, 17, 1))
    backend.trace_as_given(gm, [given])
    assert node.meta["val"].stride() == given.stride()
    x = torch.randn(2, 1184)[:, :1156].unflatten(1, (4, 17, 17))
    assert torch.equal(gm(x), x.reshape(8, 17, 17).sum(-1))


def test_passes_see_tensors_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor gives the result of a convolution other strides than it had when the backward was traced."""
    changed: list[bool] = []

    def recorded(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        before = [value.stride() for value in values(gm)]
        trace_as_given(gm, inputs)
        changed.append([value.stride() for value in values(gm)] != before)
        given = [x for x in inputs if isinstance(x, Tensor)]
        assert [value.stride() for value in values(gm)] == [x.stride() for x in given]

    def values(gm: fx.GraphModule) -> list[Tensor]:
        found = (node.meta["val"] for node in gm.graph.find_nodes(op="placeholder"))
        return [value for value in found if isinstance(value, Tensor)]

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.convolution(x).relu().permute(0, 2, 3, 1).reshape(-1, 16)).square().mean()

    trace_as_given = backend.trace_as_given
    monkeypatch.setattr(backend, "trace_as_given", recorded)
    torch.manual_seed(0)
    model = Pixels()
    torch.compile(model, backend="nvfp4", options=ALL)(torch.randn(2, 3, 8, 8)).backward()
    assert changed == [False, True]
    assert model.linear.weight.grad is not None and model.linear.weight.grad.isfinite().all()
