"""What code can be made for: the names, how one is picked for a device, and the kernels of each.

No target here has native FP4 instructions: all compute the NVFP4 product exactly by multiplying dequantised operands,
whose values (code * scale) BF16 holds without loss. A newer GPU runs the kernels of the newest target it is able to.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from nvfp4c.codegen import cpu
from nvfp4c.dialect import KernelTable
from nvfp4c.errors import OptionError, TargetError, nearest

AUTO = "auto"


@dataclass(frozen=True)
class Target:
    """capability: the least CUDA compute capability, None for the CPU. native_fp4: whether it multiplies FP4 itself."""

    name: str
    capability: tuple[int, int] | None
    description: str
    native_fp4: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", None, "exact emulation: FP32 GEMM over dequantised operands"),
        Target("sm_80", (8, 0), "exact emulation: BF16 GEMM over dequantised operands"),
        Target("sm_89", (8, 9), "exact emulation: BF16 GEMM over dequantised operands"),
        Target("sm_90", (9, 0), "exact emulation: BF16 GEMM over dequantised operands"),
    )
}
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
    able = [target for target in TARGETS.values() if target.capability and target.capability <= capability]
    if not able:
        raise TargetError(f"{device} has compute capability {version}, too old for nvfp4; it needs {SUPPORTED_GPUS}")
    chosen = able[-1] if name == AUTO else TARGETS[name]
    if chosen not in able:
        raise TargetError(f"{device} has compute capability {version} and cannot run {name!r}; use 'auto'")
    if importlib.util.find_spec("triton") is None:
        raise TargetError(f"target {chosen.name!r} needs triton, which is not installed; pip install triton")
    return chosen


def kernel_table(target: Target) -> KernelTable:
    """What `lower` puts in place of the dialect's operations on `target`."""
    return _cpu_table() if target.capability is None else _gpu_table(target)


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


def _gpu_table(target: Target) -> KernelTable:
    # Imported here because it imports triton, which a machine without a GPU need not have.
    from nvfp4c.codegen import cached_weight, operations

    return KernelTable(
        target=target.name,
        operand_dtype=torch.bfloat16,
        region=operations.REGION,
        weight=cached_weight.WEIGHT,
        dequantize=operations.dequantized,
        product=operations.scaled_product,
        names={"matmul": "triton: quantise; cuBLAS BF16 GEMM", "dequantize": "triton: quantise, dequantise"},
    )
