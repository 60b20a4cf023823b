"""Launching a Triton kernel again and again: asking Triton each time which compiled form fits would take long.

A kernel may be compiled ahead, in the background (see `background`); its first launch waits for what is under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

LOAD_BYTES = 16
"""The most that one thread loads at once, so what addresses are asked to be multiples of."""

under_way: dict[Any, list[Future[None]]] = {}
"""Compiling of kernels that has been started and not yet waited for."""


@dataclass(frozen=True)
class Launch:
    """A kernel with all of its arguments but tensors, for as many programs as given.

    types: of the tensors, None where there is none. numbers: after the tensors. constants: after those, in the kernel's
    order. compiled: by which tensors are aligned.
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
                found[grid](*tensors, *self.numbers, *self.constants.values())
                return
            for compiling in under_way.pop(self.kernel, ()):
                compiling.exception()  # waits; what went wrong there goes wrong here again
            found = self.kernel[grid](*tensors, *self.numbers, **self.keywords)
            if not INTERPRETED:
                self.compiled[aligned] = found

    @property
    def keywords(self) -> dict[str, Any]:
        """Constants, and options of the compiler."""
        return {**self.constants, "num_warps": self.warps, "enable_fp_fusion": False}

    def warm_up(self) -> None:
        """Compile it for aligned tensors, and load it on the current GPU, where that has not been done."""
        compiled = self.kernel.warmup(*self.types, *self.numbers, **self.keywords, grid=(self.programs,))
        compiled.run  # noqa: B018  (reading it loads the kernel, and has a C compiler build what launches it)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make a GPU current for a launch, which is seldom needed and never cheap."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
