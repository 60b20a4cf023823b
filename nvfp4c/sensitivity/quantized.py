"""Operands as a recipe quantises them, computed one by one outside of any graph, by the kernels of their device."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from nvfp4c import numerics
from nvfp4c.codegen import cpu
from nvfp4c.dialect import Quantization
from nvfp4c.region import Axis, Form, Output, Region, reduction

OPERAND_BITS, BATCH_BITS, SEED_BITS = 20, 20, 23
"""Of a seed of stochastic rounding, from the lowest on: which such operand of a batch, which batch, and the user's
seed. A stream for each operand would do too, but a GPU's launches are prepared for every stream anew."""


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


def quantized(x: Tensor, how: Quantization, seed: Tensor | None) -> Quantized:
    """x: [.., M, K], blocks along its last axis. seed: of stochastic rounding, as in `philox`."""
    if x.device.type == "cpu":
        source = x if how.signs is None else cpu.HADAMARD(x, how.signs)
        amax = _amax(source)
        return Quantized(source, cpu.OPERAND(source, amax, how.block, how.rounding, seed, 0), amax)
    return on_gpu(x, how, seed)


def _amax(x: Tensor) -> Tensor:
    """numerics.tensor_amax, in one pass that writes nothing."""
    if not x.numel():
        return numerics.tensor_amax(x)
    low, high = torch.aminmax(x if x.stride(-1) == 1 else x.mT)  # as it lies in memory, or it would be copied
    return torch.maximum(low.abs(), high.abs()).float()


def on_gpu(x: Tensor, how: Quantization, seed: Tensor | None) -> Quantized:
    """`quantized` by a GPU's kernels. A transposed matrix is read as it lies: copying it would take as long as that."""
    if x.dim() == 2 and x.mT.is_contiguous() and not x.is_contiguous():
        return _along(x.mT, Axis.COLUMNS, how, seed).mT
    return _along(x.contiguous(), Axis.ROWS, how, seed)


def _along(x: Tensor, axis: Axis, how: Quantization, seed: Tensor | None) -> Quantized:
    """`quantized` with blocks along the rows or down the columns of a contiguous x."""
    from nvfp4c.codegen.operations import region  # imports triton, which a machine without a GPU need not have

    reduce, quantise = _regions(how, axis)
    (amax,) = region([x], [], None, reduce)
    values, *sources = region([x], [amax], seed, quantise)
    return Quantized(sources[0] if sources else x, values, amax)


@cache
def _regions(how: Quantization, axis: Axis) -> tuple[str, str]:
    """What gives the amax, and what gives the operand, after that rotated where it is; as JSON."""
    operand = Output(Form.OPERAND, axis, block=how.block, rounding=how.rounding, signs=how.signs)
    rotated = () if how.signs is None else (Output(Form.ROTATED, axis, signs=how.signs),)
    return reduction(Region((operand,))).to_json(), Region((operand, *rotated)).to_json()


@dataclass
class Quantizer:
    """Quantises one operand after the other, each with random numbers of its own. seed: of stochastic rounding. drawn:
    how many operands of this batch were rounded so."""

    seed: int = 0
    drawn: int = 0
    _batch: int = 0
    _seeds: dict[torch.device, Tensor] = field(default_factory=dict)

    @staticmethod
    def after(seed: Tensor) -> Quantizer:
        """As one that begins after the last seed that another used, read where it lies."""
        return Quantizer(_seeds={seed.device: seed})

    def begin(self, batch: int) -> None:
        """Random numbers of a batch are its own, whatever was quantised before it."""
        self._batch, self.drawn, self._seeds = batch, 0, {}

    def __call__(self, x: Tensor, how: Quantization) -> Quantized:
        """x: as in `quantized`."""
        return quantized(x, how, self._seed(x.device) if how.rounding == "stochastic" else None)

    @property
    def last(self) -> int:
        """The last seed that was used, or the one before a batch's first."""
        return self._of_batch + self.drawn

    @property
    def _of_batch(self) -> int:
        return (self.seed % (1 << SEED_BITS) << BATCH_BITS | self._batch) << OPERAND_BITS

    def _seed(self, device: torch.device) -> Tensor:
        """Computed where it is needed: a number sent there would be waited for."""
        if device not in self._seeds:
            self._seeds[device] = torch.full((), self._of_batch, dtype=torch.int64, device=device)
        self.drawn += 1
        return self._seeds[device] + self.drawn


def product(left: Quantized | Tensor, right: Quantized | Tensor) -> Tensor:
    """left @ right^T in FP32 of operands [.., M, K] and [.., N, K]; a tensor is an operand that is not quantised."""
    return unscaled(left, right).mul_(factor(left, right))


def unscaled(left: Quantized | Tensor, right: Quantized | Tensor) -> Tensor:
    """`product` without its factor."""
    a, b = (operand.values if isinstance(operand, Quantized) else operand for operand in (left, right))
    if a.device.type == "cpu" or a.dtype != b.dtype or a.dtype is torch.float32:
        return torch.matmul(a.float(), b.float().mT)
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b.mT, out_dtype=torch.float32)


def factor(left: Quantized | Tensor, right: Quantized | Tensor) -> Tensor | float:
    """What `unscaled` lacks: of two quantised operands their global factor, of one its own."""
    amaxes = [operand.amax for operand in (left, right) if isinstance(operand, Quantized)]
    if len(amaxes) == 2:
        return numerics.global_factor(*amaxes)
    return amaxes[0] / numerics.GLOBAL_MAX if amaxes else 1.0
