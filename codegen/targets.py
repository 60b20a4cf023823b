"""Which code a device gets: how a target is picked, and the kernels of each.

On targets without FP4 instructions the NVFP4 product is computed exactly by multiplying dequantised operands, whose
values (code * scale) BF16 holds without loss. A GPU of a family that has no target of its own runs the kernels of the
newest target it is able to.
"""

from __future__ import annotations

import importlib.util

import torch
from torch.nn import functional as F

from nvfp4c.codegen import chips, cpu
from nvfp4c.codegen.chips import NATIVE_TARGETS, TARGETS, Target
from nvfp4c.dialect import KernelTable
from nvfp4c.errors import OptionError, TargetError, nearest

AUTO = "auto"
SUPPORTED_GPUS = "NVIDIA GPUs of compute capability 8.0 and up (A100, RTX 30 and newer)"


def resolve(name: str, device: torch.device) -> Target:
    """The target called `name`, or the best one for `device` when it is "auto".

    Raises OptionError for a name that does not exist, and TargetError when `device` cannot run it or triton is missing.
    """
    if name != AUTO and name not in TARGETS:
        valid = (AUTO, *TARGETS)
        raise OptionError(f"no target is called {name!r}; {nearest(name, valid)} (valid: {', '.join(valid)})")
    if device.type == "cpu":
        if name not in (AUTO, "cpu"):
            raise TargetError(f"target {name!r} is a GPU, but the model is on the CPU; move it, or use 'cpu' or 'auto'")
        return TARGETS["cpu"]
    if device.type != "cuda" or torch.version.hip is not None:
        raise TargetError(f"nvfp4 cannot compile for device {device}; it runs on the CPU and on {SUPPORTED_GPUS}")
    if name == "cpu":
        raise TargetError(f"target 'cpu' cannot run a model on {device}; move it to the CPU, or use 'auto'")
    return _gpu_target(name, device)


def _gpu_target(name: str, device: torch.device) -> Target:
    capability = torch.cuda.get_device_capability(device)
    version = "{}.{}".format(*capability)
    best = chips.newest(capability)
    if best is None:
        raise TargetError(f"{device} has compute capability {version}, too old for nvfp4; it needs {SUPPORTED_GPUS}")
    chosen = best if name == AUTO else TARGETS[name]
    if not chosen.runs_on(capability):
        raise TargetError(f"{device} has compute capability {version} and cannot run {name!r}; use 'auto'")
    if importlib.util.find_spec("triton") is None:
        raise TargetError(f"target {chosen.name!r} needs triton, which is not installed; pip install triton")
    return chosen


def kernel_table(target: Target, product: str = AUTO) -> KernelTable:
    """What `lower` puts in place of the dialect's operations on `target`.

    product: what multiplies packed operands: "triton" (which is what "auto" means) or "library". Raises OptionError
    where there is no such choice.
    """
    if product != AUTO and not target.native_fp4:
        raise OptionError(
            f"product={product!r} is a choice only where operands stay packed, on {', '.join(NATIVE_TARGETS)}; "
            f"the target is {target.name!r}, so leave it out"
        )
    if product == "library" and not hasattr(F, "scaled_mm"):
        raise OptionError(f"product='library' needs torch.nn.functional.scaled_mm; torch {torch.__version__} lacks it")
    return _cpu_table() if target.capability is None else _gpu_table(target, product)


def get_ready(target: Target) -> None:
    """Start, in the background, what compiling for `target` will need."""
    if target.capability is not None:
        from nvfp4c.codegen import launching

        launching.get_ready()


def _cpu_table() -> KernelTable:
    return KernelTable(
        target="cpu",
        operand_dtype=torch.float32,
        hadamard=cpu.HADAMARD,
        amax=cpu.amax,
        quantize=cpu.quantize,
        dequantize=cpu.DEQUANTIZE,
        product=cpu.product,
        operand=cpu.operand,
        names={"matmul": "aten: quantise, FP32 GEMM", "dequantize": "aten: quantise, dequantise"},
    )


def _gpu_table(target: Target, product: str) -> KernelTable:
    # Imported here because it imports triton, which a machine without a GPU need not have.
    from nvfp4c.codegen import cached_weight, launches, native_product, operations

    names = {"matmul": "triton: quantise; cuBLAS BF16 GEMM", "dequantize": "triton: quantise, dequantise"}
    block_scaled_mm = None
    if target.native_fp4:
        block_scaled_mm = native_product.by_library if product == "library" else native_product.by_triton
        names["matmul"] = "triton: quantise; " + ("cuBLAS FP4 GEMM" if product == "library" else "FP4 GEMM")
    return KernelTable(
        target=target.name,
        operand_dtype=torch.bfloat16,
        region=operations.REGION,
        weight=cached_weight.WEIGHT,
        dequantize=operations.dequantized,
        product=operations.PRODUCT,
        block_scaled_mm=block_scaled_mm,
        compile_kernels=None if operations.INTERPRETED else launches.compile_kernels,
        names=names,
    )
