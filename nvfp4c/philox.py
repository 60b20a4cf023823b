"""Counter-based random bytes for stochastic rounding: Philox4x32-7, the same on every target.

One call gives 16 bytes, the randomness of one block of 16 elements. The counter is
``(block index, low 32 bits; block index, high 32 bits; stream; 0)`` and the key is the 64-bit seed, so
that a value depends on nothing but the seed, which operand it is (stream) and its place. Element `e` of
a block takes byte `e % 4` (lowest first) of word `e // 4`.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, where seven rounds are the fewest that
pass every test of BigCrush; on a GPU they are a third of what stochastic rounding costs. Triton's `tl.philox` computes
the same words.
"""

from __future__ import annotations

import math

import torch

from nvfp4c.formats import BLOCK, PHILOX_ROUNDS, block_count, padded

KEY_STEP = (0x9E3779B9, 0xBB67AE85)
MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
MASK = 0xFFFFFFFF
Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _multiply_high_low(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves of a 32x32-bit product, by 16-bit halves so that no signed 64-bit product overflows."""
    low = (word & 0xFFFF) * constant
    high = (word >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: torch.Tensor, counter: Words, rounds: int = PHILOX_ROUNDS) -> Words:
    """Four random words for each counter. All tensors are int64 holding unsigned 32-bit words; seed is 0-d."""
    key0, key1 = seed & MASK, (seed >> 32) & MASK
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        high0, low0 = _multiply_high_low(MULTIPLIER[0], c0)
        high1, low1 = _multiply_high_low(MULTIPLIER[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + KEY_STEP[0]) & MASK, (key1 + KEY_STEP[1]) & MASK
    return c0, c1, c2, c3


def random_bytes(seed: torch.Tensor, stream: int | torch.Tensor, blocks: int) -> torch.Tensor:
    """Random bytes of `blocks` consecutive blocks: uint8 [blocks, 16].

    seed: int64 scalar tensor; stream: number of the operand within its graph, an int64 scalar tensor or a number.
    """
    words = torch.stack(random_words(seed, stream, blocks), dim=-1)
    shifts = torch.arange(0, 32, 8, device=seed.device, dtype=torch.int64)
    return ((words.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8).reshape(blocks, BLOCK)


def random_words(seed: torch.Tensor, stream: int | torch.Tensor, blocks: int) -> Words:
    """The words of `random_bytes`, each [blocks]."""
    index = torch.arange(blocks, device=seed.device, dtype=torch.int64)
    zero = torch.zeros_like(index)
    return philox(seed, (index & MASK, index >> 32, zero + stream, zero))


def random_bytes_like(x: torch.Tensor, seed: torch.Tensor, stream: int | torch.Tensor) -> torch.Tensor:
    """Random bytes for x [.., M, K], blocks along its last axis: uint8 [.., M, ceil16(K)]."""
    blocks = math.prod(x.shape[:-1]) * block_count(x.shape[-1])
    return random_bytes(seed, stream, blocks).reshape(*x.shape[:-1], padded(x.shape[-1]))
