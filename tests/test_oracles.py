"""`nvfp4c.numerics` against two libraries that write the same format: torchao and compressed-tensors.

All three round the same real numbers, by different float32 operations. So they may differ in two places only, and each
difference found is proved, with exact rational arithmetic, to be one of them:

- the exact ratio lies on a midpoint of the format, a tie that float32 rounding decides beforehand;
- the block scale is too small for E4M3: torchao uses at least 2**-6 and compressed-tensors 0.125 for 0, while the
  contract rounds it like any other number.
"""

from __future__ import annotations

from fractions import Fraction
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nvfp4c import numerics
from nvfp4c.formats import E2M1_MAGNITUDES
from nvfp4c.numerics import NVFP4Tensor, quantize

E2M1 = [Fraction(magnitude) for magnitude in E2M1_MAGNITUDES]
E4M3 = [Fraction(m, 512) for m in range(8)] + [
    Fraction(8 + m) * Fraction(2) ** (e - 10) for e in range(1, 16) for m in range(8)
]
E4M3 = E4M3[:127]  # the 128th code is NaN

# The longest way to a ratio has five float32 roundings, each of relative size 2**-24 at most; an implementation can
# land on the wrong side of a midpoint only if that is so near to the exact ratio.
FLOAT32_SLACK = Fraction(6, 2**24)


def raw(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8)


def lies_between(table: list[Fraction], ratio: Fraction, first: int, second: int, slack: Fraction) -> bool:
    """Whether `ratio` is the midpoint of two neighbouring entries of `table`, to a relative `slack`."""
    low, high = sorted((first, second))
    midpoint = (table[low] + table[high]) / 2
    return high == low + 1 and abs(ratio - midpoint) <= slack * midpoint


