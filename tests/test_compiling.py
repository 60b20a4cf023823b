"""Kernels compiled in another process lie where this one finds them; what cannot be compiled there harms nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="no triton for this system")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nvfp4c.codegen import operations
from nvfp4c.codegen.compiling import AbsentGpu, compile_apart
from nvfp4c.codegen.launching import INTERPRETED, Launch
from nvfp4c.formats import DEFAULT_SIGNS
from nvfp4c.region import Axis, Form, Output, Region

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter does not compile")

TARGET = GPUTarget("cuda", 90, 32)
DEVICE = torch.device("cpu")
REGION = Region((Output(Form.OPERAND), Output(Form.PACKED, Axis.COLUMNS, signs=DEFAULT_SIGNS, rounding="stochastic")))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of Triton's, and a GPU that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = driver._active
    driver.set_active(AbsentGpu(TARGET))
    yield tmp_path
    driver._active = before


def region_launch(columns: int = 128) -> Launch:
    """Of a region that no other test compiles in this process, so that Triton has to look for it."""
    layout = ((256, columns), (columns, 1), torch.bfloat16)
    return operations.prepared(REGION.to_json(), (layout,), DEVICE, (9, 0)).launch


def compiled(folder: Path) -> set[str]:
    return {file.parent.name for file in folder.glob("*/*.cubin")}


def test_this_process_finds_what_the_other_compiled(cache: Path) -> None:
    launches = [region_launch(), operations.unpacking((64, 48), False, DEVICE), operations.product_factors(DEVICE)]
    assert compile_apart([launch.job for launch in launches])
    there = compiled(cache)
    assert len(there) == len(launches)
    for launch in launches:
        launch.kernel.warmup(*launch.types, *launch.numbers, **launch.constants, **launch.options, grid=(1,))
    assert compiled(cache) == there


def test_what_has_no_tensor_in_a_place_is_compiled_so(cache: Path) -> None:
    region = Region((Output(Form.OPERAND),))
    layout = ((32, 64), (64, 1), torch.float16)
    launch = operations.prepared(region.to_json(), (layout,), DEVICE, (9, 0)).launch
    assert None in launch.types
    assert compile_apart([launch.job])
    assert len(compiled(cache)) == 1


def test_what_cannot_be_compiled_says_so(cache: Path) -> None:
    job = operations.product_factors(DEVICE).job
    assert not compile_apart([replace(job, name="no_such_kernel")])
    assert not compile_apart([replace(job, types=job.types[:1])])
    assert compiled(cache) == set()


def test_no_interpreter_to_start(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(cache / "python"))
    assert not compile_apart([operations.product_factors(DEVICE).job])


def test_the_other_process_starts_without_pytorch() -> None:
    """Importing it takes seconds, which is what the other process is to save."""
    modules = "compiling, device_math, kernels, native_math"
    check = f"import sys; from nvfp4c.codegen import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
