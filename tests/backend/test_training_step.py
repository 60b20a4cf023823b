"""A compiled training step equals the graph of the SCALED stage, interpreted with reference operations."""

from __future__ import annotations

import inspect

import pytest
import torch
from inside import KernelCall, Mlp, Reference, Watched, check_kernels
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.codegen import cpp

TOKENS = 48


def test_a_training_step_is_the_interpreted_graph(kernel_calls: list[KernelCall]) -> None:
    """Operands bit for bit; so gradients of weights too, for every sum in this model is exact."""
    _check_step(torch.float32, kernel_calls)


def test_what_is_not_finite_stays_so() -> None:
    """A NaN or infinity in the input, in a weight or in the gradient makes what depends on it NaN, never finite."""
    torch.manual_seed(0)
    model = Mlp()
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": "nvfp4-all"})
    clean = torch.randn(TOKENS, 32)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = clean.clone()
        x[7, 3] = bad
        loss = compiled(x).square().mean()
        loss.backward()
        assert loss.isnan()
        assert all(parameter.grad.isnan().any() for parameter in model.parameters())
        model.zero_grad()
    with torch.no_grad():
        model.down.weight[3, 7] = float("inf")
    assert compiled(clean).square().mean().isnan()
    with torch.no_grad():
        model.down.weight[3, 7] = 0.0
    output = compiled(clean)
    tangent = torch.ones_like(output)
    tangent[5, 5] = float("inf")
    output.backward(tangent)
    assert output.isfinite().all()
    assert all(parameter.grad.isnan().any() for parameter in model.parameters())


@pytest.mark.skipif(
    "emulate_precision_casts" not in inspect.getsource(cpp), reason="this PyTorch cannot be told so on a CPU"
)
def test_a_training_step_in_bf16_is_the_interpreted_graph(kernel_calls: list[KernelCall], eager_kernels: None) -> None:
    """The same, where Inductor is told to round to BF16 wherever the graph does; it would keep FP32 inside fusions."""
    with inductor_config.patch(emulate_precision_casts=True):
        _check_step(torch.bfloat16, kernel_calls)


def _check_step(dtype: torch.dtype, kernel_calls: list[KernelCall]) -> None:
    torch.manual_seed(0)
    model = Mlp().to(dtype)
    x = torch.randn(TOKENS, 32, dtype=dtype, requires_grad=True)
    tangent = torch.randn(TOKENS, 32, dtype=dtype)
    watched = Watched({"recipe": "nvfp4-all"})
    output = torch.compile(model, backend=watched)(x)
    output.backward(tangent)

    seeds = {int(call.seed) for call in kernel_calls if call.seed is not None}
    assert len(seeds) == 1, "one seed a graph"
    reference = Reference(watched.graphs[0], torch.tensor(seeds.pop()))
    with torch.no_grad():
        expected, *gradients = reference.run(*watched.arguments[0], tangent)

    _check_operands(kernel_calls, reference)
    assert torch.equal(output, expected)
    for argument, gradient in zip(watched.arguments[0], gradients, strict=True):
        if argument.dim() == 2:
            assert torch.equal(argument.grad, gradient)
        else:
            # The sum over tokens may be taken in any order, so it is off by a rounding a term, and one of the result.
            scale = TOKENS * torch.finfo(torch.float32).eps * TOKENS + torch.finfo(dtype).eps
            assert (argument.grad - gradient).abs().max() <= scale * gradient.abs().max()


def _check_operands(calls: list[KernelCall], reference: Reference) -> None:
    """The compiled step and the reference quantise the same tensors, to the same values."""
    check_kernels(calls)
    rotated = [call.result for call in calls if call.kernel == "hadamard"]
    operands = [call for call in calls if call.kernel in ("quantize", "operand")]
    for call in operands:
        assert _is_one_of(call.values, [values for _, values in reference.quantised])
        if call.x.shape[-1] == TOKENS:
            assert _is_one_of(call.x, rotated), "operands of wgrad are rotated"
    for _, values in reference.quantised:
        found = [call.values for call in operands]
        assert _is_one_of(values, found) or _is_one_of(values.mT, found), "the compiled step lacks an operand"


def _is_one_of(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor.shape == other.shape and torch.equal(tensor, other) for other in others)
