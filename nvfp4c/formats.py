"""Facts of the NVFP4 format: element values, block size, scale ranges, shapes and Hadamard signs.

An NVFP4 value is ``code * float(scale) * (amax / 2688)``: a 4-bit E2M1 code, an E4M3 scale for each 16
elements along the contraction axis (or for a 16x16 tile), and one FP32 amax for the tensor.
Source: arXiv 2509.25149, section 2, and the OCP Microscaling formats for E2M1.

PyTorch is imported where it is needed, for processes that only compile kernels start without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

BLOCK = 16
"""Elements that share one scale, and the size of the Hadamard transform."""

ROW_BLOCK = (1, 16)
TILE_BLOCK = (16, 16)

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of each 3-bit code; bit 3 of a code is the sign."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
GLOBAL_MAX = E2M1_MAX * E4M3_MAX
"""2688: what the tensor's amax is mapped to."""

FP32_MAX = (2.0 - 2.0**-23) * 2.0**127

DEFAULT_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Signs of the random Hadamard transform; one vector serves the whole model."""

HADAMARD_NORM = 0.25
"""1 / sqrt(16): makes the 16x16 Hadamard matrix orthonormal."""

PHILOX_ROUNDS = 7
"""Of the generator behind stochastic rounding, see `nvfp4c.philox`."""

Size = TypeVar("Size", int, "torch.SymInt")


def block_count(size: Size) -> Size:
    """Blocks needed to hold `size` elements; works on symbolic sizes."""
    return (size + (BLOCK - 1)) // BLOCK


def padded(size: Size) -> Size:
    """`size` rounded up to a whole number of blocks."""
    return block_count(size) * BLOCK


def sylvester_hadamard(size: int = BLOCK) -> torch.Tensor:
    """Unnormalised Hadamard matrix of order `size` (a power of two), float32, entries +1 and -1."""
    import torch

    if size < 1 or size & (size - 1):
        raise ValueError(f"a Sylvester Hadamard matrix has a power of two as its order, not {size}")
    matrix = torch.ones(1, 1)
    for _ in range(int(math.log2(size))):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def signs_from_seed(seed: int) -> tuple[int, ...]:
    """Another sign vector, drawn from `seed`; the same seed always gives the same signs."""
    import torch

    bits = torch.randint(0, 2, (BLOCK,), generator=torch.Generator().manual_seed(seed))
    return tuple(1 - 2 * int(bit) for bit in bits)
