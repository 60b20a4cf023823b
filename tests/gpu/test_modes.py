"""Inductor's modes on a GPU: CUDA graphs and autotuning change when kernels run, never what they give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import nvfp4c
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


def accumulated(mode: str, weight_cache: bool) -> list[Tensor]:
    """Gradients of two steps of three micro-batches, and the parameters that an optimizer then left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 80)).to("cuda", torch.bfloat16)
    options = {"recipe": NEAREST, "mode": mode, "weight_cache": weight_cache}
    compiled = torch.compile(model, backend="nvfp4", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    found = []
    for parameter in model.parameters():
        # Else the first gradients are a CUDA graph's own memory, which its next replay writes over.
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            x = torch.randn(72, 96, device="cuda", dtype=torch.bfloat16)
            compiled(x).float().square().mean().backward()
        found += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        found += [p.detach().clone() for p in model.parameters()]
    torch.compiler.reset()
    return found


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_give_the_same_numbers(mode: str) -> None:
    (expected, *_) = steps("default", NEAREST, count=1)
    for found in steps(mode, NEAREST):
        assert equal(found, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_the_cache_of_weights_changes_no_number(mode: str) -> None:
    """With a fused optimizer, which leaves no new version; and with CUDA graphs, which must not replay old weights."""
    before = nvfp4c.weight_cache_info()
    found = accumulated(mode, weight_cache=True)
    used = nvfp4c.weight_cache_info().hits - before.hits
    assert (used > 0) == (mode != "reduce-overhead")
    assert equal(found, accumulated(mode, weight_cache=False))


def test_a_graph_that_the_user_captures_quantises_at_every_replay() -> None:
    torch.manual_seed(0)
    model = nn.Linear(96, 160, bias=False).to("cuda", torch.bfloat16)
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": NEAREST, "weight_cache": "always"})
    x = torch.randn(72, 96, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compiled(x)
            compiled(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(x)
        graph.replay()
        first = captured.clone()
        model.weight.mul_(2)
        graph.replay()
        assert torch.equal(captured, 2 * first), "a power of two passes through quantisation"
    torch.compiler.reset()


def test_each_stream_keeps_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Linear(96, 160, bias=False).to("cuda", torch.bfloat16)
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": NEAREST, "weight_cache": "always"})
    x = torch.randn(72, 96, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = compiled(x)
        before = nvfp4c.weight_cache_info()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = [compiled(x), compiled(x)]
        torch.cuda.current_stream().wait_stream(side)
        after = nvfp4c.weight_cache_info()
    assert equal(found, [expected, expected])
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)
    torch.compiler.reset()


def test_replayed_graphs_draw_fresh_random_bits() -> None:
    found = steps("reduce-overhead", RECIPES["nvfp4-all"])
    assert not equal(found[-1], found[-2]), "a replay rounds gradients anew"
    assert torch.equal(found[-1][0], found[-2][0]), "the forward rounds to nearest"
