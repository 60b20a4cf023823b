"""Scores of backward matmuls, against the gradients that a model really gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nvfp4c.recipe import Recipe
from nvfp4c.sensitivity.measure import everywhere, measure
from nvfp4c.sensitivity.score import gradient_errors
from nvfp4c.sensitivity.switched import SwitchedModel

pytestmark = pytest.mark.usefixtures("uncompiled")

CLOSE = 0.35
"""Relative. What is expected leaves out how errors and gradients lie to one another; in layers this small that is no
small part. From layer to layer the errors differ by more."""


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.flip(0)).square().mean()


def test_errors_of_gradients_are_those_that_a_model_gets() -> None:
    """The gradients of all parameters with one backward matmul in FP4: an error in dx is in all gradients before it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(48, 48, bias=False), nn.Tanh())))
    batch = torch.randn(64, 48)
    expected = gradient_errors(measure(model, [batch], squares, Recipe("all")))
    assert set(expected) == {*((f"{n}", "wgrad") for n in (0, 2, 4, 6)), *((f"{n}", "dgrad") for n in (2, 4, 6))}
    switched = SwitchedModel(model, everywhere(Recipe("all")))
    exact = switched.gradient((), batch, squares)
    for key, value in expected.items():
        error = switched.gradient([key], batch, squares) - exact
        assert float(error.square().sum() / exact.square().sum()) == pytest.approx(value, rel=CLOSE), key
    dgrads = [expected[name, "dgrad"] for name in ("2", "4", "6")]
    assert dgrads == sorted(dgrads) and dgrads[-1] > 2 * dgrads[0]
