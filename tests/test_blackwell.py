"""What is emitted for Blackwell, compiled ahead of time for each of its targets: no GPU is needed.

That the same kernel computes the product is shown with its one FP4 instruction emulated: `kernels/`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton", reason="no triton for this system")

import triton.language as tl  # noqa: E402
from test_kernels import check  # noqa: E402

from nvfp4c.bench.llama import Llama, Size  # noqa: E402
from nvfp4c.codegen import block_scaled_gemm, chips, native_math  # noqa: E402
from nvfp4c.codegen.assembly import Assembly, assemble  # noqa: E402
from nvfp4c.codegen.block_scaled_gemm import TILES, assemble_emulated_gemm, assemble_gemm  # noqa: E402
from nvfp4c.emission import NativeProduct, Use, programs  # noqa: E402
from nvfp4c.errors import TargetError  # noqa: E402
from nvfp4c.fused_graphs import fused_graphs  # noqa: E402
from nvfp4c.options import parse  # noqa: E402
from nvfp4c.tasks import Task  # noqa: E402

pytestmark = pytest.mark.skipif(bool(block_scaled_gemm.INTERPRETED), reason="compiles, which the interpreter does not")

SHARED_BYTES = {"sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10}
"""What one program may have of shared memory. Source: CUDA programming guide, technical specifications."""

DATACENTER_MMA = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale"
SCALED_BY_16 = (".scale_vec::4X", ".block16")
"""A scale for every 16 of a step's 64 elements. Two names for one thing; newer versions of Triton write the second."""

RTX_MMA = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"

nearest_words = native_math.nearest_words
stochastic_words = native_math.stochastic_words


PRODUCTS = [
    (out, bias, residual)
    for out in (torch.bfloat16, torch.float32)
    for bias in (None, torch.bfloat16)
    for residual in (None, out)
]
"""Types of the result, the bias and the residual, which has the result's, as the pass that gives it sees to."""


@pytest.mark.parametrize("out, bias, residual", PRODUCTS, ids=str)
@pytest.mark.parametrize("target", TILES)
def test_the_product_runs_on_the_fp4_tensor_cores(
    target: str, out: torch.dtype, bias: torch.dtype | None, residual: torch.dtype | None
) -> None:
    assembly = assemble_gemm(target, out, bias, residual)
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


def training_step() -> Task:
    """A Llama block and a layer with a bias. Whole tiles fit what is 256 wide, and nothing else.

    Queries, keys and values share what they read; MLP, keys and the last layer are 176, 128 and 48 wide.
    """
    size = Size("blocks", 1, width=256, hidden=176, heads=2, kv_heads=1, batch=1, sequence=64)
    model = nn.Sequential(Llama(size), nn.Linear(256, 48)).bfloat16()
    x = torch.randn(1, 64, 256).bfloat16().requires_grad_()
    return Task("blocks", model, [x], lambda model, batch: model(batch).float().square().sum())


AMAXES = "amax rows; amax columns rotated"
INPUT = "packed rows 1x16 nearest native; packed columns 1x16 nearest rotated native"
GRADIENT = "packed rows 1x16 stochastic native; packed columns 1x16 stochastic rotated native"
WEIGHT = "packed rows 16x16 nearest native"
TURNED_WEIGHT = "packed columns 16x16 nearest native"
PLAIN = {"amax rows", AMAXES, INPUT, GRADIENT, WEIGHT, TURNED_WEIGHT}
"""What a training step computes from its matrices: each of them of sizes that fill tiles, and of others."""

KEPT = f"{AMAXES}; value rows"
PRODUCED = {
    "gate": {KEPT},
    "gates, backward": {f"{KEPT}; {KEPT}"},
    "normalisation, backward": {KEPT},
}
"""What is computed together with what makes the matrices."""

NORMALISED = ({KEPT}, {AMAXES, INPUT})
"""Likewise with the end of a normalisation, which is computed once or twice, as the cost model has it."""


def maker(use: Use, steps: set[str]) -> str:
    """What makes the matrix of a kernel's prologue: gates have an exponential."""
    name = "gate" if "exp" in steps else "normalisation"
    return name if use.graph == "forward" else f"{name}s, backward" if name == "gate" else f"{name}, backward"


@pytest.mark.parametrize("target", TILES)
def test_every_kernel_of_a_training_step(target: str) -> None:
    """Kernels that quantise convert natively, and store codes of columns, which are turned, eight bytes at a time.

    Four neighbours are a sector then. Products are compiled by a test of their own.
    """
    found = programs(fused_graphs(training_step(), parse({"recipe": "nvfp4-all"}), target), target)
    products = {program for program in found if isinstance(program, NativeProduct)}
    assert products and products <= {NativeProduct(*types) for types in PRODUCTS}
    plain: set[tuple[str, bool]] = set()
    produced: dict[str, set[str]] = defaultdict(set)
    for program, uses in found.items():
        if isinstance(program, NativeProduct):
            continue
        assembly, whole = program.assemble(target), dict(program.constants)["EVEN"]
        outputs, _, steps = program.computes.partition(" of ")
        assert assembly.spills == 0
        assert assembly.shared_bytes <= SHARED_BYTES[target]
        check_stores(outputs, assembly, whole)
        if steps:
            produced[maker(uses[0], set(steps.split(", ")))].add(outputs)
        else:
            check(assembly)
            plain.add((outputs, whole))
    assert plain == {(outputs, whole) for outputs in PLAIN for whole in (True, False)}
    assert produced.pop("normalisation") in NORMALISED
    assert produced == PRODUCED


def check_stores(outputs: str, assembly: Assembly, whole: bool) -> None:
    """By which instructions codes and scales are made and stored. whole: whether tiles are."""
    packs, stochastic = "packed" in outputs, "stochastic" in outputs
    native = packs and (not stochastic or chips.TARGETS[assembly.target].conversions >= chips.STOCHASTIC)
    instruction = "cvt.rs.satfinite.e2m1x4.f32" if stochastic else "cvt.rn.satfinite.e2m1x2.f32"
    assert assembly.conversions == ({instruction} if native else set())
    assert ("cvt.rn.satfinite.e4m3x2.f32" in assembly.ptx) == packs
    assert ("st.global.b64" in assembly.ptx) == ("packed columns" in outputs)
    assert not (whole and "st.global.b8" in assembly.ptx), "scales are stored one by one"


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
