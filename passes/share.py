"""Reduce and quantise a tensor once for each distinct form in which it is needed. SCALED -> SCALED.

    %a1 = nvfp4.amax(%x)    %q1 = nvfp4.quantize(%x, %a1, ...)      # for q_proj
    %a2 = nvfp4.amax(%x)    %q2 = nvfp4.quantize(%x, %a2, ...)      # for k_proj
becomes one amax and one quantize. And a weight's tiles serve both of its orientations:
    %q1 = nvfp4.quantize(%w, %a, [16, 16], "nearest")               # fprop
    %q2 = nvfp4.quantize(%w_t, %a, [16, 16], "nearest")             # dgrad
becomes
    %q1 = nvfp4.quantize(%w, %a, [16, 16], "nearest")
    %q2 = nvfp4.transpose(*%q1, k)
Stochastic quantisations draw from different streams, so they are never merged.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable

import torch
from torch import fx

from nvfp4c.dialect import AMAX, DEQUANTIZE, HADAMARD, QUANTIZE, TRANSPOSE, arguments
from nvfp4c.formats import TILE_BLOCK
from nvfp4c.passes.graph_edit import SHAPE_OPS, insert, swapped

aten = torch.ops.aten

MERGEABLE = (SHAPE_OPS - {aten.clone.default}) | {
    HADAMARD,
    AMAX,
    QUANTIZE,
    TRANSPOSE,
    DEQUANTIZE,
    operator.getitem,
    aten.sym_size.int,
}
"""Pure operations that two matmuls may both have asked for."""


def share(graph: fx.Graph) -> fx.Graph:
    """Merge equal nodes, then derive transposed tiles from the tiles already there."""
    merge_equal(graph, frozenset(MERGEABLE))
    if _transpose_tiles(graph):
        merge_equal(graph, frozenset(MERGEABLE))
    return graph


def merge_equal(graph: fx.Graph, mergeable: frozenset[object]) -> None:
    """Keep the first of all calls of a mergeable operation on the same arguments."""
    first: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in mergeable:
            continue
        key = (node.target, _frozen(arguments(node)), _frozen(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def _frozen(value: object) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value)
    # 1, 1.0 and True are equal keys but not the same argument.
    return value if isinstance(value, fx.Node) else (type(value), value)


def _transpose_tiles(graph: fx.Graph) -> bool:
    """Replace a tile quantisation of a transpose by the transpose of a tile quantisation."""
    tiles: dict[fx.Node, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if not _is_shareable_tile(node):
            continue
        source = arguments(node)[0]
        other = _turned(tiles, source)
        if other is None or arguments(other)[1] is not arguments(node)[1]:
            tiles.setdefault(source, node)
            continue
        with graph.inserting_before(node):
            parts = [insert(graph, operator.getitem, (other, index), other) for index in (0, 1)]
            k = insert(graph, aten.sym_size.int, (arguments(other)[0], source.meta["val"].dim() - 1), node)
            size = k.meta["val"]
            turned = insert(graph, TRANSPOSE, (*parts, size if isinstance(size, int) else k), node)
        if isinstance(size, int):
            graph.erase_node(k)
        node.replace_all_uses_with(turned)
        graph.erase_node(node)
        changed = True
    return changed


def _turned(tiles: dict[fx.Node, fx.Node], source: fx.Node) -> fx.Node | None:
    """The tile quantisation of the transpose of `source`, if there is one."""
    base = swapped(source)
    if base is not None and base in tiles:
        return tiles[base]
    return next((node for node in tiles.values() if swapped(arguments(node)[0]) is source), None)


def _is_shareable_tile(node: fx.Node) -> bool:
    return (
        node.target is QUANTIZE
        and tuple(arguments(node)[2]) == TILE_BLOCK
        and arguments(node)[3] == "nearest"
        and swappable(arguments(node)[0])
    )


def swappable(source: fx.Node) -> bool:
    """Whether a source is not rotated: a rotation along one axis is none along the other."""
    base = swapped(source) or source
    return base.target is not HADAMARD
