"""explain: a row for each matmul, its size and share, what becomes of it and why."""

from __future__ import annotations

import json

import pytest
import torch
from graphs import captured
from torch import Tensor, nn

from nvfp4c import explain
from nvfp4c.dialect import matmul_of
from nvfp4c.errors import OptionError, PlanError
from nvfp4c.explanation import Explanation, Row, sizes
from nvfp4c.passes.classify import Classify
from nvfp4c.plan import from_rules
from nvfp4c.recipe import RECIPES


class Decoder(nn.Module):
    """Two blocks and a head; operations in the ratio 1 : 1 : 2, forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential() for _ in range(2))
        for block in self.layers:
            block.up = nn.Linear(32, 32)
        self.head = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.head(x)


X = torch.randn(3, 8, 32)
HEAD = "output head: no other matmul follows it"


def test_rows_of_training() -> None:
    """Every role of every layer, in the order of the graph, with the sizes of its own product."""
    found = explain(Decoder(), X)
    assert (found.target, found.recipe, found.graphs) == ("cpu", "nvfp4", 1)
    assert [(row.site, row.role, row.m, row.n, row.k, row.precision) for row in found.rows] == [
        ("layers.0.up", "fprop", 24, 32, 32, "nvfp4"),
        ("layers.1.up", "fprop", 24, 32, 32, "nvfp4"),
        ("head", "fprop", 24, 64, 32, "bf16"),
        ("head", "dgrad", 24, 32, 64, "bf16"),
        ("head", "wgrad", 64, 32, 24, "bf16"),
        ("layers.1.up", "dgrad", 24, 32, 32, "nvfp4"),
        ("layers.1.up", "wgrad", 32, 32, 24, "nvfp4"),
        ("layers.0.up", "wgrad", 32, 32, 24, "nvfp4"),
    ]


def test_how_operands_are_quantised() -> None:
    rows = {(row.site, row.role): row for row in explain(Decoder(), X).rows}
    fprop, dgrad, wgrad = (rows["layers.1.up", role] for role in ("fprop", "dgrad", "wgrad"))
    assert (fprop.left, fprop.right) == ("x 1x16 nearest", "w 16x16 nearest")
    assert (dgrad.left, dgrad.right) == ("dy 1x16 stochastic", "w^T 16x16 nearest")
    assert (wgrad.left, wgrad.right) == ("dy^T 1x16 stochastic, RHT", "x^T 1x16 nearest, RHT")
    assert fprop.kernel == "aten: quantise, FP32 GEMM"
    head = rows["head", "fprop"]
    assert (head.left, head.right, head.kernel, head.reason) == ("", "", "Inductor", HEAD)
    assert fprop.reason == ""


def test_shares() -> None:
    """Of all matmul operations, forward and backward apart in the totals."""
    found = explain(Decoder(), X)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    first, head = found.rows[0], found.rows[2]
    assert first.operations == 2 * 24 * 32 * 32
    assert first.share == pytest.approx(1 / 11)  # forward 1 + 1 + 2, backward 2 * 2 of the head, 2 and 1 of the blocks
    assert head.share == pytest.approx(2 / 11)
    assert found.forward_share == pytest.approx(2 / 4)
    assert found.backward_share == pytest.approx(3 / 7)


def test_inference_has_no_backward() -> None:
    with torch.no_grad():
        found = explain(Decoder(), X)
    assert [row.role for row in found.rows] == ["fprop"] * 3
    assert found.backward_share is None


def test_frozen_models_have_no_backward() -> None:
    assert explain(Decoder().requires_grad_(False), X).backward_share is None


def test_a_model_without_matmuls() -> None:
    found = explain(nn.LayerNorm(32), X)
    assert (found.rows, found.forward_share, found.backward_share) == ((), 0.0, None)


def test_a_loss() -> None:
    """With a loss the model is called as the loss calls it."""
    found = explain(Decoder(), {"x": X}, loss=lambda model, batch: model(batch["x"]).sum())
    assert len(found.rows) == 8


def test_recipe_and_plan() -> None:
    everything = explain(Decoder(), X, recipe="nvfp4-all")
    assert (everything.forward_share, everything.backward_share) == (1.0, 1.0)
    plan = from_rules({"layers.0.*": "bf16", "head": {"fprop": "nvfp4"}})
    rows = {(row.site, row.role): row for row in explain(Decoder(), X, recipe=RECIPES["nvfp4"], plan=plan).rows}
    assert rows["layers.0.up", "wgrad"].reason == "plan: layers.0.*"
    assert rows["head", "fprop"].precision == "nvfp4"
    assert rows["head", "dgrad"].reason == HEAD


def test_weights_only() -> None:
    rows = explain(Decoder(), X, recipe="nvfp4-weight-only").rows
    assert (rows[0].left, rows[0].right, rows[0].kernel) == ("", "w 1x16 nearest", "aten: quantise, dequantise")


def test_bad_input() -> None:
    with pytest.raises(PlanError, match=r"names 'layer\.0\.up'.* did you mean 'layers\.0\.up'"):
        explain(Decoder(), X, plan={"layer.0.up": "bf16"})
    with pytest.raises(OptionError, match="unknown recipe 'fp4'"):
        explain(Decoder(), X, recipe="fp4")


def test_graph_breaks() -> None:
    """All graphs of the model count."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    found = explain(Broken(), X)
    assert found.graphs == 2
    assert [f"{row.site} {row.role}" for row in found.rows] == ["a fprop", "a wgrad", "b fprop", "b dgrad", "b wgrad"]
    assert sum(row.share for row in found.rows) == pytest.approx(1)


