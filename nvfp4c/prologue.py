"""A prologue: the pointwise expressions that a region's kernel computes its matrices with, as data.

    input 0: the gate, input 1: the other half     of a SwiGLU layer, both [M, K]
    step 2: sigmoid(0)
    step 3: mul(0, 2)
    step 4: mul(3, 1)
    results: (4,)
Each step computes in float32 and rounds to its own dtype, as PyTorch does it operation by operation. So a kernel with a
prologue gives what the separate operations would have given, but for the last bits of exp and its like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Kind(str, Enum):
    """What an input is to a matrix [.., M, K].

    FULL: as large as it. ROW: a number for each row, [.., M, 1]. COLUMN: a number for each column, [K].
    """

    FULL = "full"
    ROW = "row"
    COLUMN = "column"


Argument = int | float
"""The place of a value (an int), or a constant (a float)."""


def _clamp(function: Callable[..., Tensor], clamp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, other: function(x, other) if isinstance(other, Tensor) else clamp(x, other)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs,
    "add": torch.add,
    "cube": lambda x: torch.pow(x, 3),
    "div": torch.div,
    "eq": torch.eq,
    "erf": torch.erf,
    "exp": torch.exp,
    "ge": torch.ge,
    "gt": torch.gt,
    "le": torch.le,
    "lt": torch.lt,
    "maximum": _clamp(torch.maximum, torch.clamp_min),
    "minimum": _clamp(torch.minimum, torch.clamp_max),
    "mul": torch.mul,
    "neg": torch.neg,
    "reciprocal": torch.reciprocal,
    "relu": torch.relu,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "sub": torch.sub,
    "tanh": torch.tanh,
    "to": torch.clone,
    "where": torch.where,
}
"""What a step can be, by its name. "to" only rounds to the step's dtype."""


@dataclass(frozen=True, eq=False)
class Step:
    """One operation. dtype: of its result, "bool" for a comparison."""

    operation: str
    arguments: tuple[Argument, ...]
    dtype: str

    # Python has 2 == 2.0, but the value at place 2 is no constant; and 0.0 == -0.0.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class Prologue:
    """Values are numbered: the inputs, then the result of each step. results: those that are matrices of the region.

    The first input is FULL.
    """

    inputs: tuple[Kind, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        """Whether the only matrix is the only input."""
        return self == IDENTITY

    def evaluate(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The matrices. inputs: of the shapes that their kinds say, the first [.., M, K]."""
        values = list(inputs)

        def value(given: Argument, first: bool) -> Tensor | float:
            if isinstance(given, int):
                return _float32(values[given])
            # Most functions want a tensor first.
            return torch.tensor(given, dtype=torch.float32, device=inputs[0].device) if first else given

        for step in self.steps:
            given = [value(one, place == 0) for place, one in enumerate(step.arguments)]
            values.append(OPERATIONS[step.operation](*given).to(getattr(torch, step.dtype)))
        return [values[place].expand(inputs[0].shape) for place in self.results]

    def result_types(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """Of the matrices that `evaluate` gives, by the types of its inputs. Their shape is the first input's."""
        steps = [getattr(torch, step.dtype) for step in self.steps]
        return [[*inputs, *steps][place] for place in self.results]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Prologue:
        return Prologue(
            tuple(Kind(kind) for kind in data["inputs"]),
            tuple(Step(step["operation"], tuple(step["arguments"]), step["dtype"]) for step in data["steps"]),
            tuple(data["results"]),
        )


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.bool else x.float()


IDENTITY = Prologue((Kind.FULL,), (), (0,))
"""The matrix is given as it is."""
