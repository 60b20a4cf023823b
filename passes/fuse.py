"""Gather into one kernel what is computed from one matrix. SCALED -> FUSED, on the forward and backward graph apart.

    %a  = nvfp4.amax(%dy)                                        %t = aten.permute(%dy, [1, 0])
    %at = nvfp4.amax(%t, signs)
    %q  = nvfp4.quantize(%dy, %a, [1, 16], "stochastic", None, %seed, 0)
    %qt = nvfp4.quantize(%t, %at, [1, 16], "stochastic", signs, %seed, 1)
    %dx = nvfp4.scaled_mm(*%q, %a, *%wq, %wa, n, None, bf16)
    %dw = nvfp4.scaled_mm(*%qt, %at, *%xq, %xa, m, None, bf16)
becomes
    %a, %at = nvfp4.region([%dy], [], None, "amax; amax down the columns, rotated")
    %r, %c  = nvfp4.region([%dy], [%a, %at], %seed, "operand; operand down the columns, rotated")
    %ct = aten.permute(%c, [1, 0])
    %dx = nvfp4.product(%r, %w, %a, %wa, None, None, bf16)
    %dw = nvfp4.product(%ct, %x, %at, %xa, None, None, bf16)

so %dy is read once for its amaxes and once for its operands. An operand is packed only where its bytes are read, by
another graph for example; a product whose operand was packed elsewhere reads `nvfp4.dequantize` of it. A transpose is
never made: blocks down the columns give the transposed result.

Products that read packed operands (see `native`) stay as they are, and get them from the same regions:
    %rc, %rs, %cc, %cs = nvfp4.region(%dy, [%a, %at], %seed, "packed native; packed down the columns, rotated, native")
    %dx = nvfp4.block_scaled_mm(%rc, %rs, %a, %wc, %ws, %wa, None, None, bf16)
    %dw = nvfp4.block_scaled_mm(%cc, %cs, %at, %xc, %xs, %xa, None, None, bf16)
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nvfp4c.dialect import (
    AMAX,
    ASSIGNMENT,
    DEQUANTIZE,
    HADAMARD,
    MATMUL,
    PRODUCT,
    QUANTIZE,
    REGION,
    SCALED_MM,
    TRANSPOSE,
    arguments,
)
from nvfp4c.formats import GLOBAL_MAX
from nvfp4c.passes import fold_hadamard
from nvfp4c.passes.graph_edit import arrangement_base, insert, swap_order, swapped
from nvfp4c.region import Axis, Form, Layout, Output, Region

aten, prims = torch.ops.aten, torch.ops.prims

PRODUCTS = (SCALED_MM, DEQUANTIZE)
"""What reads an operand dequantised."""

DEFAULTS: tuple[Any, ...] = (None, None, 0, Layout.LINEAR.value)
"""Signs, seed, stream and layout of a quantisation that does not name them."""

SIGNS_PLACE = {HADAMARD: 1, **fold_hadamard.SIGNS_PLACE}


def fuse(graph: fx.Graph) -> fx.Graph:
    """Replace every reduction, quantisation and scaled matmul by regions and products."""
    fusing = _Fusing(graph, read_packed(graph), {node: place for place, node in enumerate(graph.nodes)})
    fusing.reduce()
    fusing.rotate()
    fusing.quantize()
    fusing.multiply()
    for node in reversed(graph.nodes):
        made = arguments(node)[0] if node.target is operator.getitem else node
        if not node.users and made.target in (AMAX, HADAMARD, QUANTIZE, TRANSPOSE, *PRODUCTS):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


def read_packed(graph: fx.Graph) -> frozenset[fx.Node]:
    """Quantisations and transposes whose bytes are read: by another graph, or by a transpose whose own bytes are."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target in (QUANTIZE, TRANSPOSE):
            readers = set(_readers(node))
            if any(reader in found or reader.target not in (*PRODUCTS, TRANSPOSE) for reader in readers):
                found.add(node)
    return frozenset(found)


def _readers(made: fx.Node) -> Iterator[fx.Node]:
    """What reads the codes or scales of a quantisation or transpose."""
    for item in made.users:
        yield from item.users


def _products(made: fx.Node) -> Iterator[fx.Node]:
    """What multiplies a quantised tensor, or a transpose of it."""
    for reader in _readers(made):
        if reader.target in PRODUCTS:
            yield reader
        elif reader.target is TRANSPOSE:
            yield from _products(reader)


