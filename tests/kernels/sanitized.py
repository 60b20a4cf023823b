"""The kernels of a training step, and the probe's, on shapes that fill no tiles, for NVIDIA's compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/kernels/sanitized.py

Without PyTorch's cache each tensor is an allocation of its own, so that a byte beyond it is seen. Without a GPU:

TRITON_INTERPRET=1 python tests/kernels/sanitized.py cpu
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from regions import LAYOUTS, laid_out
from test_kernels import PROLOGUES, TRAINING
from torch import Tensor

from nvfp4c.codegen import operations, probing
from nvfp4c.codegen.block_scaled_gemm import EMULATED_TILE, block_scaled_mm
from nvfp4c.dialect import Quantization
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK
from nvfp4c.prologue import Kind
from nvfp4c.region import Axis, Form, Layout, Output, Region
from nvfp4c.sensitivity.quantized import quantized
from nvfp4c.sensitivity.samples import statistics_on_gpu

SHAPES = [(70, 260), (2, 33, 40), (129, 513), (1, 1)]
BOTH_WAYS = Region(
    (
        Output(Form.PACKED, rounding="stochastic", stream=1),
        Output(Form.PACKED, Axis.COLUMNS, signs=DEFAULT_SIGNS, rounding="stochastic", stream=2),
    )
)
NATIVE = [
    Region(tuple(replace(output, layout=Layout.NATIVE) for output in outputs))
    for outputs in (BOTH_WAYS.outputs, [Output(Form.PACKED, axis, TILE_BLOCK) for axis in Axis])
]
"""What products on FP4 tensor cores read: scales in the order of those, and codes beside them."""


def regions(shape: tuple[int, ...], device: str) -> int:
    """Run every region of a training step, and give how many. Of a stack of matrices on inputs that lie in any way."""
    seed, amaxes = torch.tensor(3, device=device), [torch.tensor(4.0, device=device)] * 2
    own = {Kind.FULL: shape, Kind.ROW: (*shape[:-1], 1), Kind.COLUMN: shape[-1:]}
    found = [*TRAINING.values(), *PROLOGUES.values(), BOTH_WAYS, *NATIVE]
    for region in found:
        for layout in LAYOUTS if len(shape) > 2 else LAYOUTS[:1]:
            inputs = []
            for kind in region.prologue.inputs:
                x = torch.randn(own[kind], dtype=torch.float32 if kind is Kind.ROW else torch.bfloat16)
                inputs.append(laid_out(x, layout, torch.device(device)) if kind is Kind.FULL else x.to(device))
            operations.REGION(inputs, amaxes[: region.amax_count], seed, region.to_json())
    return len(found)


def packed(shape: tuple[int, ...], axis: Axis, layout: Layout, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and amax."""
    region = Region((Output(Form.PACKED, axis, layout=layout),))
    x, amax = torch.randn(shape, device=device).bfloat16(), torch.tensor(4.0, device=device)
    codes, scales = operations.REGION([x], [amax], None, region.to_json())
    return codes, scales, amax


def unpacking(shape: tuple[int, ...], device: str) -> None:
    for axis in Axis:
        codes, scales, _ = packed(shape, axis, Layout.LINEAR, device)
        down = axis is Axis.COLUMNS
        operations.DEQUANTIZE(codes, scales, shape[-2] if down else shape[-1], down)


def product(shape: tuple[int, ...], device: str) -> None:
    """The GEMM for Blackwell, its one instruction emulated: x times its own transpose, a bias and a residual."""
    operand = packed(shape, Axis.ROWS, Layout.NATIVE, device)
    bias = torch.randn(shape[-2], device=device)
    residual = torch.randn(*shape[:-1], shape[-2], device=device).bfloat16()
    block_scaled_mm(*operand, *operand, bias, residual, torch.bfloat16, EMULATED_TILE, True)


def probe(shape: tuple[int, ...], device: str) -> None:
    """The kernels of the sensitivity probe."""
    x, amax = torch.randn(shape, device=device).bfloat16(), torch.tensor(4.0, device=device)
    for block in (ROW_BLOCK, TILE_BLOCK):
        for operand in (x, x.mT.contiguous().mT):
            statistics_on_gpu(quantized(operand, Quantization(block, "nearest", None), None), block)
    for gradient in (x, x.mT.contiguous().mT, None):
        probing.compared(x.float(), x, gradient, amax, None)


def main(device: str) -> None:
    torch.manual_seed(0)
    count = 0
    for shape in SHAPES:
        count += regions(shape, device)
        unpacking(shape, device)
        product(shape, device)
        probe(shape, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} regions, {len(SHAPES)} shapes, of one of them {len(LAYOUTS)} layouts; what unpacks operands, the")
    print("emulated GEMM for Blackwell, and the probe's kernels")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cuda"])
