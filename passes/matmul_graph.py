"""The graph of matmul sites: which site feeds which, what lies last before an output, which blocks there are."""

from __future__ import annotations

import re
from collections.abc import Iterable

import networkx as nx
from torch import fx

from nvfp4c.dialect import Operand, Role, matmul_of
from nvfp4c.passes.graph_edit import backward_nodes

BLOCK_NAME = re.compile(r"^(?P<prefix>(?:[^.]*[^.\d][^.]*\.)*)(?P<index>\d+)\.")
"""`layers.3.mlp.up_proj`: block 3 of the numbered modules below `layers.`."""


def matmul_graph(graph: fx.Graph) -> nx.DiGraph:
    """Sites with a weight as nodes, in forward order; an edge where one site's output reaches another's input.

    An edge skips no site: of two sites in a row only neighbours are joined, whatever lies between them.
    """
    sites = nx.DiGraph()
    upstream: dict[fx.Node, frozenset[str]] = {}
    backward = backward_nodes(graph)
    for node in graph.nodes:
        if node in backward:
            continue
        reached = frozenset[str]().union(*(upstream.get(source, frozenset()) for source in node.all_input_nodes))
        found = matmul_of(node)
        if found is not None and found.role is Role.FPROP and Operand.WEIGHT in found.operands:
            sites.add_node(found.site)
            sites.add_edges_from((site, found.site) for site in reached)
            reached = frozenset({found.site})
        upstream[node] = reached
    return sites


def block_of(site: str) -> tuple[str, int] | None:
    """(prefix, index) of the numbered block that a site lies in, or None."""
    match = BLOCK_NAME.match(site)
    return (match["prefix"], int(match["index"])) if match else None


def block_name(site: str) -> str | None:
    """What all names in a site's block begin with, `layers.3.`: an encoder and a decoder both have a block 0."""
    found = block_of(site)
    return None if found is None else f"{found[0]}{found[1]}."


def block_counts(sites: Iterable[str]) -> dict[str, int]:
    """How many blocks there are below each prefix."""
    counts: dict[str, int] = {}
    for site in sites:
        block = block_of(site)
        if block is not None:
            counts[block[0]] = max(counts.get(block[0], 0), block[1] + 1)
    return counts


def heads(sites: nx.DiGraph) -> frozenset[str]:
    """Sites outside the numbered blocks that feed no other site: what lies last before an output."""
    return frozenset(site for site in sites if sites.out_degree(site) == 0 and block_of(site) is None)
