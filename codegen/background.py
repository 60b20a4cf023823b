"""Compiling kernels ahead, in the background, while Inductor is at work.

Most of the work is Python's, so threads would only take turns with Inductor: it is done in the processes in which
Inductor compiles its own kernels. They share nothing with this process but Triton's cache, from which a thread here
then loads what they have made. Without such processes the threads do all of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from nvfp4c.codegen.launching import Launch, under_way

log = logging.getLogger(__name__)


def compile_ahead(launches: Sequence[Launch], device: torch.device) -> None:
    """Start to compile all of them and to load them on a GPU; each kernel's first launch waits for all of its own."""
    by_kernel: dict[Any, dict[int, Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel, {})[id(launch)] = launch
    elsewhere = AsyncCompile.use_process_pool()
    for kernel, alike in by_kernel.items():
        forms = {_form(launch): launch for launch in alike.values()}
        compiling = [_submit(launch, device) for launch in forms.values()] if elsewhere else []
        loading = _threads().submit(_load, tuple(alike.values()), compiling, device)
        under_way.setdefault(kernel, []).append(loading)


def _form(launch: Launch) -> object:
    """What Triton tells apart when it compiles one kernel. Launches taken for equal wrongly compile when loaded."""
    numbers = tuple((number == 1, number % 16 == 0, number.bit_length() > 31) for number in launch.numbers)
    return launch.types, numbers, tuple(launch.keywords.items())


def _submit(launch: Launch, device: torch.device) -> Future[None]:
    with torch.cuda.device(device):
        work = Work.of(launch, driver.active.get_current_target())
    return AsyncCompile.process_pool().submit(compile_here, work)


def _load(launches: Sequence[Launch], compiling: Sequence[Future[None]], device: torch.device) -> None:
    """What a thread does: load what has been compiled, and compile what has not."""
    for one in compiling:
        if (reason := one.exception()) is not None:
            log.warning("a kernel was not compiled ahead: %s", reason)
    with torch.cuda.device(device):  # of this thread
        for launch in launches:
            launch.warm_up()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(get_compile_threads(), thread_name_prefix="nvfp4c-compile")


@dataclass(frozen=True)
class Work:
    """All that another process needs to compile a launch: plain values, and where the kernel's source is.

    module, path, name: of the kernel. settings: Triton's, of the environment. folder: of Triton's cache.
    """

    module: str
    path: str
    name: str
    arguments: tuple[torch.dtype | int | None, ...]
    keywords: dict[str, Any]
    target: GPUTarget
    settings: dict[str, str]
    folder: str

    @classmethod
    def of(cls, launch: Launch, target: GPUTarget) -> Work:
        """The work that `launch.warm_up` would do on such a GPU, but for loading."""
        function = launch.kernel.fn
        return cls(
            module=function.__module__,
            path=function.__code__.co_filename,
            name=function.__name__,
            arguments=(*launch.types, *launch.numbers),
            keywords=launch.keywords,
            target=target,
            settings={name: value for name, value in os.environ.items() if name.startswith("TRITON_")},
            folder=str(knobs.cache.dir),
        )


def compile_here(work: Work) -> None:
    """Compile into Triton's cache, in a process that need not have a GPU."""
    os.environ.update(work.settings)
    with knobs.cache.scope(), _driver(work.target):
        knobs.cache.dir = work.folder
        _kernel(work.module, work.path, work.name).warmup(*work.arguments, **work.keywords, grid=(1,))


@cache
def _kernel(module: str, path: str, name: str) -> JITFunction[Any]:
    spec = spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    found: JITFunction[Any] = getattr(loaded, name)
    return found


class _NoGpu:
    """Triton's driver as far as compiling asks for it, so that what is compiled has the name that it has on the GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _driver(target: GPUTarget) -> Iterator[None]:
    before = driver._active  # reading `active` would look for a GPU
    driver.set_active(_NoGpu(target))
    try:
        yield
    finally:
        driver.set_active(before)
