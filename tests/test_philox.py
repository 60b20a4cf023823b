"""Philox4x32: known answers, byte order, and independence of seeds, streams and places."""

from __future__ import annotations

import pytest
import torch

from nvfp4c.formats import PHILOX_ROUNDS
from nvfp4c.philox import philox, random_bytes

Four = tuple[int, int, int, int]


def signed(key: int) -> int:
    """The int64 that holds the 64 bits of `key`."""
    return key - (1 << 64) if key >> 63 else key


def scalar_philox(key: tuple[int, int], counter: Four, rounds: int = PHILOX_ROUNDS) -> Four:
    """The published algorithm on Python integers, one counter at a time."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c2 = (product1 >> 32) ^ c1 ^ k0, (product0 >> 32) ^ c3 ^ k1
        c1, c3 = product1 % 2**32, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


# Random123's kat_vectors, philox4x32 with 10 rounds: key, counter, answer.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000),
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_a_known_answer_with_the_rounds_that_are_used() -> None:
    """Random123's first vector of philox4x32 with 7 rounds."""
    zero = torch.tensor([0])
    words = philox(torch.tensor(0), (zero, zero, zero, zero))
    assert [int(word) for word in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN_ANSWERS)
def test_known_answers(key: tuple[int, int], counter: Four, answer: Four) -> None:
    seed = torch.tensor(signed(key[0] | key[1] << 32))
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox(seed, (c0, c1, c2, c3), rounds=10)) == answer
    assert scalar_philox(key, counter, rounds=10) == answer


@pytest.mark.parametrize("seed", [0, 1, -1, 0x0123456789ABCDEF, -(2**63)])
@pytest.mark.parametrize("stream", [0, 1, 2**31 + 7])
def test_bytes_come_lowest_first_from_the_words_of_each_block(seed: int, stream: int) -> None:
    key = (seed % 2**32, (seed >> 32) % 2**32)
    words = [scalar_philox(key, (block, 0, stream, 0)) for block in range(5)]
    expected = [[byte for word in block for byte in word.to_bytes(4, "little")] for block in words]
    found = random_bytes(torch.tensor(seed), stream, 5)
    assert found.dtype == torch.uint8
    assert found.tolist() == expected


def test_a_stream_may_be_a_tensor() -> None:
    seed = torch.tensor(7)
    assert torch.equal(random_bytes(seed, torch.tensor(3), 10), random_bytes(seed, 3, 10))


def test_a_counter_beyond_32_bits_uses_both_words() -> None:
    index = 2**40 + 12345
    zero = torch.zeros(1, dtype=torch.int64)
    counter = (torch.tensor([index % 2**32]), torch.tensor([index >> 32]), zero, zero)
    words = philox(torch.tensor(9), counter)
    assert tuple(int(word) for word in words) == scalar_philox((9, 0), (index % 2**32, index >> 32, 0, 0))


def test_a_block_does_not_depend_on_how_many_are_drawn() -> None:
    seed = torch.tensor(7)
    assert torch.equal(random_bytes(seed, 3, 100)[:10], random_bytes(seed, 3, 10))
    assert random_bytes(seed, 3, 0).shape == (0, 16)


def chi_squared(values: torch.Tensor, bins: int = 256) -> float:
    counts = torch.bincount(values.flatten().long(), minlength=bins).double()
    expected = values.numel() / bins
    return float(((counts - expected) ** 2 / expected).sum())


# Chi squared with 255 degrees of freedom has mean 255 and standard deviation sqrt(510) = 22.6. Uniform bytes
# stay within five of these; the seeds are fixed, so the outcome is always the same.
UNIFORM = (255 - 5 * 22.6, 255 + 5 * 22.6)


def test_every_byte_of_a_block_is_uniform() -> None:
    drawn = random_bytes(torch.tensor(2024), 0, 1 << 16)
    for place in range(16):
        assert UNIFORM[0] < chi_squared(drawn[:, place]) < UNIFORM[1], place
    assert UNIFORM[0] < chi_squared(drawn) < UNIFORM[1]


@pytest.mark.parametrize(
    ("left", "right"),
    [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((5, 1), (1, 5)), ((1, 0), (1 << 32, 0)), ((-1, 2), (-2, 2))],
)
def test_seeds_and_streams_are_independent(left: tuple[int, int], right: tuple[int, int]) -> None:
    first = random_bytes(torch.tensor(left[0]), left[1], 1 << 14)
    second = random_bytes(torch.tensor(right[0]), right[1], 1 << 14)
    # Independent uniform bytes differ by a uniform byte, bitwise and modulo 256.
    assert UNIFORM[0] < chi_squared(first ^ second) < UNIFORM[1]
    assert UNIFORM[0] < chi_squared(first - second) < UNIFORM[1]


def test_neighbouring_blocks_and_bytes_are_independent() -> None:
    drawn = random_bytes(torch.tensor(11), 4, 1 << 14)
    assert UNIFORM[0] < chi_squared(drawn[1:] ^ drawn[:-1]) < UNIFORM[1]
    assert UNIFORM[0] < chi_squared(drawn[:, 1:] ^ drawn[:, :-1]) < UNIFORM[1]
