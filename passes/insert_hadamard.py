"""Rotate both operands of a matmul along its contraction axis. ASSIGNED -> ROTATED.

    %mm = aten.mm(%dy_t, %x)
becomes
    %a  = nvfp4.hadamard(%dy_t, signs)
    %xt = aten.permute(%x, [1, 0])
    %b  = nvfp4.hadamard(%xt, signs)
    %bt = aten.permute(%b, [1, 0])
    %mm = aten.mm(%a, %bt)

The transform is orthogonal, so it cancels in the product; it spreads outliers over 16 elements before they are
quantised. Needs `assign` before it.
"""

from __future__ import annotations

from torch import fx

from nvfp4c.dialect import HADAMARD, arguments, assignment_of
from nvfp4c.passes.classify import OPERAND_PLACES
from nvfp4c.passes.graph_edit import insert, transposed


def insert_hadamard(graph: fx.Graph) -> fx.Graph:
    """Insert the transforms that assignments ask for."""
    for node in list(graph.nodes):
        assignment = assignment_of(node)
        if assignment is None or assignment.left is None or assignment.left.signs is None:
            continue
        signs = list(assignment.left.signs)
        left, right = OPERAND_PLACES[node.target]
        with graph.inserting_before(node):
            rotated_left = insert(graph, HADAMARD, (arguments(node)[left], signs), node)
            rows = transposed(graph, arguments(node)[right], node)
            rotated_right = transposed(graph, insert(graph, HADAMARD, (rows, signs), node), node)
        node.update_arg(left, rotated_left)
        node.update_arg(right, rotated_right)
    return graph
