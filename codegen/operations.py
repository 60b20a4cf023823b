"""The `nvfp4_triton::` operations: what `lower` calls on a GPU.

`region` runs an emitted kernel, `dequantize` unpacks what an earlier graph saved, `product` multiplies. Each gives what
the dialect's operation of that name gives. With TRITON_INTERPRET=1 in the environment before triton is first imported
they run on CPU tensors too, in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from nvfp4c import dialect
from nvfp4c.codegen import chips, cublas, kernels, zeros
from nvfp4c.codegen.emit import CONSTANTS, Tile, emit
from nvfp4c.codegen.launching import INTERPRETED, LOAD_BYTES, Launch, on_device_of
from nvfp4c.formats import BLOCK, block_count
from nvfp4c.prologue import Kind
from nvfp4c.region import Form, Output, Region, shapes, without_streams

LIBRARY = torch.library.Library("nvfp4_triton", "DEF")

DISPATCH_KEYS = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)


UNPACK_TILE = Tile(groups=2, columns=128, warps=4)


SHAPES_KEPT = 4096
"""Of how many regions and shapes the launches are remembered: sizes may be dynamic."""


@cache
def emitted(region: Region) -> Any:
    """The jit function of a region; streams are arguments of it, so regions that differ only there share one."""
    alike = without_streams(region)
    return PyCodeCache.load(emit(alike).source).region if alike == region else emitted(alike)


def tile_of(region: Region) -> Tile:
    """What suits a region: two columns a thread leave registers for many programs, so loads of one run beside the
    arithmetic of others. Where codes of columns are turned, four groups make whole sectors of them."""
    turned = any(output.native and output.down for output in region.outputs)
    return Tile(groups=4, columns=64, warps=4) if turned else Tile(groups=1, columns=256, warps=4)


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor: all that a launch depends on."""


