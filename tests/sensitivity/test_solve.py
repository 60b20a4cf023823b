"""The solver, against every possible plan."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from invented import measurements, problems, rising, site, sized, stack

from nvfp4c.errors import BudgetError, DataError
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.analysis import Candidate, Key
from nvfp4c.sensitivity.budgets import Budget, costs
from nvfp4c.sensitivity.constraints import Constraints
from nvfp4c.sensitivity.problem import SLACK, Problem
from nvfp4c.sensitivity.solve import curve, solve

CLOSE = 1e-9
"""Of the largest score and term: ten times the precision that the solver works to."""


def plans(problem: Problem) -> dict[frozenset[Key], float]:
    """The cost of every plan that the constraints allow, by what it leaves in BF16."""
    options = [[True] if one.must == "bf16" else [False] if one.must else [True, False] for one in problem.groups]
    found = {}
    for choice in itertools.product(*options):
        chosen = zip(problem.groups, choice, strict=True)
        bf16 = frozenset(key for group, high in chosen if high for key in group.keys)
        found[bf16] = problem.costs.of(bf16)
    return found


@given(problems())
def test_no_plan_is_better(problem: Problem) -> None:
    every = plans(problem)
    ceiling = problem.budget.ceiling
    affordable = [bf16 for bf16, cost in every.items() if cost <= ceiling + SLACK]
    if not affordable:
        with pytest.raises(BudgetError):
            solve(problem)
        return
    found = solve(problem)
    assert frozenset(found.bf16) in every
    assert every[frozenset(found.bf16)] <= ceiling + 2 * SLACK
    numbers = (*problem.scores.values(), *problem.pair_terms.values())
    best = min(map(problem.rise, affordable))
    assert problem.rise(found.bf16) == found.predicted <= best + CLOSE * max(map(abs, numbers))


@given(problems())
def test_the_nearest_budget_can_be_met(problem: Problem) -> None:
    """And what lies beyond it cannot."""
    strictest = {"operations": 0.0, "bits": 1.0, "speed": 1e3}[problem.budget.unit]
    problem = replace(problem, budget=replace(problem.budget, limit=strictest))
    least = min(plans(problem).values())
    if least <= SLACK:
        assert problem.costs.of(solve(problem).bf16) <= 2 * SLACK
        return
    with pytest.raises(BudgetError) as caught:
        solve(problem)
    said = re.search(r"ask for ([\d.]+) or (more|less)$", str(caught.value))
    assert said is not None and said[2] == ("less" if problem.budget.unit == "speed" else "more")
    nearest = replace(problem.budget, limit=float(said[1]))
    assert problem.costs.of(solve(replace(problem, budget=nearest)).bf16) == pytest.approx(least, rel=1e-3)
    # It is rounded to four decimals, to the side that can be met.
    assert nearest.ceiling >= least - SLACK
    assert nearest.limit == pytest.approx(1 / least if problem.budget.unit == "speed" else least, abs=1e-4)


@given(problems(), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_a_curve_never_rises(problem: Problem, shares: list[float]) -> None:
    problem = replace(problem, budget=Budget(0.5))
    least = min(plans(problem).values())
    if max(shares) < least:
        with pytest.raises(BudgetError):
            curve(problem, shares)
        return
    found = curve(problem, shares)
    assert [one.budget for one in found] == sorted({share for share in shares if share >= least})
    assert all(one.share <= one.budget + 2 * SLACK for one in found)
    predicted = [one.predicted for one in found]
    assert predicted == sorted(predicted, reverse=True)


def test_a_curve_keeps_a_plan_until_there_is_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that the solver takes for equal may differ by a rounding."""
    problem = Problem(stack(1), rising(stack(1)), Budget(0.5))
    rises = {0.1: 1.0, 0.2: 1.0 + 1e-15, 0.3: 0.5}
    monkeypatch.setattr(
        "nvfp4c.sensitivity.solve.solve",
        lambda asked: replace(asked.candidate("solved", ()), predicted=rises[asked.budget.limit]),
    )
    found = [(one.name, one.budget, one.predicted) for one in curve(problem, rises)]
    assert found == [("solved 0.1", 0.1, 1.0), ("solved 0.2", 0.2, 1.0), ("solved 0.3", 0.3, 0.5)]


def test_a_curve_of_speeds_begins_with_the_fastest() -> None:
    model = sized(stack(3), 8192)
    found = curve(Problem(model, rising(model), Budget(1, "speed", "sm_100")), [1, 2, 1.5])
    assert [one.budget for one in found] == [2, 1.5, 1]
    assert found[0].predicted > found[1].predicted > found[2].predicted == 0


