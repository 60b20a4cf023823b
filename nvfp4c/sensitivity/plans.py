"""A choice as a precision plan: few rules, which a person can read and edit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from glob import escape

from nvfp4c.passes.matmul_graph import block_name
from nvfp4c.plan import PrecisionPlan, Rule
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.analysis import Key
from nvfp4c.sensitivity.measurements import Measurements, SiteMeasure


def to_plan(measurements: Measurements, bf16: Collection[Key], provenance: Mapping[str, object]) -> PrecisionPlan:
    """The plan that leaves these in BF16, and what has an obstacle, and runs all else that was measured in NVFP4.

    The first rule is for every site; so the recipe's own choice of sites, which a plan overrides, has no say. Then one
    rule for a block whose sites agree, else one for each site that keeps something in BF16.
    """
    measured = [role for role in ROLES if any(role in site.roles for site in measurements.sites)]
    wanted = {site.site: _wanted(site, bf16) for site in measurements.sites}
    blocks: dict[str | None, list[SiteMeasure]] = {}
    for site in measurements.sites:
        blocks.setdefault(block_name(site.site), []).append(site)
    rules = [Rule("*", dict.fromkeys(measured, "nvfp4"))]
    for block, sites in blocks.items():
        kept = [_kept(wanted[site.site]) for site in sites]
        if block is not None and len(sites) > 1 and kept[0] and all(one == kept[0] for one in kept):
            rules.append(Rule(f"{escape(block)}*", kept[0]))
            continue
        # A rule for `a.b` also reaches `a.b#1`, which therefore comes later.
        for site in sorted(sites, key=lambda site: "#" in site.site):
            by_role = wanted[site.site]
            if by_role != {role: _decided(rules, site.site, role) for role in by_role}:
                rules.append(Rule(escape(site.site), by_role if "#" in site.site else _kept(by_role)))
    return PrecisionPlan(tuple(rules), provenance)


def _wanted(site: SiteMeasure, bf16: Collection[Key]) -> dict[str, str]:
    """Of each role that was measured; of all roles where nothing can run in FP4."""
    if site.obstacle is not None:
        return dict.fromkeys(ROLES, "bf16")
    return {role: "bf16" if (site.site, role) in bf16 else "nvfp4" for role in ROLES if role in site.roles}


def _kept(by_role: Mapping[str, str]) -> dict[str, str]:
    """What differs from the first rule. All roles where all that were measured are BF16: the site is left alone."""
    if set(by_role.values()) == {"bf16"}:
        return dict.fromkeys(ROLES, "bf16")
    return {role: precision for role, precision in by_role.items() if precision == "bf16"}


def _decided(rules: list[Rule], site: str, role: str) -> str | None:
    decision = PrecisionPlan(tuple(rules)).decide(site, role)
    return decision[0] if decision is not None else None
