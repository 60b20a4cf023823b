"""What kernels cost on each target: bytes moved and operations, as expressions in symbolic sizes, and seconds.

A kernel takes the longer of moving its bytes and of its arithmetic, and a launch on top. That is crude, and enough to
choose between ways of splitting the same work, which differ in whole passes over a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from nvfp4c.prologue import Prologue
from nvfp4c.region import Form, Output


@dataclass(frozen=True)
class Machine:
    """bandwidth: of memory, bytes a second. operations: of float32 units, a second. launch: seconds between kernels."""

    bandwidth: float
    operations: float
    launch: float = 2e-6


MACHINES = {
    "sm_80": Machine(2.0e12, 9.7e12),
    "sm_89": Machine(1.0e12, 41e12),
    "sm_90": Machine(3.35e12, 33e12),
    "sm_100": Machine(8.0e12, 37e12),
    "sm_103": Machine(8.0e12, 37e12),
    "sm_120": Machine(1.8e12, 62e12),
}
"""A100 80GB, RTX 4090, H100 SXM, B200, B300 and RTX 5090, by NVIDIA's data sheets; operations are half of the FP32
FLOP/s given there, which count a fused multiply-add as two."""

OPERATIONS = {Form.VALUE: 1, Form.AMAX: 2, Form.ROTATED: 8, Form.OPERAND: 12, Form.PACKED: 20}
"""An element, about: counted in the assembly for sm_90."""

ROTATION = 6
STOCHASTIC = 12

STEP_OPERATIONS = {"div": 8, "erf": 20, "exp": 6, "reciprocal": 8, "rsqrt": 12, "sigmoid": 12, "sqrt": 6, "tanh": 20}
"""Of a prologue's steps; of any other, one."""


@dataclass(frozen=True)
class Work:
    """Of one kernel: bytes read and written, and operations. launches: 0 where another kernel does it on the way."""

    bytes: sympy.Expr
    operations: sympy.Expr
    launches: int = 1


def elements(x: Tensor) -> sympy.Expr:
    """How many elements a tensor has, in the symbols of its shape."""
    found = sympy.Integer(1)
    for size in x.shape:
        found *= size.node.expr if isinstance(size, torch.SymInt) else size
    return found


def size(x: Tensor) -> sympy.Expr:
    """Bytes of a tensor."""
    return elements(x) * x.dtype.itemsize


def of_outputs(outputs: Iterable[Output], count: sympy.Expr) -> sympy.Expr:
    """Operations that outputs take, of matrices with so many elements each."""
    return count * sum(
        OPERATIONS[output.form] + ROTATION * (output.signs is not None) + STOCHASTIC * output.stochastic
        for output in outputs
    )


def of_prologue(prologue: Prologue, outputs: Iterable[Output], count: sympy.Expr) -> sympy.Expr:
    """Operations of a prologue in a kernel with these outputs: what runs along rows and down columns is apart there."""
    parts = len({output.by_columns for output in outputs})
    return count * parts * sum(STEP_OPERATIONS.get(step.operation, 1) for step in prologue.steps)


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


def at_example_sizes(expression: sympy.Expr, like: Iterable[Tensor]) -> float:
    """The value of an expression for the sizes that a graph was captured with. like: tensors with its symbols."""
    hints: dict[sympy.Symbol, int] = {}
    for x in like:
        for one in x.shape:
            if isinstance(one, torch.SymInt):
                environment = one.node.shape_env
                for symbol in one.node.expr.free_symbols:
                    hints[symbol] = int(environment.size_hint(symbol))
    return float(expression.subs(hints))
