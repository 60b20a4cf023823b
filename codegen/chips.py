"""Facts of the GPUs that code is made for: their names, which code runs where, and what they convert themselves."""

from __future__ import annotations

from dataclasses import dataclass

Capability = tuple[int, int]
"""CUDA compute capability."""


@dataclass(frozen=True)
class Target:
    """What code is made for.

    capability: the least that runs it, None for the CPU. only: the ones that alone do, where not all newer ones can:
    FP4 instructions differ between Blackwell's families, and code for one of them does not run on another. native_fp4:
    whether it multiplies FP4 itself. conversions: what it converts itself; see `E4M3`.
    """

    name: str
    capability: Capability | None
    description: str
    conversions: int = 0
    native_fp4: bool = False
    only: tuple[Capability, ...] = ()

    def runs_on(self, capability: Capability) -> bool:
        """Whether a GPU of this capability runs its code."""
        if self.capability is None:
            return False
        return capability in self.only if self.only else self.capability <= capability


E4M3, NEAREST, STOCHASTIC = 1, 2, 3
"""Conversions, each including those before it: to E4M3, to E2M1 by rounding to nearest, and to E2M1 with random bits.
Source: the PTX ISA, `cvt`."""

EMULATED = "exact emulation: BF16 GEMM over dequantised operands"
NATIVE = "FP4 tensor cores over packed operands"
TARGETS = {
    target.name: target
    for target in (
        Target("cpu", None, "exact emulation: FP32 GEMM over dequantised operands"),
        Target("sm_80", (8, 0), EMULATED),
        Target("sm_89", (8, 9), EMULATED, E4M3),
        Target("sm_90", (9, 0), EMULATED, E4M3),
        Target("sm_100", (10, 0), NATIVE, STOCHASTIC, native_fp4=True, only=((10, 0),)),
        Target("sm_103", (10, 3), NATIVE, STOCHASTIC, native_fp4=True, only=((10, 3),)),
        Target("sm_120", (12, 0), NATIVE, NEAREST, native_fp4=True, only=((12, 0), (12, 1))),
    )
}
NATIVE_TARGETS = tuple(target.name for target in TARGETS.values() if target.native_fp4)


def newest(capability: Capability) -> Target | None:
    """The newest target that a GPU of this capability runs."""
    able = [target for target in TARGETS.values() if target.runs_on(capability)]
    return able[-1] if able else None


def conversions(capability: Capability) -> int:
    """What a GPU of this capability converts itself; 0 for nothing."""
    target = newest(capability)
    return 0 if target is None else target.conversions
