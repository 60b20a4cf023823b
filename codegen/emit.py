"""From a region to the Triton source of one kernel. Pure: text out, nothing compiled or launched.

A program handles a tile of 16 * GROUPS rows and COLUMNS columns of one matrix of a batch, in up to two parts:

- down the columns: sixteen named tiles `x0`..`x15` [GROUPS, COLUMNS] hold the rows of each group of 16, so a block lies
  in one thread, its butterfly is 64 additions, and no transposed copy is made: rows stay contiguous in memory.
- along the rows: one tile [R, B, 16] of B blocks; the second part's loads hit the cache.

A loop over several tiles would share what a program does once, but the addresses it keeps across turns take twice the
registers, so half the programs would run at a time.

Every output is laid out like the input: what belongs to blocks down the columns is the transpose of what the dialect
calls codes, scales and operand, and the reader turns it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from nvfp4c.formats import BLOCK, TILE_BLOCK
from nvfp4c.region import Form, Output, Region

HEADER = '''"""Emitted by nvfp4c: {title}."""

import triton
import triton.language as tl

from nvfp4c.codegen.device_math import (
    bits_float,
    block_scale,
    e2m1_code,
    e2m1_rounded,
    e2m1_stochastic_code,
    e2m1_stochastic_rounded,
    e4m3_value,
    encode_scale,
    float_bits,
    larger,
    load_blocks,
    load_line,
    raise_amax,
    random_byte,
    random_bytes,
    random_words,
    rotate,
    rotated,
    spread_like,
    store,
    to_bfloat16,
    to_float32,
)
from nvfp4c.codegen.kernels import tile_place

'''


CONSTANTS = ("GROUPS", "COLUMNS", "WIDTH", "EVEN", "NATIVE")
"""Of every emitted kernel: the tile, how many elements along a row a thread loads at a time, whether no tile reaches
beyond the matrix, and whether the chip converts to E4M3."""


@dataclass(frozen=True)
class Tile:
    """What a program handles: 16 * groups rows and `columns` columns, with `warps` warps."""

    groups: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Kernel:
    """An emitted kernel. buffers: one name for each tensor that it writes, in the order of its arguments."""

    name: str
    source: str
    buffers: tuple[str, ...]


def emit(region: Region) -> Kernel:
    """The kernel of a region. Equal regions, whatever their streams, give equal source."""
    places = list(enumerate(region.outputs))
    down = [(place, output) for place, output in places if _is_down(output)]
    along = [(place, output) for place, output in places if not _is_down(output)]
    body = [*_before(region), *(_down(down) if down else []), *(_along(along) if along else [])]
    buffers = tuple(name for place, output in places for name in _buffers(place, output))
    streams = [f"stream{place}" for place, output in places if output.stochastic]
    arguments = ["x", *(f"a{place}" for place in range(region.amax_count)), "seed", *buffers]
    arguments += ["rows", "columns", "batch_stride", "row_stride", *streams]
    constants = [f"{name}: tl.constexpr" for name in CONSTANTS]
    decorator = f"@triton.jit(do_not_specialize={streams})" if streams else "@triton.jit"
    signature = [f"    {name}," for name in (*arguments, *constants)]
    lines = [decorator, "def region(", *signature, "):", *(f"    {line}" for line in body)]
    source = HEADER.format(title=_title(region)) + "\n" + "\n".join(lines) + "\n"
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return Kernel(f"region_{digest}", source, buffers)


def _title(region: Region) -> str:
    def one(output: Output) -> str:
        words = [output.form.value, output.axis.value]
        if output.quantised:
            words += [f"{output.block[0]}x{output.block[1]}", output.rounding]
        return " ".join([*words, *(["rotated"] if output.signs else [])])

    return "; ".join(map(one, region.outputs))


def _is_down(output: Output) -> bool:
    """Whether an output is computed down the columns. A plain amax needs no blocks, so it goes there too."""
    return output.down or (output.form is Form.AMAX and output.signs is None)


def _buffers(place: int, output: Output) -> list[str]:
    if output.form is Form.PACKED:
        return [f"codes{place}", f"scales{place}"]
    return [f"{output.form.value}{place}"]


def _before(region: Region) -> list[str]:
    """What both parts need."""
    lines = [
        "batch, first_row, first_column = tile_place(rows, columns, GROUPS, COLUMNS)",
        "rows_left = tl.minimum(rows - first_row, 16 * GROUPS).to(tl.int32)",
        "columns_left = tl.minimum(columns - first_column, COLUMNS).to(tl.int32)",
        "origin = x + batch * batch_stride + first_row * row_stride + first_column",
        *(f"encode{place} = encode_scale(tl.load(a{place}))" for place in range(region.amax_count)),
    ]
    return [*lines, "key = tl.load(seed)"] if any(output.stochastic for output in region.outputs) else lines


def _down(outputs: list[tuple[int, Output]]) -> list[str]:
    lines = [
        "group = tl.arange(0, GROUPS)[:, None]",
        "column = tl.arange(0, COLUMNS)[None, :]",
        "in_columns = column < columns_left",
    ]
    lines += [
        f"x{i} = load_line(origin + (16 * group + {i}) * row_stride + column, "
        f"(16 * group + {i} < rows_left) & in_columns, EVEN)"
        for i in range(BLOCK)
    ]
    for signs in sorted({output.signs for _, output in outputs}, key=lambda signs: signs is not None):
        chosen = [(place, output) for place, output in outputs if output.signs == signs]
        if signs is None:
            lines += [f"z{i} = x{i}" for i in range(BLOCK)]
        else:
            lines += _butterfly(signs)
        lines += _largest("z", "largest")
        amaxes = [place for place, output in chosen if output.form is Form.AMAX]
        if signs is not None:
            # Rounding is monotonic, so the largest of the rounded sums is the rounded largest sum.
            lines += ["largest, _ = rotated(largest, largest)"]
        lines += [f"raise_amax(amax{place}, float_bits(largest))" for place in amaxes]
        quantised = [(place, output) for place, output in chosen if output.quantised]
        turned = [place for place, output in chosen if output.form is Form.ROTATED]
        if signs is not None and (quantised or turned):
            lines += [f"z{i}, z{i + 1} = rotated(z{i}, z{i + 1})" for i in range(0, BLOCK, 2)]
        for place in turned:
            lines += _down_stored(f"rotated{place}", [f"z{i}" for i in range(BLOCK)], whole=True)
        for place, output in quantised:
            lines += _down_quantised(place, output)
    return lines


def _down_stored(buffer: str, values: list[str], whole: bool) -> list[str]:
    """Store sixteen rows of bfloat16. whole: rows beyond the last are kept up to a whole block."""
    height, left = ("tl.cdiv(rows, 16) * 16", "tl.cdiv(rows_left, 16) * 16") if whole else ("rows", "rows_left")
    return [
        f"place = {_out(buffer, height, 'columns', 'first_row')} + column",
        f"left = {left}",
        *(
            f"store(place + (16 * group + {i}) * columns, to_bfloat16({value}), "
            f"(16 * group + {i} < left) & in_columns, EVEN)"
            for i, value in enumerate(values)
        ),
    ]


def _butterfly(signs: tuple[int, ...]) -> list[str]:
    """Sums in the order of `numerics.rotate`, not yet scaled nor rounded."""
    # A minus sign would be 0 - x, which loses the sign of a zero.
    lines = [f"z{i} = x{i}" if signs[i] > 0 else f"z{i} = -1.0 * x{i}" for i in range(BLOCK)]
    for stride in (1, 2, 4, 8):
        for low in (i for i in range(BLOCK) if not i & stride):
            a, b = f"z{low}", f"z{low + stride}"
            lines.append(f"{a}, {b} = {a} + {b}, {a} - {b}")
    return lines


def _largest(prefix: str, into: str) -> list[str]:
    names = [f"tl.abs({prefix}{i})" for i in range(BLOCK)]
    while len(names) > 1:
        names = [f"larger({a}, {b})" for a, b in zip(names[::2], names[1::2], strict=True)]
    return [f"{into} = {names[0]}"]


def _down_quantised(place: int, output: Output) -> list[str]:
    lines = ["block = largest"]
    if tuple(output.block) == TILE_BLOCK:
        lines = [
            "wide = tl.max(tl.reshape(float_bits(largest), [GROUPS, COLUMNS // 16, 16]), 2)",
            "wide = tl.broadcast_to(wide[:, :, None], [GROUPS, COLUMNS // 16, 16])",
            "block = bits_float(tl.reshape(wide, [GROUPS, COLUMNS]))",
        ]
    lines += [f"scale, multiplier = block_scale(block, encode{output.amax}, NATIVE)"]
    if output.stochastic:
        lines += [
            "number = (batch * columns + first_column + spread_like(column + 0 * group, largest)) * tl.cdiv(rows, 16)",
            "number += first_row // 16 + spread_like(group + 0 * column, largest)",
            f"w0, w1, w2, w3 = random_words(key, number, stream{place})",
        ]

    def element(kind: str, i: int) -> str:
        if output.stochastic:
            return f"e2m1_stochastic_{kind}(z{i} * multiplier, random_byte(w{i // 4}, {i % 4}))"
        return f"e2m1_{kind}(z{i} * multiplier)"

    if output.form is Form.OPERAND:
        lines += ["scale = e4m3_value(scale)"]
        values = [f"{element('rounded', i)} * scale" for i in range(BLOCK)]
        return lines + _down_stored(f"operand{place}", values, whole=output.signs is not None)
    lines += [
        "inside = (16 * group < rows_left) & in_columns",
        f"place = {_out(f'codes{place}', 'tl.cdiv(rows, 16) * 8', 'columns', 'first_row // 2')} + column",
    ]
    lines += [
        f"store(place + (8 * group + {i // 2}) * columns, "
        f"({element('code', i)} + 16 * {element('code', i + 1)}).to(tl.uint8), inside, EVEN)"
        for i in range(0, BLOCK, 2)
    ]
    lines += [
        f"place = {_out(f'scales{place}', 'tl.cdiv(rows, 16)', 'columns', 'first_row // 16')} + column",
        "store(place + group * columns, scale.to(tl.uint8), inside, EVEN)",
    ]
    return lines


def _out(buffer: str, height: str, width: str, first: str) -> str:
    return f"{buffer} + (batch * ({height}) + {first}) * {width} + first_column"


def _along(outputs: list[tuple[int, Output]]) -> list[str]:
    lines = [
        "row = tl.arange(0, 16 * GROUPS)[:, None]",
        "block_of = tl.arange(0, COLUMNS // 16)[None, :]",
        "blocks = tl.cdiv(columns, 16)",
        "found = load_blocks(origin, row, block_of, rows_left, columns_left, row_stride, 0, 16, WIDTH, EVEN)",
        "values = to_float32(found)",
        "here = (row < rows_left) & (16 * block_of < columns_left)",
        "tile_row = batch * rows + first_row + row",
        "tile_block = first_column // 16 + block_of",
    ]
    for signs in sorted({output.signs for _, output in outputs}, key=lambda signs: signs is not None):
        chosen = [(place, output) for place, output in outputs if output.signs == signs]
        if signs is not None:
            negative = sum(1 << i for i, sign in enumerate(signs) if sign < 0)
            lines += [f"turned = rotate(values, {negative})"]
        name = "values" if signs is None else "turned"
        lines += [f"tops = tl.max(float_bits({name}) & 0x7FFFFFFF, 2)"]
        for place, output in chosen:
            if output.form is Form.AMAX:
                lines += [f"raise_amax(amax{place}, tops)"]
            elif output.form is Form.ROTATED:
                lines += _along_stored(f"rotated{place}", name, whole=True)
            else:
                lines += _along_quantised(place, output, name)
    return lines


def _along_quantised(place: int, output: Output, name: str) -> list[str]:
    lines = ["top = tops"]
    if tuple(output.block) == TILE_BLOCK:
        lines = [
            "high = tl.max(tl.reshape(tops, [GROUPS, 16, COLUMNS // 16]), 1)",
            "high = tl.broadcast_to(high[:, None, :], [GROUPS, 16, COLUMNS // 16])",
            "top = tl.reshape(high, [16 * GROUPS, COLUMNS // 16])",
        ]
    lines += [
        f"scale, multiplier = block_scale(bits_float(top), encode{output.amax}, NATIVE)",
        f"y = {name} * multiplier[:, :, None]",
    ]
    kind = "code" if output.form is Form.PACKED else "rounded"
    if output.stochastic:
        lines += [
            f"octets = random_bytes(key, tile_row * blocks + tile_block, stream{place})",
            f"q = e2m1_stochastic_{kind}(y, octets)",
        ]
    else:
        lines += [f"q = e2m1_{kind}(y)"]
    if output.form is Form.OPERAND:
        values = "q * e4m3_value(scale)[:, :, None]"
        return lines + _along_stored(f"operand{place}", values, whole=output.signs is not None)
    return [
        *lines,
        "low, high = tl.split(tl.reshape(q, [16 * GROUPS, COLUMNS // 16, 8, 2]))",
        f"place = codes{place} + (tile_row * blocks + tile_block)[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]",
        "store(place, (low + 16 * high).to(tl.uint8), here[:, :, None], EVEN)",
        f"store(scales{place} + tile_row * blocks + tile_block, scale.to(tl.uint8), here, EVEN)",
    ]


def _along_stored(buffer: str, values: str, whole: bool) -> list[str]:
    """Store a tile of bfloat16. whole: columns beyond the last are kept up to a whole block."""
    width, left = ("blocks * 16", "tl.cdiv(columns_left, 16) * 16") if whole else ("columns", "columns_left")
    return [
        "element = 16 * block_of[:, :, None] + tl.arange(0, 16)[None, None, :]",
        f"place = {buffer} + (tile_row * ({width}) + first_column)[:, :, None] + element",
        f"store(place, to_bfloat16({values}), (row < rows_left)[:, :, None] & (element < {left}), EVEN)",
    ]
