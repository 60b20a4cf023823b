"""The kernels of a training step, and the probe's, on shapes that fill no tiles, for NVIDIA's compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/kernels/sanitized.py

Without PyTorch's cache each tensor is an allocation of its own, so that a byte beyond it is seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_kernels import PROLOGUES, TRAINING

from nvfp4c.codegen import operations, probing
from nvfp4c.dialect import Quantization
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK
from nvfp4c.prologue import Kind
from nvfp4c.region import Axis, Form, Output, Region
from nvfp4c.sensitivity.quantized import quantized
from nvfp4c.sensitivity.samples import statistics_on_gpu

SHAPES = [(70, 260), (2, 33, 40), (129, 513), (1, 1)]
BOTH_WAYS = Region(
    (
        Output(Form.PACKED, rounding="stochastic", stream=1),
        Output(Form.PACKED, Axis.COLUMNS, signs=DEFAULT_SIGNS, rounding="stochastic", stream=2),
    )
)


def regions(shape: tuple[int, ...]) -> int:
    """Run every region of a training step, and give how many."""
    seed, amaxes = torch.tensor(3, device="cuda"), [torch.tensor(4.0, device="cuda")] * 2
    own = {Kind.FULL: shape, Kind.ROW: (*shape[:-1], 1), Kind.COLUMN: shape[-1:]}
    found = [*TRAINING.values(), *PROLOGUES.values(), BOTH_WAYS]
    for region in found:
        types = [torch.float32 if kind is Kind.ROW else torch.bfloat16 for kind in region.prologue.inputs]
        inputs = [
            torch.randn(own[kind], device="cuda", dtype=dtype)
            for kind, dtype in zip(region.prologue.inputs, types, strict=True)
        ]
        operations.REGION(inputs, amaxes[: region.amax_count], seed, region.to_json())
    return len(found)


def unpacking(shape: tuple[int, ...]) -> None:
    for axis in Axis:
        region = Region((Output(Form.PACKED, axis),))
        x, amax = torch.randn(shape, device="cuda").bfloat16(), torch.tensor(4.0, device="cuda")
        codes, scales = operations.REGION([x], [amax], None, region.to_json())
        down = axis is Axis.COLUMNS
        operations.DEQUANTIZE(codes, scales, shape[-2] if down else shape[-1], down)


def probe(shape: tuple[int, ...]) -> None:
    """The kernels of the sensitivity probe."""
    x, amax = torch.randn(shape, device="cuda").bfloat16(), torch.tensor(4.0, device="cuda")
    for block in (ROW_BLOCK, TILE_BLOCK):
        for operand in (x, x.mT.contiguous().mT):
            statistics_on_gpu(quantized(operand, Quantization(block, "nearest", None), None), block)
    for gradient in (x, x.mT.contiguous().mT, None):
        probing.compared(x.float(), x, gradient, amax, None)


def main() -> None:
    torch.manual_seed(0)
    count = 0
    for shape in SHAPES:
        count += regions(shape)
        unpacking(shape)
        probe(shape)
    torch.cuda.synchronize()
    print(f"{count} regions, {len(SHAPES)} shapes; what unpacks operands, and the probe's kernels")


if __name__ == "__main__":
    main()
