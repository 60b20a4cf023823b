"""The exact reference for NVFP4 arithmetic, in plain torch: the judge of every other implementation.

The order of operations is the one of TransformerEngine's kernels, so results can be compared with them bit for
bit. Everything is computed in FP32. Functions named with a leading `block_` or `tile_` work on [..., M, K];
the public ones (`quantize`, `hadamard`, `scaled_mm`) take what a person would pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nvfp4c.dtypes import QUANTIZABLE_DTYPES
from nvfp4c.errors import NumericsError
from nvfp4c.formats import (
    BLOCK,
    DEFAULT_SIGNS,
    E2M1_MAGNITUDES,
    E2M1_MAX,
    E4M3_MAX,
    FP32_MAX,
    GLOBAL_MAX,
    HADAMARD_NORM,
    ROW_BLOCK,
    TILE_BLOCK,
    block_count,
    padded,
)

Rounding = Literal["nearest", "stochastic"]


def pad_last(x: Tensor) -> Tensor:
    """x with its last axis zero-padded to a whole number of blocks."""
    missing = padded(x.shape[-1]) - x.shape[-1]
    return x if isinstance(missing, int) and missing == 0 else F.pad(x, (0, missing))


def rotate(x: Tensor, signs: Sequence[int]) -> Tensor:
    """Random Hadamard transform along the last axis of [..., M, K]: bfloat16 [..., M, ceil16(K)].

    `z = bf16_rne((x * signs) @ H16 * 0.25)` for each 16 elements. The sum is taken as a butterfly in FP32, over strides
    1, 2, 4, 8 in this order: where a block's dynamic range is wide the FP32 sum depends on its order, so one is fixed.
    """
    blocks = pad_last(x).unflatten(-1, (block_count(x.shape[-1]), BLOCK)).float()
    return rotated_blocks(blocks, signs, -1).flatten(-2).to(torch.bfloat16)


def rotated_blocks(blocks: Tensor, signs: Sequence[int], axis: int) -> Tensor:
    """`rotate` before its rounding: float32 blocks, whose 16 elements are along `axis`."""
    parts = [part if sign > 0 else -part for part, sign in zip(blocks.unbind(axis), signs, strict=True)]
    for stride in (1, 2, 4, 8):
        for low in (place for place in range(BLOCK) if not place & stride):
            even, odd = parts[low], parts[low + stride]
            parts[low], parts[low + stride] = even + odd, even - odd
    return torch.stack(parts, axis) * HADAMARD_NORM


def tensor_amax(x: Tensor) -> Tensor:
    """Largest magnitude of a whole tensor: float32 scalar; NaN if any element is NaN, 0 for an empty tensor."""
    if isinstance(x.numel(), int) and x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return x.abs().amax().float()


def encode_scale(amax: Tensor) -> Tensor:
    """S_enc = min(2688 / amax, FLT_MAX), 1 for a zero tensor, NaN when amax is not finite."""
    scale = torch.clamp(torch.full_like(amax, GLOBAL_MAX) / amax, max=FP32_MAX)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """amax of each block of float32 x [..., M, 16 * B]: [..., M, B]; a tile's amax is repeated over its rows."""
    rows, columns = x.shape[-2], x.shape[-1] // BLOCK
    magnitudes = x.abs().unflatten(-1, (columns, BLOCK)).amax(-1)
    if block == ROW_BLOCK:
        return magnitudes
    tiles = block_count(rows)
    missing = tiles * BLOCK - rows
    if not (isinstance(missing, int) and missing == 0):
        magnitudes = F.pad(magnitudes, (0, 0, 0, missing))
    tile_amax = magnitudes.unflatten(-2, (tiles, BLOCK)).amax(-2, keepdim=True)
    repeated = tile_amax.expand(*tile_amax.shape[:-2], BLOCK, columns).flatten(-3, -2)
    return repeated.narrow(-2, 0, rows)


def encode_e2m1(y: Tensor, random_bits: Tensor | None = None) -> Tensor:
    """E2M1 codes (uint8, one an element) of float32 y in [-6, 6].

    Nearest, ties to even code, or stochastic when `random_bits` (uint8, same shape) is given: the magnitude goes
    to the upper neighbour when `256 * (a - lo) / (hi - lo) > random + 0.5`: the expected value is off by 1/512 of the
    gap at most, and by 0 on average. Below 1 it is first rounded to a multiple of 2^-23, as `(a + 1) - 1` is.
    -0.0 gives code 0, a small negative that rounds to zero gives code 8, NaN gives code 7 (its block scale is NaN).
    """
    steps, magnitude = _e2m1_steps(y, random_bits)
    # Codes are linear in the magnitude within [0, 2), [2, 4) and [4, 6].
    offset = torch.where(magnitude < 2, 0.0, torch.where(magnitude < 4, 2.0, 4.0))
    sign = torch.where(y < 0, 8.0, 0.0)
    return (steps + offset + sign).to(torch.uint8)


