"""Tell the partitioner what each new node belongs to: forward or backward, saved or recomputed. SCALED -> SCALED.

- A node that depends on no tangent is a forward node, also when only a weight gradient needs it: then the partitioner
  may compute it in the forward pass and save packed codes (4.5 bits an element) instead of the tensor itself (16 bits).
- A node made from a tensor that activation checkpointing recomputes carries the same tags, so it is not saved instead.
- A seed is drawn once and saved: drawn again it would give other random bits.
- A selective checkpoint that saves a matmul means its product, not the operands that are quantised for it.
- A weight, or another input of the graph, is quantised again in the backward: it is kept anyway, and its codes would
  take memory.
"""

from __future__ import annotations

import operator

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from nvfp4c.dialect import BLOCK_SCALED_MM, QUANTIZE, SCALED_MM, arguments, is_dialect
from nvfp4c.passes.graph_edit import arrangement_base, backward_nodes
from nvfp4c.passes.insert_scaling import SEED

CHECKPOINT_META = ("recompute", "ac_graph_id")


def place(graph: fx.Graph) -> fx.Graph:
    """Set `partitioner_tag`, `recompute` and `ac_graph_id` of the nodes that earlier passes inserted."""
    backward = backward_nodes(graph)
    from_tangents = {node for node in backward if node.op == "placeholder"}
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if _is_operand(node) and node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        if any(source in from_tangents for source in node.all_input_nodes):
            from_tangents.add(node)
        elif node.target is SEED:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif node in backward and _is_inserted(node):
            node.meta["partitioner_tag"] = "is_forward"
            _inherit_checkpoint(node)
        if backward and node.target is QUANTIZE and _is_input(arguments(node)[0]):
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    return graph


def _is_input(node: fx.Node) -> bool:
    """Whether a node is an input of the graph, or an arrangement of one."""
    return arrangement_base(node).op == "placeholder"


def _is_operand(node: fx.Node) -> bool:
    """Whether a node is a step on the way to a matmul, or a part of one, and not a product."""
    if node.target is operator.getitem:
        return is_dialect(arguments(node)[0])
    return is_dialect(node) and node.target not in (SCALED_MM, BLOCK_SCALED_MM)


def _is_inserted(node: fx.Node) -> bool:
    """Whether earlier passes made this node: an operation of the dialect, a part of one, or what only feeds those."""
    if is_dialect(node) or _is_operand(node):
        return True
    return bool(node.users) and all(is_dialect(user) for user in node.users)


def _inherit_checkpoint(node: fx.Node) -> None:
    for source in node.all_input_nodes:
        if "recompute" in source.meta and source.target is not SEED:
            for key in CHECKPOINT_META:
                if key in source.meta:
                    node.meta[key] = source.meta[key]
            return
