"""Compute a matrix in the kernel that reduces it, where the cost model says that this is faster. FUSED -> FUSED.

    %h = aten.mul(%silu, %up)
    %a, %at = nvfp4.region([%h], [], None, "amax; amax down the columns, rotated")
    %x, %c = nvfp4.region([%h], [%a, %at], None, "operand; packed down the columns, rotated")
becomes one of
    %a, %at, %h = nvfp4.region([%gate, %up], [], None, "amax; ...; value; of silu, mul")       kept: one read of %h less
    %x, %c = nvfp4.region([%h], [%a, %at], None, "operand; ...")
and
    %a, %at = nvfp4.region([%gate, %up], [], None, "amax; ...; of silu, mul")             repeated: %h is never written
    %x, %c = nvfp4.region([%gate, %up], [%a, %at], None, "operand; ...; of silu, mul")
Two matrices that are computed from the same tensors share the first region.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise

import sympy
import torch
from torch import fx

from nvfp4c import cost
from nvfp4c.cost import Machine, Work
from nvfp4c.dialect import REGION, arguments
from nvfp4c.passes.graph_edit import insert
from nvfp4c.passes.producers import Input, Produced, producers
from nvfp4c.prologue import Kind
from nvfp4c.region import Form, Output, Region

aten = torch.ops.aten

FUSION = "nvfp4_fusion"
"""The metadata of a region that says what was weighed for it."""


class Way(str, Enum):
    """Where a matrix is computed: by Inductor; by the first region that reads it, which writes it; by every region."""

    APART = "apart"
    KEPT = "kept"
    REPEATED = "repeated"


@dataclass(frozen=True)
class Fusion:
    """A decision. costs: of each possible way, in the order of preference among equals. operations: of the prologue."""

    way: Way
    costs: tuple[tuple[Way, tuple[Work, ...]], ...]
    operations: tuple[str, ...]

    def bytes(self, way: Way) -> sympy.Expr:
        """What the kernels of a way move, in symbolic sizes."""
        return sum((work.bytes for work in dict(self.costs)[way]), sympy.Integer(0))


@dataclass(frozen=True)
class Absorb:
    """The pass, for one machine."""

    machine: Machine

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        moved: dict[fx.Node, fx.Node] = {}
        for found in producers(graph):
            inputs = tuple(replace(one, node=moved.get(one.node, one.node)) for one in found.inputs)
            produced = replace(found, inputs=inputs)
            if not _fits(produced):
                continue
            fusion = decide(produced, self.machine)
            if fusion.way is Way.APART:
                for readers in produced.regions:
                    readers[0].meta[FUSION] = fusion
            else:
                moved |= _Rewriting(graph, produced, fusion).rewrite()
        graph.eliminate_dead_code()
        return graph


def decide(produced: Produced, machine: Machine) -> Fusion:
    """The fastest way to compute some matrices and all that regions compute from them."""
    costs = tuple((way, _works(produced, way)) for way in _possible(produced))
    values = [one.node.meta["val"] for one in produced.inputs]
    speeds = [cost.at_example_sizes(cost.seconds(works, machine), values) for _, works in costs]
    way = costs[min(range(len(costs)), key=speeds.__getitem__)][0]
    operations = dict.fromkeys(step.operation for step in produced.prologue.steps if step.operation != "to")
    return Fusion(way, costs, tuple(operations))


def _possible(produced: Produced) -> list[Way]:
    """The ways there are, the best of equals first.

    Only a region that reads no amax of the matrix can come first. A matrix that others read too has to be written, in
    the order in which they expect it.
    """
    if any(arguments(readers[0])[1] for readers in produced.regions):
        return [Way.APART]
    once = len(produced.matrices) == 1 and not any(produced.kept)
    alike = all(one.meta["val"].is_contiguous() for one in (*produced.matrices, *produced.bases))
    return [*([Way.KEPT] if alike else []), *([Way.REPEATED] if once else []), Way.APART]


def _works(produced: Produced, way: Way) -> tuple[Work, ...]:
    """The kernels of a way."""
    matrix = produced.matrices[0].meta["val"]
    amount, count, width = len(produced.matrices), cost.elements(matrix), cost.size(matrix)
    regions = [_Reader(reader, place == 0) for readers in produced.regions for place, reader in enumerate(readers)]
    given: Sequence[Input] = produced.inputs
    if way is Way.APART:
        given = [one for one in given if one.stored and not one.shared]
    # What a kernel of ours reads has to be in memory, also where Inductor would have had it in registers.
    read = _sum(cost.size(one.node.meta["val"]) * (1 if one.stored else 2) for one in given)

    def steps(outputs: Sequence[Output]) -> sympy.Expr:
        return cost.of_prologue(produced.prologue, outputs, count)

    if way is Way.REPEATED:
        return tuple(Work(one.written + read, one.operations(count) + steps(one.outputs)) for one in regions)
    value = (Output(Form.VALUE),)
    if way is Way.APART:
        # Where Inductor reduces the inputs anyway, it computes the matrix on the way.
        alone = Work(read + amount * width, steps(value), launches=int(read != 0))
        return (alone, *(Work(one.written + width, one.operations(count)) for one in regions))
    first = [one for one in regions if one.first]
    written = _sum(one.written for one in first) + amount * width
    outputs = [output for one in first for output in one.outputs]
    together = Work(read + written, _sum(one.operations(count) for one in first) + steps((*outputs, *value)))
    return (together, *(Work(one.written + width, one.operations(count)) for one in regions if not one.first))


@dataclass(frozen=True)
class _Reader:
    """A region that reads a matrix. first: whether it is the first one."""

    node: fx.Node
    first: bool

    @property
    def outputs(self) -> tuple[Output, ...]:
        return Region.from_json(arguments(self.node)[3]).outputs

    @property
    def written(self) -> sympy.Expr:
        return _sum(cost.size(one) for one in self.node.meta["val"])

    def operations(self, count: sympy.Expr) -> sympy.Expr:
        return cost.of_outputs(self.outputs, count)


def _sum(terms: Iterable[sympy.Expr]) -> sympy.Expr:
    return sum(terms, sympy.Integer(0))


def _shape(produced: Produced, kind: Kind) -> list[int | torch.SymInt]:
    *lead, columns = produced.matrices[0].meta["val"].shape
    return {Kind.FULL: [*lead, columns], Kind.ROW: [*lead, 1], Kind.COLUMN: [columns]}[kind]


def _fits(produced: Produced) -> bool:
    """Whether the inputs are there in time, what else reads the matrices comes later, and views will do for both."""
    where = min(readers[0] for readers in produced.regions)
    if not all(one.node < where for one in produced.inputs) or not all(where < one for one in produced.others):
        return False
    shapes = [_shape(produced, Kind.FULL), *(base.meta["val"].shape for base in produced.bases)]
    if any(sum(isinstance(size, torch.SymInt) for size in shape) > 1 for shape in shapes):
        return False
    return all(_is_view(one.node.meta["val"], _shape(produced, one.kind)) for one in produced.inputs)


def _is_view(x: torch.Tensor, shape: Sequence[int | torch.SymInt]) -> bool:
    """Whether a tensor has a shape with rows as long as its own without a copy.

    Fake tensors would allow too much where an axis of size 1 stands between.
    """
    if list(map(str, x.shape)) == list(map(str, shape)):
        return True
    steps = [
        (cost.extent(size) * cost.extent(stride), cost.extent(stride))
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        if not (isinstance(size, int) and size == 1)
    ]
    return all(outer == whole for (_, outer), (whole, _) in pairwise(steps))


@dataclass
class _Rewriting:
    """The rewriting of one group."""

    graph: fx.Graph
    produced: Produced
    fusion: Fusion

    def rewrite(self) -> dict[fx.Node, fx.Node]:
        """Returns the nodes that now hold the matrices and what they are views of."""
        produced = self.produced
        where = min(readers[0] for readers in produced.regions)
        with self.graph.inserting_before(where):
            inputs = [self._arranged(one, where) for one in produced.inputs]
        if self.fusion.way is Way.REPEATED:
            for reader in produced.regions[0]:
                self._replace([reader], inputs, [Region.from_json(arguments(reader)[3]).outputs])
            return {}
        firsts = [readers[0] for readers in produced.regions]
        outputs = [
            [replace(one, matrix=place) for one in (*_Reader(reader, True).outputs, Output(Form.VALUE))]
            for place, reader in enumerate(firsts)
        ]
        values = self._replace(firsts, inputs, outputs)
        moved: dict[fx.Node, fx.Node] = {}
        for matrix, base, value in zip(produced.matrices, produced.bases, values, strict=True):
            moved |= self._take_over(matrix, base, value)
        return moved

    def _arranged(self, one: Input, like: fx.Node) -> fx.Node:
        """An input in the shape that the matrices give it."""
        shape = _shape(self.produced, one.kind)
        if list(map(str, one.node.meta["val"].shape)) == list(map(str, shape)):
            return one.node
        return insert(self.graph, aten.reshape.default, (one.node, _sizes(shape)), like)

    def _replace(
        self, readers: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[Sequence[Output]]
    ) -> list[fx.Node]:
        """One region with a prologue in place of some without; returns the nodes of the values that it gives."""
        where = min(readers)
        region = Region(tuple(one for found in outputs for one in found), self.produced.prologue)
        _, amaxes, seed, _ = arguments(where)
        with self.graph.inserting_before(where):
            made = insert(self.graph, REGION, (list(inputs), amaxes, seed, region.to_json()), where)
            made.meta[FUSION] = self.fusion
            place = 0
            values = []
            for reader, found in zip(readers, outputs, strict=True):
                items = {arguments(item)[1]: item for item in reader.users}
                start = place
                for output in found:
                    for _ in range(output.tensors):
                        part = insert(self.graph, operator.getitem, (made, place), reader)
                        if output.form is Form.VALUE:
                            values.append(part)
                        elif place - start in items:
                            items[place - start].replace_all_uses_with(part)
                        place += 1
        for reader in readers:
            for item in list(reader.users):
                self.graph.erase_node(item)
            self.graph.erase_node(reader)
        return values

    def _take_over(self, matrix: fx.Node, base: fx.Node, value: fx.Node) -> dict[fx.Node, fx.Node]:
        """Let what reads a matrix, or what it is a view of, read the value."""
        matrix.replace_all_uses_with(value)
        _move_after(value, value.users)
        if base is matrix:
            return {matrix: value}
        with self.graph.inserting_after(value):
            view = insert(self.graph, aten.view.default, (value, _sizes(base.meta["val"].shape)), base)
        base.replace_all_uses_with(view, delete_user_cb=lambda user: user is not matrix)
        _move_after(view, view.users)
        return {matrix: value, base: view}


def _move_after(node: fx.Node, readers: Iterable[fx.Node]) -> None:
    """Put what reads a node behind it, and what reads that. Only views stand before it: all else was found later."""
    for reader in list(readers):
        if reader < node:
            node.append(reader)
            _move_after(reader, reader.users)


def _sizes(shape: Sequence[int | torch.SymInt]) -> list[int]:
    """A shape as an argument of a view: the one symbolic size follows from the others."""
    return [size if isinstance(size, int) else -1 for size in shape]