@dataclass(frozen=True)
class _Source:
    """What a node is computed from: a matrix as it lies in memory, and the axis of it that blocks run along."""

    matrix: fx.Node
    axis: Axis
    signs: tuple[int, ...] | None


def _source(node: fx.Node) -> _Source:
    given, place = arguments(node), SIGNS_PLACE[node.target]  # type: ignore[index]
    signs = tuple(given[place]) if len(given) > place and given[place] is not None else None
    base = swapped(given[0])
    return _Source(given[0], Axis.ROWS, signs) if base is None else _Source(base, Axis.COLUMNS, signs)


def _form(node: fx.Node) -> tuple[bool, bool]:
    """Sorts what is computed from one matrix, so that equal sets of outputs give equal kernels."""
    source = _source(node)
    plain = source.signs is None
    return source.axis is Axis.COLUMNS and not (plain and node.target is AMAX), not plain


@dataclass
class _Fusing:
    """The work on one graph.

    packed: what `read_packed` found. order: the place of each node; of new ones, that of the node they stand before.
    operands: dequantised operands by the codes they replace.
    """

    graph: fx.Graph
    packed: frozenset[fx.Node]
    order: dict[fx.Node, int]
    operands: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def reduce(self) -> None:
        """One region for all amaxes of a matrix, where the first of them stood."""
        nodes = list(self.graph.find_nodes(op="call_function", target=AMAX))
        rotated = {
            arrangement_base(source.matrix): source.matrix for source in map(_source, nodes) if source.signs is not None
        }
        groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in nodes:
            source = _source(node)
            # A plain amax does not depend on the arrangement, so it may be taken of the matrix that is rotated.
            other = rotated.get(arrangement_base(source.matrix)) if source.signs is None else None
            same = other is not None and self.order[other] < self.order[node]
            groups[other if other is not None and same else source.matrix].append(node)
        for matrix, found in groups.items():
            members = sorted(found, key=_form)
            outputs = []
            for node in members:
                source = _source(node)
                axis = Axis.ROWS if source.signs is None else source.axis
                outputs.append(Output(Form.AMAX, axis, signs=source.signs))
            first = min(members, key=self.order.__getitem__)
            for node, amax in zip(members, self._region(matrix, outputs, (), None, first, first), strict=True):
                node.replace_all_uses_with(amax)

    def rotate(self) -> None:
        """Transforms that could not be folded into their readers."""
        for node in self.graph.find_nodes(op="call_function", target=HADAMARD):
            source = _source(node)
            output = Output(Form.ROTATED, source.axis, signs=source.signs)
            (rotated,) = self._region(source.matrix, [output], (), None, node, node)
            node.replace_all_uses_with(self._turned(rotated, source.axis, node, node))

    def quantize(self) -> None:
        """One region for the quantisations of a matrix, where the first of them is read."""
        groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.graph.find_nodes(op="call_function", target=QUANTIZE):
            if node.users:
                groups[_source(node).matrix].append(node)
        for matrix, members in groups.items():
            waiting = sorted(members, key=lambda node: self.order[self._first(node)])
            while waiting:
                where = self._first(waiting[0])
                ready = [node for node in waiting if self.order[arguments(node)[1]] <= self.order[where]]
                ready.sort(key=_form)
                self._quantize(matrix, ready, where)
                waiting = [node for node in waiting if node not in ready]

    def _first(self, node: fx.Node) -> fx.Node:
        """What reads a quantisation first, else itself: a product, or a transpose whose bytes are read."""
        others = (reader for reader in _readers(node) if reader.target is not TRANSPOSE or reader in self.packed)
        readers = (reader for reader in (*_products(node), *others) if reader.op != "output")
        return min(readers, key=self.order.__getitem__, default=node)

    def _quantize(self, matrix: fx.Node, nodes: Sequence[fx.Node], where: fx.Node) -> None:
        amaxes = list(dict.fromkeys(arguments(node)[1] for node in nodes))
        outputs: list[Output] = []
        made: list[tuple[fx.Node, Output]] = []
        seed = None
        for node in nodes:
            source = _source(node)
            given = arguments(node)
            _, amax, block, rounding, _, own_seed, stream, layout = (*given, *DEFAULTS[len(given) - 4 :])
            seed = own_seed if rounding == "stochastic" else seed
            forms = ([Form.PACKED] if node in self.packed else []) + ([Form.OPERAND] if any(_products(node)) else [])
            for form in forms:
                how = (tuple(block), rounding, source.signs, amaxes.index(amax), stream)
                output = Output(form, source.axis, *how, layout=Layout(layout))
                outputs.append(output)
                made.append((node, output))
        found = iter(self._region(matrix, outputs, amaxes, seed, where, nodes[0]))
        packed: dict[fx.Node, fx.Node] = {}
        for node, output in made:
            axis = Axis.ROWS if output.native else output.axis
            parts = [self._turned(next(found), axis, where, node) for _ in range(output.tensors)]
            for item in list(node.users):
                place = arguments(item)[1]
                if output.form is Form.PACKED:
                    packed[item] = parts[place]
                    item.replace_all_uses_with(parts[place], delete_user_cb=lambda user: user.target not in PRODUCTS)
                elif place == 0:
                    # A transpose of what is packed too now reads that.
                    self.operands[item] = self.operands[packed.get(item, item)] = parts[0]

    def multiply(self) -> None:
        """Products of dequantised operands, and operands that are multiplied by something else."""
        for node in self.graph.find_nodes(op="call_function", target=SCALED_MM):
            a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, k, bias, dtype = arguments(node)
            a, b = self._operand(a_codes, a_scales, k, node), self._operand(b_codes, b_scales, k, node)
            with self.graph.inserting_before(node):
                product = insert(self.graph, PRODUCT, (a, b, a_amax, b_amax, bias, None, dtype), node)
            for key in (MATMUL, ASSIGNMENT):
                if key in node.meta:
                    product.meta[key] = node.meta[key]
            node.replace_all_uses_with(product)
        made = set(self.operands.values())
        for node in self.graph.find_nodes(op="call_function", target=DEQUANTIZE):
            if node not in made:
                codes, scales, amax, k, dtype = arguments(node)
                node.replace_all_uses_with(self._scaled(self._operand(codes, scales, k, node), amax, dtype, node))

    def _operand(self, codes: fx.Node, scales: fx.Node, k: object, node: fx.Node) -> fx.Node:
        """code * scale of a packed operand, [.., rows, k]; made once for each distinct operand."""
        if codes in self.operands:
            return self.operands[codes]
        maker = arguments(codes)[0] if codes.target is operator.getitem else None
        if isinstance(maker, fx.Node) and maker.target is TRANSPOSE:
            codes_before, scales_before, k_before = arguments(maker)
            source = self._operand(codes_before, scales_before, k_before, node)
            self.operands[codes] = self._turned(source, Axis.COLUMNS, node, node)
        else:
            with self.graph.inserting_before(node):
                args = (codes, scales, None, k, torch.bfloat16)
                self.operands[codes] = insert(self.graph, DEQUANTIZE, args, node)
        return self.operands[codes]

    def _scaled(self, operand: fx.Node, amax: fx.Node | None, dtype: torch.dtype, node: fx.Node) -> fx.Node:
        """What is left of nvfp4.dequantize after code * scale."""
        if amax is None and dtype is torch.bfloat16:
            return operand
        with self.graph.inserting_before(node):
            if amax is None:
                return insert(self.graph, prims.convert_element_type.default, (operand, dtype), node)
            wide = insert(self.graph, prims.convert_element_type.default, (operand, torch.float32), node)
            factor = insert(self.graph, aten.div.Tensor, (amax, GLOBAL_MAX), node)
            scaled = insert(self.graph, aten.mul.Tensor, (wide, factor), node)
            return insert(self.graph, prims.convert_element_type.default, (scaled, dtype), node)

    def _region(
        self,
        matrix: fx.Node,
        outputs: Sequence[Output],
        amaxes: Sequence[fx.Node],
        seed: fx.Node | None,
        where: fx.Node,
        like: fx.Node,
    ) -> list[fx.Node]:
        """A region before the node `where`: a node for each of its tensors."""
        with self.graph.inserting_before(where):
            text = Region(tuple(outputs)).to_json()
            made = insert(self.graph, REGION, ([matrix], list(amaxes), seed, text), like)
            count = sum(output.tensors for output in outputs)
            found = [insert(self.graph, operator.getitem, (made, place), like) for place in range(count)]
        for node in found:
            self.order[node] = self.order[where]
        return found

    def _turned(self, node: fx.Node, axis: Axis, where: fx.Node, like: fx.Node) -> fx.Node:
        """A result as the dialect has it: that of blocks down the columns is the transpose of it."""
        if axis is Axis.ROWS:
            return node
        with self.graph.inserting_before(where):
            turned = insert(self.graph, aten.permute.default, (node, swap_order(node.meta["val"].dim())), like)
        self.order[turned] = self.order[where]
        return turned
