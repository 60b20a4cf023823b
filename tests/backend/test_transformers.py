"""Llama and GPT-2 of `transformers`, small and with random weights, train in NVFP4 as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from inside import KernelCall
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nvfp4c
from nvfp4c.backend import nvfp4
from nvfp4c.explanation import Row

pytestmark = pytest.mark.usefixtures("eager_kernels")

STEPS = 20


def llama(tied: bool) -> nn.Module:
    """SwiGLU, and two query heads for each key and value head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> nn.Module:
    """Conv1D layers, whose weights lie the other way round, and a tied head."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama-tied": lambda: llama(True),
    "llama-untied": lambda: llama(False),
    "gpt2": gpt2,
}
LINEAR_LAYERS = {"llama-tied": 7, "llama-untied": 7, "gpt2": 4}


def loss_of(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def train(model: nn.Module, tokens: Tensor, backend: Any, steps: int) -> tuple[list[float], int, dict[str, int]]:
    """Losses of steps on one batch; how many graphs Dynamo made, and its graph breaks by reason."""
    torch._dynamo.reset()
    counters.clear()
    graphs = 0

    def counted(gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return backend(gm, inputs)

    compiled = torch.compile(model, backend=counted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(compiled, tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, graphs, dict(counters["graph_break"])


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps(name: str, kernel_calls: list[KernelCall]) -> None:
    """The loss on one batch falls, and nothing is compiled apart or anew that PyTorch alone does not."""
    torch.manual_seed(0)
    model = MODELS[name]()
    tokens = torch.randint(64, (2, 24))
    losses, graphs, breaks = train(model, tokens, nvfp4, STEPS)
    assert kernel_calls, "NVFP4 was at work"
    # Random weights predict nothing, so the loss starts near log(64) = 4.2; 48 tokens are learnt by heart in no time.
    assert losses[0] == pytest.approx(4.2, abs=0.5)
    assert losses[-1] < 0.7 * losses[0]
    assert sum(later < earlier for earlier, later in pairwise(losses)) >= 0.8 * (STEPS - 1)
    assert train(model, tokens, lambda gm, inputs: gm.forward, 2)[1:] == (graphs, breaks)


def linear_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of linear layers that no rule of the recipe keeps in high precision."""
    rules = ("output head", "no weight", "one of the")
    return [row for row in rows if not row.reason.startswith(rules)]


@pytest.mark.parametrize("name", MODELS)
def test_nearly_all_linear_operations_are_nvfp4(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    explained = nvfp4c.explain(model, torch.randint(64, (2, 24)), loss=loss_of)
    linear = linear_rows(explained.rows)
    for role in ("fprop", "dgrad", "wgrad"):
        rows = [row for row in linear if row.role == role]
        assert len(rows) == LINEAR_LAYERS[name]
        quantised = sum(row.operations for row in rows if row.precision == "nvfp4")
        assert quantised > 0.99 * sum(row.operations for row in rows)
    kept = {row.site: row.reason for row in explained.rows if row.reason.startswith("output head")}
    assert list(kept) == ["lm_head"]
    assert all(row.site.split(".")[0] in ("model", "transformer", "lm_head") for row in explained.rows), "all are named"
