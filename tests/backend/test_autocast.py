"""Compiling happens under the user's autocast; none of it may reach into what the target runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nvfp4c import numerics, pipeline
from nvfp4c.capture import capture
from nvfp4c.codegen import targets
from nvfp4c.plan import EMPTY_PLAN
from nvfp4c.recipe import RECIPES

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_layer_under_autocast_is_the_reference_product(device: str) -> None:
    """Equal to one BF16 ulp, 2^-8: both sum the same products in FP32, in another order, and round once."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 64).to(device)
    x = torch.randn(40, 96, device=device)
    compiled = torch.compile(layer, backend="nvfp4", options={"recipe": "nvfp4-all"})
    with torch.autocast(device, dtype=torch.bfloat16):
        found = compiled(x)
    found.float().square().sum().backward()

    weight = numerics.quantize(layer.weight.detach().bfloat16(), block=(16, 16))
    bias = layer.bias.detach().bfloat16()
    expected = numerics.scaled_mm(numerics.quantize(x.bfloat16()), weight, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3 * float(expected.abs().max()))
    # The weight gradient is noisy by about 0.13 for each quantised operand, but points the same way.
    gradient = (2 * expected.float()).T @ x
    assert torch.cosine_similarity(layer.weight.grad.flatten(), gradient.flatten(), dim=0) > 0.97


def test_nothing_that_lower_traces_is_cast() -> None:
    layer = nn.Linear(96, 64)
    (found,) = capture(layer, torch.randn(40, 96))
    names, table = found.names, targets.kernel_table(targets.TARGETS["cpu"])
    steps = (*pipeline.decide(RECIPES["nvfp4-all"], EMPTY_PLAN, names), *pipeline.rewrite(), *pipeline.lowering(table))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipeline.run(found.graph, steps, "test")
    products = [node for node in found.graph.nodes if node.target is torch.ops.aten.mm.default]
    assert len(products) == 2  # no gradient of the input
    assert all(node.meta["val"].dtype is torch.float32 for node in products)
