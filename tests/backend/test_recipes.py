"""Recipes by name, as options of `torch.compile(model, backend="nvfp4")`, in training and inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inside import KernelCall, Mlp, check_kernels
from torch import Tensor
from torch._inductor import config as inductor_config

from nvfp4c import backend, numerics
from nvfp4c.recipe import RECIPES

Step = tuple[Tensor, dict[str, Tensor]]


def step(name: str, **options: Any) -> Step:
    """Output and gradients of one training step."""
    torch.manual_seed(0)
    model = Mlp()
    x = torch.randn(32, 32)
    compiled = torch.compile(model, backend=name, options=options or None)
    output = compiled(x)
    output.square().mean().backward()
    return output.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def inductor() -> Step:
    return step("inductor")


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left | right)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_bf16_is_inductor_bit_for_bit(inductor: Step) -> None:
    output, gradients = step("nvfp4", recipe="bf16")
    assert torch.equal(output, inductor[0])
    assert equal(gradients, inductor[1])


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "bf16"])
def test_each_recipe_runs_a_step(
    name: str, inductor: Step, kernel_calls: list[KernelCall], eager_kernels: None
) -> None:
    """Near to the step in high precision, and only in the roles that the recipe quantises different from it.

    NVFP4 is about 0.1 off in each operand; a result of three products in a row, of two operands each, is up to
    sqrt(6) * 0.1 off, and 0.5 leaves twice that.
    """
    output, gradients = step("nvfp4", recipe=name)
    recipe = RECIPES[name]
    check_kernels(kernel_calls)
    assert torch.equal(output, inductor[0]) == ("fprop" not in recipe.roles)
    assert relative_error(output, inductor[0]) < 0.5
    for parameter, gradient in gradients.items():
        assert relative_error(gradient, inductor[1][parameter]) < 0.5, parameter
    # Of the head nothing but its input can differ, where recipes keep it in high precision.
    if "fprop" not in recipe.roles and recipe.keep_head:
        assert torch.equal(gradients["head.weight"], inductor[1]["head.weight"])
    seeds = {call.seed is not None for call in kernel_calls}
    assert (True in seeds) == ("wgrad" in recipe.roles), "only gradients are rounded stochastically"
    rotated = any(call.kernel == "hadamard" for call in kernel_calls)
    assert rotated == ("wgrad" in recipe.roles and "wgrad" in recipe.rotate)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-inference", "nvfp4-weight-only"])
def test_inference(recipe: str, context: Callable[[], Any], eager_kernels: None) -> None:
    """Inference without gradients is what numerics says, layer by layer; the head stays in high precision."""
    torch.manual_seed(0)
    model = Mlp().eval()
    x = torch.randn(32, 32)
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": recipe})
    with context():
        found = compiled(x)
        again = compiled(x)
    block = RECIPES[recipe].weight_block
    quantised = RECIPES[recipe].quantize_activations

    def layer(linear: torch.nn.Linear, value: Tensor) -> Tensor:
        weight = numerics.quantize(linear.weight.detach(), block=block)
        if quantised:
            return numerics.scaled_mm(numerics.quantize(value), weight, linear.bias.detach(), torch.float32)
        return torch.nn.functional.linear(value, weight.dequantize(), linear.bias.detach())

    with torch.no_grad():
        hidden = layer(model.down, torch.relu(layer(model.up, x)))
        expected = torch.nn.functional.linear(x + hidden, model.head.weight)
    assert torch.equal(found, again)
    # Products in FP32 of at most 64 terms: each sum may be taken in any order. Where that moves a value of the second
    # layer's input over a tie, one code differs, which is 1 part in 64 of one sum.
    assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("recipe", ["nvfp4-all", "nvfp4-weight-only"])
def test_frozen_weights(recipe: str, eager_kernels: None) -> None:
    """With Inductor's freezing, weights are constants of the graph; they are quantised all the same, bit for bit."""
    torch.manual_seed(0)
    model = Mlp().eval()
    x = torch.randn(32, 32)
    options = {"recipe": recipe}
    with torch.no_grad():
        expected = torch.compile(model, backend="nvfp4", options=options)(x)
        torch._dynamo.reset()
        with inductor_config.patch(freezing=True):
            found = torch.compile(model, backend="nvfp4", options=options)(x)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, model(x))


@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"options": {"mode": "max-autotune"}}], ids=str)
def test_modes_mean_what_they_mean_for_inductor(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, eager_kernels: None
) -> None:
    """A mode is Inductor's own set of settings, whether given as such or among the options."""
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: Any, inputs: Any, inner_compile: object, config_patches: dict[str, Any]) -> Callable[..., Any]:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    torch.compile(Mlp(), backend="nvfp4", **given)(torch.randn(32, 32))
    (patches,) = seen
    mode = given.get("mode") or given["options"]["mode"]
    for name, value in torch._inductor.list_mode_options(mode).items():
        assert patches[name] == value
    assert "joint_custom_pre_pass" in patches
