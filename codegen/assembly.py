"""Compiling a Triton kernel for a GPU that need not be there, and reading off what it became.

Triton ships NVIDIA's assembler, so the PTX and the machine code are those that the GPU would run. Registers and spills
are what the assembler reports of that very run.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from triton.runtime.errors import PTXASError

from nvfp4c.errors import TargetError

THREADS_IN_A_WARP = 32
POINTER_BYTES = 16
"""What every tensor's memory is aligned to."""

MMA = re.compile(r"(?:tcgen05\.mma|wgmma\.mma_async|mma\.sync)[\w.:]*")
CONVERSION = re.compile(r"cvt\.r[ns]\.[\w.]*e2m1x\d[\w.]*")
REPORT = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers", re.DOTALL)


@dataclass(frozen=True)
class Assembly:
    """A kernel in PTX, and what it takes to run.

    registers: of a thread. spills: bytes that it stores and loads again because they
    find no place in registers. shared_bytes: of
    a program. mma, conversions: each kind of matrix multiplication, and of conversion to E2M1, found in the PTX.
    """

    target: str
    ptx: str
    registers: int
    spills: int
    shared_bytes: int
    mma: frozenset[str]
    conversions: frozenset[str]


def assemble(
    kernel: Any,
    target: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    aligned: Collection[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = False,
    **options: Any,
) -> Assembly:
    """Compile a `@triton.jit` kernel for a target such as "sm_100"; no GPU is needed.

    types: Triton's name for the type of each argument, such as "*fp32", "i32" or "tensordesc<u8[128, 64]>". constants:
    the value of each `constexpr`, and of arguments that a launch would make constant (an int of 1, None). aligned:
    integers that are divisible by 16; pointers always are. options: any other compile option of Triton.
    Raises TargetError for a target that is no NVIDIA GPU, in Triton's interpreter, and when the target lacks an
    instruction that the kernel asks for.
    """
    capability = re.fullmatch(r"sm_(\d+)", target)
    if capability is None:
        raise TargetError(f"cannot compile a kernel for target {target!r}; name a GPU, such as 'sm_100'")
    if not isinstance(kernel, JITFunction):
        raise TargetError("Triton's interpreter does not compile; unset TRITON_INTERPRET and start anew")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(place,): constants[name] for place, name in enumerate(names) if name in constants}
    divisible = [place for place, name in enumerate(names) if signature[name].startswith("*") or name in aligned]
    attributes = {(place,): [["tt.divisibility", POINTER_BYTES]] for place in divisible}
    report = io.StringIO()
    try:
        with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(report):
            # Only a run of the assembler reports, so nothing may come from Triton's cache.
            knobs.compilation.always_compile = True
            knobs.nvidia.dump_ptxas_log = True
            binary = triton.compile(
                ASTSource(kernel, signature, values, attributes),
                target=GPUTarget("cuda", int(capability[1]), THREADS_IN_A_WARP),
                options={
                    "num_warps": num_warps,
                    "num_stages": num_stages,
                    "enable_fp_fusion": enable_fp_fusion,
                    **options,
                },
            )
    except PTXASError as error:
        reason = next((line for line in str(error).splitlines() if "error   :" in line), str(error)).strip()
        raise TargetError(f"kernel {kernel.__name__!r} cannot be assembled for {target}: {reason}") from error
    ptx = binary.asm["ptx"]
    found = REPORT.search(report.getvalue())
    assert found is not None, f"the assembler reports no registers: {report.getvalue()}"
    stored, loaded, registers = map(int, found.groups())
    return Assembly(
        target=target,
        ptx=ptx,
        registers=registers,
        spills=stored + loaded,
        shared_bytes=binary.metadata.shared,
        mma=frozenset(MMA.findall(ptx)),
        conversions=frozenset(CONVERSION.findall(ptx)),
    )
