"""What must agree with what, and what must be as it is: constraints as data, and the groups they leave to decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx

from nvfp4c.errors import PlanError
from nvfp4c.passes.matmul_graph import block_name
from nvfp4c.plan import EMPTY_PLAN, PrecisionPlan
from nvfp4c.sensitivity.analysis import Key
from nvfp4c.sensitivity.measurements import Measurements, RoleMeasure, SiteMeasure


@dataclass(frozen=True)
class Constraints:
    """must: sites and roles that are "bf16" or "nvfp4" whatever it costs, in the rules of a plan: the last that matches
    wins. shared_input: sites that read the same tensor agree, each role with its like: so can the projections of a
    layer be joined into one matmul. whole_blocks: a block is decided as a whole, with all its roles.

    Sites that share a weight agree always, each role with its like. They have one weight, which is stored, cached and
    counted once: with two precisions it would be kept twice, and its uses would see two different weights.
    """

    must: PrecisionPlan = EMPTY_PLAN
    shared_input: bool = False
    whole_blocks: bool = False


UNCONSTRAINED = Constraints()
"""Only shared weights agree."""


@dataclass(frozen=True)
class Group:
    """What is decided together. must: "bf16" or "nvfp4" where that is given, else None."""

    keys: tuple[Key, ...]
    must: str | None = None


def choices(measurements: Measurements) -> dict[Key, RoleMeasure]:
    """Every site and role that can run in FP4, in the order of the sites. One with an obstacle is always BF16."""
    return {
        (site.site, role): measure
        for site in measurements.sites
        if site.obstacle is None
        for role, measure in site.roles.items()
    }


def groups(measurements: Measurements, constraints: Constraints) -> tuple[Group, ...]:
    """All of `choices`, divided into what is decided together, in their order.

    A site with an obstacle forces BF16 on those that share its weight; inputs and blocks tie only what can run in FP4.
    Raises PlanError for a rule that names no site, and where one group must be both BF16 and NVFP4.
    """
    constraints.must.check_sites(site.site for site in measurements.sites)
    stuck = {site.weight for site in measurements.sites if site.obstacle is not None}
    sites = {site.site: site for site in measurements.sites}
    position = {key: index for index, key in enumerate(choices(measurements))}
    ties = nx.Graph()
    must: dict[Key, str] = {}
    for key in position:
        name, role = key
        ties.add_node(key)
        ties.add_edges_from((key, tie) for tie in _ties(sites[name], role, constraints))
        decision = constraints.must.decide(name, role)
        if decision is not None:
            must[key] = decision[0]
        if sites[name].weight and sites[name].weight in stuck and must.setdefault(key, "bf16") == "nvfp4":
            raise PlanError(
                f"{name} ({role}) must run in nvfp4, but a site that shares its weight {sites[name].weight!r} cannot; "
                "leave that rule out"
            )
    members = (sorted(part & position.keys(), key=position.__getitem__) for part in nx.connected_components(ties))
    return tuple(_group(tuple(keys), must) for keys in members)


def _ties(site: SiteMeasure, role: str, constraints: Constraints) -> Iterator[tuple[str, object, object]]:
    """What this role of a site has in common with others: whatever names the same agrees."""
    if site.weight:
        yield ("weight", site.weight, role)
    if constraints.shared_input:
        yield ("input", site.reads, role)
    if constraints.whole_blocks and block_name(site.site) is not None:
        yield ("block", block_name(site.site), None)


def _group(keys: tuple[Key, ...], must: dict[Key, str]) -> Group:
    forced = {must[key]: key for key in keys if key in must}
    if len(forced) > 1:
        high, low = forced["bf16"], forced["nvfp4"]
        raise PlanError(
            f"{high[0]} ({high[1]}) must stay in bf16 and {low[0]} ({low[1]}) must run in nvfp4, but they are decided "
            "together: they share a weight, an input or a block; change one of the rules, or ask for fewer ties"
        )
    return Group(keys, next(iter(forced), None))
