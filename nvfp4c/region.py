"""A region: everything that one kernel computes from one matrix, read once. The data behind `nvfp4::region`.

Its prologue may compute that matrix, or several, from other tensors. A matrix is [M, K] or a batch [B, M, K], in the
orientation in which it lies in memory. Blocks of 16 run along its rows, or down its columns: those are the blocks of
its transpose, and need no transposed copy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from nvfp4c import numerics, philox
from nvfp4c.formats import ROW_BLOCK, block_count, padded
from nvfp4c.prologue import IDENTITY, Prologue
from nvfp4c.scale_layout import swizzle, swizzled_shape


class Form(str, Enum):
    """What an output holds.

    AMAX: the largest magnitude, after rotation if there is one. ROTATED: the rotated matrix, bfloat16. PACKED: two
    tensors, codes and scales. OPERAND: the dequantised values code * scale, bfloat16, where they are exact; a zero may
    have lost its sign. VALUE: the matrix itself, in its dtype.
    """

    AMAX = "amax"
    ROTATED = "rotated"
    PACKED = "packed"
    OPERAND = "operand"
    VALUE = "value"


class Axis(str, Enum):
    """What a block of 16 elements runs along."""

    ROWS = "rows"
    COLUMNS = "columns"


class Layout(str, Enum):
    """How codes and scales lie in memory.

    LINEAR: as the matrix does; those of blocks down its columns are the transpose of what the dialect calls codes and
    scales. NATIVE: as the FP4 tensor cores read them: codes [.., rows, ceil16(k) / 2] with the contraction axis last,
    whichever way the blocks run, and scales as `scale_layout.swizzle` gives them.
    """

    LINEAR = "linear"
    NATIVE = "native"


@dataclass(frozen=True)
class Output:
    """One result of a region. An amax or a rotated matrix uses only `axis` and `signs`, a value neither.

    amax: the place of the tensor's amax among those given to the region. stream: of stochastic rounding. matrix: which
    of the prologue's results it is computed from. layout: of packed codes and scales.
    """

    form: Form
    axis: Axis = Axis.ROWS
    block: tuple[int, int] = ROW_BLOCK
    rounding: str = "nearest"
    signs: tuple[int, ...] | None = None
    amax: int = 0
    stream: int = 0
    matrix: int = 0
    layout: Layout = Layout.LINEAR

    @property
    def quantised(self) -> bool:
        return self.form in (Form.PACKED, Form.OPERAND)

    @property
    def stochastic(self) -> bool:
        return self.quantised and self.rounding == "stochastic"

    @property
    def tensors(self) -> int:
        """How many tensors it holds."""
        return 2 if self.form is Form.PACKED else 1

    @property
    def down(self) -> bool:
        return self.axis is Axis.COLUMNS

    @property
    def by_columns(self) -> bool:
        """Whether a kernel computes it down the columns. A plain amax and a value need no blocks, and are too."""
        return self.down or self.form is Form.VALUE or (self.form is Form.AMAX and self.signs is None)

    @property
    def native(self) -> bool:
        return self.form is Form.PACKED and self.layout is Layout.NATIVE


@dataclass(frozen=True)
class Region:
    """The outputs of one kernel, in order, and what computes the matrices that they are computed from."""

    outputs: tuple[Output, ...]
    prologue: Prologue = IDENTITY

    @cached_property
    def amax_count(self) -> int:
        """How many amaxes the kernel reads."""
        return 1 + max((output.amax for output in self.outputs if output.quantised), default=-1)

    def to_json(self) -> str:
        """Plain data. A matrix that is given as it is needs no mention."""
        return self._text

    @cached_property
    def _text(self) -> str:
        given = {} if self.prologue.is_identity else {"prologue": self.prologue.to_dict()}
        return json.dumps({"outputs": [asdict(output) for output in self.outputs], **given})

    @staticmethod
    def from_json(text: str) -> Region:
        def output(given: dict[str, object]) -> Output:
            signs = given["signs"]
            return Output(
                form=Form(given["form"]),
                axis=Axis(given["axis"]),
                block=tuple(given["block"]),  # type: ignore[arg-type]
                rounding=str(given["rounding"]),
                signs=None if signs is None else tuple(signs),  # type: ignore[arg-type]
                amax=int(given["amax"]),  # type: ignore[call-overload]
                stream=int(given["stream"]),  # type: ignore[call-overload]
                matrix=int(given["matrix"]),  # type: ignore[call-overload]
                layout=Layout(given["layout"]),
            )

        data = json.loads(text)
        prologue = Prologue.from_dict(data["prologue"]) if "prologue" in data else IDENTITY
        return Region(tuple(map(output, data["outputs"])), prologue)


def without_streams(region: Region) -> Region:
    """What regions have in common that share a kernel: it is told their streams of random numbers in each launch."""
    return replace(region, outputs=tuple(replace(output, stream=0) for output in region.outputs))


def reduction(region: Region) -> Region:
    """The region of the one amax that every output of `region` is quantised by."""
    output = region.outputs[0]
    axis = Axis.ROWS if output.signs is None else output.axis
    return Region((Output(Form.AMAX, axis, signs=output.signs),))


Shape = tuple[tuple[int | torch.SymInt, ...], torch.dtype]


def shapes(output: Output, shape: Sequence[int], dtype: torch.dtype) -> list[Shape]:
    """Shapes and types of the tensors that an output of a region on a matrix [.., M, K] holds. All are contiguous."""
    if output.form is Form.AMAX:
        return [((), torch.float32)]
    if output.form is Form.VALUE:
        return [(tuple(shape), dtype)]
    *lead, rows, columns = shape
    whole = (padded(rows), columns) if output.down else (rows, padded(columns))
    if output.form is Form.ROTATED or (output.form is Form.OPERAND and output.signs is not None):
        return [((*lead, *whole), torch.bfloat16)]
    if output.form is Form.OPERAND:
        return [((*lead, rows, columns), torch.bfloat16)]
    if output.native:
        k, others = (rows, columns) if output.down else (columns, rows)
        scales = swizzled_shape(others, block_count(k))
        return [((*lead, others, padded(k) // 2), torch.uint8), ((*lead, *scales), torch.float8_e4m3fn)]
    packed = (whole[0] // 2, columns) if output.down else (rows, whole[1] // 2)
    linear = (block_count(rows), columns) if output.down else (rows, block_count(columns))
    return [((*lead, *packed), torch.uint8), ((*lead, *linear), torch.float8_e4m3fn)]


def evaluate(region: Region, inputs: Sequence[Tensor], amaxes: Sequence[Tensor], seed: Tensor | None) -> list[Tensor]:
    """The reference: every tensor of every output, in order.

    inputs: what the prologue reads; the first is [M, K] or [B, M, K], or of any rank for a plain amax.
    """
    matrices = region.prologue.evaluate(inputs)
    found: list[Tensor] = []
    for output in region.outputs:
        found += _evaluate(output, matrices[output.matrix], amaxes, seed)
    return found


def empty_outputs(region: Region, inputs: Sequence[Tensor]) -> list[Tensor]:
    """New tensors like those that `evaluate` gives, their contents left open."""
    types = region.prologue.result_types([x.dtype for x in inputs])
    return [
        inputs[0].new_empty(shape, dtype=dtype)
        for output in region.outputs
        for shape, dtype in shapes(output, inputs[0].shape, types[output.matrix])
    ]


def _evaluate(output: Output, x: Tensor, amaxes: Sequence[Tensor], seed: Tensor | None) -> list[Tensor]:
    if output.form is Form.VALUE:
        return [x.clone(memory_format=torch.contiguous_format)]
    rows = x.mT if output.down else x
    if output.signs is not None:
        rows = numerics.rotate(rows, output.signs)
    if output.form is Form.AMAX:
        return [numerics.tensor_amax(rows)]
    if output.form is Form.ROTATED:
        return [_laid_out(rows, output)]
    bits = None
    if output.stochastic:
        assert seed is not None, "stochastic rounding needs a seed"
        bits = philox.random_bytes_like(rows, seed, output.stream)
    codes, scales = numerics.block_codes(rows, amaxes[output.amax], output.block, bits)
    if output.native:
        return [numerics.pack(codes).contiguous(), swizzle(scales)]
    if output.form is Form.PACKED:
        return [_laid_out(numerics.pack(codes), output), _laid_out(scales, output)]
    values = numerics.block_values(codes, scales).narrow(-1, 0, rows.shape[-1])
    return [_laid_out(values.to(torch.bfloat16), output)]


def _laid_out(rows: Tensor, output: Output) -> Tensor:
    return (rows.mT if output.down else rows).contiguous()
