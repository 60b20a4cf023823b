"""A small modern GPT in plain PyTorch: RMSNorm, rotary positions, SwiGLU, untied head; nothing NVFP4 about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4c.errors import OptionError, nearest
from nvfp4c.quickstart.data import VOCABULARY

ROTARY_BASE = 10000.0
INIT_STD = 0.02


@dataclass(frozen=True)
class Size:
    """One size of the GPT, and how long it trains by default.

    width: of the residual stream. hidden: of the MLP. sequence: tokens a sample. batch: samples a step.
    learning_rate: the highest, reached after the warmup.
    """

    name: str
    layers: int
    width: int
    heads: int
    hidden: int
    sequence: int
    batch: int
    steps: int
    learning_rate: float


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 2, 64, 2, 192, sequence=64, batch=8, steps=100, learning_rate=4e-3),
        Size("small", 4, 128, 4, 384, sequence=128, batch=8, steps=200, learning_rate=2e-3),
        Size("medium", 8, 512, 8, 1408, sequence=512, batch=32, steps=500, learning_rate=1e-3),
        Size("large", 12, 768, 12, 2048, sequence=1024, batch=32, steps=300, learning_rate=6e-4),
    )
}


def size_named(name: str) -> Size:
    """The size called `name`; OptionError when there is none."""
    if name not in SIZES:
        raise OptionError(f"There is no model size {name!r}: {nearest(name, SIZES)} All sizes: {', '.join(SIZES)}.")
    return SIZES[name]


class Attention(nn.Module):
    """Causal self-attention with rotary positions, [B, T, width] to [B, T, width]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.q_proj = nn.Linear(size.width, size.width, bias=False)
        self.k_proj = nn.Linear(size.width, size.width, bias=False)
        self.v_proj = nn.Linear(size.width, size.width, bias=False)
        self.o_proj = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return out


class Mlp(nn.Module):
    """SwiGLU, [B, T, width] to [B, T, width]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(size.width)
        self.attn = Attention(size)
        self.mlp_norm = nn.RMSNorm(size.width)
        self.mlp = Mlp(size.width, size.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Gpt(nn.Module):
    """Byte tokens [B, T] (int64, T up to `size.sequence`) to logits [B, T, 256]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.lm_head = nn.Linear(size.width, VOCABULARY, bias=False)
        cos, sin = rotary_table(size.sequence, size.width // size.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._init_weights(size)

    def _init_weights(self, size: Size) -> None:
        """GPT-2's: normal weights, those that write to the residual stream scaled down with the depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * size.layers) if writes_residual else INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def rotary_table(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [length, width / 2] (arXiv 2104.09864)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + width/2]) of [B, H, T, width] by its position's angle; keeps x's dtype."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).to(x.dtype)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
