"""What the dialect becomes on a CPU: the reference functions, compiled by Inductor once for each kind of operand.

A model has hundreds of operands but few kinds of them. Inlining the arithmetic at every site would make Inductor
compile it hundreds of times; an `nvfp4_cpu::` operation that calls one compiled function, with dynamic sizes, costs
microseconds instead. The functions are compiled when they are first needed, and kept in Inductor's cache on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from nvfp4c import dialect, numerics
from nvfp4c.codegen import cpu_blocks
from nvfp4c.codegen.cpu_compiler import compiled
from nvfp4c.dialect import oriented_like
from nvfp4c.formats import BLOCK, TILE_BLOCK, padded

LIBRARY = torch.library.Library("nvfp4_cpu", "DEF")


def amax(x: Tensor, signs: Sequence[int] | None = None) -> Tensor:
    """nvfp4.amax. The rotated tensor is written out, and shared with whoever quantises it."""
    x = x if signs is None else HADAMARD(x, signs)
    if not statically_known_true(x.numel() > 0):
        # A size that is known only at run time may be 0, and then there is nothing to take a maximum of.
        x = F.pad(x.flatten(), (0, 1))
    return numerics.tensor_amax(x)


def quantize(
    x: Tensor,
    amax: Tensor,
    block: Sequence[int],
    rounding: str,
    signs: Sequence[int] | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """nvfp4.quantize."""
    return QUANTIZE(x if signs is None else HADAMARD(x, signs), amax, block, rounding, seed, stream)


def operand(
    x: Tensor,
    amax: Tensor,
    block: Sequence[int],
    rounding: str,
    signs: Sequence[int] | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """nvfp4.quantize followed by nvfp4.dequantize without the global factor, never packed: float32 [.., M, K]."""
    return OPERAND(x if signs is None else HADAMARD(x, signs), amax, block, rounding, seed, stream)


def product(
    a: Tensor,
    b: Tensor,
    a_amax: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """nvfp4.product."""
    return dialect.scale_product(torch.matmul(a, b.mT), a_amax, b_amax, bias, residual, out_dtype)


def _hadamard(x: Tensor, signs: Sequence[int]) -> Tensor:
    if x.numel() and x.stride(-1) != 1 and x.mT.is_contiguous() and x.shape[-1] % BLOCK == 0:
        return cpu_blocks.rotated(x, signs)
    return compiled(_rotated, _kind(x, (signs,)))(x, signs)


def _rotated(x: Tensor, signs: Sequence[int]) -> Tensor:
    return oriented_like(x, numerics.rotate(x, signs))


def _operand(x: Tensor, amax: Tensor, block: Sequence[int], rounding: str, seed: Tensor | None, stream: int) -> Tensor:
    return cpu_blocks.operand(x, amax, (block[0], block[1]), seed if rounding == "stochastic" else None, stream)


def _quantize(
    x: Tensor, amax: Tensor, block: Sequence[int], rounding: str, seed: Tensor | None, stream: int
) -> tuple[Tensor, Tensor]:
    # The stream goes in as a tensor, so that no code depends on its value.
    others = amax, block, rounding, seed, torch.tensor(stream)
    return compiled(_packed, _kind(x, others))(x, *others)


def _packed(
    x: Tensor, amax: Tensor, block: Sequence[int], rounding: str, seed: Tensor | None, stream: Tensor
) -> tuple[Tensor, Tensor]:
    return dialect.quantize(x, amax, block, rounding, None, seed, stream)


def _dequantize(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return compiled(_unpacked, _kind(codes, (scales, k)))(codes, scales, k)


def _unpacked(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return dialect.dequantize(codes, scales, None, k, torch.float32)


def _kind(x: Tensor, others: Sequence[Any]) -> Hashable:
    """All that compiled code depends on although sizes are dynamic: 0 and 1 are constants, and the arithmetic asks
    whether there is one block, whether all are whole, and whether memory is without gaps."""
    settings = tuple(tuple(value) for value in others if isinstance(value, (list, str)))
    few = tuple(min(size, 2) for size in (*x.shape, *(value for value in others if isinstance(value, int))))
    blocked = x.shape[-2:] if TILE_BLOCK in settings else x.shape[-1:]
    blocks = tuple((size > BLOCK, size % BLOCK == 0) for size in blocked)
    return x.dtype, settings, few, blocks, x.stride(-1) == 1, x.is_contiguous(), x.mT.is_contiguous()


def _call(function: Callable[..., Any], x: Tensor, *others: Any) -> Any:
    # One state of autograd in forward and backward, and no Parameter, whose sizes Dynamo takes for constants: each
    # would be compiled anew.
    with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView(), torch.autocast("cpu", enabled=False):
        return function(x.detach(), *others)


def _run_hadamard(x: Tensor, signs: Sequence[int]) -> Tensor:
    return _call(_hadamard, x, list(signs))


def _run_quantize(
    x: Tensor, amax: Tensor, block: Sequence[int], rounding: str, seed: Tensor | None, stream: int
) -> tuple[Tensor, Tensor]:
    return _call(_quantize, x, amax, list(block), rounding, seed, stream)


def _run_operand(
    x: Tensor, amax: Tensor, block: Sequence[int], rounding: str, seed: Tensor | None, stream: int
) -> Tensor:
    return _call(_operand, x, amax, list(block), rounding, seed, stream)


def _run_dequantize(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return _call(_dequantize, codes, scales, k)


def _fake_hadamard(x: Tensor, signs: Sequence[int]) -> Tensor:
    return oriented_like(x, x.new_empty((*x.shape[:-1], padded(x.shape[-1])), dtype=torch.bfloat16))


def _fake_quantize(x: Tensor, amax: Tensor, block: Sequence[int], rounding: str, *_: object) -> tuple[Tensor, Tensor]:
    return dialect.QUANTIZE(x, amax, block, rounding)


def _fake_operand(x: Tensor, *_: object) -> Tensor:
    return oriented_like(x, x.new_empty(x.shape, dtype=torch.float32))


def _fake_dequantize(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    return oriented_like(codes, codes.new_empty((*codes.shape[:-1], k), dtype=torch.float32))


_QUANTIZE_ARGUMENTS = "Tensor x, Tensor amax, int[] block, str rounding, Tensor? seed, int stream"
_OPERATIONS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("hadamard(Tensor x, int[] signs) -> Tensor", _run_hadamard, _fake_hadamard),
    (f"quantize({_QUANTIZE_ARGUMENTS}) -> (Tensor, Tensor)", _run_quantize, _fake_quantize),
    (f"operand({_QUANTIZE_ARGUMENTS}) -> Tensor", _run_operand, _fake_operand),
    ("dequantize(Tensor codes, Tensor scales, SymInt k) -> Tensor", _run_dequantize, _fake_dequantize),
)
for _schema, _run, _fake in _OPERATIONS:
    _name = _schema.split("(", 1)[0]
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"nvfp4_cpu::{_name}", _fake, lib=LIBRARY)

HADAMARD = torch.ops.nvfp4_cpu.hadamard.default
QUANTIZE = torch.ops.nvfp4_cpu.quantize.default
OPERAND = torch.ops.nvfp4_cpu.operand.default
DEQUANTIZE = torch.ops.nvfp4_cpu.dequantize.default
