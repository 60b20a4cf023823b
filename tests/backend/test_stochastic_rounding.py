"""Stochastic rounding in a compiled step: repeatable under a seed, fresh at every step, right on average."""

from __future__ import annotations

import pytest
import torch
from inside import KernelCall, Mlp
from torch import Tensor, nn

from nvfp4c import numerics

pytestmark = pytest.mark.usefixtures("eager_kernels")

STEPS = 400


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_seed_repeats_a_run_and_steps_differ(kernel_calls: list[KernelCall]) -> None:
    torch.manual_seed(0)
    model = Mlp()
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": "nvfp4-all"})
    x = torch.randn(48, 32)

    def run(seed: int) -> list[list[Tensor]]:
        torch.manual_seed(seed)
        steps = []
        for _ in range(3):
            model.zero_grad()
            compiled(x).square().mean().backward()
            steps.append(gradients(model))
        return steps

    first, again, other = run(7), run(7), run(8)
    for one, same in zip(first, again, strict=True):
        assert all(map(torch.equal, one, same))
    for left, right in ((first[0], first[1]), (first[1], first[2]), (first[0], other[0])):
        assert not any(torch.equal(a, b) for a, b in zip(left, right, strict=True) if a.dim() == 2)
    streams = [(int(call.seed), int(call.others[4])) for call in kernel_calls if call.seed is not None]
    assert 2 * len(streams) == 3 * len(set(streams)), "of three runs only the repeated one draws the same again"


def test_gradients_are_right_on_average() -> None:
    """The mean of many steps' input gradient is the product of the exact output gradient with the quantised weight.

    Each block of the output gradient has 6 as its largest value, so scales are exact, nothing is clipped, and every
    value is a whole number of 1/64, so that 8 random bits round it without any bias. What is left is chance: in each
    place the mean of n steps is off by sigma / sqrt(n), and of 1536 places one by 6 of those in 1 of 300,000 runs.
    """
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    compiled = torch.compile(layer, backend="nvfp4", options={"recipe": "nvfp4-all"})
    tangent = torch.randint(-6 * 64, 6 * 64 + 1, (48, 32)) / 64
    tangent[:, ::16] = 6.0
    x = torch.randn(48, 32, requires_grad=True)
    found = []
    for _ in range(STEPS):
        compiled(x).backward(tangent)
        found.append(x.grad)
        x.grad = None
    samples = torch.stack(found).double()
    weight = numerics.quantize(layer.weight.detach(), block=(16, 16)).dequantize()
    expected = tangent.double() @ weight.double()
    spread = samples.std(0) / STEPS**0.5
    assert spread.min() > 0, "every step rounds anew"
    assert ((samples.mean(0) - expected) / spread).abs().max() < 6
    nearest = numerics.quantize(tangent).dequantize().double() @ weight.double()
    assert ((nearest - expected) / spread).abs().max() > 6, "rounding to nearest would not pass"
