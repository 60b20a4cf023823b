"""From a region to the Triton source of one kernel. Pure: text out, nothing compiled or launched.

A program handles a tile of 16 * GROUPS rows and COLUMNS columns of one matrix of a batch, in up to two parts:

- down the columns: sixteen named tiles `m0_0`..`m0_15` [GROUPS, COLUMNS] hold the rows of each group of 16, so a block
  lies in one thread, its butterfly is 64 additions, and no transposed copy is made: rows stay contiguous in memory.
- along the rows: one tile [R, B, 16] of B blocks; the second part's loads hit the cache.

Where the region has a prologue, a jit function of that name computes the matrices from what both parts load.

A loop over several tiles would share what a program does once, but the addresses it keeps across turns take twice the
registers, so half the programs would run at a time.

Outputs are laid out like the input: what belongs to blocks down the columns is the transpose of what the dialect calls
codes, scales and operand, and the reader turns it. In the native layout nothing is left to turn: eight bytes of a block
are stored where a product on the FP4 tensor cores reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass

from nvfp4c.codegen.expressions import prologue_source
from nvfp4c.formats import BLOCK, TILE_BLOCK
from nvfp4c.prologue import Kind
from nvfp4c.region import Form, Output, Region

HEADER = '''"""Emitted by nvfp4c: {title}."""

import triton
import triton.language as tl

from nvfp4c.codegen.device_math import (
    bits_float,
    block_amax,
    block_scale,
    e4m3_value,
    encode_scale,
    float_bits,
    halves,
    larger,
    larger_half,
    larger_pair,
    load_blocks,
    load_line,
    raise_amax,
    random_byte,
    random_bytes,
    random_pairs,
    random_words,
    rotate,
    rotated,
    rotated_pair,
    rounded_bfloat16,
    rounded_float16,
    smaller,
    spread_like,
    store,
    tanh,
    to_bfloat16,
    to_dtype,
    to_float32,
)
from nvfp4c.codegen.e2m1 import e2m1_bytes, e2m1_rounded, e2m1_stochastic_bytes, e2m1_stochastic_rounded
from nvfp4c.codegen.kernels import {from_kernels}
{more}
'''
NATIVE_IMPORT = (
    "from nvfp4c.codegen.native_math import nearest_word, nearest_words, stochastic_word, stochastic_words\n"
)


CONSTANTS = ("GROUPS", "COLUMNS", "WIDTH", "EVEN", "NATIVE")
"""Of every emitted kernel: the tile, how many elements along a row a thread loads at a time, whether no tile reaches
beyond the matrix, and what the chip converts itself: see `chips`. One that converts anything, compares magnitudes and
keeps the sign in one instruction too."""


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
    down = [(place, output) for place, output in places if output.by_columns]
    along = [(place, output) for place, output in places if not output.by_columns]
    body = [*_before(region), *(_down(region, down) if down else []), *(_along(region, along) if along else [])]
    buffers = tuple(name for place, output in places for name in _buffers(place, output))
    streams = [f"stream{place}" for place, output in places if output.stochastic]
    inputs = list(enumerate(region.prologue.inputs))
    arguments = [*(f"i{place}" for place, _ in inputs), *(f"a{place}" for place in range(region.amax_count)), "seed"]
    arguments += [*buffers, "rows", "columns"]
    arguments += [f"i{place}_{step}" for place, kind in inputs if kind is Kind.FULL for step in ("batch", "row")]
    arguments += streams
    constants = [f"{name}: tl.constexpr" for name in CONSTANTS]
    decorator = f"@triton.jit(do_not_specialize={streams})" if streams else "@triton.jit"
    signature = [f"    {name}," for name in (*arguments, *constants)]
    lines = [decorator, "def region(", *signature, "):", *(f"    {line}" for line in body)]
    native = any(output.native for output in region.outputs)
    imports = {
        "from_kernels": "swizzled_place, tile_place" if native else "tile_place",
        "more": NATIVE_IMPORT if native else "",
    }
    before = [] if region.prologue.is_identity else prologue_source(region.prologue)
    source = HEADER.format(title=_title(region), **imports) + "\n" + "\n".join([*before, *lines]) + "\n"
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return Kernel(f"region_{digest}", source, buffers)


def _title(region: Region) -> str:
    def one(output: Output) -> str:
        words = [output.form.value, output.axis.value]
        if output.quantised:
            words += [f"{output.block[0]}x{output.block[1]}", output.rounding]
        return " ".join([*words, *["rotated"] * (output.signs is not None), *["native"] * output.native])

    title = "; ".join(map(one, region.outputs))
    operations = list(dict.fromkeys(step.operation for step in region.prologue.steps if step.operation != "to"))
    return f"{title} of {', '.join(operations)}" if operations else title


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
    ]
    for place, kind in enumerate(region.prologue.inputs):
        offset = {
            Kind.FULL: f"batch * i{place}_batch + first_row * i{place}_row + first_column",
            Kind.ROW: "batch * rows + first_row",
            Kind.COLUMN: "first_column",
        }[kind]
        lines.append(f"o{place} = i{place} + {offset}")
    lines += [f"amax_{place} = tl.load(a{place})" for place in range(region.amax_count)]
    return [*lines, "key = tl.load(seed)"] if any(output.stochastic for output in region.outputs) else lines


def _encodes(outputs: list[tuple[int, Output]], known: Container[int] = ()) -> list[str]:
    """Compute the scales that outputs ask for but those that are known: after the loads, for a division may branch, and
    no load is moved across a branch."""
    amaxes = sorted({output.amax for _, output in outputs if output.quantised and output.amax not in known})
    return [f"encode{amax} = encode_scale(amax_{amax})" for amax in amaxes]


def _by_matrix(outputs: list[tuple[int, Output]]) -> list[tuple[int, tuple[int, ...] | None]]:
    """The matrices that are needed, each with the signs of its rotations, plain first."""
    found = {(output.matrix, output.signs) for _, output in outputs}
    return sorted(found, key=lambda one: (one[0], one[1] is not None, one[1] or ()))


def _matrices(region: Region, loaded: list[str], names: list[str], inside: str) -> list[str]:
    """Compute the matrices from elements of all inputs. Beyond a matrix they are 0, as what is loaded is."""
    if region.prologue.is_identity:
        return [f"{names[0]} = {loaded[0]}"]
    lines = [f"{', '.join(names)} = prologue({', '.join(loaded)})"]
    return [*lines, "if not EVEN:", *(f"    {name} = tl.where({inside}, {name}, 0.0)" for name in names)]


def _down(region: Region, outputs: list[tuple[int, Output]]) -> list[str]:
    inputs = list(enumerate(region.prologue.inputs))
    lines = [
        "group = tl.arange(0, GROUPS)[:, None]",
        "column = tl.arange(0, COLUMNS)[None, :]",
        "in_columns = column < columns_left",
        *(f"c{place} = load_line(o{place} + column, in_columns, EVEN)" for place, k in inputs if k is Kind.COLUMN),
        *(f"p{place} = o{place} + 16 * group" for place, k in inputs if k is Kind.ROW),
        *(f"p{place} = o{place} + 16 * group * i{place}_row + column" for place, k in inputs if k is Kind.FULL),
    ]
    step = {Kind.FULL: "p{0} += i{0}_row", Kind.ROW: "p{0} += 1", Kind.COLUMN: ""}
    for i in range(BLOCK):
        in_rows = f"16 * group + {i} < rows_left"
        inside = f"({in_rows}) & in_columns"
        if i:
            lines += [step[kind].format(place) for place, kind in inputs if step[kind]]
        loaded = [
            {
                Kind.FULL: f"load_line(p{place}, {inside}, EVEN)",
                Kind.ROW: f"load_line(p{place}, {in_rows}, EVEN)",
                Kind.COLUMN: f"c{place}",
            }[kind]
            for place, kind in inputs
        ]
        lines += _matrices(region, loaded, [f"m{m}_{i}" for m in range(len(region.prologue.results))], inside)
    lines += _encodes(outputs)
    for matrix, signs in _by_matrix(outputs):
        chosen = [(p, output) for p, output in outputs if output.matrix == matrix and output.signs == signs]
        for place in (place for place, output in chosen if output.form is Form.VALUE):
            lines += _down_stored(f"value{place}", [f"m{matrix}_{i}" for i in range(BLOCK)], whole=False)
        if all(output.form is Form.VALUE for _, output in chosen):
            continue
        amaxes = [place for place, output in chosen if output.form is Form.AMAX]
        quantised = [(place, output) for place, output in chosen if output.quantised]
        turned = [place for place, output in chosen if output.form is Form.ROTATED]
        if signs is None:
            lines += [f"z{i} = m{matrix}_{i}" for i in range(BLOCK)]
            lines += _largest_magnitude()
        else:
            lines += _butterfly(f"m{matrix}_", signs)
            lines += _rounded_sums() if quantised or turned else _largest_sum()
        lines += [f"raise_amax(amax{place}, float_bits(largest))" for place in amaxes]
        for place in turned:
            lines += _down_stored(f"rotated{place}", [f"z{i}" for i in range(BLOCK)], whole=True)
        for place, output in quantised:
            lines += _down_quantised(place, output)
    return lines


def _down_stored(buffer: str, values: list[str], whole: bool) -> list[str]:
    """Store sixteen rows, of which nothing is rounded. whole: rows beyond the last are kept up to a whole block."""
    height, left = ("tl.cdiv(rows, 16) * 16", "tl.cdiv(rows_left, 16) * 16") if whole else ("rows", "rows_left")
    stores = [
        f"store(place, to_dtype({value}, {buffer}.dtype.element_ty), (16 * group + {i} < left) & in_columns, EVEN)"
        for i, value in enumerate(values)
    ]
    return [
        f"place = {_out(buffer, height, 'columns', 'first_row')} + 16 * group * columns + column",
        f"left = {left}",
        *_line_by_line(stores),
    ]


def _line_by_line(stores: list[str]) -> list[str]:
    """Stores at `place`, each a line further. Adding a stride to pointers is one operation, where computing each anew
    would be four; Triton takes time in the square of their number."""
    return [line for store in stores for line in (store, "place += columns")][:-1]


def _butterfly(prefix: str, signs: tuple[int, ...]) -> list[str]:
    """Sums in the order of `numerics.rotate`, not yet scaled nor rounded."""
    # A minus sign would be 0 - x, which loses the sign of a zero.
    lines = [f"z{i} = {'' if signs[i] > 0 else '-1.0 * '}{prefix}{i}" for i in range(BLOCK)]
    for stride in (1, 2, 4, 8):
        for low in (i for i in range(BLOCK) if not i & stride):
            a, b = f"z{low}", f"z{low + stride}"
            lines.append(f"{a}, {b} = {a} + {b}, {a} - {b}")
    return lines


def _largest_magnitude() -> list[str]:
    return _largest([f"tl.abs(z{i})" for i in range(BLOCK)], "larger({}, {})")


def _largest_sum() -> list[str]:
    """The largest magnitude alone of a rotated block: rounding is monotonic, so it is the rounded largest sum."""
    return [*_largest_magnitude(), "largest, _ = rotated(largest, largest)"]


def _rounded_sums() -> list[str]:
    """Scale and round the sums of a rotated block, two to a register, in which they are compared as well."""
    pairs = range(0, BLOCK, 2)
    lines = [f"pair{i} = rotated_pair(z{i}, z{i + 1})" for i in pairs]
    lines += _largest([f"pair{i}" for i in pairs], "larger_pair({}, {}, NATIVE)")
    lines += ["largest = larger_half(largest)"]
    return [*lines, *(f"z{i}, z{i + 1} = halves(pair{i})" for i in pairs)]


def _largest(names: list[str], larger: str) -> list[str]:
    while len(names) > 1:
        names = [larger.format(a, b) for a, b in zip(names[::2], names[1::2], strict=True)]
    return [f"largest = {names[0]}"]


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
            "across = tl.cast(tl.cdiv(rows, 16), tl.int64)",
            "number = spread_like(column + 0 * group, largest) * across + spread_like(group + 0 * column, largest)",
            "number += (batch * columns + first_column) * across + first_row // 16",
            f"w0, w1, w2, w3 = random_words(key, number, stream{place})",
        ]
    if output.native:
        return lines + _down_native(place, output)

    if output.form is Form.OPERAND:
        lines += ["scale = e4m3_value(scale)"]
        values = [f"{_rounded(output, i)} * scale" for i in range(BLOCK)]
        return lines + _down_stored(f"operand{place}", values, whole=output.signs is not None)
    lines += [
        "inside = (16 * group < rows_left) & in_columns",
        f"place = {_out(f'codes{place}', 'tl.cdiv(rows, 16) * 8', 'columns', 'first_row // 2')}",
        "place += 8 * group * columns + column",
    ]
    lines += _line_by_line([f"store(place, {_byte(output, i)}, inside, EVEN)" for i in range(0, BLOCK, 2)])
    lines += [
        f"place = {_out(f'scales{place}', 'tl.cdiv(rows, 16)', 'columns', 'first_row // 16')} + column",
        "store(place + group * columns, scale.to(tl.uint8), inside, EVEN)",
    ]
    return lines


def _rounded(output: Output, i: int) -> str:
    """The value of an element of blocks down the columns."""
    if output.stochastic:
        return f"e2m1_stochastic_rounded(z{i} * multiplier, random_byte(w{i // 4}, {i % 4}), NATIVE)"
    return f"e2m1_rounded(z{i} * multiplier, NATIVE)"


def _byte(output: Output, i: int) -> str:
    """The codes of an element and of the next."""
    both = f"z{i} * multiplier, z{i + 1} * multiplier"
    return f"e2m1_stochastic_bytes({both}, w{i // 4}, {i % 4})" if output.stochastic else f"e2m1_bytes({both})"


def _down_native(place: int, output: Output) -> list[str]:
    """Store codes and scales of blocks that a thread each holds whole: 8 bytes of a line of codes.

    The groups of a tile are neighbours in memory, four of them a whole sector.
    """
    lines = [f"y{i} = z{i} * multiplier" for i in range(BLOCK)]
    for half, words in enumerate(("w0, w1, ", "w2, w3, ")):
        values = ", ".join(f"y{8 * half + i}" for i in range(8))
        call = f"stochastic_word({values}, {words}NATIVE)" if output.stochastic else f"nearest_word({values}, NATIVE)"
        lines += [f"half{half} = {call}.to(tl.int64)"]
    return [
        *lines,
        "inside = (16 * group < rows_left) & in_columns",
        "blocks = tl.cdiv(rows, 16)",
        "block_of = first_row // 16 + group",
        f"place = codes{place}.to(tl.pointer_type(tl.int64), bitcast=True)",
        "place += (batch * columns + first_column + column) * blocks + block_of",
        "store(place, (half0 & 0xFFFFFFFF) | (half1 << 32), inside, EVEN)",
        f"place = scales{place} + swizzled_place(batch, first_column + column, block_of, columns, blocks)",
        "store(place, scale.to(tl.uint8), inside, EVEN)",
    ]


def _out(buffer: str, height: str, width: str, first: str) -> str:
    return f"{buffer} + (batch * ({height}) + {first}) * {width} + first_column"


def _along(region: Region, outputs: list[tuple[int, Output]]) -> list[str]:
    inputs = list(enumerate(region.prologue.inputs))
    # Numbers of columns are loaded as if each row had its own: threads then hold the same elements of all inputs.
    blocks = "load_blocks(o{0}, row, block_of, rows_left, columns_left, %s, 0, 16, WIDTH, EVEN)"
    loaded = {
        Kind.FULL: blocks % "i{0}_row",
        Kind.ROW: "load_line(o{0} + row, row < rows_left, EVEN)[:, :, None]",
        Kind.COLUMN: blocks % "0",
    }
    names = [f"m{m}" for m in range(len(region.prologue.results))]
    inside = "(row < rows_left)[:, :, None] & (element < columns_left)"
    lines = [
        "row = tl.arange(0, 16 * GROUPS)[:, None]",
        "block_of = tl.arange(0, COLUMNS // 16)[None, :]",
        "blocks = tl.cdiv(columns, 16)",
        "element = 16 * block_of[:, :, None] + tl.arange(0, 16)[None, None, :]",
        *_matrices(region, [loaded[kind].format(place) for place, kind in inputs], names, inside),
        *_encodes(outputs, known={one.amax for one in region.outputs if one.by_columns and one.quantised}),
        "here = (row < rows_left) & (16 * block_of < columns_left)",
        "tile_row = batch * rows + first_row + row",
        "tile_block = first_column // 16 + block_of",
    ]
    for matrix, signs in _by_matrix(outputs):
        chosen = [(p, output) for p, output in outputs if output.matrix == matrix and output.signs == signs]
        name = f"m{matrix}"
        if signs is not None:
            negative = sum(1 << i for i, sign in enumerate(signs) if sign < 0)
            lines += [f"turned = rotate({name}, {negative})"]
            name = "turned"
        lines += [f"tops = block_amax({name})"]
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
    if output.native:
        return lines + _along_native(place, output)
    if output.form is Form.OPERAND:
        if output.stochastic:
            lines += [f"octets = random_bytes(key, tile_row * blocks + tile_block, stream{place})"]
        q = "e2m1_stochastic_rounded(y, octets, NATIVE)" if output.stochastic else "e2m1_rounded(y, NATIVE)"
        values = f"{q} * e4m3_value(scale)[:, :, None]"
        return lines + _along_stored(f"operand{place}", values, whole=output.signs is not None)
    lines += ["low, high = tl.split(tl.reshape(y, [16 * GROUPS, COLUMNS // 16, 8, 2]))"]
    both = "e2m1_bytes(low, high)"
    if output.stochastic:
        lines += [f"words = random_pairs(key, tile_row * blocks + tile_block, stream{place})"]
        both = "e2m1_stochastic_bytes(low, high, words, 0)"
    return [
        *lines,
        f"place = codes{place} + (tile_row * blocks + tile_block)[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]",
        f"store(place, {both}, here[:, :, None], EVEN)",
        f"store(scales{place} + tile_row * blocks + tile_block, scale.to(tl.uint8), here, EVEN)",
    ]


def _along_native(place: int, output: Output) -> list[str]:
    lines = ["words = nearest_words(y, NATIVE)"]
    if output.stochastic:
        lines = [
            f"w0, w1, w2, w3 = random_words(key, tile_row * blocks + tile_block, stream{place})",
            "words = stochastic_words(y, w0, w1, w2, w3, NATIVE)",
        ]
    return [
        *lines,
        f"place = codes{place}.to(tl.pointer_type(tl.int32), bitcast=True)",
        "place += (tile_row * blocks + tile_block)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]",
        "store(place, words, here[:, :, None], EVEN)",
        f"place = scales{place} + swizzled_place(batch, first_row + row, tile_block, rows, blocks)",
        "store(place, scale.to(tl.uint8), here, EVEN)",
    ]


def _along_stored(buffer: str, values: str, whole: bool) -> list[str]:
    """Store a tile of bfloat16. whole: columns beyond the last are kept up to a whole block."""
    width, left = ("blocks * 16", "tl.cdiv(columns_left, 16) * 16") if whole else ("columns", "columns_left")
    return [
        f"place = {buffer} + (tile_row * ({width}) + first_column)[:, :, None] + element",
        f"store(place, to_bfloat16({values}), (row < rows_left)[:, :, None] & (element < {left}), EVEN)",
    ]
