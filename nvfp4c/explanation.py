"""What becomes of every matmul of a model, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from nvfp4c import options as option_parsing
from nvfp4c import pipeline
from nvfp4c.backend import device_of
from nvfp4c.capture import capture
from nvfp4c.codegen import targets
from nvfp4c.dialect import Assignment, Operand, Quantization, Role, arguments, assignment_of, matmul_of, numbers
from nvfp4c.passes.classify import operand_places


@dataclass(frozen=True)
class Row:
    """One site in one role.

    m, n, k: the product is M x N with K summed over (a batch is counted in M). share: of all the model's matmul
    operations, 0 to 1. left, right: how each operand is quantised, "" when it is not. reason: why bf16, "" for nvfp4.
    """

    site: str
    role: str
    m: int
    n: int
    k: int
    share: float
    precision: str
    left: str
    right: str
    kernel: str
    reason: str

    @property
    def operations(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Explanation:
    """All rows in the order of the graph. The shares are of matmul operations that run in NVFP4, 0 to 1."""

    target: str
    recipe: str
    graphs: int
    rows: tuple[Row, ...]

    @property
    def forward_share(self) -> float:
        return self._share(forward=True) or 0.0

    @property
    def backward_share(self) -> float | None:
        """None for a model that is not trained."""
        return self._share(forward=False)

    def _share(self, forward: bool) -> float | None:
        rows = [row for row in self.rows if (row.role == Role.FPROP.value) == forward]
        total = sum(row.operations for row in rows)
        return sum(row.operations for row in rows if row.precision == "nvfp4") / total if total else None

    def to_json(self) -> dict[str, object]:
        """Plain data with every row."""
        return {
            "target": self.target,
            "recipe": self.recipe,
            "graphs": self.graphs,
            "forward_share": self.forward_share,
            "backward_share": self.backward_share,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        widths = (max((len(row.site) for row in self.rows), default=4), 5)
        lines = [
            f"{row.site:{widths[0]}} {row.role:{widths[1]}} {row.m}x{row.n}x{row.k} {row.share:6.1%} "
            f"{row.precision} {', '.join(filter(None, (row.left, row.right))) or row.reason}"
            for row in self.rows
        ]
        backward = "" if self.backward_share is None else f", backward {self.backward_share:.1%}"
        lines.append(f"matmul operations in NVFP4: forward {self.forward_share:.1%}{backward}")
        return "\n".join(lines)


def explain(
    model: Callable[..., Any],
    *args: Any,
    loss: Callable[..., Any] | None = None,
    recipe: object = None,
    plan: object = None,
    target: str = "auto",
) -> Explanation:
    """Say what the backend would do with each matmul of `model(*args)`, or of `loss(model, *args)`.

    The model is run once, uncompiled. A model whose parameters need gradients is explained as in training, both
    directions; under `torch.no_grad()`, or with frozen parameters, forward only. Raises what the backend would raise.
    """
    given: dict[str, object] = {"plan": plan, "target": target}
    if recipe is not None:
        given["recipe"] = recipe
    options = option_parsing.parse(given)
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    chosen = targets.resolve(options.target, device_of([*parameters, *tree_leaves(args)]))
    kernels = targets.kernel_table(chosen).names
    captured = capture(model, *args, call=loss)
    rows: list[Row] = []
    for found in captured:
        if found.names.weights:
            options.plan.check_sites(found.names.weights)
        pipeline.run(found.graph, pipeline.decide(options.recipe, options.plan, found.names), "explain")
        rows.extend(rows_of(found.graph, kernels))
    total = sum(row.operations for row in rows) or 1
    shared = tuple(Row(**{**asdict(row), "share": row.operations / total}) for row in rows)
    return Explanation(chosen.name, options.recipe.name, len(captured), shared)


def rows_of(graph: fx.Graph, kernels: Mapping[str, str]) -> list[Row]:
    """A row for each matmul of a graph that `assign` has seen; `share` is left at 0. kernels: names of the target's."""
    rows = []
    for node in graph.nodes:
        matmul, assignment = matmul_of(node), assignment_of(node)
        if matmul is None or assignment is None:
            continue
        m, n, k = sizes(node)
        left, right = (
            _describe(operand, how, matmul.role)
            for operand, how in zip(matmul.operands, (assignment.left, assignment.right), strict=True)
        )
        rows.append(
            Row(
                matmul.site,
                matmul.role.value,
                m,
                n,
                k,
                0.0,
                assignment.precision,
                left,
                right,
                _kernel(assignment, kernels),
                assignment.reason,
            )
        )
    return rows


def sizes(node: fx.Node) -> tuple[int, int, int]:
    """(M, N, K) of a matmul node, a batch counted in M; symbolic sizes at their example values."""
    places = operand_places(node)
    assert places is not None
    left, right = (arguments(node)[place].meta["val"] for place in places)
    output = node.meta["val"]
    if node.target is torch.ops.aten.convolution.default:  # channels are contracted, in each group apart
        transposed, groups = arguments(node)[6], arguments(node)[8]
        channels = right.shape[0] // groups if transposed else right.shape[1]
        shape = (output.numel() // output.shape[1], output.shape[1], channels)
    elif right.dim() == 1:
        shape = (left.shape[0], 1, left.shape[1])
    else:
        shape = (math.prod(output.shape[:-1]), output.shape[-1], left.shape[-1])
    m, n, k = numbers(shape)
    return m, n, k


def _describe(operand: Operand, how: Quantization | None, role: Role) -> str:
    if how is None:
        return ""
    turned = role is Role.WGRAD or (role is Role.DGRAD and operand is Operand.WEIGHT)
    rotated = ", RHT" if how.signs is not None else ""
    return f"{operand.value}{'^T' if turned else ''} {how.block[0]}x{how.block[1]} {how.rounding}{rotated}"


def _kernel(assignment: Assignment, kernels: Mapping[str, str]) -> str:
    if assignment.precision == "bf16":
        return "Inductor"
    both = assignment.left is not None and assignment.right is not None
    return kernels["matmul"] if both else kernels["dequantize"]
