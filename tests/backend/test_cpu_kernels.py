"""The CPU's kernels: compiled for few kinds of tensors, right for every size, and never given up by Dynamo."""

from __future__ import annotations

import torch
from inside import expected_values
from torch import Tensor
from torch._dynamo.utils import counters

from nvfp4c import numerics
from nvfp4c.codegen import cpu
from nvfp4c.formats import DEFAULT_SIGNS

ROW = [1, 16]
NONE = torch.tensor(0)


def operand(x: Tensor) -> Tensor:
    return cpu.OPERAND(x, numerics.tensor_amax(x.detach()), ROW, "nearest", None, 0)


def test_sizes_and_parameters_share_compiled_code() -> None:
    """Sizes are dynamic, also those of parameters, in with gradients and in inference."""
    operand(torch.randn(48, 64))
    before = counters["stats"]["unique_graphs"]
    for rows, columns in ((32, 64), (64, 64), (80, 96), (5, 32)):
        x = torch.randn(rows, columns)
        expected = expected_values(x, ROW, "nearest", None, NONE)
        for given in (x, torch.nn.Parameter(x)):
            assert torch.equal(operand(given), expected)
            with torch.inference_mode():
                assert torch.equal(operand(given.clone()), expected)
    assert counters["stats"]["unique_graphs"] == before


def test_every_size_can_be_quantised() -> None:
    """0, 1, less than a block, whole blocks and not: more kinds of sizes than Dynamo compiles one function for."""
    sizes = ((0, 32), (32, 0), (0, 0), (1, 0), (0, 1), (1, 1), (1, 32), (33, 1), (3, 16), (5, 33))
    assert len(sizes) > torch._dynamo.config.recompile_limit
    for rows, columns in sizes:
        x = torch.randn(rows, columns)
        assert torch.equal(operand(x), expected_values(x, ROW, "nearest", None, NONE)), (rows, columns)


def test_kernels_on_a_stack_of_matrices() -> None:
    """A batch [B, M, K] shares one amax; each matrix is as it is alone."""
    x = torch.randn(3, 17, 33)
    amax = numerics.tensor_amax(x)
    values = cpu.OPERAND(x, amax, ROW, "nearest", None, 0)
    rotated = cpu.HADAMARD(x, DEFAULT_SIGNS)
    for matrix, own, turned in zip(x, values, rotated, strict=True):
        codes, scales = numerics.block_codes(matrix, amax, (1, 16))
        assert torch.equal(own, numerics.block_values(codes, scales)[:, :33])
        assert torch.equal(turned, numerics.hadamard(matrix))
