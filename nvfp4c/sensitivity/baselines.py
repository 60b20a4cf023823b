"""Plans that need no sensitivity, at the same budget: the paper's rule, the error of weights alone, and chance.

Each is an order of sites. Sites stay in BF16, with all their roles, in that order, for as long as the budget lasts;
what must agree with them follows. What must be BF16, or costs nothing of the budget, is in BF16 from the start.
FORWARD in place of all roles leaves forward matmuls alone in BF16, of about three times as many sites: for a verdict by
a forward pass, which backward matmuls cannot change.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from random import Random

from nvfp4c.passes.matmul_graph import block_name
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.analysis import Candidate, Key
from nvfp4c.sensitivity.measurements import SiteMeasure
from nvfp4c.sensitivity.problem import SLACK, Problem

FORWARD = ("fprop",)

FIRST_SHARE = 0.2
"""Of the blocks that the paper leaves in BF16, how many are first ones: 2 and 8 last ones in its model with 62 blocks
(arXiv 2509.25149)."""


class _Filling:
    """What is in BF16 so far, and what of the budget it takes. Raises BudgetError where no plan meets the budget."""

    def __init__(self, problem: Problem, roles: Collection[str]) -> None:
        problem.check()
        self.problem = problem
        self.roles = roles
        self.group_of = {key: group for group in problem.groups for key in group.keys}
        self.bf16: set[Key] = {key for group in problem.base for key in group.keys}
        self.used = problem.costs.of(self.bf16)

    def add(self, sites: Iterable[SiteMeasure]) -> bool:
        """Leave these in BF16 if the budget allows all of them, save for what must be NVFP4. Whether it did."""
        keys = ((site.site, role) for site in sites for role in site.roles if role in self.roles)
        wanted = {self.group_of[key] for key in keys if key in self.group_of}
        new = [group for group in wanted if group.must is None and self.bf16.isdisjoint(group.keys)]
        cost = math.fsum(map(self.problem.cost, new))
        if self.used + cost > self.problem.budget.ceiling + SLACK:
            return False
        self.used += cost
        self.bf16.update(key for group in new for key in group.keys)
        return True


def paper(problem: Problem, roles: Collection[str] = ROLES) -> Candidate:
    """The rule of arXiv 2509.25149, for any budget: the head, then whole blocks, four last ones for one first one.

    Sites outside the blocks come first, from the last one, each if it fits: the recipe's `keep_head` does so too. The
    first block that does not fit whole is left in BF16 in part: those of its sites that fit, from the model's end if it
    is one of the last blocks, else from its start. No other block follows.
    """
    filling = _Filling(problem, roles)
    blocks: dict[str, list[SiteMeasure]] = {}
    for site in problem.measurements.sites:
        blocks.setdefault(block_name(site.site) or "", []).append(site)
    for site in reversed(blocks.pop("", [])):
        filling.add([site])
    for sites in _outside_in(list(blocks.values())):
        if not filling.add(sites):
            for site in sites:
                filling.add([site])
            break
    return problem.candidate("paper", filling.bf16, _note(roles))


def _outside_in(blocks: list[list[SiteMeasure]]) -> Iterable[list[SiteMeasure]]:
    """Blocks in the order in which the paper's rule reaches them; the sites of last ones from the model's end."""
    first = 0
    for taken in range(1, len(blocks) + 1):
        if round(FIRST_SHARE * taken) > first:
            yield blocks[first]
            first += 1
        else:
            yield blocks[first - taken][::-1]


def weights(problem: Problem, roles: Collection[str] = ROLES) -> Candidate:
    """Sites by the relative error of their quantised weights, the worst first, as in post-training quantisation.

    The error, sqrt(sum e^2 / sum w^2), is one of an element, and every element takes part in as many operations, one
    for each row: so it is already the error of an operation, and large weights have no advantage. A site that does not
    fit is passed over.
    """
    order = sorted(problem.measurements.sites, key=weight_error, reverse=True)
    return _in_order("weights", problem, order, roles)


def weight_error(site: SiteMeasure) -> float:
    """Relative error of the weight as fprop reads it; 0 where it was not measured."""
    role = site.roles.get("fprop")
    operands = role.operands if role is not None else ()
    return next((math.sqrt(one.noise / one.signal) for one in operands if one.operand == "w" and one.signal), 0.0)


def random(problem: Problem, seeds: Iterable[int], roles: Collection[str] = ROLES) -> tuple[Candidate, ...]:
    """Sites in an order drawn uniformly, one plan for each seed. A site that does not fit is passed over."""
    found = []
    for seed in seeds:
        sites = list(problem.measurements.sites)
        Random(seed).shuffle(sites)
        found.append(_in_order("random", problem, sites, roles, f" #{seed}"))
    return tuple(found)


def _in_order(
    kind: str, problem: Problem, sites: Iterable[SiteMeasure], roles: Collection[str], note: str = ""
) -> Candidate:
    filling = _Filling(problem, roles)
    for site in sites:
        filling.add([site])
    return problem.candidate(kind, filling.bf16, note + _note(roles))


def _note(roles: Collection[str]) -> str:
    return "" if set(roles) == set(ROLES) else f", {' and '.join(roles)}"
