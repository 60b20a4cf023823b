"""Products summed exactly, so that graphs that multiply in different ways can be compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from graphs import Reference
from torch import Tensor, fx, nn

from nvfp4c import dialect
from nvfp4c.dialect import BLOCK_SCALED_MM, PRODUCT, SCALED_MM
from nvfp4c.formats import block_count
from nvfp4c.scale_layout import unswizzle


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """The product summed in FP64. A sum of the products of two 6-bit numbers is nearly always exact there, so it does
    not depend on the order of summation."""
    return torch.matmul(a.double(), b.double().mT).float()


def product(
    a: Tensor,
    b: Tensor,
    a_amax: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """dialect.product, summed exactly."""
    return dialect.scale_product(exact_product(a, b), a_amax, b_amax, bias, residual, out_dtype)


def dequantize_codes(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    """code * scale of packed codes, float32 [.., M, k]."""
    return dialect.dequantize(codes, scales, None, k, torch.float32)


class ExactProducts(Reference):
    """The reference, with exact products."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is PRODUCT:
            return product(*args)
        if target not in (SCALED_MM, BLOCK_SCALED_MM):
            return super().call_function(target, args, kwargs)
        if target is SCALED_MM:
            a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, k, bias, dtype = args
            residual = None
        else:
            a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, bias, residual, dtype = args
            k = 2 * a_codes.shape[-1]
            a_scales = unswizzle(a_scales, a_codes.shape[-2], block_count(k))
            b_scales = unswizzle(b_scales, b_codes.shape[-2], block_count(k))
        a, b = dequantize_codes(a_codes, a_scales, k), dequantize_codes(b_codes, b_scales, k)
        return product(a, b, a_amax, b_amax, bias, residual, dtype)


def run_exactly(graph: fx.Graph, *inputs: Any) -> list[Any]:
    """What a graph gives on these inputs, with exact products."""
    with torch.no_grad():
        result = ExactProducts(fx.GraphModule(nn.Module(), graph)).run(*inputs)
    return list(result) if isinstance(result, (list, tuple)) else [result]
