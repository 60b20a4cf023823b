"""The whole backend on a GPU: a compiled step equals the interpreted graph, and models learn.

That emitted kernels equal the reference on the data of a step is tested in `kernels/test_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import nvfp4c
from nvfp4c import pipeline
from nvfp4c.capture import CapturedGraph, capture
from nvfp4c.plan import EMPTY_PLAN
from nvfp4c.recipe import RECIPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

transformers = pytest.importorskip("transformers")


class Block(nn.Module):
    """A residual MLP with a bias, a norm, and widths that are no whole number of blocks."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 200, hidden: int = 500) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def inputs_of(found: CapturedGraph, model: nn.Module, x: Tensor, tangent: Tensor) -> list[Tensor]:
    """What the joint graph's placeholders stand for, in their order."""
    parameters = dict(model.named_parameters())
    values = []
    for position, node in enumerate(node for node in found.graph.nodes if node.op == "placeholder"):
        known = found.names.input_of(node, position)
        if node.meta.get("partitioner_tag") == "is_backward":
            values.append(tangent)
        else:
            values.append(parameters[known.names[0]] if known.is_weight else x)
    return [value.detach() for value in values]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def test_a_compiled_step_equals_the_interpreted_graph() -> None:
    """With nearest rounding everywhere nothing is random, so the two differ by roundings outside the products alone.

    In FP32 those are about 1e-7, which moves one code in a million across a tie: 1e-3 of the norm after a few products.
    In BF16 Inductor keeps FP32 between fused operations where the interpreter rounds, a difference of 2^-8; each
    quantiser makes noise of its own size from that, so whole steps cannot be compared, and kernels/test_step.py
    compares every kernel on equal arguments instead.
    """
    torch.manual_seed(0)
    model = Model().cuda()
    x = torch.randn(3, 37, 200, device="cuda")
    recipe = replace(RECIPES["nvfp4-all"], gradient_rounding="nearest")
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": recipe})
    output = compiled(x)
    tangent = torch.randn_like(output)
    output.backward(tangent)

    (found,) = capture(model, x)
    pipeline.run(found.graph, (*pipeline.decide(recipe, EMPTY_PLAN, found.names), *pipeline.rewrite()), "test")
    found.module.recompile()
    expected = fx.Interpreter(found.module).run(*inputs_of(found, model, x, tangent))
    result, *gradients = tree_leaves(expected)
    assert relative_error(output, result) < 1e-3
    parameters = dict(model.named_parameters())
    compared = 0
    for known, gradient in zip(found.names.inputs, gradients, strict=False):
        if known.is_weight:
            assert relative_error(parameters[known.names[0]].grad, gradient) < 1e-3, known.names
            compared += 1
    assert compared == len(parameters)


def relative_error(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm() / other.norm())


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=256, n_layer=3, n_head=8, vocab_size=512, n_positions=128)
    return transformers.GPT2LMHeadModel(config)


def graph_breaks(model: nn.Module, backend: str, tokens: Tensor) -> dict[str, int]:
    """Why, and how often, Dynamo broke the graph of one training step."""
    torch._dynamo.reset()
    counters.clear()
    loss_under_autocast(torch.compile(model, backend=backend), tokens).backward()
    model.zero_grad()
    return dict(counters["graph_break"])


def loss_under_autocast(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


MODELS = {"llama": lambda: llama(tied=False), "tied llama": lambda: llama(tied=True), "gpt2": gpt2}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_transformers_train(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().cuda()
    tokens = torch.randint(0, 512, (4, 100), device="cuda")
    breaks_without = graph_breaks(model, "eager", tokens)
    assert graph_breaks(model, "nvfp4", tokens) == breaks_without
    compiled = torch.compile(model, backend="nvfp4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = loss_under_autocast(compiled, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    explained = nvfp4c.explain(model, tokens, loss=loss_under_autocast)
    linear = [row for row in explained.rows if not row.reason.startswith(("output head", "one of the", "no weight"))]
    for role in ("fprop", "dgrad", "wgrad"):
        rows = [row for row in linear if row.role == role]
        converted = sum(row.operations for row in rows if row.precision == "nvfp4")
        assert converted > 0.99 * sum(row.operations for row in rows)


def test_a_vision_transformer_trains() -> None:
    """Of 17 patches: what attention saves lies in memory with gaps, see `backend.trace_as_given`."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).cuda().bfloat16()
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": "nvfp4-all"})
    images, labels = torch.randn(2, 3, 32, 32, device="cuda", dtype=torch.bfloat16), torch.tensor([0, 1], device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = compiled(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_stochastic_rounding_follows_the_seed() -> None:
    torch.manual_seed(0)
    model = Model().cuda()
    x = torch.randn(3, 37, 200, device="cuda")
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": "nvfp4-all"})

    def gradient(seed: int | None) -> Tensor:
        model.zero_grad()
        if seed is not None:
            torch.manual_seed(seed)
        loss_of(compiled, x).backward()
        return model.layers[0].up.weight.grad.clone()

    first, second, again = gradient(1), gradient(None), gradient(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
