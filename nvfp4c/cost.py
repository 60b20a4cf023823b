"""What kernels cost on each target: bytes moved and operations, as expressions in symbolic sizes, and seconds.

A kernel takes the longer of moving its bytes and of its arithmetic, and a launch on top. That is crude, and enough to
choose between ways of splitting the same work, which differ in whole passes over a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from nvfp4c.prologue import Prologue
from nvfp4c.region import Form, Output


@dataclass(frozen=True)
class Machine:
    """bandwidth: of memory, bytes a second. operations: instructions of single threads, a second. launch: seconds
    between kernels."""

    bandwidth: float
    operations: float
    launch: float = 2e-6


MEASURED_BANDWIDTH, MEASURED_OPERATIONS = 0.88, 0.8
"""What kernels reach of what data sheets promise: of an H100's 3.35 TB/s a copy moves 2.96, and its quantisers issue 24
of 29.6 instructions times 10^12 a second."""


def _machine(terabytes: float, multiprocessors: int, gigahertz: float) -> Machine:
    """By its data sheet. A multiprocessor issues for 128 threads in each cycle."""
    issued = multiprocessors * 128 * gigahertz * 1e9
    return Machine(terabytes * 1e12 * MEASURED_BANDWIDTH, issued * MEASURED_OPERATIONS)


MACHINES = {
    "sm_80": _machine(2.04, 108, 1.41 / 2),
    "sm_89": _machine(1.01, 128, 2.52),
    "sm_90": _machine(3.35, 132, 1.755),
    "sm_100": _machine(8.0, 148, 1.85),
    "sm_103": _machine(8.0, 160, 1.9),
    "sm_120": _machine(1.79, 170, 2.41),
}
"""A100 80GB, RTX 4090, H100 SXM, B200, B300 and RTX 5090. An A100 has half of the float32 units, so half the rate."""

OPERATIONS = {Form.VALUE: 1, Form.AMAX: 2, Form.ROTATED: 3, Form.OPERAND: 15, Form.PACKED: 17}
"""Instructions for each element, counted in the machine code for sm_90."""

LOADING = 4
"""Of what runs along rows, and again of what runs down columns."""

ROTATION = 5
STOCHASTIC = 11

STEP_OPERATIONS = {"div": 8, "erf": 25, "exp": 5, "reciprocal": 8, "rsqrt": 6, "sigmoid": 12, "sqrt": 6, "tanh": 25}
"""Of a prologue's steps; of any other, one."""


@dataclass(frozen=True)
class Work:
    """Of one kernel: bytes read and written, and operations. launches: 0 where another kernel does it on the way."""

    bytes: sympy.Expr
    operations: sympy.Expr
    launches: int = 1


def extent(size: int | torch.SymInt) -> sympy.Expr:
    """A size, in its symbols if it has any."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def elements(x: Tensor) -> sympy.Expr:
    """How many elements a tensor has, in the symbols of its shape."""
    return sympy.Mul(*map(extent, x.shape))


def size(x: Tensor) -> sympy.Expr:
    """Bytes of a tensor."""
    return elements(x) * x.dtype.itemsize


def _parts(outputs: Sequence[Output]) -> int:
    """What runs along rows and down columns are apart in a kernel."""
    return len({output.by_columns for output in outputs})


def of_outputs(outputs: Sequence[Output], count: sympy.Expr) -> sympy.Expr:
    """Operations that outputs take, of a matrix with so many elements."""
    return count * (
        LOADING * _parts(outputs)
        + sum(
            OPERATIONS[output.form] + ROTATION * (output.signs is not None) + STOCHASTIC * output.stochastic
            for output in outputs
        )
    )


def of_prologue(prologue: Prologue, outputs: Sequence[Output], count: sympy.Expr) -> sympy.Expr:
    """Operations of a prologue in a kernel with these outputs."""
    return count * _parts(outputs) * sum(STEP_OPERATIONS.get(step.operation, 1) for step in prologue.steps)


def seconds(kernels: Sequence[Work], machine: Machine) -> sympy.Expr:
    """How long kernels take, one after the other."""
    return sum(
        (
            sympy.Max(work.bytes / machine.bandwidth, work.operations / machine.operations)
            + work.launches * machine.launch
            for work in kernels
        ),
        sympy.Integer(0),
    )


UNKNOWN_SIZE = 8192
"""What a size is taken for that depends on data, so that no example is known: Inductor's choice too."""


def at_example_sizes(expression: sympy.Expr, like: Iterable[Tensor]) -> float:
    """The value of an expression for the sizes that a graph was captured with. like: tensors with its symbols."""
    hints: dict[sympy.Symbol, int] = {}
    for x in like:
        for one in x.shape:
            if isinstance(one, torch.SymInt):
                for symbol in one.node.expr.free_symbols:
                    hints[symbol] = _example(one.node.shape_env, symbol)
    return float(expression.subs(hints))


def _example(environment: Any, symbol: sympy.Symbol) -> int:
    """The size that a graph was captured with."""
    if hasattr(environment, "optimization_hint"):
        return int(environment.optimization_hint(symbol, fallback=UNKNOWN_SIZE))
    hint = environment.size_hint(symbol, allow_none=True)  # torch 2.12 and older
    return UNKNOWN_SIZE if hint is None else int(hint)
