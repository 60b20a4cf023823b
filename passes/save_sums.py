"""Save the sum that takes in a product, rather than the product. SCALED -> SCALED, on the joint graph.

    %y = nvfp4.scaled_mm(%xq, %xs, %xa, %wq, %ws, %wa, k, None, bf16)
    %s = aten.add(%x, %y)                                                        the backward reads %s
becomes
    %s = aten.add(%x, %y)                                                        with the tag that it is saved

To the partitioner both are worth the same: they are of one size, and adding %x once more costs nothing where it is
kept, as an input of the graph is. But a product that is saved is read by others than the sum, and `fold_residual` lets
it stand: its result would be written, read for the sum, and the sum written too. What a checkpoint recomputes stays as
the user wanted it; so does all where the user has set a budget of memory for what is saved. After `place`.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._functorch import config
from torch.utils.checkpoint import CheckpointPolicy

from nvfp4c.passes.fold_residual import match
from nvfp4c.passes.graph_edit import backward_nodes

RECOMPUTE = "recompute"


def save_sums(graph: fx.Graph) -> fx.Graph:
    """Tag every sum of the forward that a product can take over."""
    if config.activation_memory_budget < 1:
        return graph
    backward = backward_nodes(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        found = match(node) if backward and node not in backward else None
        if found is not None and not any(RECOMPUTE in one.meta for one in (node, found.product)):
            node.meta[RECOMPUTE] = CheckpointPolicy.MUST_SAVE
    return graph
