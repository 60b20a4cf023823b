"""One question to the solver and to the baselines: where FP4 may run, at what cost, and what it does to the loss."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from nvfp4c.errors import BudgetError, DataError
from nvfp4c.sensitivity import budgets, constraints
from nvfp4c.sensitivity.analysis import Candidate, Key, PairTerms, Scores
from nvfp4c.sensitivity.budgets import Budget, Costs
from nvfp4c.sensitivity.constraints import UNCONSTRAINED, Constraints, Group
from nvfp4c.sensitivity.measurements import Measurements

SLACK = 1e-9
"""By how much a budget may be exceeded: sums of shares are rounded, and a budget that is just met counts as met."""


@dataclass(frozen=True)
class Problem:
    """What is to be divided, and by what rule. Another budget is `dataclasses.replace(problem, budget=...)`.

    Raises DataError for scores that lack a choice or are not numbers, for a pair of something that is no choice, and
    for a model of which nothing can run in FP4.

    Scores and noise. A negative score counts as it is. What nothing ties runs in FP4 with a score of -0.1 as with one
    of 0, so clipping at 0 would not change the choice. It would where many are decided together: of scores that
    are only noise about 0, the negative ones cancel the positive ones, but clipped they add up to a rise.
    """

    measurements: Measurements
    scores: Scores
    budget: Budget
    constraints: Constraints = UNCONSTRAINED
    pair_terms: PairTerms = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.choices:
            raise DataError("no matmul of this model can run in FP4, so there is nothing to decide")
        for key in self.choices:
            if not math.isfinite(self.scores.get(key, math.nan)):
                found = f"is {self.scores[key]}" if key in self.scores else "is missing"
                raise DataError(f"the score of {key[0]} ({key[1]}) {found}; measure it again")
        known = {(site.site, role) for site in self.measurements.sites for role in site.roles}
        for pair, value in self.pair_terms.items():
            if not (known.issuperset(pair) and math.isfinite(value)):
                raise DataError(f"the pair term of {pair} is {value}; give a number for two measured choices")

    @cached_property
    def choices(self) -> tuple[Key, ...]:
        """Every site and role that can run in FP4."""
        return tuple(constraints.choices(self.measurements))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """What is decided together."""
        return constraints.groups(self.measurements, self.constraints)

    @cached_property
    def costs(self) -> Costs:
        """Of the budget."""
        return budgets.costs(self.measurements, self.budget)

    @cached_property
    def base(self) -> tuple[Group, ...]:
        """The cheapest plan's groups in BF16: what must be, and what costs no more of the budget there than in FP4."""
        return tuple(
            group for group in self.groups if group.must == "bf16" or (group.must is None and self.cost(group) <= 0)
        )

    def cost(self, group: Group) -> float:
        """What it adds to the cost of a plan in BF16."""
        return math.fsum(self.costs.bf16[key] for key in group.keys)

    def check(self) -> None:
        """Raise BudgetError, naming the nearest budget that can be met, where no plan meets this one.

        The cheapest plan is exact without a search: each group adds to the cost on its own.
        """
        least = self.costs.of(key for group in self.base for key in group.keys)
        if least > self.budget.ceiling + SLACK:
            raise BudgetError(self.budget.refusal(least))

    def rise(self, bf16: Collection[Key]) -> float:
        """Predicted rise of the loss with these in BF16 and all other choices in FP4."""
        low = set(self.choices).difference(bf16)
        alone = (self.scores[key] for key in low)
        return math.fsum((*alone, *(value for pair, value in self.pair_terms.items() if low.issuperset(pair))))

    def candidate(self, kind: str, bf16: Collection[Key], note: str = "") -> Candidate:
        """The plan that leaves these in BF16, with what it is worth. note: ends its name where a kind has several."""
        return Candidate(
            name=f"{kind} {self.budget.limit:g}{note}",
            kind=kind,
            bf16=tuple(key for key in self.choices if key in bf16),
            budget=self.budget.limit,
            share=budgets.operations(self.measurements).of(bf16),
            predicted=self.rise(bf16),
        )
