"""A matmul in FP4 beside the same in high precision: sums of its error, and of what that does to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from nvfp4c.sensitivity.quantized import Quantized, product, unscaled

PART = {"cpu": 1 << 22, "cuda": 1 << 25}
"""Elements of a result that are compared at a time: what a comparison needs beside the operands stays small. A GPU has
the more memory, and takes as long to be told of a small part as of a large one."""


@dataclass(frozen=True)
class Compared:
    """A matmul in high precision and in FP4, as rows @ columns^T. rows: [.., M, K] and [.., N, K]; quantities: the same
    as FP4 has them. exact: [.., M, N], where it is known. gradient: [M, N] where a result has a gradient, with any
    number of axes. samples: that the M rows belong to, 0 if unknown. parts: leading axes are parts of a weight, all of
    which read rows of the same samples; else they are rows too."""

    rows: Sequence[Tensor]
    quantities: Sequence[Quantized | Tensor]
    exact: Tensor | None
    gradient: Tensor | None
    samples: int
    parts: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and the length of the contraction of all the products together."""
        left, right = self.rows
        return left.shape[:-1].numel(), right.shape[-2], left.shape[-1]

    def sums(self) -> Tensor:
        """signal, noise, aligned, and with a gradient the terms of the loss: see `RoleMeasure`."""
        left, right = self.rows
        *batch, m, n = (*left.shape[:-1], right.shape[-2])
        gradient = None if self.gradient is None else self.gradient.reshape(*batch, m, n)
        step = max(1, PART[left.device.type] // max(1, n * math.prod(batch)))
        totals, by_row = [], []
        for start in range(0, m, step) or [0]:  # also of no rows, as those of an expert without tokens
            size = min(step, m - start)
            part = self.quantities[0].narrow(-2, start, size)
            exact = (
                left.narrow(-2, start, size) @ right.mT if self.exact is None else self.exact.narrow(-2, start, size)
            )
            of_part = None if gradient is None else gradient.narrow(-2, start, size)
            total, changes = _compared(part, self.quantities[1], exact, of_part)
            totals.append(total)
            if changes is not None:
                by_row.append(changes)
        total = reduce(torch.add, totals)
        if gradient is None:
            return total[:3]
        changes = torch.cat(by_row, -1) if len(by_row) > 1 else by_row[0]
        of_samples = self._of_samples(changes)
        squares = [dot(each, each) * (each.numel() / 2) for each in (changes, of_samples)]
        return torch.cat([total[:3], torch.stack([changes.sum(), total[3], *squares])])

    def _of_samples(self, by_row: Tensor) -> Tensor:
        """Changes by row [.., M], added up over the rows of each sample."""
        if not self.samples:
            return by_row
        apart = by_row if self.parts else by_row.flatten()
        return apart.unflatten(-1, (self.samples, -1)).movedim(-2, 0).flatten(1).sum(1)


def _compared(
    left: Quantized | Tensor, right: Quantized | Tensor, exact: Tensor, gradient: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`terms` of a product of operands."""
    if exact.is_cuda:
        from nvfp4c.codegen.probing import compared  # imports triton, which a machine without a GPU need not have

        amaxes = (operand.amax if isinstance(operand, Quantized) else None for operand in (left, right))
        return compared(unscaled(left, right), exact, gradient, *amaxes)
    return terms(product(left, right), exact, gradient)


def terms(found: Tensor, exact: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See `codegen.probing.compared`. found: float32, with its factor, used up. Three sums without a gradient."""
    y = exact.float()
    error = found.sub_(y)
    sums = [dot(y, y), dot(error, error), dot(error, y)]
    if gradient is None:
        return torch.stack(sums), None
    change = error.mul_(gradient)
    return torch.stack([*sums, dot(change, change)]), change.sum(-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of two tensors' elements."""
    return torch.dot(a.reshape(-1), b.reshape(-1))
