"""Inserting nodes into a graph: every new node gets its value and the metadata of the matmul that it serves."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.node import Target
from torch.utils._pytree import tree_map

from nvfp4c.dialect import FAKES, arguments

aten = torch.ops.aten

ORIGIN_META = (
    "partitioner_tag",
    "seq_nr",
    "recompute",
    "ac_graph_id",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "autograd_backward",
)
"""Without `recompute`, activation checkpointing would silently save what it should recompute."""

SHAPE_OPS = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
    }
)
"""Operations that only arrange the same elements anew."""


def backward_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes of a joint graph that belong to its backward; none in a graph without tangents.

    The backward of a custom `autograd.Function` carries no tag, so it is what is not tagged as forward.
    """
    backward = frozenset(
        node
        for node in graph.nodes
        if node.op != "output" and node.meta.get("partitioner_tag") not in ("is_forward", "must_be_in_forward")
    )
    return backward if any(node.op == "placeholder" and _is_tangent(node) for node in graph.nodes) else frozenset()


def _is_tangent(placeholder: fx.Node) -> bool:
    return placeholder.meta.get("partitioner_tag") == "is_backward"


def value(node: Any) -> Any:
    """What a node holds at trace time (a fake tensor or symbolic size); anything else as it is."""
    return tree_map(lambda leaf: leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf, node)


def insert(
    graph: fx.Graph, target: Target, args: Sequence[Any], like: fx.Node, kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """A call at the graph's insertion point, its value derived by running it on the arguments' fake tensors."""
    node = graph.create_node("call_function", target, tuple(args), dict(kwargs or {}))
    copy_origin(node, like)
    node.meta["val"] = _derived(node, like)
    return node


def refresh(node: fx.Node) -> None:
    """Derive the value of a node anew, and of its parts, after its arguments were changed."""
    node.meta["val"] = _derived(node, node)
    for user in node.users:
        if user.target is operator.getitem:
            user.meta["val"] = node.meta["val"][arguments(user)[1]]


def _derived(node: fx.Node, like: fx.Node) -> Any:
    """What a node gives on the fake tensors of its arguments. like: holds a fake tensor if those do not."""
    assert callable(node.target)
    args, kwargs = value(tuple(arguments(node))), value(dict(node.kwargs))
    if node.target is operator.getitem:  # needs no fake mode, which takes long to enter
        return args[0][args[1]]
    mode = detect_fake_mode([*args, like.meta.get("val")])
    if mode is None:
        return node.target(*args, **kwargs)
    with mode:
        return FAKES.get(node.target, node.target)(*args, **kwargs)


def copy_origin(node: fx.Node, like: fx.Node) -> None:
    """Give a node the tags of the node that it was made for."""
    for key in ORIGIN_META:
        if key in like.meta:
            node.meta[key] = like.meta[key]


def swapped(node: fx.Node) -> fx.Node | None:
    """What a node is the transpose of, in its last two axes; None if it is no such transpose."""
    if node.target not in (aten.permute.default, aten.t.default, aten.transpose.int):
        return None
    dims = arguments(node)[0].meta["val"].dim()
    if node.target is aten.permute.default:
        order = [axis % dims for axis in arguments(node)[1]]
        return arguments(node)[0] if order == swap_order(dims) else None
    if node.target is aten.transpose.int:
        axes = {arguments(node)[1] % dims, arguments(node)[2] % dims}
        return arguments(node)[0] if axes == {dims - 1, dims - 2} else None
    return arguments(node)[0]


def swap_order(dims: int) -> list[int]:
    """The permutation that exchanges the last two of `dims` axes."""
    return [*range(dims - 2), dims - 1, dims - 2]


def transposed(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    """A node holding the transpose of `node` in its last two axes; undoes a transpose rather than adding one."""
    source = swapped(node)
    if source is not None:
        return source
    return insert(graph, aten.permute.default, (node, swap_order(node.meta["val"].dim())), like)


def arrangement_base(node: fx.Node) -> fx.Node:
    """The tensor of which `node` is only an arrangement: it has the same elements, each once."""
    while node.op == "call_function" and node.target in SHAPE_OPS:
        node = arguments(node)[0]
    return node