def test_what_costs_no_loss_runs_in_fp4() -> None:
    """Whatever the budget allows."""
    found = stack(2)
    scores = dict.fromkeys(rising(found), 0.0) | {("layers.1.q", "fprop"): -0.5, ("layers.0.q", "wgrad"): 0.1}
    assert solve(Problem(found, scores, Budget(1))).bf16 == (("layers.0.q", "wgrad"),)


def test_noise_cancels_within_what_is_tied() -> None:
    """A negative score counts as it is: the block of noise goes, the other one stays."""
    found = measurements(site("layers.0.q"), site("layers.1.q"))
    noise = [0.5, -0.5, 0.1, 0.1, 0.1, 0.1]
    scores = dict(zip(rising(found), noise, strict=True))
    chosen = solve(Problem(found, scores, Budget(0.5), Constraints(whole_blocks=True)))
    assert {name for name, _ in chosen.bf16} == {"layers.1.q"}
    assert chosen.predicted == pytest.approx(0.1)


def test_a_pair_that_is_bad_together() -> None:
    """Alone each costs nothing; of the two, the cheaper one stays."""
    found = measurements(site("a", (3, 0, 0)), site("b", (2, 0, 0)), site("c", (5, 0, 0)))
    pair = (("a", "fprop"), ("b", "fprop"))
    scores = {("a", "fprop"): 0.0, ("b", "fprop"): 0.0, ("c", "fprop"): 1.0}
    assert solve(Problem(found, scores, Budget(0.2), pair_terms={pair: 5.0})).bf16 == (("b", "fprop"),)
    assert solve(Problem(found, scores, Budget(0.5), pair_terms={pair: 0.5})).bf16 == (("c", "fprop"),)
    assert solve(Problem(found, scores, Budget(0.1), pair_terms={pair: 5.0})).predicted == 6.0


def test_a_pair_that_is_good_together() -> None:
    """Errors that cancel: a and b are worst alone, and yet c stays."""
    found = measurements(*(site(name, (1, 0, 0)) for name in "abc"))
    scores = {("a", "fprop"): 1.0, ("b", "fprop"): 1.0, ("c", "fprop"): 0.5}
    pair = (("b", "fprop"), ("a", "fprop"))
    chosen = solve(Problem(found, scores, Budget(0.34), pair_terms={pair: -1.9}))
    assert chosen.bf16 == (("c", "fprop"),)
    assert chosen.predicted == pytest.approx(0.1)


def test_scores_of_any_size() -> None:
    """Losses differ by powers of ten; so do scores of one model."""
    found = stack(2)
    for scale in (1e-12, 1.0, 1e9):
        scores = {key: scale * value for key, value in rising(found).items()}
        chosen = solve(Problem(found, scores, Budget(0.25)))
        assert chosen.bf16 == tuple(rising(found))[-3:]
        assert chosen.predicted == pytest.approx(45 * scale)


def test_a_candidate() -> None:
    """A fifth of the 15 operations: the head's one matmul saves 9, the last three others save 4 + 5 + 6."""
    found = stack(1, head=3)
    kept = tuple(("layers.0.down", role) for role in ROLES)
    assert solve(Problem(found, rising(found), Budget(0.2))) == Candidate("solved 0.2", "solved", kept, 0.2, 0.2, 30.0)


@pytest.mark.parametrize("score", [None, float("nan"), float("inf")])
def test_scores_must_be_whole(score: float | None) -> None:
    found = stack(1)
    scores = rising(found)
    del scores["layers.0.q", "fprop"]
    if score is not None:
        scores["layers.0.q", "fprop"] = score
    with pytest.raises(DataError, match=r"score of layers.0.q \(fprop\) is .*measure it again"):
        Problem(found, scores, Budget(0.15))


def test_pairs_must_be_known() -> None:
    found = stack(1)
    with pytest.raises(DataError, match=r"'layers\.9\.q'"):
        Problem(found, rising(found), Budget(1), pair_terms={(("layers.0.q", "fprop"), ("layers.9.q", "fprop")): 1.0})


def test_a_model_without_choices() -> None:
    with pytest.raises(DataError, match="no matmul of this model can run in FP4"):
        Problem(measurements(site("a", obstacle="the weight is no matrix")), {}, Budget(0.15))


def test_nothing_is_printed() -> None:
    """Standard output is data for a program; a solver writes there on its own (see solve._silence)."""
    program = (
        "import os, nvfp4c.sensitivity.solve as solve\n"
        "print('before')\n"
        "with solve._silence():\n"
        "    os.write(1, b'noise')\n"
        "print('after')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["before", "after"]


def test_costs_add_up() -> None:
    """All in BF16 costs a share of 1, 16 bits, and the time of BF16."""
    found = sized(stack(3), 512)
    for budget in (Budget(1), Budget(16, "bits"), Budget(1, "speed", "sm_100"), Budget(1, "speed", "sm_80")):
        assert costs(found, budget).of(rising(found)) == pytest.approx(budget.ceiling)
