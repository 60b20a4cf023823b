"""A target for tests: its kernels are the reference functions run eagerly, each one call in the lowered graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from exact import dequantize_codes, product
from graphs import nvfp4
from torch import Tensor

from nvfp4c import dialect, numerics
from nvfp4c.dialect import KernelTable

LIBRARY = torch.library.Library("nvfp4_eager", "DEF")


def _operand(
    x: Tensor,
    amax: Tensor,
    block: Sequence[int],
    rounding: str,
    signs: Sequence[int] | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    codes, scales = dialect.quantize_values(x, amax, block, rounding, signs, seed, stream)
    values = numerics.block_values(codes, scales)
    return values if signs is not None else values.narrow(-1, 0, x.shape[-1]).contiguous()


def _fake_operand(x: Tensor, *args: Any) -> Tensor:
    rotated = args[3:4] not in ((), (None,))
    return x.new_empty(nvfp4.hadamard(x, args[3]).shape if rotated else x.shape, dtype=torch.float32)


def _values(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return nvfp4.dequantize(codes, scales, None, k, torch.bfloat16)


def _fake_dequantize(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return nvfp4.dequantize(codes, scales, None, k, torch.float32)


def _schema(operation: torch._ops.OpOverload) -> str:
    return str(operation._schema).removeprefix("nvfp4::")


for schema, function, fake in (
    ("hadamard(Tensor x, int[] signs) -> Tensor", nvfp4.hadamard, nvfp4.hadamard),
    (_schema(nvfp4.region.default), nvfp4.region, nvfp4.region),
    ("amax(Tensor x, int[]? signs=None) -> Tensor", nvfp4.amax, nvfp4.amax),
    (_schema(nvfp4.quantize.default), nvfp4.quantize, nvfp4.quantize),
    ("dequantize(Tensor codes, Tensor scales, SymInt k) -> Tensor", dequantize_codes, _fake_dequantize),
    ("values(Tensor codes, Tensor scales, SymInt k) -> Tensor", _values, _values),
    (
        "operand(Tensor x, Tensor amax, int[] block, str rounding, int[]? signs=None, Tensor? seed=None, int stream=0) "
        "-> Tensor",
        _operand,
        _fake_operand,
    ),
):
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CPU")
    torch.library.register_fake(f"nvfp4_eager::{name}", fake, lib=LIBRARY)

eager = torch.ops.nvfp4_eager


EAGER = KernelTable(
    target="eager",
    operand_dtype=torch.float32,
    hadamard=eager.hadamard.default,
    amax=eager.amax.default,
    quantize=eager.quantize.default,
    dequantize=eager.dequantize.default,
    product=product,
    operand=eager.operand.default,
    names={},
)
PACKED = replace(EAGER, target="packed", operand=None)
"""A target without an unpacked form."""

REGIONS = KernelTable(
    target="sm_90",
    operand_dtype=torch.bfloat16,
    region=eager.region.default,
    dequantize=eager.values.default,
    product=product,
    names={},
)
"""A target whose kernels are regions, as the GPUs are."""

PLAIN = KernelTable(
    target="plain",
    operand_dtype=torch.float32,
    hadamard=lambda x, signs: numerics.rotate(x, signs),
    amax=dialect.amax,
    quantize=dialect.quantize,
    dequantize=dequantize_codes,
    product=product,
    operand=None,
    names={},
)
"""A target without operations of its own: everything becomes aten."""
