"""Quantise a weight once for every version of it, whichever graph reads it. Two passes, for targets with such a kernel.

`MarkWeights`, SCALED -> SCALED, on the joint graph: the amax of a weight is computed again in the backward, as its
codes are, and so is a cast of it; where each graph asks for all of it, each finds what the other left.

`cache_weights`, FUSED -> FUSED, on the forward and the backward graph apart:
    %a = nvfp4.region([%w], [], None, "amax")
    %r = nvfp4.region([%w], [%a], None, "operand tiles")
    %y = nvfp4.product(%x, %r, %xa, %a, None, None, bf16)
becomes
    %a, %r = nvfp4.weight(%w, bf16, "operand tiles", False)
    %y = nvfp4.product(%x, %r, %xa, %a, None, None, bf16)

and so where %w is cast first, as under autocast. Where products read packed operands (see `native`), each axis of a
weight is an operation of its own:
    %a, %c, %s = nvfp4.weight(%w, bf16, "packed tiles native", False)
    %y = nvfp4.block_scaled_mm(%xc, %xs, %xa, %c, %s, %a, None, None, bf16)
in the forward, and in the backward
    %a, %c, %s = nvfp4.weight(%w, bf16, "packed columns tiles native", True)
    %dx = nvfp4.block_scaled_mm(%dyc, %dys, %dya, %c, %s, %a, None, None, bf16)

Only inputs of the graph that the model holds are taken, as they are given: the memory of anything else may hold
something new each time that it is read.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain, count

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from nvfp4c.dialect import BLOCK_SCALED_MM, DEQUANTIZE, QUANTIZE, REGION, SCALED_MM, TRANSPOSE, WEIGHT, arguments
from nvfp4c.passes.graph_edit import backward_nodes, insert, swapped
from nvfp4c.region import Form, Output, Region, reduction
from nvfp4c.sites import ModelNames

CAST = torch.ops.prims.convert_element_type.default

MARK = "nvfp4_weight"
"""Written on an input that is a weight: its `Trust`."""


class Trust(Enum):
    """Where the version of a weight is trusted before any update of it was seen.

    BACKWARD: there, since the forward before it quantises the weight anew. A forward that only multiplies it as it is
    does not, so its backward may find what an earlier one has left: NOWHERE.
    """

    NOWHERE = "nowhere"
    BACKWARD = "backward"
    EVERYWHERE = "everywhere"

    def holds(self, backward: bool) -> bool:
        """In a backward graph, or in any other."""
        return self is Trust.EVERYWHERE or (self is Trust.BACKWARD and backward)


PRODUCTS = (SCALED_MM, BLOCK_SCALED_MM, DEQUANTIZE)
"""What multiplies a quantised weight."""


@dataclass(frozen=True)
class MarkWeights:
    """Mark the weights that are quantised. inference: in a graph without a backward too, which is then trusted."""

    names: ModelNames
    inference: bool

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        backward = backward_nodes(graph)
        if not backward and not self.inference:
            return graph
        for position, node in enumerate(graph.find_nodes(op="placeholder")):
            if self.names.input_of(node, position).is_weight:
                node.meta[MARK] = Trust.NOWHERE if backward else Trust.EVERYWHERE
        for node in graph.find_nodes(op="call_function", target=QUANTIZE):
            matrix, amax, _, rounding = arguments(node)[:4]
            matrix = swapped(matrix) or matrix
            weight = _weight(matrix)
            if rounding == "nearest" and weight is not None:
                for again in (matrix, amax, node):
                    if again.op == "call_function":
                        again.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                if backward and any(reader not in backward for reader in _products(node)):
                    weight.node.meta[MARK] = Trust.BACKWARD
        return graph


def cache_weights(graph: fx.Graph) -> fx.Graph:
    """Replace the regions of marked weights, and the amaxes that they quantise by."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    backward = bool(backward_nodes(graph))
    for node in graph.find_nodes(op="call_function", target=REGION):
        weight = _read(node)
        if weight is not None and _is_quantised(node, weight):
            _replace(node, weight, weight.node.meta[MARK].holds(backward), order)
    graph.eliminate_dead_code()
    return graph


@dataclass(frozen=True)
class _Weight:
    """A marked input, and the type that it is cast to before it is quantised."""

    node: fx.Node
    dtype: torch.dtype


def _products(made: fx.Node) -> Iterator[fx.Node]:
    """What multiplies a quantised weight, or a transpose of it."""
    for item in made.users:
        for reader in item.users:
            if reader.target in PRODUCTS:
                yield reader
            elif reader.target is TRANSPOSE:
                yield from _products(reader)


def _weight(matrix: fx.Node) -> _Weight | None:
    """The weight that a node is, or is a cast of."""
    node = arguments(matrix)[0] if matrix.target is CAST else matrix
    return _Weight(node, matrix.meta["val"].dtype) if node.op == "placeholder" and MARK in node.meta else None


def _read(region: fx.Node) -> _Weight | None:
    """The weight that a region is of, if it is of nothing else."""
    inputs, text = arguments(region)[0], arguments(region)[3]
    return _weight(inputs[0]) if Region.from_json(text).prologue.is_identity else None


def _is_quantised(node: fx.Node, weight: _Weight) -> bool:
    """Whether a region only quantises a weight to nearest, each time by an amax of it that is reduced in this graph."""
    _, amaxes, seed, text = arguments(node)
    outputs = Region.from_json(text).outputs
    return seed is None and all(
        output.quantised and _is_amax(amaxes[output.amax], weight, reduction(Region((output,)))) for output in outputs
    )


def _is_amax(amax: fx.Node, weight: _Weight, wanted: Region) -> bool:
    """Whether a node is what the region `wanted` of the weight gives."""
    if amax.target is not operator.getitem:
        return False
    made, place = arguments(amax)
    if made.target is not REGION or _read(made) != weight:
        return False
    outputs = Region.from_json(arguments(made)[3]).outputs
    return all(output.form is Form.AMAX for output in outputs) and (outputs[place],) == wanted.outputs


def _replace(node: fx.Node, weight: _Weight, sure: bool, order: Mapping[fx.Node, int]) -> None:
    """Put a weight operation for each different quantisation before a region; one differs not in its forms."""
    graph, amaxes = node.graph, arguments(node)[1]
    parts = _parts(node)
    alike: dict[Output, list[Output]] = defaultdict(list)
    for output in parts:
        alike[replace(output, form=Form.PACKED)].append(output)
    for outputs in alike.values():
        text = Region(tuple(replace(output, amax=0) for output in outputs)).to_json()
        with graph.inserting_before(node):
            made = insert(graph, WEIGHT, (weight.node, weight.dtype, text, sure), node)
            found = [insert(graph, operator.getitem, (made, place), node) for place in range(len(made.meta["val"]))]
        amax = amaxes[outputs[0].amax]
        amax.replace_all_uses_with(found[0], delete_user_cb=lambda user: order.get(user, 0) > order[node])
        for old, new in zip(chain(*(parts[output] for output in outputs)), found[1:], strict=True):
            for item in old:
                item.replace_all_uses_with(new)


def _parts(node: fx.Node) -> dict[Output, list[list[fx.Node]]]:
    """The nodes that read each tensor of each output of a region."""
    items: dict[int, list[fx.Node]] = defaultdict(list)
    for item in node.users:
        items[arguments(item)[1]].append(item)
    places = count()
    outputs = Region.from_json(arguments(node)[3]).outputs
    return {output: [items[next(places)] for _ in range(output.tensors)] for output in outputs}
