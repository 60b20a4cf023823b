"""A task made of a Llama from `transformers`, with random weights: grouped-query attention and an untied head.

nvfp4c explain examples/llama.py:training
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nvfp4c.tasks import Loss


def training() -> tuple[nn.Module, list[Tensor], Loss]:
    """Batches of random tokens: enough to see what the compiler does, nothing to learn from."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )
    return model, [torch.randint(512, (4, 128)) for _ in range(4)], next_token_loss


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss
