"""Compiling kernels in Inductor's compile workers: what of Triton's compiling is Python holds back the whole process.

A worker leaves what it compiles in Triton's cache on disk. There the process that asked finds it when it compiles the
same. Workers see no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import make_backend
from triton.runtime import driver

PACKAGE = "nvfp4c"

LONGEST = 300
"""Seconds that a worker is waited for: far more than a kernel takes."""


@dataclass(frozen=True)
class Job:
    """A kernel and what it is compiled for. Its file is found by `module` where that is one of ours, else by `path`.

    The rest is as in `launching.Launch`.
    """

    module: str
    path: str
    name: str
    types: tuple[torch.dtype | None, ...]
    numbers: tuple[int, ...]
    constants: Mapping[str, int]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What decides, beside a kernel and the environment, where it is found in Triton's cache. assembler: its version,
    as Triton's backend writes it."""

    target: GPUTarget
    assembler: str
    cache: str


def start_workers() -> None:
    """Have Inductor's workers start, where it compiles with any and has not started them. For one thread to call: two
    at once would start them twice."""
    with suppress(Exception):  # without workers kernels compile here
        AsyncCompile.use_process_pool()


def compile_apart(jobs: Sequence[Job]) -> bool:
    """Compile for the current GPU in a worker, and wait for it. False where there is none, or it came to nothing: the
    workers take their time to start, and Inductor does not wait for them either."""
    try:
        if not AsyncCompile.use_process_pool():
            return False
        _take_the_assembler_of_workers()
        target = driver.active.get_current_target()
        setting = Setting(target, make_backend(target).hash(), knobs.cache.dir)
        AsyncCompile.process_pool().submit(compile_jobs, tuple(jobs), setting).result(LONGEST)
    except Exception:  # whatever it was, compiling here shows it again
        return False
    return True


@cache
def _take_the_assembler_of_workers() -> None:
    """They take PyTorch's, where it has one, from their start on; Inductor does so here once it has compiled something.
    Triton may know the version of another, which it would keep to."""
    _set_triton_ptxas_path()
    get_ptxas_version.cache_clear()


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


def compile_jobs(jobs: Sequence[Job], setting: Setting) -> None:
    """What a worker does. Tensors are taken to be aligned, as in `Launch.warm_up`."""
    if make_backend(setting.target).hash() != setting.assembler:
        raise ValueError("nobody would find what is compiled here with another assembler")
    with _compiling_for(setting.target), knobs.cache.scope():
        knobs.cache.dir = setting.cache
        for job in jobs:
            kernel = getattr(_module(job), job.name)
            kernel.warmup(*job.types, *job.numbers, **job.constants, **job.options, grid=(1,))


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
