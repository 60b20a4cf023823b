"""Launching a Triton kernel again and again: asking Triton each time which compiled form fits would take long.

A kernel may be compiled ahead, in the background; the first launch waits for what is still under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
import triton
from torch import Tensor
from torch._inductor.async_compile import get_compile_threads

from nvfp4c.codegen import compiling
from nvfp4c.codegen.compiling import Job, compile_apart

INTERPRETED = bool(triton.knobs.runtime.interpret)

LOAD_BYTES = 16
"""The most that one thread loads at once, so what addresses are asked to be multiples of."""


@dataclass(frozen=True)
class Launch:
    """A kernel with all of its arguments but tensors, for as many programs as given.

    types: of the tensors, None where there is none. numbers: after the tensors. constants: after those, in the kernel's
    order. compiled: what starts the kernel, by which tensors are aligned.
    """

    kernel: Any
    programs: int
    types: tuple[torch.dtype | None, ...]
    numbers: tuple[int, ...]
    constants: Mapping[str, int]
    warps: int
    compiled: dict[tuple[bool, ...], Any] = field(default_factory=dict)

    def __call__(self, tensors: Sequence[Tensor | None]) -> None:
        """Start it on the device of the first tensor; nothing where there are no programs."""
        if not self.programs:
            return
        assert tensors[0] is not None
        with on_device_of(tensors[0]):
            grid = (self.programs, 1, 1)  # a compiled kernel takes all three
            aligned = tuple(tensor is None or tensor.data_ptr() % LOAD_BYTES == 0 for tensor in tensors)
            found = self.compiled.get(aligned)
            if found is not None:
                found(*tensors, *self.numbers, *self.constants.values())
                return
            for begun in _under_way.pop(self.kernel, ()):
                begun.exception()  # waits; what went wrong there goes wrong here again
            found = self.kernel[grid](*tensors, *self.numbers, **self.constants, **self.options)
            if not INTERPRETED:
                self.compiled[aligned] = found[grid]

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}

    def warm_up(self) -> None:
        """Compile it for aligned tensors, and load it on the current GPU, where that has not been done."""
        arguments = *self.types, *self.numbers
        compiled = self.kernel.warmup(*arguments, **self.constants, **self.options, grid=(self.programs,))
        compiled.run  # noqa: B018  (reading it loads the kernel, and has a C compiler build what launches it)

    @property
    def job(self) -> Job:
        """What `warm_up` compiles, for another process."""
        function = self.kernel.fn
        return Job(
            module=function.__module__,
            path=function.__code__.co_filename,
            name=function.__name__,
            types=tuple(None if dtype is None else str(dtype) for dtype in self.types),
            numbers=self.numbers,
            constants=dict(self.constants),
            options=self.options,
        )


def get_ready() -> None:
    """Start what `compile_ahead` will need."""
    if _apart():
        compiling.start()


def _apart() -> bool:
    """Whether another process is to compile new kernels: not where Inductor is to compile one after the other."""
    return not INTERPRETED and get_compile_threads() > 1


def compile_ahead(launches: Sequence[Launch], device: torch.device) -> None:
    """Start to compile all of them in the background, kernels side by side and the forms of one in turn, for most are
    alike. Kernels that are new are compiled by another process."""
    by_kernel: dict[Any, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    compiling.settle(device.index or 0)
    for kernel, alike in by_kernel.items():
        apart = _apart() and kernel not in _met
        _under_way.setdefault(kernel, []).append(_pool().submit(_warm_up, alike, device, apart))


def _warm_up(launches: Sequence[Launch], device: torch.device, apart: bool) -> None:
    with torch.cuda.device(device):  # of this thread
        if apart and compile_apart([launch.job for launch in launches]):  # where that fails, it compiles here
            _met.add(launches[0].kernel)
        for launch in launches:
            launch.warm_up()


_under_way: dict[Any, list[Future[None]]] = {}
"""Compiling of kernels that has been started and not yet waited for."""

_met: WeakSet[Any] = WeakSet()
"""Kernels that another process has compiled: other forms of them are mostly the same, and compile here."""


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that compile or have it done, as many as Inductor compiles with."""
    return ThreadPoolExecutor(max(1, get_compile_threads()), thread_name_prefix="nvfp4c-compile")


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make a GPU current for a launch, which is seldom needed and never cheap."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