def assert_same_but_for_ties(x: Tensor, found: NVFP4Tensor, codes: Tensor, scales: Tensor, comparable: Tensor) -> None:
    """Compare with another library's packed `codes` and `scales` in the blocks that are `comparable`.

    For a bfloat16 tensor every difference must be an exact tie: its elements have 8 significant bits, a scale 4 and
    a midpoint 3, so that a ratio which is no tie is further from one (2**-15) than float32 rounding can reach.
    """
    slack = Fraction(0) if x.dtype == torch.bfloat16 else FLOAT32_SLACK
    amax = Fraction(float(found.amax))
    blocks = x.unflatten(1, (-1, 16))
    ours, theirs = raw(found.scales), raw(scales)
    for row, block in ((ours != theirs) & comparable).nonzero().tolist():
        ratio = Fraction(float(blocks[row, block].abs().max())) * 448 / amax
        assert lies_between(E4M3, ratio, int(ours[row, block]), int(theirs[row, block]), slack), (row, block)
    same_scale = ((ours == theirs) & comparable).repeat_interleave(16, dim=1)
    our_codes, their_codes = numerics.unpack(found.codes), numerics.unpack(codes)
    different = (our_codes != their_codes) & same_scale
    for row, column in different.nonzero().tolist():
        first, second = int(our_codes[row, column]), int(their_codes[row, column])
        assert first >> 3 == second >> 3, (row, column)
        unit = amax / 2688 * E4M3[int(ours[row, column // 16])]
        ratio = abs(Fraction(float(x[row, column]))) / unit
        assert lies_between(E2M1, ratio, first & 7, second & 7, slack), (row, column)
    # The proofs above hold of nothing, too. So most blocks are compared; the share of ties depends on the amax, and
    # in the worst tensor below they touch 0.7% of the blocks.
    assert comparable.float().mean() > 0.5
    assert (same_scale & ~different).float().mean() > 0.99 * comparable.float().mean()


def data(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (256, 512)
    x = torch.randn(shape, generator=generator)
    if kind == "outliers":
        x = torch.where(torch.rand(shape, generator=generator) < 0.001, x * 300, x)
    elif kind == "heavy-tailed":
        x = x * (torch.randn(shape, generator=generator) * 1.5).exp()
    elif kind == "rows of all sizes":
        x = x * torch.exp2(-torch.arange(256) / 12).unsqueeze(1)
    elif kind == "few values":  # ratios of small integers
        x = (x * 4).round()
    elif kind == "sparse":
        x = torch.where(torch.rand(256, 32, generator=generator).repeat_interleave(16, 1) < 0.2, 0.0, x)
    return (x + 0.0).to(dtype)  # no -0.0, for which see below


def elements() -> Tensor:
    """All bfloat16 values in [-6, 6], and each tie with the float32 numbers beside it."""
    bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    beside = [torch.nextafter(ties, torch.tensor(limit)) for limit in (0.0, 6.0)]
    return torch.cat([bf16[bf16.abs() <= 6], *beside, *(-part for part in beside)])


KINDS = ["normal", "outliers", "heavy-tailed", "rows of all sizes", "few values", "sparse"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def torchao() -> ModuleType:
    return pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")


@pytest.fixture(scope="module")
def compressed() -> ModuleType:
    return pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")


# ---- torchao


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchao_quantize(torchao: ModuleType, kind: str, dtype: torch.dtype) -> None:
    x = data(kind, dtype)
    found = quantize(x)
    scales, codes = torchao.nvfp4_quantize(x, 16, torchao.per_tensor_amax_to_scale(found.amax))
    scales = scales.view(found.scales.shape)
    small = found.scales.float() < 2**-6
    assert (scales.float()[small] == 2**-6).all()
    assert_same_but_for_ties(x, found, codes, scales, ~small)
    zero = (x == 0).unflatten(1, (-1, 16)).all(-1)
    assert not codes.unflatten(1, (-1, 8))[zero].any() and not found.codes.unflatten(1, (-1, 8))[zero].any()


@pytest.mark.parametrize("kind", KINDS)
def test_torchao_dequantize(torchao: ModuleType, kind: str) -> None:
    found = quantize(data(kind, torch.float32))
    scale = torchao.per_tensor_amax_to_scale(found.amax)
    theirs = torchao.NVFP4Tensor(found.codes, found.scales, 16, torch.float32, scale).dequantize()
    ours = found.dequantize()
    # Five float32 roundings between the two, in the order in which three factors are multiplied.
    assert ((theirs - ours).abs() <= 6 * 2**-24 * ours.abs()).all()


def test_torchao_elements(torchao: ModuleType) -> None:
    y = elements()
    codes = numerics.encode_e2m1(y)
    theirs = torchao.f32_to_f4_unpacked(y)
    negative_zero = (y == 0) & torch.signbit(y)
    assert torch.equal(codes[~negative_zero], theirs[~negative_zero])
    # The contract encodes -0.0 as 0, torchao as 8; both decode to zero.
    assert negative_zero.any() and (codes[negative_zero] == 0).all() and (theirs[negative_zero] == 8).all()
    packed = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(numerics.unpack(packed), torchao.unpack_uint4(packed))
    assert torch.equal(numerics.pack(numerics.unpack(packed)), torchao.pack_uint4(torchao.unpack_uint4(packed)))
    every = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(numerics.decode_e2m1(every), torchao.f4_unpacked_to_f32(every))


# ---- compressed-tensors


def compressed_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E2M1 values, E4M3 scales and the global scale 2688 / amax by compressed-tensors' own steps.

    The statistics are taken in float32: in bfloat16 it would round amax / 6 to bfloat16, another number.
    """
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import quantize as compressed_forward
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam

    weights = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    statistics = x.float()
    global_scale = generate_gparam(statistics.min(), statistics.max())
    scales, _ = compute_dynamic_scales_and_zp(statistics, weights, torch.nn.Module(), global_scale)
    values = compressed_forward(x, scales, None, weights, global_scale=global_scale)
    return values, scales.to(torch.float8_e4m3fn), global_scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors_quantize(compressed: ModuleType, kind: str, dtype: torch.dtype) -> None:
    x = data(kind, dtype)
    found = quantize(x)
    values, scales, global_scale = compressed_quantize(x)
    assert float(global_scale) == float(2688 / found.amax)
    underflow = raw(found.scales) == 0
    assert (scales.float()[underflow] == 0.125).all()
    codes = compressed.pack_fp4_to_uint8(values)
    assert_same_but_for_ties(x, found, codes, scales, ~underflow)
    zero = (x == 0).unflatten(1, (-1, 16)).all(-1)
    assert not codes.unflatten(1, (-1, 8))[zero].any() and not found.codes.unflatten(1, (-1, 8))[zero].any()


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_dequantize(compressed: ModuleType, kind: str) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    x = data(kind, torch.float32)
    found = quantize(x)
    values = compressed.unpack_fp4_from_uint8(found.codes, *x.shape).float()
    weights = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    global_scale = (2688 / found.amax).reshape(1)
    theirs = dequantize(values, found.scales.float(), None, weights, global_scale=global_scale)
    ours = found.dequantize()
    # Five float32 roundings between the two, in the order in which three factors are multiplied.
    assert ((theirs - ours).abs() <= 6 * 2**-24 * ours.abs()).all()


def test_compressed_tensors_elements(compressed: ModuleType) -> None:
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    y = elements()
    y = y[: y.numel() // 2 * 2].reshape(1, -1) + 0.0  # rows of pairs, and no -0.0, which the contract encodes as 0
    theirs = compressed.pack_fp4_to_uint8(cast_to_fp4(y.clone()))
    assert torch.equal(numerics.pack(numerics.encode_e2m1(y)), theirs)
    packed = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    assert torch.equal(
        numerics.decode_e2m1(numerics.unpack(packed)), compressed.unpack_fp4_from_uint8(packed, 1, 512).float()
    )
