"""Which target a device gets, what is refused and why, and the kernel tables."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from nvfp4c import dialect
from nvfp4c.codegen import chips, targets
from nvfp4c.codegen.chips import NATIVE_TARGETS
from nvfp4c.codegen.targets import TARGETS, kernel_table, resolve
from nvfp4c.errors import OptionError, TargetError
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK
from nvfp4c.region import Axis, Form, Layout, Output, Region

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An NVIDIA GPU of compute capability 9.0, and triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: object())
    return monkeypatch


def with_capability(gpu: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    "capability, name",
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_103"),
        ((11, 0), "sm_90"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "sm_90"),
    ],
)
def test_auto_takes_the_newest_target_that_the_gpu_runs(
    gpu: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    with_capability(gpu, capability)
    assert resolve("auto", GPU) == TARGETS[name]


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_a_model_on_the_cpu_gets_the_cpu_target(name: str) -> None:
    assert resolve(name, CPU) == TARGETS["cpu"]


def test_an_older_target_may_be_asked_for(gpu: pytest.MonkeyPatch) -> None:
    assert resolve("sm_80", GPU) == TARGETS["sm_80"]


def test_targets_say_how_they_multiply() -> None:
    native = {target.name for target in TARGETS.values() if target.native_fp4}
    assert native == {"sm_100", "sm_103", "sm_120"} == set(NATIVE_TARGETS)
    assert all(("exact emulation" in target.description) != target.native_fp4 for target in TARGETS.values())


@pytest.mark.parametrize(
    "capability, name",
    [((10, 0), "sm_120"), ((12, 0), "sm_100"), ((12, 1), "sm_100"), ((10, 0), "sm_103"), ((10, 3), "sm_100")],
)
def test_code_of_one_blackwell_family_does_not_run_on_another(
    gpu: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    with_capability(gpu, capability)
    version = "{}.{}".format(*capability)
    with pytest.raises(TargetError, match=rf"compute capability {version} and cannot run '{name}'; use 'auto'"):
        resolve(name, GPU)
    assert resolve("sm_90", GPU) == TARGETS["sm_90"]


def test_each_chip_converts_what_its_instructions_can() -> None:
    capabilities = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
    e4m3, nearest, stochastic = chips.E4M3, chips.NEAREST, chips.STOCHASTIC
    found = [chips.conversions(capability) for capability in capabilities]
    assert found == [0, 0, 0, e4m3, e4m3, stochastic, stochastic, e4m3, nearest, nearest]


@pytest.mark.parametrize("name", ["cpu", "sm_80", "sm_90"])
@pytest.mark.parametrize("product", ["triton", "library"])
def test_a_product_is_chosen_only_where_operands_stay_packed(name: str, product: str) -> None:
    with pytest.raises(OptionError, match=rf"product='{product}' is a choice only .*sm_100, sm_103, sm_120.*'{name}'"):
        kernel_table(TARGETS[name], product)


def test_a_torch_without_the_library_s_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(targets.F, "scaled_mm")
    with pytest.raises(OptionError, match=r"'library' needs torch\.nn\.functional\.scaled_mm; torch .* lacks it"):
        kernel_table(TARGETS["sm_100"], "library")


@pytest.mark.parametrize("device", [CPU, GPU])
def test_unknown_names_are_refused_with_the_valid_ones(device: torch.device) -> None:
    with pytest.raises(
        OptionError, match=r"'sm90'; did you mean 'sm_90'\?.*auto, cpu, sm_80, sm_89, sm_90, sm_100, sm_103, sm_120"
    ):
        resolve("sm90", device)


def test_a_gpu_target_needs_a_model_on_the_gpu() -> None:
    with pytest.raises(TargetError, match="'sm_80' is a GPU, but the model is on the CPU"):
        resolve("sm_80", CPU)


def test_the_cpu_target_needs_a_model_on_the_cpu(gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="'cpu' cannot run a model on cuda:0"):
        resolve("cpu", GPU)


@pytest.mark.parametrize("name", ["auto", "sm_80"])
def test_old_gpus_are_refused(gpu: pytest.MonkeyPatch, name: str) -> None:
    with_capability(gpu, (7, 5))
    with pytest.raises(TargetError, match=r"compute capability 7\.5, too old.*8\.0 and up"):
        resolve(name, GPU)


def test_a_target_newer_than_the_gpu_is_refused(gpu: pytest.MonkeyPatch) -> None:
    with_capability(gpu, (8, 6))
    with pytest.raises(TargetError, match=r"compute capability 8\.6 and cannot run 'sm_90'; use 'auto'"):
        resolve("sm_90", GPU)


def test_gpus_of_other_makers_are_refused(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.4")
    with pytest.raises(TargetError, match=r"device cuda:0.*NVIDIA GPUs"):
        resolve("auto", GPU)
    with pytest.raises(TargetError, match=r"device mps.*NVIDIA GPUs"):
        resolve("auto", torch.device("mps"))


def test_a_gpu_target_needs_triton(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"'sm_90' needs triton.*pip install triton"):
        resolve("auto", GPU)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_cpu_target_needs_no_triton() -> None:
    """In a process where triton cannot be imported."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from nvfp4c.codegen.targets import kernel_table, resolve
