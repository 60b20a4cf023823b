"""Hand the matmuls of sites to someone who watches them, or who decides at run time. ASSIGNED -> ASSIGNED.

`Switch` makes every matmul that can run in FP4 a call that gets its operands, its site and its role:
    %mm = aten.mm(%x, %w_t)
becomes
    %mm = operation(session, %x, %w_t, None, "fc1", "fprop")
`Observe` leaves all of them but one a site, the last in backward, whose call gets the operands of the others too:
    %dx = aten.mm(%dy, %w)
becomes
    %dx = operation(session, %dy, %w, [%x, %w_t], [%dy_t, %x, %dw], samples, "fc1", "dgrad")
A site without a backward matmul has nothing to observe: its forward matmul becomes a call as `Switch` makes them.
All calls return what the matmul returns. So everything about a site is at hand at one moment, and nothing is kept for
it that backward does not keep anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.node import Target

from nvfp4c.dialect import (
    ASSIGNMENT,
    MATMUL,
    Assignment,
    Matmul,
    Operand,
    Role,
    arguments,
    assignment_of,
    matmul_of,
    numbers,
)
from nvfp4c.passes.classify import OPERAND_PLACES, origin
from nvfp4c.passes.graph_edit import SHAPE_OPS, backward_nodes, insert

aten = torch.ops.aten
SAME_ELEMENTS = SHAPE_OPS | {aten._to_copy.default, torch.ops.prims.convert_element_type.default}


@dataclass(frozen=True)
class SiteNodes:
    """A site in one graph, some role of which runs in FP4. roles: its first matmul of each role, in whatever precision,
    in the order of the graph. weight, input: where its operands come from, before casts and rearrangements."""

    site: str
    roles: dict[Role, fx.Node]
    weight: fx.Node
    input: fx.Node

    @property
    def host(self) -> Role | None:
        """The role of the last backward matmul, when the operands of all are there; None without a gradient."""
        return next((role for role in reversed(self.roles) if role is not Role.FPROP), None)

    def matmul(self, role: Role) -> Matmul:
        found = matmul_of(self.roles[role])
        assert found is not None
        return found

    def assignment(self, role: Role) -> Assignment:
        found = assignment_of(self.roles[role])
        assert found is not None
        return found


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The left and the right operand of a matmul."""
    left, right = OPERAND_PLACES[node.target]  # type: ignore[index]
    return arguments(node)[left], arguments(node)[right]


def site_nodes(graph: fx.Graph) -> dict[str, SiteNodes]:
    """Every site of a graph some role of which runs in FP4, in forward order. A graph that `assign` has seen."""
    backward = backward_nodes(graph)
    roles: dict[str, dict[Role, fx.Node]] = {}
    for node in graph.nodes:
        matmul = matmul_of(node)
        if matmul is None or matmul.obstacle is not None:
            continue
        # A forward matmul that is computed again in backward counts once.
        if matmul.role is not Role.FPROP or node not in backward:
            roles.setdefault(matmul.site, {}).setdefault(matmul.role, node)
    found = {}
    for site, nodes in roles.items():
        if all(_in_fp4(node) is None for node in nodes.values()):
            continue
        weight = _origin_of(nodes, Operand.WEIGHT)
        read = _origin_of(nodes, Operand.INPUT)
        if weight is not None and read is not None:
            found[site] = SiteNodes(site, nodes, weight, read)
    return found


def _in_fp4(node: fx.Node) -> Matmul | None:
    assignment = assignment_of(node)
    return matmul_of(node) if assignment is not None and assignment.precision == "nvfp4" else None


def _origin_of(nodes: dict[Role, fx.Node], kind: Operand) -> fx.Node | None:
    for node in nodes.values():
        matmul = matmul_of(node)
        assert matmul is not None
        if kind in matmul.operands:
            return origin(operands(node)[matmul.operands.index(kind)])
    return None


@dataclass(frozen=True)
class Switch:
    """operation: (session, left, right, bias or None, site, role) -> what the matmul gives."""

    operation: Target
    session: int

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            _switch(graph, node, self.operation, self.session)
        return graph


def _switch(graph: fx.Graph, node: fx.Node, operation: Target, session: int) -> None:
    matmul = _in_fp4(node)
    if matmul is not None:
        bias = arguments(node)[0] if OPERAND_PLACES[node.target] == (1, 2) else None  # type: ignore[index]
        _replace(graph, node, operation, (session, *operands(node), bias, matmul.site, matmul.role.value))


@dataclass(frozen=True)
class Observe:
    """operation: (session, left, right, operands of fprop, operands and result of the other backward matmul, samples,
    site, role) -> what the matmul gives; an empty list where the site has no such matmul in this graph. samples: see
    `samples`. alone: what a forward matmul becomes whose site has no other, arguments as in `Switch`."""

    operation: Target
    alone: Target
    session: int

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for found in site_nodes(graph).values():
            if found.host is None:
                _switch(graph, found.roles[Role.FPROP], self.alone, self.session)
                continue
            node = found.roles[found.host]
            forward = found.roles.get(Role.FPROP)
            other = found.roles.get(Role.DGRAD if found.host is Role.WGRAD else Role.WGRAD)
            fprop = [] if forward is None else list(operands(forward))
            backward = [] if other is None else [*operands(other), other]
            args = (self.session, *operands(node), fprop, backward, samples(graph, found), found.site, found.host.value)
            _replace(graph, node, self.operation, args)
        return graph


def samples(graph: fx.Graph, found: SiteNodes) -> int | fx.Node:
    """How many samples the rows that a site reads belong to, the same number of rows to each; 0 where it is not known.

    They lie along the first axis of the tensor of three or more axes whose rows they are: what the layer was called
    with. A weight of three axes has each row read by every part of it, or each part reads rows of its own: then nothing
    says whose they are.
    """
    role = next(role for role in found.roles if Operand.INPUT in found.matmul(role).operands)
    place = found.matmul(role).operands.index(Operand.INPUT)
    node = operands(found.roles[role])[place]
    shape = numbers(node.meta["val"].shape)
    # The contraction of fprop is along features, that of wgrad along rows.
    rows = shape[-2] if (place == 0) == (role is Role.FPROP) else shape[-1]
    parts = len(numbers(found.weight.meta["val"].shape)) > 2
    rows = rows if parts else rows * math.prod(shape[:-2])
    passed = {*SAME_ELEMENTS, aten.expand.default} if parts else SAME_ELEMENTS
    while (len(shape) < 3 or parts) and node.target in passed:
        node = arguments(node)[0]
        shape = numbers(node.meta["val"].shape)
    if len(shape) < 3 or shape[0] == 0 or rows % shape[0] or (parts and math.prod(shape[:-1]) != rows):
        return 0
    size = node.meta["val"].shape[0]
    if isinstance(size, int):
        return size
    with graph.inserting_after(node):
        return insert(graph, aten.sym_size.int, (node, 0), node)


def _replace(graph: fx.Graph, node: fx.Node, target: Target, args: tuple[object, ...]) -> None:
    with graph.inserting_before(node):
        call = insert(graph, target, args, node)
    for key in (MATMUL, ASSIGNMENT):
        call.meta[key] = node.meta[key]
    node.replace_all_uses_with(call)
    graph.erase_node(node)
