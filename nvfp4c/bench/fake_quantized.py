"""What one can do without a compiler of one's own: linear layers that quantise and dequantise in plain torch.

The arithmetic is the recipe `nvfp4-all`'s, in vectorised operations, and each product is one of dequantised operands:
fprop x and W nearest, dgrad dy stochastic and the same W, wgrad dy^T stochastic and x^T nearest, both rotated.
Compiled by Inductor it is what the nvfp4 backend has to beat; not compiled it is the reference arithmetic run eagerly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nvfp4c import numerics
from nvfp4c.formats import (
    BLOCK,
    DEFAULT_SIGNS,
    GLOBAL_MAX,
    HADAMARD_NORM,
    ROW_BLOCK,
    TILE_BLOCK,
    block_count,
    sylvester_hadamard,
)


def fake_quantize(
    x: Tensor, dtype: torch.dtype, block: tuple[int, int] = ROW_BLOCK, stochastic: bool = False
) -> Tensor:
    """x [M, K] as it is after quantising along its last axis and dequantising, rounded to `dtype`."""
    amax = numerics.tensor_amax(x)
    scales = numerics.block_scales(x, amax, block).float().unsqueeze(-1)
    blocks = numerics.pad_last(x).float().unflatten(-1, (block_count(x.shape[-1]), BLOCK))
    scaled = numerics.scaled(blocks, scales, torch.reciprocal(numerics.encode_scale(amax)))
    bits = torch.randint(256, scaled.shape, dtype=torch.uint8, device=x.device) if stochastic else None
    values = rounded(scaled, bits) * scales * (amax / GLOBAL_MAX)
    return values.flatten(-2).narrow(-1, 0, x.shape[1]).to(dtype)


def rounded(y: Tensor, random_bits: Tensor | None) -> Tensor:
    """`numerics.round_e2m1` of numbers in [-6, 6], but for numbers below 2^-23 and for NaN.

    Inductor computes y anew wherever it is read, and whatever y is made from likewise. Were it read as often as there,
    compiling would take minutes a layer.
    """
    binade = (y.abs().clamp(min=1).view(torch.int32) & 0x7F800000).view(torch.float32)
    steps = y.abs() * 2 / binade
    steps = steps.round() if random_bits is None else torch.ceil(steps - (random_bits.float() + 0.5) / 256)
    return torch.copysign(steps * binade / 2, y)


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """The random Hadamard transform of x [M, K] along its last axis, as a product: bfloat16 [M, ceil16(K)]."""
    blocks = numerics.pad_last(x).unflatten(-1, (block_count(x.shape[-1]), BLOCK))
    return (blocks @ matrix.to(x.dtype)).flatten(-2).to(torch.bfloat16)


def hadamard_matrix() -> Tensor:
    """diag(signs) H16 / 4, float32 [16, 16]: exact in BF16."""
    return torch.tensor(DEFAULT_SIGNS, dtype=torch.float32).unsqueeze(1) * sylvester_hadamard() * HADAMARD_NORM


class FakeQuantizedProduct(torch.autograd.Function):
    """x [M, K] times the transpose of w [N, K], forward and backward in fake NVFP4; results in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, matrix: Tensor) -> Tensor:
        weight = fake_quantize(w, x.dtype, TILE_BLOCK)
        ctx.save_for_backward(x, weight, matrix)
        return fake_quantize(x, x.dtype) @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, matrix = ctx.saved_tensors
        dy = gradients[0]
        dx = fake_quantize(dy, dy.dtype, stochastic=True) @ weight
        left = fake_quantize(rotated(dy.t(), matrix), dy.dtype, stochastic=True)
        right = fake_quantize(rotated(x.t(), matrix), dy.dtype)
        return dx, left @ right.t(), None


class FakeQuantizedLinear(nn.Module):
    """Stands for an nn.Linear without bias, and shares its weight."""

    weight: Tensor
    matrix: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None, "the bench's models have no biases"
        self.weight = linear.weight
        self.register_buffer("matrix", hadamard_matrix().to(linear.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = FakeQuantizedProduct.apply(x.flatten(0, -2), self.weight, self.matrix)
        return y.unflatten(0, x.shape[:-1])


def fake_quantized(model: nn.Module) -> nn.Module:
    """`model` with each linear layer replaced; changes it in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, FakeQuantizedLinear(child))
    return model
