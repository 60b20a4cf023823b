"""Fold a Hadamard transform into the reductions and quantisations that read it. SCALED -> SCALED.

    %h = nvfp4.hadamard(%x, signs)
    %a = nvfp4.amax(%h)
    %q = nvfp4.quantize(%h, %a, [1, 16], "nearest")
becomes
    %a = nvfp4.amax(%x, signs)
    %q = nvfp4.quantize(%x, %a, [1, 16], "nearest", signs)

The rotated tensor is then never written to memory.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from nvfp4c.dialect import AMAX, HADAMARD, QUANTIZE, arguments
from nvfp4c.formats import BLOCK
from nvfp4c.passes.graph_edit import insert, refresh

SIGNS_PLACE = {AMAX: 1, QUANTIZE: 4}
"""Which argument of an operation is the signs of its own rotation."""

SIZE = torch.ops.aten.sym_size.int
"""Reads nothing but a length, which is known without the transform."""


def fold_hadamard(graph: fx.Graph) -> fx.Graph:
    """Fold every transform all of whose readers can rotate by themselves."""
    for node in list(graph.nodes):
        if node.target is not HADAMARD or any(user.target not in (*SIGNS_PLACE, SIZE) for user in node.users):
            continue
        source, signs = arguments(node)
        for user in list(node.users):
            if user.target is SIZE:
                user.replace_all_uses_with(_rotated_size(graph, source, user))
                graph.erase_node(user)
                continue
            place = SIGNS_PLACE[user.target]
            args = [source, *arguments(user)[1:]]
            args += [None] * (place + 1 - len(args))
            args[place] = signs
            user.args = tuple(args)
            refresh(user)
        graph.erase_node(node)
    return graph


def _rotated_size(graph: fx.Graph, source: fx.Node, like: fx.Node) -> fx.Node:
    """What `like` reads off a transform: a length of its source, the last of which it pads to whole blocks."""
    axis = arguments(like)[1]
    with graph.inserting_before(like):
        size = insert(graph, SIZE, (source, axis), like)
        if axis % source.meta["val"].dim() != source.meta["val"].dim() - 1:
            return size
        blocks = insert(graph, operator.floordiv, (insert(graph, operator.add, (size, BLOCK - 1), like), BLOCK), like)
        return insert(graph, operator.mul, (blocks, BLOCK), like)