def test_the_model_is_left_as_it_was() -> None:
    """Explaining neither trains nor changes anything."""
    model = Decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Product(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w)


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (nn.Linear(32, 48), torch.randn(8, 32), (8, 48, 32)),
        (nn.Linear(32, 48), torch.randn(2, 3, 32), (6, 48, 32)),
        (nn.Linear(32, 48, bias=False), torch.randn(32), (1, 48, 32)),
        (Product(torch.randn(4, 32, 48)), torch.randn(4, 8, 32), (32, 48, 32)),
        (nn.Conv1d(32, 48, 1), torch.randn(2, 32, 5), (10, 48, 32)),
        (nn.Conv2d(32, 48, 1), torch.randn(2, 32, 5, 3), (30, 48, 32)),
        (nn.Conv2d(32, 48, 1, stride=2), torch.randn(2, 32, 5, 3), (12, 48, 32)),
        (nn.Conv2d(32, 48, 1, groups=4), torch.randn(2, 32, 5, 3), (30, 48, 8)),
        (nn.Conv3d(32, 48, 1), torch.randn(2, 32, 5, 3, 2), (60, 48, 32)),
        (nn.ConvTranspose2d(32, 48, 1, groups=4), torch.randn(2, 32, 5, 3), (30, 48, 8)),
    ],
)
def test_sizes(model: nn.Module, x: Tensor, expected: tuple[int, int, int]) -> None:
    """M counts batches and pixels; K is what one element of the output is summed over."""
    found = captured(model, x, train=False)
    (node,) = (node for node in Classify(found.names)(found.graph).nodes if matmul_of(node) is not None)
    assert sizes(node) == expected


def test_symbolic_sizes() -> None:
    """Shown at the values of the example."""
    x = torch.randn(24, 32)
    torch._dynamo.mark_dynamic(x, 0)
    assert [(row.m, row.n, row.k) for row in explain(nn.Linear(32, 48), x).rows] == [(24, 48, 32), (48, 32, 24)]


ROW = Row("fc", "fprop", 8, 16, 32, 0.5, "nvfp4", "x 1x16 nearest", "w 16x16 nearest", "kernel", "")
OTHER = Row("head", "dgrad", 8, 16, 32, 0.5, "bf16", "", "", "Inductor", "because")


def test_text() -> None:
    assert str(Explanation("cpu", "nvfp4", 1, (ROW, OTHER))) == (
        "fc   fprop 8x16x32  50.0% nvfp4 x 1x16 nearest, w 16x16 nearest\n"
        "head dgrad 8x16x32  50.0% bf16 because\n"
        "matmul operations in NVFP4: forward 100.0%, backward 0.0%"
    )
    assert str(Explanation("cpu", "nvfp4", 0, ())) == "matmul operations in NVFP4: forward 0.0%"


def test_json() -> None:
    """Plain data: what is read back is what was written, with every field of every row."""
    found = explain(Decoder(), X)
    data = json.loads(json.dumps(found.to_json()))
    assert (data["target"], data["recipe"], data["graphs"]) == ("cpu", "nvfp4", 1)
    assert (data["forward_share"], data["backward_share"]) == (found.forward_share, found.backward_share)
    assert tuple(Row(**row) for row in data["rows"]) == found.rows
