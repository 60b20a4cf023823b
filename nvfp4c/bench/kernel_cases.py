"""The kernels that `nvfp4c bench kernels` times, and what each is measured against. All that knows kernels is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor

from nvfp4c.bench.timing import cache_bytes
from nvfp4c.codegen.targets import kernel_table, resolve
from nvfp4c.dialect import KernelTable
from nvfp4c.formats import BLOCK, DEFAULT_SIGNS, TILE_BLOCK, block_count
from nvfp4c.region import Axis, Form, Layout, Output, Region

INPUT_DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
LARGE_BYTES = {"cuda": 512 * 2**20, "cpu": 64 * 2**20}
"""Of the tensors whose copy and reduction show what memory can do: launching them takes no part of their time."""

MOST_INPUTS = 16
CODES_PER_BYTE = 2

Inputs = TypeVar("Inputs")


class Ceiling(Enum):
    """What bounds a kernel, with the unit of its amount."""

    COPY = "copy"
    """Bytes read and written, against those of a device copy."""
    READ = "read"
    """Bytes read, against those of a plain reduction."""
    PRODUCT = "product"
    """Operations, against those of a matrix product by the vendor's library."""


@dataclass(frozen=True)
class Case:
    """Something to time. amount: bytes moved when each input is read and each output written once, or operations.

    reference: whether this measures the ceiling; of several that do, the fastest counts.
    """

    name: str
    ceiling: Ceiling
    amount: int
    call: Callable[[], object]
    reference: bool = False


def cases(device: str, rows: int, columns: int) -> list[Case]:
    """Every case on an input of rows x columns: the references first. Inputs are made here, and stay with the calls."""
    torch.manual_seed(0)
    inputs = _inputs(device, rows, columns)
    return [*_memory_references(device, inputs), *_quantizers(device, inputs), *_products(device, rows, columns)]


