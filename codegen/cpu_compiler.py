"""Compiling the CPU's functions: each once for every kind of arguments, whatever their sizes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from types import FunctionType
from typing import Any

import torch

EXACT: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}
"""Inductor would else drop a rounding to BF16 that is followed by a conversion back to FP32."""


def compiled(function: Callable[..., Any], kind: Hashable) -> Callable[..., Any]:
    """`function` compiled for arguments of one kind. kind: all that compiled code depends on although sizes are
    dynamic, as 0 and 1 are."""
    assert isinstance(function, FunctionType)
    return compile_kind(function, kind)


@cache
def compile_kind(function: FunctionType, kind: Hashable) -> Callable[..., Any]:
    """Each kind gets a code object of its own: Dynamo counts recompilations by code object, and gives up compiling one
    that has too many."""
    name = f"{function.__name__}_{compile_kind.cache_info().currsize}"
    code = function.__code__.replace(co_name=name)
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    return torch.compile(copy, dynamic=True, fullgraph=True, options=EXACT)
