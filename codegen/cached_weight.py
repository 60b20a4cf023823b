"""`nvfp4_triton::weight`: a region of a parameter, quantised once for every state that the parameter is in.

Results are always new tensors, for Inductor may write over them: what the cache keeps is unpacked, or copied. A copy
reads and writes 4.5 bits an element, where quantising reads the weight twice.

Where products read packed operands, a weight is kept along its rows for the forward, and down its columns for the
backward: in the native layout neither is the transpose of the other. The second of them takes the amax of the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from nvfp4c import dialect
from nvfp4c.codegen import operations
from nvfp4c.codegen.operations import DISPATCH_KEYS, LIBRARY
from nvfp4c.formats import padded
from nvfp4c.region import Axis, Form, Output, Region, reduction
from nvfp4c.weight_cache import CACHE, Packed, cacheable


@dataclass(frozen=True)
class Regions:
    """What is launched for a region of a weight.

    reduce: its amax. wanted: what is asked for. fill: the packed form that is kept, in the layout that is asked for,
    then what else is.
    """

    reduce: Region
    wanted: Region
    fill: Region

    @property
    def packed(self) -> Output:
        return self.fill.outputs[0]

    @property
    def turned(self) -> Output | None:
        """The same down the other axis, where that has the same amax; a rotated matrix has another along each."""
        axis = Axis.ROWS if self.packed.down else Axis.COLUMNS
        return replace(self.packed, axis=axis) if self.packed.signs is None else None


@lru_cache(maxsize=operations.SHAPES_KEPT)
def regions(text: str) -> Regions:
    """Those of a region given as JSON, all of whose outputs are the same values."""
    wanted = Region.from_json(text)
    others = [output for output in wanted.outputs if output.form is not Form.PACKED]
    return Regions(reduction(wanted), wanted, Region((replace(wanted.outputs[0], form=Form.PACKED), *others)))


def weight(w: Tensor, dtype: torch.dtype, region: str, sure: bool) -> list[Tensor]:
    """`dialect.weight`, from the cache where it can be. A tensor that nothing can be kept of is quantised as any is."""
    needed = regions(region)
    if not cacheable(w):
        amax, found = _quantised(w.to(dtype), None, needed.reduce, needed.wanted)
        return [amax, *found]
    kind, state = (needed.packed, dtype), CACHE.state(w)
    packed, operand = CACHE.find(w, kind, state, sure), None
    if packed is None:
        other = CACHE.peek(w, (needed.turned, dtype), state, sure)
        known = None if other is None else other.amax
        amax, (codes, scales, *others) = _quantised(w.to(dtype), known, needed.reduce, needed.fill)
        packed, operand = Packed(amax, codes, scales), next(iter(others), None)
        CACHE.keep(w, kind, state, packed)
    results = [packed.amax.clone()]
    for output in needed.wanted.outputs:
        if output.form is Form.PACKED:
            results += [packed.codes.clone(), packed.scales.clone()]
        else:
            results.append(_unpacked(packed, output, w.shape) if operand is None else operand)
    return results


def _quantised(matrix: Tensor, known: Tensor | None, reduce: Region, quantise: Region) -> tuple[Tensor, list[Tensor]]:
    """The amax of a matrix, reduced if it is not known, and a region that is quantised by it."""
    amax = operations.region([matrix], [], None, reduce.to_json())[0] if known is None else known
    return amax, operations.region([matrix], [amax], None, quantise.to_json())


def _unpacked(packed: Packed, output: Output, shape: torch.Size) -> Tensor:
    length = shape[-2 if output.down else -1]
    length = length if output.signs is None else padded(length)
    return operations.dequantize(packed.codes, packed.scales, length, output.down)


LIBRARY.define(operations.schema(dialect.WEIGHT), tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
for _key in DISPATCH_KEYS:
    LIBRARY.impl("weight", weight, _key)
torch.library.register_fake("nvfp4_triton::weight", dialect.WEIGHT, lib=LIBRARY)

WEIGHT = torch.ops.nvfp4_triton.weight.default
