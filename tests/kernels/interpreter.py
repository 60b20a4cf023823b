# mypy: allow-untyped-defs
"""What Triton's interpreter, where it is used, can do."""

from __future__ import annotations

import inspect

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


@triton.jit
def loop_kernel(out, count):
    for index in tl.range(0, count):
        tl.store(out + index, index)


def loops_run() -> bool:
    """Triton 3.6's interpreter takes a loop's bound from an array in a way that NumPy 2.4 no longer allows."""
    if not triton.knobs.runtime.interpret:
        return True
    try:
        loop_kernel[(1,)](torch.empty(2, dtype=torch.int32), 2)
    except InterpreterError:
        return False
    return True


@triton.jit
def minimum_kernel(x):
    tl.store(x, tl.minimum(tl.load(x), 1.0))


def minimum_drops_nan() -> bool:
    """Triton 3.6's interpreter keeps it, where a GPU gives the number, as kernels count on."""
    if not triton.knobs.runtime.interpret:
        return True
    x = torch.tensor([torch.nan])
    minimum_kernel[(1,)](x)
    return bool(x == 1.0)


LOOPS_RUN = loops_run()

needs_loops = pytest.mark.skipif(not LOOPS_RUN, reason="this Triton's interpreter cannot loop with this NumPy")
needs_dropped_nan = pytest.mark.skipif(
    not minimum_drops_nan(), reason="this Triton's interpreter keeps a NaN that a GPU's minimum drops"
)


def patch_once_a_kernel() -> None:
    """Let the interpreter replace the functions of Triton's language once a kernel, not anew for each function that the
    kernel calls: replaced they are already, and that takes a third of the time."""
    scopes = getattr(interpreter, "_LangPatchScope", None)
    if scopes is None:  # a version that does it otherwise
        return
    patch, replaced = interpreter._patch_lang, set()

    class Kernel(scopes):
        def restore(self) -> None:
            super().restore()
            replaced.clear()

    def patch_lang(function):
        languages = {name for name, value in (("tl", tl), ("core", tl.core)) if value in globals_of(function)}
        if replaced and languages <= replaced:
            return scopes()
        scope = patch(function)
        if not replaced:
            scope.__class__ = Kernel
        replaced.update(languages)
        return scope

    interpreter._patch_lang = patch_lang


def globals_of(function) -> list[object]:
    return [value for value in function.__globals__.values() if inspect.ismodule(value)]
