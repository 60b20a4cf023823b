"""Kernels compiled by a worker lie where this process finds them; what cannot be compiled there harms nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import async_compile
from torch._inductor.async_compile import AsyncCompile

pytest.importorskip("triton", reason="no triton for this system")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version
from triton.compiler import make_backend
from triton.runtime import driver

from nvfp4c.codegen import compiling, operations
from nvfp4c.codegen.compiling import AbsentGpu, Setting, compile_apart, compile_jobs, start_workers
from nvfp4c.codegen.launching import INTERPRETED, Launch
from nvfp4c.formats import DEFAULT_SIGNS
from nvfp4c.region import Axis, Form, Output, Region

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter does not compile")

TARGET = GPUTarget("cuda", 90, 32)
DEVICE = torch.device("cpu")
ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
REGION = Region((Output(Form.OPERAND), Output(Form.PACKED, Axis.COLUMNS, signs=DEFAULT_SIGNS, rounding="stochastic")))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of Triton's, and a GPU that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = driver._active
    driver.set_active(AbsentGpu(TARGET))
    yield tmp_path
    driver._active = before


@pytest.fixture
def _workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor's, two of them, started and ready."""
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 2)
    compiling._take_the_assembler_of_workers.cache_clear()
    async_compile.shutdown_compile_workers()
    AsyncCompile.wait_pool_ready()
    yield
    async_compile.shutdown_compile_workers()


@pytest.fixture
def other_assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Triton's own, under another version. It is known of Triton's own that it is asked for next."""
    own = get_ptxas(TARGET.arch).path
    script = tmp_path / "ptxas"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo other; {own} --version; else exec {own} "$@"; fi\n'
    )
    script.chmod(0o755)
    get_ptxas_version.cache_clear()
    get_ptxas_version(TARGET.arch)
    yield script
    get_ptxas_version.cache_clear()


def region_launch(region: Region, columns: int, dtype: torch.dtype) -> Launch:
    """Of a region that no other test compiles in this process, so that Triton has to look for it."""
    layout = ((256, columns), (columns, 1), dtype)
    return operations.prepared(region.to_json(), (layout,), DEVICE, (9, 0)).launch


def compiled(folder: Path) -> set[str]:
    return {file.parent.name for file in folder.glob("*/*.cubin")}


@pytest.mark.usefixtures("_workers")
def test_this_process_finds_what_a_worker_compiled(cache: Path) -> None:
    launches = [
        region_launch(REGION, 128, torch.bfloat16),
        region_launch(Region((Output(Form.OPERAND),)), 64, torch.float16),
        operations.unpacking((64, 48), False, DEVICE),
        operations.product_factors(DEVICE),
    ]
    assert None in launches[1].types, "nothing random there: no seed"
    assert compile_apart([launch.job for launch in launches])
    there = compiled(cache)
    assert len(there) == len(launches)
    for launch in launches:
        launch.kernel.warmup(*launch.types, *launch.numbers, **launch.constants, **launch.options, grid=(1,))
    assert compiled(cache) == there


def test_the_assembler_is_the_workers(
    cache: Path, other_assembler: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """PyTorch's, where it has one: workers take it from their start on."""

    def take() -> None:
        for name in ASSEMBLERS:
            monkeypatch.setenv(name, str(other_assembler))

    take()
    request.getfixturevalue("_workers")
    for name in ASSEMBLERS:
        monkeypatch.delenv(name)
    monkeypatch.setattr(compiling, "_set_triton_ptxas_path", take)
    launch = region_launch(REGION, 160, torch.bfloat16)
    assert compile_apart([launch.job])
    there = compiled(cache)
    launch.kernel.warmup(*launch.types, *launch.numbers, **launch.constants, **launch.options, grid=(1,))
    assert compiled(cache) == there != set()


@pytest.mark.usefixtures("_workers")
def test_workers_with_another_assembler_compile_nothing(
    cache: Path, other_assembler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they compiled would not be found."""
    for name in ASSEMBLERS:
        monkeypatch.setenv(name, str(other_assembler))
    assert not compile_apart([region_launch(REGION, 128, torch.bfloat16).job])
    assert compiled(cache) == set()


@pytest.mark.usefixtures("_workers")
def test_what_cannot_be_compiled_says_so(cache: Path) -> None:
    job = operations.product_factors(DEVICE).job
    assert not compile_apart([replace(job, name="no_such_kernel")])
    assert not compile_apart([replace(job, types=job.types[:1])])
    assert compiled(cache) == set()
    assert compile_apart([job]), "the worker goes on"


@pytest.mark.parametrize(("workers", "started"), [(1, False), (2, True)])
def test_workers_that_are_not_ready_are_not_waited_for(
    workers: int, started: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: workers)
    monkeypatch.setattr(AsyncCompile, "_ready_future", Future() if started else None)
    monkeypatch.setattr(AsyncCompile, "process_pool", lambda: pytest.fail("nothing is to be asked of them"))
    assert not compile_apart([operations.product_factors(DEVICE).job])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_start_where_there_are_to_be_any(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: workers)
    async_compile.shutdown_compile_workers()
    start_workers()
    assert (AsyncCompile._ready_future is not None) == (workers > 1)
    async_compile.shutdown_compile_workers()


def test_workers_that_cannot_start_harm_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise RuntimeError("no process can be started")

    monkeypatch.setattr(AsyncCompile, "use_process_pool", refuse)
    start_workers()
    assert not compile_apart([operations.product_factors(DEVICE).job])


@pytest.mark.usefixtures("_workers")
def test_a_worker_that_hangs_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LONGEST", 0)
    assert not compile_apart([region_launch(REGION, 192, torch.bfloat16).job])


def test_a_worker_is_left_as_it_was(cache: Path, tmp_path: Path) -> None:
    """It compiles Inductor's kernels next."""
    active, folder = driver._active, knobs.cache.dir
    setting = Setting(TARGET, make_backend(TARGET).hash(), str(tmp_path / "other"))
    compile_jobs([region_launch(REGION, 128, torch.float32).job], setting)
    assert driver._active is active and knobs.cache.dir == folder
    assert len(compiled(tmp_path / "other")) == 1