def layout(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype


@dataclass(frozen=True)
class Prepared:
    """All about the launches of a region that shapes, strides and types determine.

    buffers: shape and type of every tensor. amaxes: the places of those, which a kernel raises from 0. padded: the
    places of others that have to start as 0: scales in whole tiles, of which no program writes the rest.
    """

    region: Region
    buffers: tuple[tuple[Sequence[int | torch.SymInt], torch.dtype], ...]
    amaxes: tuple[int, ...]
    padded: tuple[int, ...]
    launch: Launch


def prepare(
    region: Region,
    inputs: Sequence[Layout],
    device: torch.device,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Prepared:
    """The launch of a region on such inputs. tile: what a program handles, chosen here if None.

    capability: of a GPU that need not be there; asked of `device` if None.
    """
    given = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in inputs]
    matrix, results = inputs[0][0], region.prologue.result_types([dtype for _, _, dtype in inputs])
    batches = [_as_input(x, kind, region) for x, kind in zip(given, region.prologue.inputs, strict=True)]
    full = [x for x, kind in zip(batches, region.prologue.inputs, strict=True) if kind is Kind.FULL]
    count, rows, columns = full[0].shape
    tile = tile or tile_of(region)
    height = BLOCK * tile.groups
    even = rows % height == 0 and columns % tile.columns == 0
    native = 0 if INTERPRETED else chips.conversions(capability or torch.cuda.get_device_capability(device))
    strides = [step for x in full for step in x.stride()[:2]]
    buffers = [(one, buffer) for one in region.outputs for buffer in shapes(one, matrix, results[one.matrix])]
    constants = (tile.groups, tile.columns, LOAD_BYTES // max(x.dtype.itemsize for x in full), even, native)
    random = any(output.stochastic for output in region.outputs)
    types = (
        *(x.dtype for x in given),
        *[torch.float32] * region.amax_count,
        torch.int64 if random else None,
        *(torch.uint8 if dtype is torch.float8_e4m3fn else dtype for _, (_, dtype) in buffers),
    )
    return Prepared(
        region=region,
        buffers=tuple(buffer for _, buffer in buffers),
        amaxes=tuple(place for place, (output, _) in enumerate(buffers) if output.form is Form.AMAX),
        padded=tuple(place for place, (o, buffer) in enumerate(buffers) if _padded(o, *buffer, matrix)),
        launch=Launch(
            kernel=emitted(region),
            programs=count * triton.cdiv(rows, height) * triton.cdiv(columns, tile.columns),
            types=types,
            numbers=(rows, columns, *strides, *(o.stream for o in region.outputs if o.stochastic)),
            constants=dict(zip(CONSTANTS, constants, strict=True)),
            warps=tile.warps,
        ),
    )


def _padded(output: Output, shape: Sequence[int | torch.SymInt], dtype: torch.dtype, matrix: Sequence[int]) -> bool:
    """Whether a tensor is scales of fewer blocks than whole tiles of them hold."""
    if not output.native:
        return False
    rows, columns = matrix[-2:]
    written = (columns, block_count(rows)) if output.down else (rows, block_count(columns))
    return dtype is torch.float8_e4m3fn and tuple(shape[-2:]) != written


@lru_cache(maxsize=SHAPES_KEPT)
def prepared(
    text: str, inputs: tuple[Layout, ...], device: torch.device, capability: tuple[int, int] | None = None
) -> Prepared:
    """`prepare` of a region given as JSON, remembered."""
    return prepare(Region.from_json(text), inputs, device, capability=capability)


def region(inputs: Sequence[Tensor], amaxes: Sequence[Tensor], seed: Tensor | None, region: str) -> list[Tensor]:
    """Every tensor of every output of a region, in order. An input whose rows are not contiguous is copied first."""
    return run(prepared(region, tuple(map(layout, inputs)), inputs[0].device), inputs, amaxes, seed)


def run(prepared: Prepared, inputs: Sequence[Tensor], amaxes: Sequence[Tensor], seed: Tensor | None) -> list[Tensor]:
    """`region`, as prepared."""
    x, region = inputs[0], prepared.region
    ready = zeros.at_hand(x.device)
    found = [
        zeros.take(x.device) if ready and place in prepared.amaxes else x.new_empty(shape, dtype=dtype)
        for place, (shape, dtype) in enumerate(prepared.buffers)
    ]
    buffers = [buffer.view(torch.uint8) if buffer.dtype == torch.float8_e4m3fn else buffer for buffer in found]
    if cleared := prepared.padded if ready else prepared.amaxes + prepared.padded:
        torch._foreach_zero_([buffers[place] for place in cleared])  # one launch for all
    given = (_as_input(x, kind, region) for x, kind in zip(inputs, region.prologue.inputs, strict=True))
    prepared.launch((*given, *amaxes[: region.amax_count], seed, *buffers))
    return found


def _as_input(x: Tensor, kind: Kind, region: Region) -> Tensor:
    """An input as a kernel reads it: numbers contiguous, a matrix as [B, M, K] with contiguous rows.

    For a plain amax any tensor is a matrix, in its memory's order.
    """
    if kind is not Kind.FULL:
        return x.contiguous()
    if region.prologue.is_identity and all(o.form is Form.AMAX and o.signs is None for o in region.outputs):
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
        x = x.reshape(1, 1, -1) if x.dim() < 2 else x.flatten(0, -2).unsqueeze(0)
    x = x if x.dim() == 3 else x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=SHAPES_KEPT)
def unpacking(shape: tuple[int, ...], down: bool, device: torch.device) -> Launch:
    """The launch that unpacks an operand of this shape. device: apart, for compiled kernels belong to one."""
    rows, columns = shape[-2:]
    tile = UNPACK_TILE
    return Launch(
        kernel=kernels.unpack_columns if down else kernels.unpack_rows,
        programs=math.prod(shape[:-2]) * triton.cdiv(rows, BLOCK * tile.groups) * triton.cdiv(columns, tile.columns),
        types=(torch.uint8, torch.uint8, torch.bfloat16),
        numbers=(rows, columns),
        constants={"GROUPS": tile.groups, "COLUMNS": tile.columns},
        warps=tile.warps,
    )


@cache
def product_factors(device: torch.device) -> Launch:
    """The launch that gives, of a product's two amaxes, its global factor, 0 and 1. device: as in `unpacking`."""
    return Launch(kernels.product_factors, 1, (torch.float32,) * 3, (), {}, warps=1)


def dequantize(codes: Tensor, scales: Tensor, k: int, down: bool) -> Tensor:
    """code * scale, bfloat16: exact, without the global factor.

    codes: uint8 [.., M, ceil16(k) / 2], giving [.., M, k]; of blocks down the columns [.., ceil16(k) / 2, N], giving
    [.., k, N].
    """
    *lead, rows, columns = codes.shape
    shape = (*lead, k, columns) if down else (*lead, rows, k)
    values = codes.new_empty(shape, dtype=torch.bfloat16)
    tensors = codes.contiguous(), scales.contiguous().view(torch.uint8), values
    unpacking(shape, down, codes.device)(tensors)
    return values


def product(
    a: Tensor,
    b: Tensor,
    a_amax: Tensor,
    b_amax: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """dialect.product of operands one of whose axes is contiguous: in FP32, rounded once.

    a: [.., M, K]; b: [.., N, K]; bias: broadcastable to the result; residual: [.., M, N]. Operands are neither copied
    nor transposed. With both, cuBLASLt adds the residual first.
    """
    factors = a_amax.new_empty(3)
    # A launch of its own: Inductor would take longer to compile as many.
    product_factors(a.device)((a_amax, b_amax, factors))
    return _scaled(a, b, factors, bias, residual, out_dtype)


def _scaled(
    a: Tensor, b: Tensor, factors: Tensor, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    with on_device_of(a):
        found = None if INTERPRETED else cublas.product(a, b, factors, bias, residual, out_dtype)
        terms = [term for term in (bias, residual) if term is not None]
        if found is None and terms:
            return _added(_scaled(a, b, factors, None, None, torch.float32), terms, out_dtype)
    if found is None:
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        exact = multiply(a.float(), b.mT.float()) if INTERPRETED else multiply(a, b.mT, out_dtype=torch.float32)
        found = (exact * factors[0]).to(out_dtype)
    return found


def _added(product: Tensor, terms: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
    """dialect.add_terms to a float32 product, in one kernel a term; the last of them rounds. Terms are no wider."""
    for term in terms[:-1]:
        product = product + term
    return torch.add(product, terms[-1], out=product.new_empty(product.shape, dtype=out_dtype))


def _fake_dequantize(codes: Tensor, scales: Tensor, k: int, down: bool) -> Tensor:
    shape = (*codes.shape[:-2], k, codes.shape[-1]) if down else (*codes.shape[:-1], k)
    return codes.new_empty(shape, dtype=torch.bfloat16)


def schema(operation: torch._ops.OpOverload) -> str:
    """That of an operation of the dialect, for one of the same name."""
    return str(operation._schema).removeprefix("nvfp4::")


_OPERATIONS = (
    (schema(dialect.REGION), region, dialect.REGION),
    ("dequantize(Tensor codes, Tensor scales, SymInt k, bool down) -> Tensor", dequantize, _fake_dequantize),
    (schema(dialect.PRODUCT), product, dialect.PRODUCT),
)

for _definition, _implementation, _fake in _OPERATIONS:
    _name = _definition.split("(", 1)[0]
    LIBRARY.define(_definition, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    for _key in DISPATCH_KEYS:
        LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"nvfp4_triton::{_name}", _fake, lib=LIBRARY)

REGION = torch.ops.nvfp4_triton.region.default
DEQUANTIZE = torch.ops.nvfp4_triton.dequantize.default
PRODUCT = torch.ops.nvfp4_triton.product.default


def dequantized(codes: Tensor, scales: Tensor, k: int) -> Tensor:
    """code * scale of an operand [.., M, k], whichever way its codes lie in memory; so does the result."""
    if codes.stride(-1) == 1:
        return DEQUANTIZE(codes, scales, k, False)
    return DEQUANTIZE(codes.mT, scales.mT, k, True).mT
