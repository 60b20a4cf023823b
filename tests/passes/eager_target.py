"""A target for tests: its kernels are the reference functions run eagerly, each one call in the lowered graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from graphs import nvfp4
from torch import Tensor

from nvfp4c import dialect, numerics
from nvfp4c.dialect import KernelTable

LIBRARY = torch.library.Library("nvfp4_eager", "DEF")


def dequantize_codes(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return dialect.dequantize(codes, scales, None, k, torch.float32).contiguous()


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
    return (values if signs is not None else values.narrow(-1, 0, x.shape[-1])).contiguous()


def _fake_operand(x: Tensor, *args: Any) -> Tensor:
    rotated = args[3:4] not in ((), (None,))
    return x.new_empty(nvfp4.hadamard(x, args[3]).shape if rotated else x.shape, dtype=torch.float32)


def _fake_dequantize(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return nvfp4.dequantize(codes, scales, None, k, torch.float32)


for schema, function, fake in (
    ("hadamard(Tensor x, int[] signs) -> Tensor", nvfp4.hadamard, nvfp4.hadamard),
    ("amax(Tensor x, int[]? signs=None) -> Tensor", nvfp4.amax, nvfp4.amax),
    (str(nvfp4.quantize.default._schema).removeprefix("nvfp4::"), nvfp4.quantize, nvfp4.quantize),
    ("dequantize(Tensor codes, Tensor scales, SymInt k) -> Tensor", dequantize_codes, _fake_dequantize),
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


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """The product summed in FP64. A sum of the products of two 6-bit numbers is nearly always exact there, so it does
    not depend on the order of summation."""
    return torch.matmul(a.double(), b.double().mT).float()


EAGER = KernelTable(
    target="eager",
    operand_dtype=torch.float32,
    hadamard=eager.hadamard.default,
    amax=eager.amax.default,
    quantize=eager.quantize.default,
    dequantize=eager.dequantize.default,
    product=exact_product,
    operand=eager.operand.default,
    names={},
)
PACKED = replace(EAGER, target="packed", operand=None)
"""A target without an unpacked form, as the GPUs are."""

PLAIN = KernelTable(
    target="plain",
    operand_dtype=torch.float32,
    hadamard=lambda x, signs: numerics.rotate(x, signs),
    amax=dialect.amax,
    quantize=dialect.quantize,
    dequantize=dequantize_codes,
    product=exact_product,
    operand=None,
    names={},
)
"""A target without operations of its own: everything becomes aten."""
