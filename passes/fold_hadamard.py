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

from torch import fx

from nvfp4c.dialect import AMAX, HADAMARD, QUANTIZE, arguments

SIGNS_PLACE = {AMAX: 1, QUANTIZE: 4}
"""Which argument of an operation is the signs of its own rotation."""


def fold_hadamard(graph: fx.Graph) -> fx.Graph:
    """Fold every transform all of whose readers can rotate by themselves."""
    for node in list(graph.nodes):
        if node.target is not HADAMARD or any(user.target not in SIGNS_PLACE for user in node.users):
            continue
        source, signs = arguments(node)
        for user in list(node.users):
            place = SIGNS_PLACE[user.target]
            args = [source, *arguments(user)[1:]]
            args += [None] * (place + 1 - len(args))
            args[place] = signs
            user.args = tuple(args)
        graph.erase_node(node)
    return graph
