"""The CPU's kernels: compiled for few kinds of tensors, right for every size, and never given up by Dynamo."""

from __future__ import annotations

import pytest
import torch
from inside import expected_values
from torch import Tensor
from torch._dynamo.utils import counters

from nvfp4c import numerics, philox
from nvfp4c.codegen import cpu
from nvfp4c.formats import DEFAULT_SIGNS

ROW, TILE = [1, 16], [16, 16]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("block", [ROW, TILE], ids=["rows", "tiles"])
def test_operands_as_they_lie_in_memory(block: list[int], rounding: str, dtype: torch.dtype) -> None:
    """By rows, transposed, with gaps, a stack of any of these; whole blocks and not. The result lies as the operand."""
    seed = torch.tensor(7)
    for rows, columns in ((32, 48), (17, 33), (16, 80)):
        stack = torch.randn(3, columns, rows).to(dtype)
        given = stack[0], stack, stack.mT, torch.randn(rows, 2 * columns).to(dtype)[:, ::2]
        for x in (*given, stack[0].mT):
            amax = numerics.tensor_amax(x)
            bits = philox.random_bytes_like(x, seed, 3) if rounding == "stochastic" else None
            codes, scales = numerics.block_codes(x, amax, (block[0], block[1]), bits)
            expected = numerics.block_values(codes, scales)[..., : x.shape[-1]]
            found = cpu.OPERAND(x, amax, block, rounding, seed, 3)
            assert torch.equal(found, expected), (x.shape, x.stride())
            fake = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")
            assert found.stride() == cpu.OPERAND(fake, amax, block, rounding, seed, 3).stride()


def test_a_transposed_matrix_is_rotated_as_it_lies() -> None:
    for rows, columns in ((32, 48), (17, 80), (1, 16)):
        x = torch.randn(3, columns, rows).mT
        found = cpu.HADAMARD(x, DEFAULT_SIGNS)
        assert torch.equal(found, numerics.rotate(x, DEFAULT_SIGNS)) and found.mT.is_contiguous()


def test_special_values() -> None:
    """Infinite, NaN, tiny and zero, in blocks along and across memory."""
    x = torch.randn(48, 64)
    x[0, 0], x[17, 20], x[30], x[:, 50], x[40:] = torch.inf, torch.nan, 0.0, -0.0, 1e-42
    for amax in (torch.tensor(3.0), torch.tensor(torch.inf), torch.tensor(torch.nan), torch.tensor(0.0)):
        for one in (x, x.mT):
            for block in (ROW, TILE):
                codes, scales = numerics.block_codes(one, amax, (block[0], block[1]))
                found = cpu.OPERAND(one, amax, block, "nearest", None, 0)
                assert torch.equal(found.nan_to_num(77.0), numerics.block_values(codes, scales).nan_to_num(77.0))
