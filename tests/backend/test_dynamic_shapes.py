"""Batch and sequence vary with one compiled graph, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from inside import KernelCall, Mlp, Reference, Watched, check_kernels
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("eager_kernels")

SIZES = ((3, 16), (2, 24), (5, 7), (16, 3), (8, 8), (2, 51))
"""Batch and sequence: token counts that are and are not multiples of 16. Sizes of one block are a case of their own, as
sizes of 1 are."""


def check_step(model: nn.Module, compiled: nn.Module, watched: Watched, x: Tensor, calls: list[KernelCall]) -> None:
    """One training step equals the interpreted graph at these sizes, bit for bit but for sums over tokens (biases)."""
    calls.clear()
    model.zero_grad()
    output = compiled(x)
    tangent = torch.randn_like(output)
    output.backward(tangent)
    check_kernels(calls)
    seed = next(call.seed for call in calls if call.seed is not None)
    with torch.no_grad():
        reference = Reference(watched.graphs[-1], seed)
        expected, *gradients = reference.run(*watched.arguments[-1], tangent)
    assert torch.equal(output, expected)
    for argument, gradient in zip(watched.arguments[-1], gradients, strict=True):
        if isinstance(argument, nn.Parameter) and argument.dim() == 2:
            assert torch.equal(argument.grad, gradient), x.shape
        elif isinstance(argument, nn.Parameter):
            torch.testing.assert_close(argument.grad, gradient)


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "found"])
def test_one_graph_serves_all_sizes(marked: bool, kernel_calls: list[KernelCall]) -> None:
    """With sizes marked as dynamic at once, else when the second shape is seen."""
    torch.manual_seed(0)
    model = Mlp()
    watched = Watched({"recipe": "nvfp4-all"})
    compiled = torch.compile(model, backend=watched)
    for batch, sequence in SIZES:
        x = torch.randn(batch, sequence, 32)
        if marked:
            torch._dynamo.mark_dynamic(x, (0, 1))
        check_step(model, compiled, watched, x, kernel_calls)
    assert len(watched.graphs) == (1 if marked else 2)


def test_few_tokens_and_none(kernel_calls: list[KernelCall]) -> None:
    """PyTorch compiles sizes of 0 and 1, of tokens or of blocks, for themselves; they give what they should."""
    torch.manual_seed(0)
    model = Mlp()
    watched = Watched({"recipe": "nvfp4-all"})
    compiled = torch.compile(model, backend=watched, dynamic=True)
    check_step(model, compiled, watched, torch.randn(3, 16, 32), kernel_calls)
    check_step(model, compiled, watched, torch.randn(2, 3, 32), kernel_calls)
    check_step(model, compiled, watched, torch.randn(1, 1, 32), kernel_calls)
    output = compiled(torch.randn(0, 16, 32))
    assert output.shape == (0, 16, 32)
    model.zero_grad()
    output.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_a_dynamic_size_can_become_empty(kernel_calls: list[KernelCall]) -> None:
    """A size that Dynamo may not specialise (here, of a selection) reaches 0 in a graph compiled for any size."""

    def selected(weight: Tensor, x: Tensor, keep: Tensor) -> Tensor:
        return torch.relu(x[keep] @ weight) @ weight

    weight = nn.Parameter(torch.randn(32, 32))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(selected, backend="nvfp4", options={"recipe": "nvfp4-all"}, fullgraph=True)
        x = torch.randn(8, 32)
        for count in (5, 1, 0):
            keep = torch.arange(8) < count
            kernel_calls.clear()
            output = compiled(weight, x, keep)
            output.sum().backward()
            assert output.shape == (count, 32)
            check_kernels(kernel_calls)
            assert weight.grad.isfinite().all()
            assert bool(weight.grad.any()) == (count > 0)
            weight.grad = None
