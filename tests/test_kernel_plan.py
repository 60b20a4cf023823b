"""What `explain --kernels` says of products that took over a sum, and of weights.

Of regions: `test_cli.py`, and what is weighed: `passes/test_absorb.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from graphs import text
from torch import Tensor, fx, nn
from torch._functorch import config
from torch.utils.checkpoint import checkpoint

from nvfp4c import backend
from nvfp4c.bench.llama import SIZES, Llama
from nvfp4c.codegen import targets
from nvfp4c.dialect import Stage
from nvfp4c.fused_graphs import fused_graphs
from nvfp4c.kernel_plan import kernel_plan
from nvfp4c.options import parse
from nvfp4c.tasks import Task

pytest.importorskip("triton", reason="no triton for this system")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.fc(x))


@pytest.mark.parametrize(
    ("target", "operands", "width"),
    [("sm_90", ("bfloat16 [40, 32]", "bfloat16 [32, 32]"), 2), ("sm_100", ("uint8 [40, 16]", "uint8 [32, 16]"), 0.5)],
)
def test_a_sum_that_a_product_took_over(target: str, operands: tuple[str, str], width: float) -> None:
    model, x = Residual().bfloat16().requires_grad_(False), torch.randn(40, 32).bfloat16()
    rows = kernel_plan(Task("residual", model, args=(x,)), parse({"recipe": "nvfp4-all"}), target)
    (row,) = [row for row in rows.values() if "residual" in row.computes]
    assert str(row) == f"product, and the sum of it and a residual; reads {', '.join((*operands, 'bfloat16 [40, 32]'))}"
    assert (row.graph, row.sites, row.decision) == ("forward", ("fc fprop",), "")
    # Two operands, of packed ones 512 scales each, which is what a tile of them takes; two amaxes, residual and result.
    scales = 2 * 512 if target == "sm_100" else 0
    assert row.bytes == (40 + 32) * 32 * width + scales + 2 * 4 + 2 * 40 * 32 * 2


def test_a_sum_that_inductor_lays_open() -> None:
    """A copy and a factor of 1 stand between product and sum until Inductor's own passes have run."""

    class Copied(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + torch.ones(32).bfloat16() * self.fc(x).clone())

    model, x = Copied().bfloat16(), torch.randn(40, 32).bfloat16()
    task = Task("copied", model, [x], lambda model, batch: model(batch).float().sum())
    rows = kernel_plan(task, parse({"recipe": "nvfp4-all"}), "sm_90")
    assert [row.sites for row in rows.values() if "residual" in row.computes] == [("fc fprop",)]


def test_a_checkpoint_that_draws_random_numbers() -> None:
    """The partitioner then keeps the state of the generator, which it asks of the compile under way."""

    class Checkpointed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + checkpoint(lambda y: self.fc(nn.functional.dropout(y)), x.sin(), use_reentrant=False))

    model, x = Checkpointed().bfloat16(), torch.randn(40, 32).bfloat16()
    task = Task("checkpointed", model, [x], lambda model, batch: model(batch).float().sum())
    rows = kernel_plan(task, parse({"recipe": "nvfp4-all"}), "sm_90")
    assert [row.sites for row in rows.values() if "residual" in row.computes] == [("fc fprop",)]


def test_what_is_shown_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama blocks, up to where the backend lowers them and Inductor would compile for a GPU."""
    torch.manual_seed(0)
    model = Llama(replace(SIZES["tiny"], blocks=2)).bfloat16()
    x = torch.randn(1, 32, 32).bfloat16()
    options = parse({"recipe": "nvfp4-all"})
    compiled: list[str] = []

    def observe(step: str, stage: Stage, graph: fx.Graph) -> None:
        if step == "absorb":
            compiled.append(text(graph))

    def compile_only(gm: fx.GraphModule, given: Any) -> Any:
        with config.patch(force_non_lazy_backward_lowering=True):
            backend.compile_graph(gm, given, options, [observe])
        return gm.forward

    monkeypatch.setattr(targets, "resolve", lambda name, device: targets.TARGETS["sm_90"])
    monkeypatch.setattr(targets, "get_ready", lambda target: None)
    monkeypatch.setattr(backend, "compile_fx_inner", lambda gm, given, **how: make_boxed_func(gm.forward))
    torch._dynamo.reset()
    torch.compile(model, backend=compile_only)(x)
    torch._dynamo.reset()
    task = Task("llama", model, [x], lambda model, batch: model(batch).float().sum())
    assert [text(half.graph) for half in fused_graphs(task, options, "sm_90")] == compiled
    assert len(compiled) == 2


KEPT = 48 * 32 * 9 / 16
"""Bytes of codes and scales of 48 x 32 elements, without padding."""

NATIVE_SCALES = {"rows": 128 * 4, "columns": 128 * 4}
"""Bytes of the one tile that the scales of 48 rows, or of 32 columns, take."""


def weight_bytes(target: str, axis: str) -> float:
    """Read for its amax and to be packed; what is kept, written; and what is made of that, with an amax."""
    if target == "sm_90":
        return 2 * 48 * 32 * 2 + KEPT + 48 * 32 * 2 + 4
    kept = 48 * 32 / 2 + NATIVE_SCALES[axis]
    return 2 * 48 * 32 * 2 + kept + 2 * kept + 4  # a copy is read and written


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_weights(target: str) -> None:
    """Both graphs ask for it; where products read it packed, along one axis and along the other."""
    model, x = nn.Linear(32, 48, bias=False).bfloat16(), torch.randn(40, 32).bfloat16().requires_grad_()
    task = Task("layer", model, [x], lambda model, batch: model(batch).float().square().mean())
    planned = kernel_plan(task, parse({"recipe": "nvfp4-all"}), target)
    rows = [row for row in planned.values() if "a weight" in row.computes]
    native = target == "sm_100"
    axes = ["rows", "columns" if native else "rows"]
    made = "amax and packed" if native else "amax, packed and operand"
    assert [str(row) for row in rows] == [
        f"{made} by {axis} of a weight, once a version; reads bfloat16 [48, 32]" for axis in axes
    ]
    assert [(row.graph, row.sites) for row in rows] == [("forward", ("weight fprop",)), ("backward", ("weight dgrad",))]
    assert [row.bytes for row in rows] == [weight_bytes(target, axis) for axis in axes]
    off = kernel_plan(task, parse({"recipe": "nvfp4-all", "weight_cache": False}), target)
    assert not any("a weight" in row.computes for row in off.values())
