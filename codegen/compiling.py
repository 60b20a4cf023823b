"""Compiling kernels in Inductor's compile workers: what of Triton's compiling is Python holds back the whole process.

A worker leaves what it compiles in Triton's cache on disk. There the process that asked finds it when it compiles the
same. Workers see no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import triton
from torch._inductor.async_compile import AsyncCompile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
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
    """Compile for the current GPU in a worker, and wait for it. False where there is none, or it came to nothing: the
    workers take their time to start, and Inductor does not wait for them either."""
    if not AsyncCompile.use_process_pool():
        return False
    target = triton.runtime.driver.active.get_current_target()
    try:
        AsyncCompile.process_pool().submit(compile_jobs, tuple(jobs), target, knobs.cache.dir).result()
    except Exception:  # whatever it was, compiling here shows it again
        return False
    return True


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


def compile_jobs(jobs: Sequence[Job], target: GPUTarget, cache: str) -> None:
    """What a worker does. Tensors are taken to be aligned, as in `Launch.warm_up`."""
    with _compiling_for(target), knobs.cache.scope():
        knobs.cache.dir = cache
        for job in jobs:
            kernel = getattr(_module(job), job.name)
            tensors = (None if dtype is None else MockTensor(dtype) for dtype in job.types)
            kernel.warmup(*tensors, *job.numbers, **job.constants, **job.options, grid=(1,))


@contextmanager
def _compiling_for(target: GPUTarget) -> Iterator[None]:
    """In the place of the GPU that Triton would look for."""
    before = driver._active
    driver.set_active(AbsentGpu(target))
    try:
        yield
    finally:
        driver._active = before


def _module(job: Job) -> ModuleType:
    if job.module.split(".")[0] == PACKAGE:
        return import_module(job.module)
    spec = spec_from_file_location(job.module, job.path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[job.module] = module  # where Triton looks up what the kernel's source names
    spec.loader.exec_module(module)
    return module