x = torch.ones(2, 16)
table = kernel_table(resolve("auto", x.device))
amax = torch.tensor(2688.0)
assert table.product(x, x, amax, amax, None, None, torch.float32).tolist() == [[16.0, 16.0]] * 2
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["codegen", "passes"])
def test_a_bare_import_of_a_subpackage_is_refused(name: str) -> None:
    """Run from the repository's root, where the folder could be found under its bare name."""
    run = python(f"import {name}")
    assert run.returncode != 0
    assert f"ImportError: {name!r} is a part of nvfp4c" in run.stderr
    assert f"Use 'import nvfp4c.{name}'" in run.stderr
    assert importlib.util.find_spec(f"nvfp4c.{name}") is not None


X = torch.randn(3, 20, 37, generator=torch.Generator().manual_seed(0))


def test_cpu_hadamard_and_amax_are_the_dialect_s() -> None:
    table = kernel_table(TARGETS["cpu"])
    assert table.operand_dtype is torch.float32
    assert torch.equal(table.hadamard(X, DEFAULT_SIGNS), dialect.HADAMARD(X, DEFAULT_SIGNS))
    assert torch.equal(table.amax(X, DEFAULT_SIGNS), dialect.AMAX(X, DEFAULT_SIGNS))


def test_cpu_quantize_and_dequantize_are_the_dialect_s() -> None:
    table = kernel_table(TARGETS["cpu"])
    arguments = (X, dialect.AMAX(X, DEFAULT_SIGNS), ROW_BLOCK, "stochastic", DEFAULT_SIGNS, torch.tensor(-7), 2)
    codes, scales = table.quantize(*arguments)
    expected = dialect.QUANTIZE(*arguments)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales.view(torch.uint8), expected[1].view(torch.uint8))
    assert torch.equal(table.dequantize(codes, scales, 37), dialect.DEQUANTIZE(*expected, None, 37, torch.float32))


@pytest.mark.parametrize(
    "block, rounding, signs, k",
    [(TILE_BLOCK, "stochastic", None, 37), (ROW_BLOCK, "nearest", DEFAULT_SIGNS, 48)],
    ids=["trimmed", "rotated, so without padding"],
)
def test_cpu_operand_is_the_dialect_s_quantize_and_dequantize(
    block: tuple[int, int], rounding: str, signs: tuple[int, ...] | None, k: int
) -> None:
    table = kernel_table(TARGETS["cpu"])
    assert table.operand is not None
    arguments = (X, dialect.AMAX(X, signs), block, rounding, signs, torch.tensor(7), 1)
    expected = dialect.DEQUANTIZE(*dialect.QUANTIZE(*arguments), None, k, torch.float32)
    assert torch.equal(table.operand(*arguments), expected)


