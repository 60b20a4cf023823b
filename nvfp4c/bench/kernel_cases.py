"""The kernels that `nvfp4c bench kernels` times, and what each is measured against. All that knows kernels is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor

from nvfp4c.bench.timing import cache_bytes
from nvfp4c.codegen.targets import kernel_table, resolve
from nvfp4c.formats import BLOCK, DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK, block_count

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


def _quantizers(device: str, inputs: list[Tensor]) -> Iterator[Case]:
    table = kernel_table(resolve("auto", torch.device(device)))
    rows, columns = inputs[0].shape
    read, packed = inputs[0].nbytes, packed_bytes(rows, columns)
    amax_of, quantize = table.amax, table.quantize
    assert amax_of is not None and quantize is not None
    plain, turned = amax_of(inputs[0]), amax_of(inputs[0].t(), DEFAULT_SIGNS)
    seed = torch.tensor(1, device=device)

    def amax(x: Tensor) -> object:
        return amax_of(x), amax_of(x.t(), DEFAULT_SIGNS)

    def both_ways(rounding: str) -> Callable[[Tensor], object]:
        def call(x: Tensor) -> object:
            along_rows = quantize(x, plain, ROW_BLOCK, rounding, None, seed, 0)
            return along_rows, quantize(x.t(), turned, ROW_BLOCK, rounding, DEFAULT_SIGNS, seed, 1)

        return call

    def weight(x: Tensor) -> object:
        return quantize(x, plain, TILE_BLOCK, "nearest")

    yield Case("amax, plain and of rotated columns", Ceiling.READ, read, _rotating(inputs, amax))
    for rounding in ("nearest", "stochastic"):
        moved = read + packed + packed_bytes(columns, rows)
        name = f"quantise rows + rotated columns, {rounding}"
        yield Case(name, Ceiling.COPY, moved, _rotating(inputs, both_ways(rounding)))
    yield Case("quantise in 16x16 tiles", Ceiling.COPY, read + packed, _rotating(inputs, weight))

    quantized = [quantize(x, plain, ROW_BLOCK, "nearest") for x in inputs]
    written = rows * columns * table.operand_dtype.itemsize
    unpack = _rotating(quantized, lambda operand: table.dequantize(*operand, columns))
    yield Case("dequantise", Ceiling.COPY, packed + written, unpack)


def _products(device: str, rows: int, columns: int) -> Iterator[Case]:
    """rows x columns times the transpose of columns x columns."""
    table = kernel_table(resolve("auto", torch.device(device)))
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
        lambda: table.product(a, b, one, one, None, dtype),
    )


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
