"""What kernels cost on each target: bytes moved and operations, as expressions in symbolic sizes, and seconds.

A kernel takes the longer of moving its bytes and of its arithmetic, and a launch on top. That is crude, and enough to
choose between ways of splitting the same work, which differ in whole passes over a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from nvfp4c.prologue import Prologue
from nvfp4c.region import Form, Output


@dataclass(frozen=True)
class Machine:
    """bandwidth: of memory, bytes a second. operations: instructions of single threads, a second. launch: seconds
    between kernels. matmul: multiplications and additions of tensor cores a second, by the precision of the operands;
    "nvfp4" only where they take it."""

    bandwidth: float
    operations: float
    launch: float = 2e-6
    matmul: Mapping[str, float] = field(default_factory=dict)


MEASURED_BANDWIDTH, MEASURED_OPERATIONS, MEASURED_MATMUL = 0.88, 0.8, 0.73
"""What kernels reach of what data sheets promise: of an H100's 3.35 TB/s a copy moves 2.96, its quantisers issue 24 of
29.6 instructions times 10^12 a second, and cuBLAS multiplies large BF16 matrices at 693 to 761 of 989 TFLOP/s. That
FP4 reaches as much of its promise is an assumption."""


def _machine(terabytes: float, multiprocessors: int, gigahertz: float, bf16: float, nvfp4: float = 0.0) -> Machine:
    """By its data sheet. A multiprocessor issues for 128 threads in each cycle. bf16, nvfp4: dense, in TFLOP/s."""
    issued = multiprocessors * 128 * gigahertz * 1e9
    matmul = {name: rate * 1e12 * MEASURED_MATMUL for name, rate in (("bf16", bf16), ("nvfp4", nvfp4)) if rate}
    return Machine(terabytes * 1e12 * MEASURED_BANDWIDTH, issued * MEASURED_OPERATIONS, matmul=matmul)


MACHINES = {
    "sm_80": _machine(2.04, 108, 1.41 / 2, bf16=312),
    "sm_89": _machine(1.01, 128, 2.52, bf16=165.2),
    "sm_90": _machine(3.35, 132, 1.755, bf16=989),
    "sm_100": _machine(8.0, 148, 1.85, bf16=2250, nvfp4=9000),
    "sm_103": _machine(8.0, 160, 1.9, bf16=2250, nvfp4=13125),
    "sm_120": _machine(1.79, 170, 2.41, bf16=209.5, nvfp4=1676),
}
"""A100 80GB, RTX 4090, H100 SXM, B200, B300 and RTX 5090. An A100 has half of the float32 units, so half the rate.
Matmuls: NVIDIA's data sheets, without sparsity, accumulating in FP32; for B200 and B300 an eighth of an HGX board."""

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


BF16_BYTES, NVFP4_BYTES = 2.0, 0.5625
"""Of an element: 16 bits, and 4 bits with a sixteenth of a scale of 8 bits."""


def matmul_seconds(m: int, n: int, k: int, precision: str, machine: Machine) -> float:
    """How long a product of [m, k] and [n, k] takes, with quantising both where precision is "nvfp4".

    Each operand is read once and written once as the product reads it: packed where tensor cores take NVFP4, else
    dequantised, which is multiplied as BF16 is. Its amax, a prologue, and a matmul that reads the same quantised
    operand cost and save nothing here: the sum over matmuls stays linear in what each of them runs in.
    """
    native = precision in machine.matmul
    width = NVFP4_BYTES if native and precision == "nvfp4" else BF16_BYTES
    read = (m + n) * k
    product = max(
        2.0 * m * n * k / machine.matmul[precision if native else "bf16"],
        (read * width + m * n * BF16_BYTES) / machine.bandwidth,
    )
    if precision == "bf16":
        return product + machine.launch
    instructions = LOADING + OPERATIONS[Form.PACKED if native else Form.OPERAND]
    quantizing = max(read * (BF16_BYTES + width) / machine.bandwidth, read * instructions / machine.operations)
    return product + quantizing + 3 * machine.launch


UNKNOWN_SIZE = 8192
"""What a size is taken for that depends on data, so that no example is known: Inductor's choice too."""


def at_example_sizes(expression: sympy.Expr, like: Iterable[Tensor]) -> float:
    """The value of an expression for the sizes that a graph was captured with. like: tensors with its symbols."""
    hints: dict[sympy.Symbol, int] = {}
    for x in like:
        for one in (*x.shape, *x.stride()):
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
