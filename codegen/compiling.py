"""Compiling kernels in a process of its own: much of Triton's compiling is Python, which runs one thread at a time.

`compile_apart` describes kernels to such a process, which leaves what it compiles in Triton's cache on disk. There the
process that asked finds it when it compiles the same. The other process needs neither a GPU nor PyTorch, and so starts
in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

PACKAGE = "nvfp4c"


@dataclass(frozen=True)
class Job:
    """A kernel and what it is compiled for. Its file is found by `module` where that is one of ours, else by `path`.

    types: of tensors, as PyTorch writes them; None where there is none. The rest is as in `launching.Launch`.
    """

    module: str
    path: str
    name: str
    types: tuple[str | None, ...]
    numbers: tuple[int, ...]
    constants: Mapping[str, int]
    options: Mapping[str, Any]


def compile_apart(jobs: Sequence[Job]) -> bool:
    """Compile for the current GPU in a new process, and wait for it. False where it came to nothing."""
    target = triton.runtime.driver.active.get_current_target()
    asked = {"target": [target.backend, target.arch, target.warp_size], "jobs": [asdict(job) for job in jobs]}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(asked).encode(),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except OSError:
        return False
    return done.returncode == 0


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_jobs(text: str) -> None:
    """Compile what `compile_apart` describes. Tensors are taken to be aligned, as `Launch.warm_up` does."""
    asked = json.loads(text)
    triton.runtime.driver.set_active(AbsentGpu(GPUTarget(*asked["target"])))
    for job in (Job(**job) for job in asked["jobs"]):
        kernel = getattr(_module(job), job.name)
        tensors = (None if dtype is None else MockTensor(dtype) for dtype in job.types)
        kernel.warmup(*tensors, *job.numbers, **job.constants, **job.options, grid=(1,))


def _module(job: Job) -> ModuleType:
    if job.module.split(".")[0] == PACKAGE:
        return import_module(job.module)
    spec = spec_from_file_location(job.module, job.path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[job.module] = module  # where Triton looks up what the kernel's source names
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    compile_jobs(sys.stdin.read())
