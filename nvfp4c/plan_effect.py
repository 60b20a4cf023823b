"""What a plan means for a model: the precision of every site and role, who decided it, and rules that do nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nvfp4c.errors import PlanError
from nvfp4c.explanation import Explanation, Row, explain
from nvfp4c.plan import PrecisionPlan
from nvfp4c.sites import weight_sites
from nvfp4c.tasks import Task


@dataclass(frozen=True)
class PlanEffect:
    """explanation: the reason of each row is who decided its precision, also where that is NVFP4.

    decided: how many sites and roles each rule decides, by its pattern. warnings: sentences about rules that do not do
    what they say.
    """

    explanation: Explanation
    decided: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of all matmul operations, forward and backward, those in NVFP4: 0 to 1."""
        return sum(row.share for row in self.explanation.rows if row.precision == "nvfp4")

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, with every row."""
        more = {"share": self.share, "decided": self.decided, "warnings": list(self.warnings)}
        return {**self.explanation.to_json(), **more}


def effect(plan: PrecisionPlan, task: Task, recipe: str | None = None) -> PlanEffect:
    """Find out what becomes of a task's model under a plan and a recipe. The model is run once, uncompiled.

    Rules that name no site, which `torch.compile` refuses, are left out and warned of.
    """
    sites, known, warnings = weight_sites(task.model), [], []
    for rule in plan.rules:
        try:
            PrecisionPlan((rule,)).check_sites(sites)
            known.append(rule)
        except PlanError as error:
            warnings.append(f"torch.compile refuses this plan: {error}")
    accepted = PrecisionPlan(tuple(known))
    explanation = explain(task.model, *task.example(), loss=task.loss, recipe=recipe, plan=accepted)
    rows = explanation.rows
    counts = Counter(decision[1] for row in rows if (decision := accepted.decide(row.site, row.role)))
    decided = {rule.pattern: counts[rule.pattern] for rule in plan.rules}
    return PlanEffect(
        replace(explanation, rows=tuple(replace(row, reason=_decided_by(accepted, explanation, row)) for row in rows)),
        decided,
        (*warnings, *_idle(accepted, explanation, decided), *_unheeded(accepted, explanation)),
    )


def differences(before: PlanEffect, after: PlanEffect) -> list[tuple[Row, Row]]:
    """The rows, of one model under two plans, whose precision differs."""
    pairs = zip(before.explanation.rows, after.explanation.rows, strict=True)
    return [(old, new) for old, new in pairs if old.precision != new.precision]


def _decided_by(plan: PrecisionPlan, explanation: Explanation, row: Row) -> str:
    """What `assign` says of bf16, and for NVFP4 the rule or else the recipe."""
    decision = plan.decide(row.site, row.role)
    return row.reason or (f"plan: {decision[1]}" if decision else f"recipe {explanation.recipe}")


def _idle(plan: PrecisionPlan, explanation: Explanation, decided: dict[str, int]) -> Iterator[str]:
    """Rules that name a site and yet decide nothing."""
    for rule in plan.rules:
        if decided[rule.pattern]:
            continue
        named = [row for row in explanation.rows if rule.matches(row.site) and row.role in rule.precision]
        if named:
            decision = plan.decide(named[0].site, named[0].role)
            assert decision is not None, "the rule itself decides where no other does"
            yield f"the plan's rule {rule.pattern!r} decides nothing; later ones win, such as {decision[1]!r}"
        else:
            yield f"the plan's rule {rule.pattern!r} decides nothing; no matmul that it names has one of its roles"


def _unheeded(plan: PrecisionPlan, explanation: Explanation) -> Iterator[str]:
    """Rules that ask for NVFP4 where it cannot be."""
    told = set()
    for row in explanation.rows:
        decision = plan.decide(row.site, row.role)
        if decision and decision[0] != row.precision and decision[1] not in told:
            told.add(decision[1])
            where = f"{row.role} of {row.site}"
            yield f"the plan's rule {decision[1]!r} asks for {decision[0]}, but {where} stays in bf16: {row.reason}"
