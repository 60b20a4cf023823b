"""Who watches a model's matmuls is asked in their place; where that answers as they would, nothing else changes."""

from __future__ import annotations

import pytest
import torch
from graphs import captured, copied, example_inputs, run, run_until, same_bits, text
from torch import Tensor, fx, nn

from nvfp4c.passes.intercept import Observe, Switch
from nvfp4c.recipe import RECIPES
from nvfp4c.sensitivity import intercepted
from nvfp4c.sensitivity.intercepted import MATMUL, OBSERVE, plain

SESSION = -1


class Faithful:
    """Gives what the matmuls would."""

    def captured(self, graph: fx.Graph, names: object) -> None:
        raise AssertionError("no model is compiled here")

    def matmul(self, left: Tensor, right: Tensor, bias: Tensor | None, site: str, role: str) -> Tensor:
        return plain(left, right, bias)

    def observe(self, left: Tensor, right: Tensor, *_: object) -> Tensor:
        return plain(left, right, None)


@pytest.fixture
def joint() -> fx.Graph:
    """Of a layer that is frozen, which leaves its forward matmul alone, and of one that is trained."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32, bias=False))
    model[0].requires_grad_(False)
    return run_until(captured(model, torch.randn(2, 24, 32), train=True), "assign", RECIPES["nvfp4-all"])


SWITCHED = {
    "%addmm = aten.addmm(%primals_2, %view, %permute)": (
        "%matmul = nvfp4_sensitivity.matmul(-1, %view, %permute, %primals_2, 0, fprop)"
    ),
    "%mm = aten.mm(%view_3, %permute_2)": (
        "%matmul_2 = nvfp4_sensitivity.matmul(-1, %view_3, %permute_2, None, 1, fprop)"
    ),
    "%mm_2 = aten.mm(%permute_3, %view_3)": (
        "%matmul_3 = nvfp4_sensitivity.matmul(-1, %permute_3, %view_3, None, 1, wgrad)"
    ),
    "(%addmm,": "(%matmul,",
    "(%mm,": "(%matmul_2,",
    "(%mm_2,": "(%matmul_3,",
}
OBSERVED = {
    "%addmm = aten.addmm(%primals_2, %view, %permute)": (
        "%matmul = nvfp4_sensitivity.matmul(-1, %view, %permute, %primals_2, 0, fprop)"
    ),
    "%mm_2 = aten.mm(%permute_3, %view_3)": (
        "%observe = nvfp4_sensitivity.observe(-1, %permute_3, %view_3, [%view_3, %permute_2], [], 2, 1, wgrad)"
    ),
    "(%addmm,": "(%matmul,",
    "(%mm_2,": "(%observe,",
}


@pytest.mark.parametrize(
    ("rewrite", "changes"),
    [(Switch(MATMUL, SESSION), SWITCHED), (Observe(OBSERVE, MATMUL, SESSION), OBSERVED)],
    ids=["switch", "observe"],
)
def test_what_becomes_of_matmuls(
    rewrite: Switch | Observe, changes: dict[str, str], joint: fx.Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, inputs = copied(joint), example_inputs(joint)
    expected = text(joint)
    for old, new in changes.items():
        assert expected.count(old) == 1
        expected = expected.replace(old, new)
    assert text(rewrite(joint)) == expected
    watcher = Faithful()
    monkeypatch.setitem(intercepted._sessions, SESSION, watcher)
    for found, exact in zip(run(joint, *inputs), run(before, *inputs), strict=True):
        assert same_bits(found, exact)
