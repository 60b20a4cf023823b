"""Llama blocks in plain PyTorch: RMSNorm, rotary positions, grouped-query attention, SwiGLU; no embedding, no head."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4c.errors import OptionError, nearest
from nvfp4c.quickstart.model import Mlp, rotary_table, rotate

EPSILON = 1e-5


@dataclass(frozen=True)
class Size:
    """width: of the residual stream. hidden: of the MLP. batch, sequence: samples a step, and tokens in each."""

    name: str
    blocks: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 1, 32, 64, heads=2, kv_heads=1, batch=1, sequence=32),
        Size("small", 2, 512, 1536, heads=8, kv_heads=2, batch=2, sequence=256),
        Size("medium", 4, 2048, 8192, heads=16, kv_heads=4, batch=8, sequence=2048),
        Size("large", 4, 4096, 14336, heads=32, kv_heads=8, batch=4, sequence=2048),
    )
}
"""tiny is for tests, small for a CPU; medium and large are layers of real models, large those of Llama 3 8B."""


def size_named(name: str) -> Size:
    """The size called `name`; OptionError when there is none."""
    if name not in SIZES:
        raise OptionError(f"There is no size {name!r}: {nearest(name, SIZES)} All sizes: {', '.join(SIZES)}.")
    return SIZES[name]


class Attention(nn.Module):
    """Causal self-attention whose keys and values are shared by groups of heads, [B, T, width] to [B, T, width]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_width = size.width // size.heads
        self.q_proj = nn.Linear(size.width, size.width, bias=False)
        self.k_proj = nn.Linear(size.width, size.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(size.width, size.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(size.width, eps=EPSILON)
        self.attn = Attention(size)
        self.mlp_norm = nn.RMSNorm(size.width, eps=EPSILON)
        self.mlp = Mlp(size.width, size.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Llama(nn.Module):
    """Hidden states [B, T, width] to the same shape, T up to `size.sequence`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(size) for _ in range(size.blocks))
        cos, sin = rotary_table(size.sequence, size.width // size.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x
