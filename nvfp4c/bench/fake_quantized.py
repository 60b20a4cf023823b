"""What one can do without a compiler of one's own: linear layers that quantise and dequantise in plain torch.

The arithmetic is the recipe `nvfp4-all`'s, in vectorised operations, and each product is one of dequantised operands:
fprop x and W nearest, dgrad dy stochastic and the same W, wgrad dy^T stochastic and x^T nearest, both rotated.
There are two ways to quantise, with one result. `fake_quantize`, compiled by Inductor, is what the nvfp4 backend has to
beat. `reference_quantize` calls `numerics`, as it stands: the reference run eagerly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

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
    padded,
    sylvester_hadamard,
)

Model = TypeVar("Model", bound=nn.Module)


class Quantize(Protocol):
    def __call__(
        self, x: Tensor, dtype: torch.dtype, block: tuple[int, int] = ROW_BLOCK, stochastic: bool = False
    ) -> Tensor:
        """x [M, K] as it is after quantising along its last axis and dequantising, rounded to `dtype`."""


def reference_quantize(
    x: Tensor, dtype: torch.dtype, block: tuple[int, int] = ROW_BLOCK, stochastic: bool = False
) -> Tensor:
    """See `Quantize`."""
    amax = numerics.tensor_amax(x)
    bits = _random_bits((x.shape[0], padded(x.shape[1])), x) if stochastic else None
    codes, scales = numerics.block_codes(x, amax, block, bits)
    values = numerics.block_values(codes, scales) * (amax / GLOBAL_MAX)
    return values.narrow(-1, 0, x.shape[1]).to(dtype)


def fake_quantize(
    x: Tensor, dtype: torch.dtype, block: tuple[int, int] = ROW_BLOCK, stochastic: bool = False
) -> Tensor:
    """See `Quantize`. In fewer operations than the reference, made for a compiler."""
    amax = numerics.tensor_amax(x)
    scales = numerics.block_scales(x, amax, block).float().unsqueeze(-1)
    blocks = numerics.pad_last(x).float().unflatten(-1, (block_count(x.shape[-1]), BLOCK))
    scaled = numerics.scaled(blocks, scales, torch.reciprocal(numerics.encode_scale(amax)))
    bits = _random_bits(scaled.shape, x) if stochastic else None
    values = rounded(scaled, bits) * scales * (amax / GLOBAL_MAX)
    return values.flatten(-2).narrow(-1, 0, x.shape[1]).to(dtype)


def _random_bits(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, device=like.device)


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
    def forward(ctx: Any, x: Tensor, w: Tensor, matrix: Tensor, quantize: Quantize) -> Tensor:
        weight = quantize(w, x.dtype, TILE_BLOCK)
        ctx.save_for_backward(x, weight, matrix)
        ctx.quantize = quantize
        return quantize(x, x.dtype) @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, matrix = ctx.saved_tensors
        dy, quantize = gradients[0], ctx.quantize
        dx = quantize(dy, dy.dtype, stochastic=True) @ weight
        left = quantize(rotated(dy.t(), matrix), dy.dtype, stochastic=True)
        right = quantize(rotated(x.t(), matrix), dy.dtype)
        return dx, left @ right.t(), None, None


class FakeQuantizedLinear(nn.Module):
    """Stands for an nn.Linear without bias, and shares its weight."""

    weight: Tensor
    matrix: Tensor
    quantize: Quantize

    def __init__(self, linear: nn.Linear, quantize: Quantize = fake_quantize) -> None:
        super().__init__()
        assert linear.bias is None, "the bench's models have no biases"
        self.weight = linear.weight
        self.quantize = quantize
        self.register_buffer("matrix", hadamard_matrix().to(linear.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = FakeQuantizedProduct.apply(x.flatten(0, -2), self.weight, self.matrix, self.quantize)
        return y.unflatten(0, x.shape[:-1])


def fake_quantized(model: Model, quantize: Quantize = fake_quantize) -> Model:
    """`model` with each linear layer replaced; changes it in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, FakeQuantizedLinear(child, quantize))
    return model