def _memory_references(device: str, inputs: list[Tensor]) -> Iterator[Case]:
    dtype = INPUT_DTYPE[device]
    source = torch.randn(LARGE_BYTES[device] // dtype.itemsize, dtype=dtype, device=device)
    target, copied = torch.empty_like(source), torch.empty_like(inputs[0])
    same_size = _rotating(inputs, lambda x: copied.copy_(x))
    yield Case("copy, large tensor", Ceiling.COPY, 2 * source.nbytes, lambda: target.copy_(source), reference=True)
    yield Case("copy, this shape", Ceiling.COPY, 2 * copied.nbytes, same_size, reference=True)
    yield Case("torch.amax, large tensor", Ceiling.READ, source.nbytes, lambda: source.amax(), reference=True)
    yield Case("torch.sum, large tensor", Ceiling.READ, source.nbytes, lambda: source.sum(), reference=True)
    if device == "cuda":
        reduce = torch.compile(lambda x: x.abs().amax())
        yield Case("compiled amax, large tensor", Ceiling.READ, source.nbytes, lambda: reduce(source), reference=True)


ROWS, COLUMNS = Output(Form.PACKED), Output(Form.PACKED, Axis.COLUMNS, signs=DEFAULT_SIGNS, amax=1)
ROW_OPERAND, COLUMN_OPERAND = replace(ROWS, form=Form.OPERAND), replace(COLUMNS, form=Form.OPERAND)

QUANTIZERS: dict[str, tuple[Output, ...]] = {
    "rows and rotated columns, packed": (ROWS, COLUMNS),
    "row operand, rotated columns packed: a layer's input": (ROW_OPERAND, COLUMNS),
    "row operand and rotated column operand: a gradient": (ROW_OPERAND, COLUMN_OPERAND),
}
"""What is computed from one read of a matrix. The first form is the one that a chip with FP4 products wants."""

NATIVE_PRODUCTS = {"emitted kernel": "triton", "library": "library"}
"""What multiplies packed operands, and the option that asks for it."""


def _quantizers(device: str, inputs: list[Tensor]) -> Iterator[Case]:
    table = kernel_table(resolve("auto", torch.device(device)))
    rows, columns = inputs[0].shape
    read, packed = inputs[0].nbytes, packed_bytes(rows, columns)
    seed = torch.tensor(1, device=device)
    amax_both = Output(Form.AMAX), Output(Form.AMAX, Axis.COLUMNS, signs=DEFAULT_SIGNS)
    amaxes = [amax for (amax,) in _computed(table, inputs[0], [], seed, amax_both)]

    def case(name: str, outputs: tuple[Output, ...], ceiling: Ceiling = Ceiling.COPY) -> Case:
        found = _computed(table, inputs[0], amaxes, seed, outputs)
        written = sum(tensor.nbytes for tensors in found for tensor in tensors)
        moved = read if ceiling is Ceiling.READ else read + written
        return Case(name, ceiling, moved, _rotating(inputs, lambda x: _computed(table, x, amaxes, seed, outputs)))

    yield case("amax, plain", amax_both[:1], Ceiling.READ)
    yield case("amax, plain and of rotated columns", amax_both, Ceiling.READ)
    for name, outputs in QUANTIZERS.items():
        for rounding in ("nearest", "stochastic"):
            drawn = tuple(replace(output, rounding=rounding, stream=place) for place, output in enumerate(outputs))
            yield case(f"{name}, {rounding}", drawn)
    yield case("operand in 16x16 tiles: a weight", (replace(ROW_OPERAND, block=TILE_BLOCK),))

    quantized = [_computed(table, x, amaxes, seed, (ROWS,))[0] for x in inputs]
    written = rows * columns * table.operand_dtype.itemsize
    unpack = _rotating(quantized, lambda operand: table.dequantize(operand[0], operand[1], columns))
    yield Case("dequantise", Ceiling.COPY, packed + written, unpack)


def _computed(
    table: KernelTable, x: Tensor, amaxes: list[Tensor], seed: Tensor, outputs: tuple[Output, ...]
) -> list[tuple[Tensor, ...]]:
    """The tensors of each output: by one kernel where the target has such kernels, else by one after the other."""
    if table.region is not None:
        found = iter(table.region([x], amaxes, seed, Region(outputs).to_json()))
        return [tuple(next(found) for _ in range(output.tensors)) for output in outputs]
    assert table.amax is not None and table.quantize is not None and table.operand is not None
    results: list[tuple[Tensor, ...]] = []
    for output in outputs:
        along = x.t() if output.down else x
        if output.form is Form.AMAX:
            results.append((table.amax(along, output.signs),))
            continue
        how = output.block, output.rounding, output.signs, seed, output.stream
        made = (table.quantize if output.form is Form.PACKED else table.operand)(along, amaxes[output.amax], *how)
        results.append(made if isinstance(made, tuple) else (made,))
    return results


def _products(device: str, rows: int, columns: int) -> Iterator[Case]:
    """rows x columns times the transpose of columns x columns."""
    target = resolve("auto", torch.device(device))
    table = kernel_table(target)
    a = torch.randn(rows, columns, device=device).to(table.operand_dtype)
    b = torch.randn(columns, columns, device=device).to(table.operand_dtype)
    operations = 2 * rows * columns * columns
    name = "cuBLAS" if device == "cuda" else "BLAS"
    dtype = INPUT_DTYPE[device]
    precision = str(dtype).removeprefix("torch.")
    one = torch.ones((), device=device)
    yield Case(f"{name} {precision} product", Ceiling.PRODUCT, operations, lambda: a @ b.t(), reference=True)
    yield Case(
        "product of dequantised operands",
        Ceiling.PRODUCT,
        operations,
        lambda: table.product(a, b, one, one, None, None, dtype),
    )
    if target.native_fp4:
        operands = *_packed(table, a), *_packed(table, b)
        for title, product in NATIVE_PRODUCTS.items():
            multiply = kernel_table(target, product).block_scaled_mm
            assert multiply is not None, "what multiplies FP4 itself has one"
            call = partial(multiply, *operands, None, None, dtype)
            yield Case(f"FP4 product of packed operands: {title}", Ceiling.PRODUCT, operations, call)


def _packed(table: KernelTable, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and amax of an operand as the FP4 tensor cores read it: quantised by the target's own kernels."""
    seed = torch.tensor(0, device=x.device)
    ((amax,),) = _computed(table, x, [], seed, (Output(Form.AMAX),))
    ((codes, scales),) = _computed(table, x, [amax], seed, (replace(ROWS, layout=Layout.NATIVE),))
    return codes, scales, amax


def packed_bytes(rows: int, columns: int) -> int:
    """Of the codes and scales of a matrix quantised along its columns, padded to whole blocks."""
    return rows * block_count(columns) * (BLOCK // CODES_PER_BYTE + 1)


def _inputs(device: str, rows: int, columns: int) -> list[Tensor]:
    """So many inputs that even their packed forms are out of the cache again before each has its turn.

    Of small inputs there are not that many: those are timed with some of their data in the cache.
    """
    count = 2 * cache_bytes(device) // packed_bytes(rows, columns) + 1
    dtype = INPUT_DTYPE[device]
    return [torch.randn(rows, columns, device=device, dtype=dtype) for _ in range(min(count, MOST_INPUTS))]


def _rotating(inputs: list[Inputs], function: Callable[[Inputs], object]) -> Callable[[], object]:
    """A call that takes the next of the inputs each time."""
    turn = cycle(inputs)
    return lambda: function(next(turn))
