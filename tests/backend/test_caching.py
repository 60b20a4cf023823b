"""A second process finds what the first has compiled, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from inside import Mlp

from nvfp4c import backend

HERE = Path(__file__).parent
SCRIPT = HERE / "cached_compile.py"
CHANGES = ("recipe", "plan", "signs", "sources")


def run(*arguments: str) -> str:
    """What a fresh interpreter prints, which finds the modules that tests share as they do."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def second() -> dict[str, dict[str, dict[str, int]]]:
    """Counters of the second process, by variation and kind of graph."""
    name = uuid.uuid4().hex
    first = json.loads(run(str(SCRIPT), name, "same"))
    assert first["same"]["training"]["fxgraph_cache_miss"] == 2
    assert first["same"]["inference"]["fxgraph_cache_miss"] == 1
    return json.loads(run(str(SCRIPT), name, "same", *CHANGES))


@pytest.mark.parametrize("kind", ["training", "inference"])
def test_a_second_process_compiles_nothing(second: dict[str, dict[str, dict[str, int]]], kind: str) -> None:
    found = second["same"][kind]
    assert found["fxgraph_cache_miss"] == found["autograd_cache_miss"] == 0
    assert found["autograd_cache_hit"] == 1
    assert found["fxgraph_cache_hit"] == (2 if kind == "training" else 1)


@pytest.mark.parametrize("change", CHANGES)
def test_what_code_depends_on_is_in_the_key(second: dict[str, dict[str, dict[str, int]]], change: str) -> None:
    found = second[change]["training"]
    assert found["autograd_cache_hit"] == 0
    assert (found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]) == (0, 2)


@pytest.mark.parametrize("part", ["numerics.py", "passes/share.py", "codegen/cpu.py"])
def test_changed_sources_are_noticed(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, its passes and its kernels: one more byte in any of them gives another hash."""
    package = tmp_path / "nvfp4c"
    shutil.copytree(backend.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    hash_anew = backend.source_hash.__wrapped__
    before = hash_anew()
    monkeypatch.setattr(backend, "PACKAGE", package)
    assert hash_anew() == before, "the place of the package does not matter"
    (package / part).write_text((package / part).read_text() + "\n")
    assert hash_anew() != before


def test_whoever_wants_to_see_passes_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager_kernels: None
) -> None:
    """With NVFP4C_DUMP or NVFP4C_DEBUG a graph is compiled although it is cached."""

    def infer() -> None:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(Mlp(), backend="nvfp4")(torch.randn(16, 32))

    infer()
    monkeypatch.setenv("NVFP4C_DUMP", str(tmp_path))
    for number in (1, 2):
        infer()
        assert len(list(tmp_path.glob("*-joint/*-share.txt"))) == number
        assert len(list(tmp_path.glob("*-lower/*-lower.txt"))) == number


FOUND_BY_NAME = """
import sys
import torch
from torch._dynamo.backends.registry import list_backends
assert "nvfp4" in list_backends()
assert "nvfp4c" not in sys.modules
layer = torch.nn.Linear(64, 32)
compiled = torch.compile(layer, backend="nvfp4", options={"recipe": "nvfp4-all"})
x = torch.randn(48, 64)
with torch.no_grad():
    error = (compiled(x) - layer(x)).norm() / layer(x).norm()
print(float(error))
"""


def test_the_backend_is_found_by_name_without_an_import() -> None:
    """A user imports nothing but torch. Two operands that are each about 0.1 off make a product that is 0.14 off."""
    assert 0.07 < float(run("-c", FOUND_BY_NAME)) < 0.28