def round_e2m1(y: Tensor, random_bits: Tensor | None = None) -> Tensor:
    """decode_e2m1(encode_e2m1(y, random_bits)), with no code between: float32, for whoever packs nothing."""
    steps, magnitude = _e2m1_steps(y, random_bits)
    rounded = steps * torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.where(y < 0, -rounded, rounded)


def _e2m1_steps(y: Tensor, random_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Magnitudes in steps between codes, rounded as `encode_e2m1` says, and the magnitudes themselves."""
    magnitude = torch.where(_is_nan(y), E2M1_MAX, y.abs())
    if random_bits is not None:
        magnitude = torch.where(magnitude < 1, (magnitude + 1.0) - 1.0, magnitude)
    slope = torch.where(magnitude < 2, 2.0, torch.where(magnitude < 4, 1.0, 0.5))
    position = magnitude * slope
    if random_bits is None:
        return position.round(), magnitude
    below = position.floor()
    return below + ((position - below) * 256.0 > random_bits.float() + 0.5).float(), magnitude


def decode_e2m1(codes: Tensor) -> Tensor:
    """float32 value of each unpacked E2M1 code."""
    code = (codes & 7).float()
    magnitude = torch.where(code < 4, code * 0.5, torch.where(code < 6, code - 2.0, code * 2.0 - 8.0))
    return torch.where(codes > 7, -magnitude, magnitude)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the even index in the low nibble: [..., K] to [..., K / 2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def block_codes(
    x: Tensor, amax: Tensor, block: tuple[int, int], random_bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Unpacked codes uint8 [..., M, ceil16(K)] and scales float8_e4m3fn [..., M, ceil16(K) / 16] of x [..., M, K]."""
    scaled, scales = _block_scaled(x, amax, block)
    return encode_e2m1(scaled, random_bits), scales


def block_scales(x: Tensor, amax: Tensor, block: tuple[int, int]) -> Tensor:
    """The scales of `block_codes`."""
    return _scales(pad_last(x).float(), encode_scale(amax), block)


def _scales(values: Tensor, encode: Tensor, block: tuple[int, int]) -> Tensor:
    return scale_of(block_amax(values, block), encode * (1 / E2M1_MAX))


def scale_of(amax: Tensor, sixth: Tensor) -> Tensor:
    """The scales, float8_e4m3fn, of blocks with these amaxes. sixth: of the tensor's `encode_scale`."""
    scales = torch.clamp(amax * sixth, max=E4M3_MAX)
    # A positive NaN constant: the sign of a computed NaN differs between processors, and the contract is 0x7F.
    return torch.where(_is_nan(scales), torch.nan, scales).to(torch.float8_e4m3fn)


def scaled(values: Tensor, scales: Tensor, inverse: Tensor) -> Tensor:
    """Float32 values over their float32 scales, clipped to what E2M1 holds. inverse: 1 / `encode_scale`."""
    multiplier = torch.clamp(torch.reciprocal(scales * inverse), max=FP32_MAX)
    return torch.clamp(values * multiplier, -E2M1_MAX, E2M1_MAX)


def _is_nan(x: Tensor) -> Tensor:
    """`isnan`, which Inductor does not vectorise on a CPU."""
    return x != x


def _block_scaled(x: Tensor, amax: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x over its scales, clipped to what E2M1 holds, and the scales."""
    values, encode = pad_last(x).float(), encode_scale(amax)
    scales = _scales(values, encode, block)
    blocks = values.unflatten(-1, (block_count(x.shape[-1]), BLOCK))
    return scaled(blocks, scales.float().unsqueeze(-1), torch.reciprocal(encode)).flatten(-2), scales


def tile_transpose(codes: Tensor, scales: Tensor, k: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    """Codes and scales of the transpose of a tensor [..., M, k] quantised in 16x16 tiles: no new rounding.

    A tile holds the same elements either way, so only the bytes are rearranged.
    """
    rows = codes.shape[-2]
    transposed = pad_last(unpack(codes).narrow(-1, 0, k).transpose(-1, -2))
    tiles = scales.view(torch.uint8)[..., ::BLOCK, :].transpose(-1, -2)
    repeated = tiles.unsqueeze(-2).expand(*tiles.shape[:-1], BLOCK, block_count(rows)).flatten(-3, -2)
    # clone, for `contiguous` hands the input's own memory on when k is 1 or the matrix is empty.
    own = repeated.narrow(-2, 0, k).clone(memory_format=torch.contiguous_format)
    return pack(transposed), own.view(torch.float8_e4m3fn)


def block_values(codes: Tensor, scales: Tensor) -> Tensor:
    """code * scale of unpacked codes, float32 [..., M, ceil16(K)]: exact in BF16 too (six significant bits)."""
    blocks = decode_e2m1(codes).unflatten(-1, (scales.shape[-1], BLOCK))
    return (blocks * scales.float().unsqueeze(-1)).flatten(-2)


def global_factor(amax_a: Tensor, amax_b: Tensor) -> Tensor:
    """What a product of two operands' code * scale is multiplied by, float32 scalar."""
    return amax_a * amax_b / (GLOBAL_MAX * GLOBAL_MAX)


@dataclass(frozen=True)
class NVFP4Tensor:
    """A quantised matrix [M, K], blocks along its last axis.

    codes: uint8 [M, ceil16(K) / 2]; scales: float8_e4m3fn [M, ceil16(K) / 16], tile scales repeated over rows;
    amax: float32 scalar; shape: (M, K), where a rotated matrix has K rounded up to a whole number of blocks.
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor
    shape: tuple[int, int]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`code * scale * (amax / 2688)` in FP32, rounded once to `dtype`: [M, K]."""
        values = block_values(unpack(self.codes), self.scales) * (self.amax / GLOBAL_MAX)
        return values[:, : self.shape[1]].to(dtype)


def _check_matrix(x: Tensor) -> None:
    if x.dim() != 2:
        raise NumericsError(f"expected a 2-D tensor, got {x.dim()}-D {tuple(x.shape)}; reshape it to rows x K")
    if x.dtype not in QUANTIZABLE_DTYPES:
        names = ", ".join(str(dtype) for dtype in QUANTIZABLE_DTYPES)
        raise NumericsError(f"cannot quantise {x.dtype}; convert to one of {names}")


def _check_signs(signs: Sequence[int]) -> None:
    if len(signs) != BLOCK or any(sign not in (1, -1) for sign in signs):
        raise NumericsError(f"signs must be {BLOCK} numbers, each 1 or -1, got {tuple(signs)}")


def hadamard(x: Tensor, signs: Sequence[int] = DEFAULT_SIGNS) -> Tensor:
    """Random Hadamard transform of each 16 elements along the last axis.

    x: [..., K] of float32, bfloat16 or float16. Returns bfloat16 [..., ceil16(K)]. Raises NumericsError for other signs
    than 16 of +1 and -1. Source: arXiv 2509.25149, appendix on random Hadamard transforms.
    """
    _check_signs(signs)
    return rotate(x, signs)


def quantize(
    x: Tensor,
    *,
    block: tuple[int, int] = ROW_BLOCK,
    rounding: Rounding = "nearest",
    signs: Sequence[int] | None = None,
    random_bits: Tensor | None = None,
) -> NVFP4Tensor:
    """Quantise a matrix along its last axis.

    x: [M, K] of float32, bfloat16 or float16. block: (1, 16) or (16, 16). signs: rotate first, with these signs.
    random_bits: uint8 [M, ceil16(K)], needed for and only for stochastic rounding. Raises NumericsError for anything
    else.
    """
    _check_matrix(x)
    if block not in (ROW_BLOCK, TILE_BLOCK):
        raise NumericsError(f"block must be (1, 16) or (16, 16), got {block}")
    if rounding not in ("nearest", "stochastic"):
        raise NumericsError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if (rounding == "stochastic") != (random_bits is not None):
        raise NumericsError("random_bits must be given for stochastic rounding, and only then")
    expected = (x.shape[0], padded(x.shape[1]))
    if random_bits is not None and (random_bits.dtype != torch.uint8 or tuple(random_bits.shape) != expected):
        found = f"{random_bits.dtype} {tuple(random_bits.shape)}"
        raise NumericsError(f"random_bits must be uint8 {expected} (one byte an element), got {found}")
    if signs is not None:
        x = hadamard(x, signs)
    amax = tensor_amax(x)
    if x.numel() == 0:
        codes = torch.zeros(expected, dtype=torch.uint8, device=x.device)
        scales = torch.zeros(expected[0], expected[1] // BLOCK, device=x.device).to(torch.float8_e4m3fn)
    else:
        codes, scales = block_codes(x, amax, block, random_bits)
    return NVFP4Tensor(pack(codes), scales, amax, (x.shape[0], x.shape[1]))


def scaled_mm(
    a: NVFP4Tensor, b: NVFP4Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a [M, K] times the transpose of b [N, K]: [M, N] in `out_dtype`.

    FP32 accumulation of code * scale, then the global factor, then the bias, then one rounding.
    Raises NumericsError when the contraction axes differ.
    """
    if a.shape[1] != b.shape[1]:
        raise NumericsError(f"contraction axes differ: {a.shape[1]} and {b.shape[1]} elements")
    product = block_values(unpack(a.codes), a.scales) @ block_values(unpack(b.codes), b.scales).transpose(-1, -2)
    product = product * global_factor(a.amax, b.amax)
    if bias is not None:
        product = product + bias.float()
    return product.to(out_dtype)


assert tuple(decode_e2m1(torch.arange(8, dtype=torch.uint8)).tolist()) == E2M1_MAGNITUDES
