"""Inductor's modes on a GPU: CUDA graphs and autotuning change when kernels run, never what they give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nvfp4c.recipe import RECIPES, Recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NEAREST = replace(RECIPES["nvfp4-all"], gradient_rounding="nearest")


def steps(mode: str, recipe: Recipe, count: int = 4) -> list[list[Tensor]]:
    """Output and gradients of equal steps, the later of which a mode with CUDA graphs replays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 80)).to("cuda", torch.bfloat16)
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": recipe, "mode": mode})
    x = torch.randn(72, 96, device="cuda", dtype=torch.bfloat16)
    found = []
    for _ in range(count):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad(set_to_none=True)
        output = compiled(x)
        output.float().square().mean().backward()
        found.append([tensor.detach().clone() for tensor in (output, *(p.grad for p in model.parameters()))])
    torch.compiler.reset()
    return found


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_give_the_same_numbers(mode: str) -> None:
    (expected, *_) = steps("default", NEAREST, count=1)
    for found in steps(mode, NEAREST):
        assert equal(found, expected)


def test_replayed_graphs_draw_fresh_random_bits() -> None:
    found = steps("reduce-overhead", RECIPES["nvfp4-all"])
    assert not equal(found[-1], found[-2]), "a replay rounds gradients anew"
    assert torch.equal(found[-1][0], found[-2][0]), "the forward rounds to nearest"
