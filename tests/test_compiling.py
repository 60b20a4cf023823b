"""Kernels compiled by another process lie where this one finds them; what cannot be compiled there harms nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="no triton for this system")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version
from triton.runtime import driver

from nvfp4c.codegen import compile_server, compiling, operations
from nvfp4c.codegen.compile_server import AbsentGpu
from nvfp4c.codegen.compiling import ASSEMBLERS, compile_apart
from nvfp4c.codegen.launching import INTERPRETED, Launch
from nvfp4c.formats import DEFAULT_SIGNS
from nvfp4c.region import Axis, Form, Output, Region

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter does not compile")

TARGET = GPUTarget("cuda", 90, 32)
DEVICE = torch.device("cpu")
REGION = Region((Output(Form.OPERAND), Output(Form.PACKED, Axis.COLUMNS, signs=DEFAULT_SIGNS, rounding="stochastic")))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of Triton's, and a GPU that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ASSEMBLERS:  # what is decided on here is forgotten after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = driver._active
    driver.set_active(AbsentGpu(TARGET))
    yield tmp_path
    driver._active = before


@pytest.fixture
def _no_server() -> Iterator[None]:
    """None runs; one that the test starts ends with it."""
    compiling.forget()
    yield
    compiling.forget()


def region_launch(region: Region, columns: int, dtype: torch.dtype) -> Launch:
    """Of a region that no other test compiles in this process, so that Triton has to look for it."""
    layout = ((256, columns), (columns, 1), dtype)
    return operations.prepared(region.to_json(), (layout,), DEVICE, (9, 0)).launch


def compile_here(launch: Launch) -> None:
    launch.kernel.warmup(*launch.types, *launch.numbers, **launch.constants, **launch.options, grid=(1,))


def compiled(folder: Path) -> set[str]:
    return {file.parent.name for file in folder.glob("*/*.cubin")}


def test_this_process_finds_what_another_compiled(cache: Path) -> None:
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
    for launch in reversed(launches):
        compile_here(launch)
    assert compiled(cache) == there


@pytest.mark.parametrize(("taken", "dtype"), [(False, torch.bfloat16), (True, torch.float32)], ids=["new", "taken"])
def test_the_assembler_is_the_one_that_inductor_takes(
    taken: bool, dtype: torch.dtype, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's, where it has one, though Triton has been asked for the version of its own. taken: by Inductor itself,
    before."""
    own = get_ptxas(TARGET.arch).path
    other = tmp_path / "ptxas"
    other.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo other; {own} --version; else exec {own} "$@"; fi\n'
    )
    other.chmod(0o755)
    get_ptxas_version.cache_clear()
    get_ptxas_version(TARGET.arch)

    def take() -> None:
        for name in ASSEMBLERS:
            monkeypatch.setenv(name, str(other))

    monkeypatch.setattr(compiling, "_set_triton_ptxas_path", take)
    if taken:
        take()
    launch = region_launch(REGION, 160, dtype)
    compiling.settle(0)
    assert compile_apart([launch.job])
    there = compiled(cache)
    compile_here(launch)
    assert compiled(cache) == there != set()
    get_ptxas_version.cache_clear()


def test_the_cache_is_the_one_that_inductor_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR")
    compiling.settle(0)
    assert os.environ["TRITON_CACHE_DIR"] == compiling.triton_cache_dir(0)


def test_what_cannot_be_compiled_says_so(cache: Path) -> None:
    job = operations.product_factors(DEVICE).job
    assert not compile_apart([replace(job, name="no_such_kernel")])
    assert not compile_apart([replace(job, types=job.types[:1])])
    assert compiled(cache) == set()
    assert compile_apart([job]), "the server goes on"


def test_an_answer_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LONGEST", 0.001)
    assert not compile_apart([region_launch(REGION, 192, torch.bfloat16).job])


@pytest.mark.usefixtures("_no_server")
def test_a_server_that_has_ended_is_started_again() -> None:
    job = operations.product_factors(DEVICE).job
    assert compile_apart([job])
    first = compiling._servers[0]
    first.process.kill()
    first.process.wait()
    assert compile_apart([job])
    assert compiling._servers[0].process.pid != first.process.pid
    assert compile_apart([job])


@pytest.mark.usefixtures("_no_server")
def test_where_no_process_can_be_started_nothing_is_compiled_there(monkeypatch: pytest.MonkeyPatch) -> None:
    job = operations.product_factors(DEVICE).job
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert not compile_apart([job])
    monkeypatch.undo()
    monkeypatch.delattr(os, "fork")
    assert not compile_apart([job])


@pytest.mark.usefixtures("_no_server")
def test_a_server_that_does_not_come_up_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert not compile_apart([operations.product_factors(DEVICE).job])


def test_the_server_ends_with_who_started_it() -> None:
    script = (
        "from nvfp4c.codegen import compiling\n"
        "with compiling.connect(): pass\n"
        "print(compiling._servers[0].process.pid, flush=True)\n"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    pid = int(found.stdout)
    deadline = time.monotonic() + 60
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_server_that_nobody_asks_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(compile_server, "IDLE", 0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        compile_server.serve(theirs)


def test_the_server_does_without_pytorch(cache: Path) -> None:
    """Importing it would take a child longer than compiling does."""
    asked = {
        "environment": {**os.environ, "TRITON_CACHE_DIR": str(cache)},
        "triton_key": "any",
        "target": (TARGET.backend, TARGET.arch, TARGET.warp_size),
        "jobs": [asdict(operations.product_factors(DEVICE).job)],
    }
    script = f"""
import sys

class NoPyTorch:
    def find_spec(self, name, *_):
        assert name.split(".")[0] != "torch", "it is imported after all"

sys.meta_path.insert(0, NoPyTorch())
from nvfp4c.codegen import compile_server, kernels
compile_server.leave_out_pytorch()
compile_server.compile_all({asked!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert len(compiled(cache)) == 1


@pytest.mark.usefixtures("_no_server")
def test_a_server_can_be_started_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling.start()
    pid = compiling._servers[0].process.pid
    assert compile_apart([operations.product_factors(DEVICE).job])
    assert compiling._servers[0].process.pid == pid
    compiling.forget()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    compiling.start()


@pytest.mark.usefixtures("_no_server")
def test_a_forked_process_lets_go_of_the_server() -> None:
    """A worker that loads data would else keep it alive after the process that trains has ended."""
    compiling.start()
    (server,) = compiling._servers
    pid = os.fork()
    if pid == 0:
        os._exit(len(compiling._servers))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert compiling._servers == [server]
    assert compile_apart([operations.product_factors(DEVICE).job])


@pytest.mark.usefixtures("_no_server")
def test_nothing_is_left_of_a_server_that_ended() -> None:
    """No dead process that a program which waits for any child of its own would find."""
    compiling.start()
    pid = compiling._servers[0].process.pid
    compiling.forget()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.usefixtures("_no_server")
def test_paths_that_python_ignores_and_the_folder_it_runs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what this process would import from is where the server imports from."""
    (tmp_path / "json.py").write_text("raise AssertionError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [tmp_path, *(path for path in sys.path if path)])
    assert compile_apart([operations.product_factors(DEVICE).job])
