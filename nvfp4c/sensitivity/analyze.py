"""All of it: measure, score, solve, run what was chosen for real on held-out batches, and write it down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from nvfp4c import recipe as recipes
from nvfp4c.errors import DataError, OptionError, nearest
from nvfp4c.files import write_text
from nvfp4c.page import finite
from nvfp4c.plan import PrecisionPlan
from nvfp4c.recipe import ROLES, Recipe
from nvfp4c.sensitivity import baselines, report
from nvfp4c.sensitivity.ablation import Ablation, ablate, forward_matmuls
from nvfp4c.sensitivity.analysis import Analysis, Candidate, PairTerms, Together
from nvfp4c.sensitivity.budgets import PAPER_SHARE, Budget
from nvfp4c.sensitivity.constraints import UNCONSTRAINED, Constraints, choices
from nvfp4c.sensitivity.measure import check_batches, everywhere, measure, provenance_of_data
from nvfp4c.sensitivity.measurements import Measurements
from nvfp4c.sensitivity.plans import to_plan
from nvfp4c.sensitivity.problem import Problem
from nvfp4c.sensitivity.runs import Runs
from nvfp4c.sensitivity.score import scores, second_order
from nvfp4c.sensitivity.solve import curve, solve
from nvfp4c.sensitivity.switched import SwitchedModel
from nvfp4c.sensitivity.together import pair_terms, together
from nvfp4c.tasks import Task
from nvfp4c.watch import Watch, unwatched

Loss = Callable[[Any, Any], Tensor]

METHODS = ("probe", "ablate")
BATCHES = 8
"""Batches to measure on, and as many held out."""

CURVES = {
    "operations": (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    "bits": (4.5, 4.75, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0),
    "speed": (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 3.0),
}
"""Budgets that the curve has points at, beside the one asked for."""


@dataclass(frozen=True)
class Settings:
    """method: "probe", or "ablate": see `ablate`. random: how many random plans there are beside the others. pairs:
    whether blocks are run whole to see if scores add up, and pairs of matmuls where they do not."""

    recipe: Recipe = recipes.RECIPES[recipes.DEFAULT_RECIPE]
    budget: Budget = field(default_factory=lambda: Budget(PAPER_SHARE))
    constraints: Constraints = UNCONSTRAINED
    method: str = "probe"
    seed: int = 0
    random: int = 3
    pairs: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"unknown method {self.method!r}; {nearest(self.method, METHODS)}")


def analyze(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    held_out: Sequence[Any] = (),
    settings: Settings | None = None,
    folder: Path | None = None,
    watch: Watch = unwatched,
) -> Analysis:
    """Decide which matmuls run in FP4. loss(model, batch): a scalar tensor, the mean over the batch.

    held_out: batches that nothing is chosen by, for the verdict; without any, no plan is run. folder: where all that is
    measured is kept as it is found, so that an interrupted run goes on, and another one measures only what is new.
    Raises DataError, BudgetError, PlanError or OptionError, each saying what to do, as soon as it can be known.
    """
    settings = settings or Settings()
    check_batches([*batches, *held_out])
    found = measure(model, batches, loss, settings.recipe, settings.seed, folder, watch)
    check(found, settings)
    switched = SwitchedModel(model, everywhere(settings.recipe))
    runs = Runs(switched, batches, loss, folder, found.provenance)
    known = {**found.provenance, **provenance_of_data(held_out)}
    unseen = Runs(switched, held_out, loss, folder, known, "held-out batch")
    runs.check()
    if held_out:
        unseen.check()
    everything = fmean(runs.rises(forward_matmuls(found)))
    if not math.isfinite(everything):
        raise DataError(
            f"with every forward matmul in FP4 the loss rises by {everything}, so costs cannot be weighed; look at "
            "what the loss does with large numbers, and use BF16 or FP32 in place of FP16"
        )
    more = {"method": settings.method, "held_out": len(held_out), "rise_with_everything_in_fp4": everything}
    found = replace(found, provenance={**found.provenance, **more})
    ablation = Ablation()
    if settings.method == "ablate":
        ablation = ablate(found, runs, watch)
        angle = {"cosine_with_everything_in_fp4": ablation.cosine_of_everything}
        found = replace(found, provenance={**found.provenance, **angle})
    scored = {**scores(found, everything), **ablation.single}
    checked: tuple[Together, ...] = ()
    pairs: PairTerms = {}
    if settings.pairs:
        checked = together(scored, runs.rises, watch)
        pairs = pair_terms(checked, scored, runs.rises, watch)
        if pairs:
            scored = {**scores(found, everything - math.fsum(pairs.values())), **ablation.single}
    second = second_order(found, everything - math.fsum(pairs.values()))
    found = replace(found, provenance={**found.provenance, "second_order": asdict(second)})
    problem = Problem(found, scored, settings.budget, settings.constraints, pairs)
    chosen = solve(problem)
    plans = (chosen, *rivals(problem, settings))
    if held_out:
        plans = verified(unseen, problem, plans, watch)
    limits = {*CURVES[settings.budget.unit], settings.budget.limit}
    others = [plan for plan in curve(problem, limits) if plan.budget != settings.budget.limit]
    return Analysis(
        measurements=found,
        scores=problem.scores,
        candidates=(*sorted([plans[0], *others], key=lambda plan: plan.budget), *plans[1:]),
        chosen=chosen.name,
        budget_unit=settings.budget.unit,
        target=settings.budget.target,
        single=ablation.single,
        all_but=ablation.all_but,
        cosine=ablation.cosine,
        cosine_all_but=ablation.cosine_all_but,
        together=checked,
        pairs=pairs,
    )


def check(found: Measurements, settings: Settings) -> None:
    """Raise BudgetError or PlanError where no plan can be what is asked for, whatever the scores are."""
    Problem(found, dict.fromkeys(choices(found), 0.0), settings.budget, settings.constraints).check()


def rivals(problem: Problem, settings: Settings, roles: Collection[str] = ROLES) -> tuple[Candidate, ...]:
    """The baselines under the same budget. roles: that they may leave in BF16."""
    seeds = range(settings.seed, settings.seed + settings.random)
    return (
        baselines.paper(problem, roles),
        baselines.weights(problem, roles),
        *baselines.random(problem, seeds, roles),
    )


def verified(
    runs: Runs, problem: Problem, plans: Sequence[Candidate], watch: Watch = unwatched
) -> tuple[Candidate, ...]:
    """The same plans with the rise of the loss on every batch. runs: on held-out ones."""
    found = []
    for number, plan in enumerate(plans):
        watch("running plans", number, len(plans))
        fp4 = set(problem.choices).difference(plan.bf16)
        found.append(replace(plan, measured=runs.rises(fp4)))
    watch("running plans", len(plans), len(plans))
    return tuple(found)


def data_of(task: Task, count: int = BATCHES) -> tuple[list[Any], list[Any]]:
    """`count` batches of a task to measure on, and as many held out: the task's own, else those that come next.

    A task with few batches gives half of them to each. Raises DataError where it has fewer than two in all.
    """
    batches, _ = task.training()
    if task.held_out is not None:
        return list(islice(batches, count)), list(islice(task.held_out, count))
    taken = list(islice(batches, 2 * count))
    if len(taken) < 2:
        raise DataError(
            f"{task.name} returned {len(taken)} batches; at least two are needed, one to measure on and one held out"
        )
    half = (len(taken) + 1) // 2
    return taken[:half], taken[half:]


def plan_of(analysis: Analysis) -> PrecisionPlan:
    """The plan that was chosen, with where it came from."""
    chosen = analysis.plan
    provenance = {
        **analysis.measurements.provenance,
        "budget": {"limit": chosen.budget, "unit": analysis.budget_unit, "target": analysis.target},
        "share_in_bf16": chosen.share,
        "predicted_rise": chosen.predicted,
        "measured_rise": None if chosen.measured is None else fmean(chosen.measured),
    }
    return to_plan(analysis.measurements, chosen.bf16, finite(provenance))


def write(analysis: Analysis, out: Path) -> None:
    """plan.json, sensitivity.json and report.html; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    plan_of(analysis).save(out / "plan.json")
    write_text(out / "sensitivity.json", json.dumps(analysis.to_dict(), indent=1) + "\n")
    report.write(analysis, out / "report.html")


def analyze_task(
    task: Task, settings: Settings, count: int = BATCHES, out: Path | None = None, watch: Watch = unwatched
) -> Analysis:
    """`analyze` of a task; writes to `out`, and keeps what is measured in `out`/parts for the next run."""
    _, loss = task.training()
    batches, held_out = data_of(task, count)
    parts = None if out is None else out / "parts"
    if parts is not None:
        parts.mkdir(parents=True, exist_ok=True)
    found = analyze(task.model, batches, loss, held_out, settings, parts, watch)
    found = replace(
        found, measurements=replace(found.measurements, provenance={"task": task.name, **found.measurements.provenance})
    )
    if out is not None:
        write(found, out)
    return found
