"""Operands as a recipe quantises them, computed one by one outside of any graph, by the kernels of their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4c import numerics
from nvfp4c.codegen import cpu
from nvfp4c.dialect import Quantization
from nvfp4c.region import Form, Output, Region, reduction

STREAM_BITS = 24
"""Streams that a batch may use up: one for each operand that is quantised."""


@dataclass(frozen=True)
class Quantized:
    """source: the operand [.., M, K], rotated where it is quantised so. values: code * scale, exact, without the global
    factor. amax: float32 scalar, of `source`."""

    source: Tensor
    values: Tensor
    amax: Tensor

    @property
    def mT(self) -> Quantized:
        """The transpose; that it is quantised alike is for the caller to know."""
        return Quantized(self.source.mT, self.values.mT, self.amax)

    def narrow(self, axis: int, start: int, length: int) -> Quantized:
        """A part of the operand, quantised as part of the whole."""
        source, values = (each.narrow(axis, start, length) for each in (self.source, self.values))
        return Quantized(source, values, self.amax)


def quantized(x: Tensor, how: Quantization, seed: int, stream: int) -> Quantized:
    """x: [.., M, K], blocks along its last axis. seed, stream: of stochastic rounding, as in `philox`."""
    random = torch.tensor(seed, device=x.device) if how.rounding == "stochastic" else None
    if x.device.type == "cpu":
        source = x if how.signs is None else cpu.HADAMARD(x, how.signs)
        amax = numerics.tensor_amax(source)
        # Exact, and twice as fast: the kernel of stochastic rounding is not vectorised over BF16, nor over a transpose.
        rows = source.float().contiguous()
        return Quantized(source, cpu.OPERAND(rows, amax, how.block, how.rounding, random, stream), amax)
    return _on_gpu(x.contiguous(), how, random, stream if random is not None else 0)


def _on_gpu(x: Tensor, how: Quantization, seed: Tensor | None, stream: int) -> Quantized:
    from nvfp4c.codegen.operations import REGION  # imports triton, which a machine without a GPU need not have

    operand = Output(Form.OPERAND, block=how.block, rounding=how.rounding, signs=how.signs, stream=stream)
    rotated = () if how.signs is None else (Output(Form.ROTATED, signs=how.signs),)
    (amax,) = REGION([x], [], None, reduction(Region((operand,))).to_json())
    values, *sources = REGION([x], [amax], seed, Region((operand, *rotated)).to_json())
    return Quantized(sources[0] if sources else x, values, amax)


@dataclass
class Quantizer:
    """Quantises one operand after the other, each with random numbers of its own. seed: of stochastic rounding."""

    seed: int = 0
    _stream: int = 0

    def begin(self, batch: int) -> None:
        """Random numbers of a batch are its own, whatever was quantised before it."""
        self._stream = batch << STREAM_BITS

    def __call__(self, x: Tensor, how: Quantization) -> Quantized:
        """x: as in `quantized`."""
        self._stream += 1
        return quantized(x, how, self.seed, self._stream)


def product(left: Quantized | Tensor, right: Quantized | Tensor) -> Tensor:
    """left @ right^T in FP32 of operands [.., M, K] and [.., N, K]; a tensor is an operand that is not quantised."""
    a, b = (operand.values if isinstance(operand, Quantized) else operand for operand in (left, right))
    if a.device.type == "cpu" or a.dtype != b.dtype or a.dtype is torch.float32:
        found = torch.matmul(a.float(), b.float().mT)
    else:
        found = (torch.mm if a.dim() == 2 else torch.bmm)(a, b.mT, out_dtype=torch.float32)
    if isinstance(left, Quantized) and isinstance(right, Quantized):
        return found.mul_(numerics.global_factor(left.amax, right.amax))
    for operand in (left, right):
        if isinstance(operand, Quantized):
            found.mul_(operand.amax / numerics.GLOBAL_MAX)
    return found