def test_cpu_product_is_that_of_scaled_mm() -> None:
    table = kernel_table(TARGETS["cpu"])
    w = torch.randn(3, 8, 37, generator=torch.Generator().manual_seed(1))
    for x, weight in ((X[0], w[0]), (X, w)):
        x_amax, w_amax = dialect.AMAX(x), dialect.AMAX(weight)
        packed_x = dialect.QUANTIZE(x, x_amax, ROW_BLOCK, "nearest")
        packed_w = dialect.QUANTIZE(weight, w_amax, TILE_BLOCK, "nearest")
        operands = (dialect.DEQUANTIZE(*packed, None, 37, torch.float32) for packed in (packed_x, packed_w))
        found = table.product(*operands, x_amax, w_amax, None, None, torch.float32)
        expected = dialect.SCALED_MM(*packed_x, x_amax, *packed_w, w_amax, 37, None, torch.float32)
        # Sums of the same 37 exact products in FP32, but the reference adds 11 zeros and may group terms otherwise:
        # 37 additions, each off by at most half an ulp (6e-8) of a partial sum below 37 * 16.
        torch.testing.assert_close(found, expected, rtol=0, atol=37 * 37 * 16 * 6e-8)


EVERY_FORM = Region(
    (
        Output(Form.AMAX),
        Output(Form.ROTATED, Axis.COLUMNS, signs=DEFAULT_SIGNS),
        Output(Form.PACKED, Axis.COLUMNS, TILE_BLOCK, "stochastic"),
        Output(Form.PACKED, signs=DEFAULT_SIGNS),
        Output(Form.OPERAND),
        Output(Form.PACKED, Axis.COLUMNS, layout=Layout.NATIVE),
    )
)


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_90", *NATIVE_TARGETS])
def test_gpu_tables_promise_what_the_dialect_does_for_any_size(name: str) -> None:
    """On fake tensors of symbolic sizes, so that no GPU is needed."""
    pytest.importorskip("triton", reason="no triton for this system")
    table = kernel_table(TARGETS[name])
    assert table.target == name and table.operand_dtype is torch.bfloat16
    assert table.region is not None
    assert (table.hadamard, table.amax, table.quantize, table.operand) == (None,) * 4
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(torch.empty(20, 37), static_shapes=False)
        amax, seed = (mode.from_tensor(given) for given in (torch.tensor(3.0), torch.tensor(3)))
        region = ([x], [amax], seed, EVERY_FORM.to_json())
        pairs = [*zip(table.region(*region), dialect.REGION(*region), strict=True)]
        for turned in (x, x.mT):
            codes, scales = dialect.QUANTIZE(turned, amax, [1, 16], "nearest")
            k = turned.shape[1]
            expected = dialect.DEQUANTIZE(codes, scales, None, k, torch.bfloat16)
            pairs.append((table.dequantize(codes, scales, k), expected))
            for residual in (None, dialect.PRODUCT(expected, expected, amax, amax, None, None, torch.bfloat16)):
                product = (expected, expected, amax, amax, None, residual, torch.float16)
                pairs.append((table.product(*product), dialect.PRODUCT(*product)))
            if table.native:
                native = (*dialect.QUANTIZE(turned, amax, [1, 16], "nearest", layout="native"), amax)
                for bias in (None, mode.from_tensor(torch.zeros(())), turned[:, 0]):
                    for residual in (None, dialect.BLOCK_SCALED_MM(*native, *native, None, None, torch.bfloat16)):
                        product = (*native, *native, bias, residual, torch.float16)
                        pairs += [(mm(*product), dialect.BLOCK_SCALED_MM(*product)) for mm in native_products(name)]
        for found, expected in pairs:
            assert found.dtype is expected.dtype and found.device == expected.device
            assert tuple(map(str, found.shape)) == tuple(map(str, expected.shape))
            assert tuple(map(str, found.stride())) == tuple(map(str, expected.stride()))


def native_products(name: str) -> list[Callable[..., torch.Tensor]]:
    """Both ways to multiply packed operands on a target."""
    found = [kernel_table(TARGETS[name], product).block_scaled_mm for product in ("triton", "library")]
    return [product for product in found if product is not None]


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_table_has_what_lower_needs(name: str) -> None:
    """One kernel for all of a matrix, or one for each operation; and names of what `explain` shows."""
    if name != "cpu":
        pytest.importorskip("triton", reason="no triton for this system")
    table = kernel_table(TARGETS[name])
    apart = {entry for entry in ("hadamard", "amax", "quantize", "operand") if getattr(table, entry) is not None}
    assert apart == (set() if table.region is not None else {"hadamard", "amax", "quantize", "operand"})
    assert set(table.names) == {"matmul", "dequantize"}
    assert table.native == TARGETS[name].native_fp4
