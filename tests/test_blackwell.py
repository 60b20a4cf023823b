"""What is emitted for Blackwell, compiled ahead of time for each of its targets: no GPU is needed.

That the same kernel computes the product is shown with its one FP4 instruction emulated: `kernels/`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="no triton for this system")

import triton.language as tl  # noqa: E402
from test_kernels import NATIVE_INPUT, assembled, check  # noqa: E402

from nvfp4c.codegen import block_scaled_gemm, chips, native_math  # noqa: E402
from nvfp4c.codegen.assembly import assemble  # noqa: E402
from nvfp4c.codegen.block_scaled_gemm import TILES, assemble_emulated_gemm, assemble_gemm  # noqa: E402
from nvfp4c.errors import TargetError  # noqa: E402
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK  # noqa: E402
from nvfp4c.region import Axis, Form, Layout, Output, Region  # noqa: E402

pytestmark = pytest.mark.skipif(bool(block_scaled_gemm.INTERPRETED), reason="compiles, which the interpreter does not")

SHARED_BYTES = {"sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10}
"""What one program may have of shared memory. Source: CUDA programming guide, technical specifications."""

DATACENTER_MMA = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale"
SCALED_BY_16 = (".scale_vec::4X", ".block16")
"""A scale for every 16 of a step's 64 elements. Two names for one thing; newer versions of Triton write the second."""

RTX_MMA = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"

nearest_words = native_math.nearest_words
stochastic_words = native_math.stochastic_words


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("bias", [None, torch.bfloat16], ids=["plain", "bias"])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TILES)
def test_the_product_runs_on_the_fp4_tensor_cores(
    target: str, out: torch.dtype, bias: torch.dtype | None, residual: bool
) -> None:
    """A residual has the result's type, as the pass that gives it to a product sees to."""
    assembly = assemble_gemm(target, out, bias, out if residual else None)
    (mma,) = assembly.mma
    if target == "sm_120":
        assert mma == RTX_MMA
    else:
        assert mma in {DATACENTER_MMA + scaled for scaled in SCALED_BY_16}
        assert "tcgen05.cp" in assembly.ptx, "scales pass registers, so no step overlaps the next one's loads"
    assert assembly.spills == 0
    assert assembly.shared_bytes <= SHARED_BYTES[target]
    assert "cp.async.bulk.tensor.2d.shared" in assembly.ptx, "codes are not loaded by TMA"
    assert "cp.async.bulk.tensor.3d.global" in assembly.ptx, "the result is not stored by TMA"
    assert "fma.rn.f32" not in assembly.ptx, "the epilogue rounds once where the reference rounds twice"


def test_the_emulated_product_needs_no_fp4() -> None:
    assembly = assemble_emulated_gemm("sm_90", torch.bfloat16, torch.bfloat16, torch.bfloat16)
    (mma,) = assembly.mma
    assert mma.startswith("wgmma") and mma.endswith("f32.bf16.bf16")
    assert assembly.spills == 0


@triton.jit
def nearest_kernel(y, words):
    block = tl.arange(0, 256)[:, None]
    values = tl.load(y + block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :])
    tl.store(words + block[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], nearest_words(values, 3))


@triton.jit
def stochastic_kernel(y, random, words):
    block = tl.arange(0, 256)[:, None]
    values = tl.load(y + block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :])
    first = random + block * 4
    found = stochastic_words(values, tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3), 3)
    tl.store(words + block[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], found)


NATIVE = {"layout": Layout.NATIVE}
REGIONS = {
    "input": NATIVE_INPUT,
    "gradient": Region(
        (
            Output(Form.PACKED, rounding="stochastic", **NATIVE),
            Output(Form.PACKED, Axis.COLUMNS, ROW_BLOCK, "stochastic", DEFAULT_SIGNS, 1, 1, **NATIVE),
        )
    ),
    "weight": Region((Output(Form.PACKED, block=TILE_BLOCK, **NATIVE),)),
    "weight, transposed": Region((Output(Form.PACKED, Axis.COLUMNS, TILE_BLOCK, **NATIVE),)),
}
"""What a training step computes from each of its matrices where products read packed operands."""


@pytest.mark.parametrize("target", TILES)
@pytest.mark.parametrize("name", REGIONS)
def test_regions_convert_natively(name: str, target: str) -> None:
    """And store codes of columns, which are turned, eight bytes at a time, four neighbours a sector."""
    found = assembled(REGIONS[name], target)
    check(found)
    stochastic = name == "gradient"
    native = not stochastic or chips.TARGETS[target].conversions >= chips.STOCHASTIC
    instruction = "cvt.rs.satfinite.e2m1x4.f32" if stochastic else "cvt.rn.satfinite.e2m1x2.f32"
    assert found.conversions == ({instruction} if native else set())
    assert "cvt.rn.satfinite.e4m3x2.f32" in found.ptx
    turned = any(output.down for output in REGIONS[name].outputs)
    assert ("st.global.b64" in found.ptx) == turned
    assert "st.global.b8" not in found.ptx, "scales are stored one by one"


def test_regions_of_sizes_that_do_not_fit() -> None:
    for region in REGIONS.values():
        check(assembled(region, "sm_100", even=False))


TYPES = {"y": "*fp32", "random": "*i32", "words": "*i32"}


@pytest.mark.parametrize("target", chips.NATIVE_TARGETS)
def test_nearest_codes_are_converted_natively(target: str) -> None:
    assembly = assemble(nearest_kernel, target, TYPES, {})
    assert assembly.conversions == {"cvt.rn.satfinite.e2m1x2.f32"}
    # 256 blocks of 16 elements on 128 threads, in pairs, each element once with +0.0 added.
    assert assembly.ptx.count("cvt.rn.satfinite") == 16 and assembly.ptx.count(", 0f00000000;") == 32
    assert assembly.spills == 0


@pytest.mark.parametrize("target", ["sm_100", "sm_103"])
def test_stochastic_codes_are_converted_natively(target: str) -> None:
    assembly = assemble(stochastic_kernel, target, TYPES, {})
    assert assembly.conversions == {"cvt.rs.satfinite.e2m1x4.f32"}
    assert assembly.ptx.count("cvt.rs.satfinite") == 8 and assembly.ptx.count("add.rz.f32") == 32
    assert assembly.spills == 0


@pytest.mark.parametrize("kernel, target", [(stochastic_kernel, "sm_120"), (nearest_kernel, "sm_90")])
def test_a_target_without_the_instruction_is_refused(kernel: Any, target: str) -> None:
    with pytest.raises(TargetError, match=f"{kernel.__name__}.* cannot be assembled for {target}: .*not supported"):
        assemble(kernel, target, TYPES, {})


def test_spills_are_seen() -> None:
    """Few registers for many values: what the other tests count is not always 0."""
    roomy = assemble(stochastic_kernel, "sm_100", TYPES, {})
    cramped = assemble(stochastic_kernel, "sm_100", TYPES, {}, maxnreg=24)
    assert roomy.spills == 0 and cramped.spills > 0
    assert cramped.registers <= 24 < roomy.registers


def test_other_targets_are_refused() -> None:
    with pytest.raises(TargetError, match=r"'cpu'.*such as 'sm_100'"):
        assemble(nearest_kernel, "cpu", TYPES, {})
    with pytest.raises(TargetError, match="'sm_90' has no FP4 tensor cores; use one of sm_100, sm_103, sm_120"):
        assemble_gemm("sm_90", torch.bfloat16, None, None)
