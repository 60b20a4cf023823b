"""The Triton source of a prologue: a jit function from float32 elements of the inputs to those of the matrices."""

from __future__ import annotations

import math

from nvfp4c.prologue import Argument, Prologue, Step

TEMPLATES = {
    "abs": "tl.abs({})",
    "add": "{} + {}",
    "cube": "{0} * {0} * {0}",
    "div": "{} / {}",
    "eq": "{} == {}",
    "erf": "tl.erf({})",
    "exp": "tl.exp({})",
    "ge": "{} >= {}",
    "gt": "{} > {}",
    "le": "{} <= {}",
    "lt": "{} < {}",
    "maximum": "larger({}, {})",
    "minimum": "smaller({}, {})",
    "mul": "{} * {}",
    "neg": "-1.0 * {}",
    "reciprocal": "1.0 / {}",
    "relu": "larger({}, 0.0)",
    "rsqrt": "tl.rsqrt({})",
    "sigmoid": "tl.sigmoid({})",
    "sqrt": "tl.sqrt({})",
    "square": "{0} * {0}",
    "sub": "{} - {}",
    "tanh": "tanh({})",
    "to": "{}",
    "where": "tl.where({}, {}, {})",
}
"""Of each operation of `nvfp4c.prologue.OPERATIONS`, on float32, as Inductor has it: quotients and roots are off by two
units in the last place at most. Correctly rounded ones branch for rare operands, which made a kernel of a gated layer
twice as slow. A minus sign would be 0 - x, which loses the sign of a zero."""


def prologue_source(prologue: Prologue) -> list[str]:
    """Lines of the function `prologue(v0, v1, ..)`, which gives one matrix, or a tuple of several."""
    names = ", ".join(f"v{place}" for place in range(len(prologue.inputs)))
    lines = ["@triton.jit", f"def prologue({names}):"]
    for place, step in enumerate(prologue.steps, len(prologue.inputs)):
        lines.append(f"    v{place} = {_expression(step)}")
    results = ", ".join(f"v{place}" for place in prologue.results)
    return [*lines, f"    return {results}", "", ""]


def _expression(step: Step) -> str:
    computed = TEMPLATES[step.operation].format(*map(_argument, step.arguments))
    return computed if step.dtype in ("float32", "bool") else f"rounded_{step.dtype}({computed})"


def _argument(given: Argument) -> str:
    if isinstance(given, int):
        return f"v{given}"
    return repr(given) if math.isfinite(given) else f'float("{given}")'
