"""The plan that raises the loss least under a budget, by mixed-integer programming.

With y = 1 for each group of choices that runs in FP4, and z = y_a y_b for each pair of groups that has a term:

    minimise    sum of score_g y_g  +  sum of term_ab z_ab
    subject to  sum of cost_g (1 - y_g) <= budget        z_ab <= y_a,  z_ab <= y_b,  z_ab >= y_a + y_b - 1

The bounds on z leave exactly y_a y_b once y is 0 or 1, so z needs no integrality (McCormick 1976). HiGHS solves it,
through scipy.optimize.milp.
"""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from nvfp4c.errors import BudgetError, Nvfp4Error
from nvfp4c.sensitivity.analysis import Candidate
from nvfp4c.sensitivity.problem import SLACK, Problem

SCALE = 1e4
"""What the largest number of the objective, and of the budget's row, is made: HiGHS takes sums that differ by 1e-6 as
equal, which is then one part in 10^10."""

OPTIONS = {"mip_rel_gap": 0.0, "presolve": False}
"""The optimum, not something near it. Presolving finds little in one row: a model of 62 blocks takes four times as long
with it."""


def solve(problem: Problem) -> Candidate:
    """The plan with the least predicted rise of the loss within the budget.

    What does not raise the loss runs in FP4; what does, but costs nothing of the budget in BF16, runs in BF16. Raises
    BudgetError, with the nearest budget that can be met, where no plan meets this one.
    """
    problem.check()
    group_of = {key: index for index, group in enumerate(problem.groups) for key in group.keys}
    linear = np.array([math.fsum(problem.scores[key] for key in group.keys) for group in problem.groups])
    pairs: dict[tuple[int, int], float] = defaultdict(float)
    for (first, second), term in problem.pair_terms.items():
        if first in group_of and second in group_of:
            low, high = sorted((group_of[first], group_of[second]))
            if low == high:
                linear[low] += term
            else:
                pairs[low, high] += term
    costs = np.array([problem.cost(group) for group in problem.groups])
    paired = {index for pair in pairs for index in pair}
    lower, upper = np.zeros(len(linear)), np.ones(len(linear))
    for index, group in enumerate(problem.groups):
        if group.must == "bf16":
            upper[index] = 0
        elif group.must == "nvfp4" or (linear[index] <= 0 and costs[index] >= 0 and index not in paired):
            lower[index] = 1
    room = problem.budget.ceiling + SLACK - problem.costs.fixed
    chosen = _minimise(linear, pairs, costs, room, lower, upper)
    return problem.candidate("solved", {key for key, index in group_of.items() if not chosen[index]})


def _minimise(
    linear: np.ndarray,
    pairs: Mapping[tuple[int, int], float],
    costs: np.ndarray,
    room: float,
    lower: np.ndarray,
    upper: np.ndarray,
) -> np.ndarray:
    """Which groups run in FP4, as booleans. costs: of a group in BF16. room: what they may add up to."""
    count, products = len(linear), len(pairs)
    objective = np.concatenate([linear, np.array(list(pairs.values()), dtype=float)])
    weight = SCALE / (np.abs(costs).max() or 1)
    budget = np.concatenate([-costs * weight, np.zeros(products)])
    with _silence():
        result = milp(
            objective * SCALE / (np.abs(objective).max() or 1),
            integrality=np.repeat([1, 0], [count, products]),
            bounds=Bounds(np.append(lower, np.zeros(products)), np.append(upper, np.ones(products))),
            constraints=[
                LinearConstraint(budget[None], -np.inf, (room - costs.sum()) * weight),
                *_products(list(pairs), count),
            ],
            options=OPTIONS,
        )
    if result.x is None:
        raise Nvfp4Error(f"the solver stopped without a plan ({result.message}); report this with the measurements")
    return np.asarray(result.x[:count] > 0.5)


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard output, which may be data for a program: HiGHS 1.12 writes a line there that no option stops
    (ERGO-Code/HiGHS, issue 2783)."""
    if sys.stdout is None:  # closed
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _products(pairs: list[tuple[int, int]], count: int) -> Iterable[LinearConstraint]:
    """z - y_a <= 0, z - y_b <= 0, and y_a + y_b - z <= 1, for the products z that follow `count` variables y."""
    if not pairs:
        return
    first, second = np.array(pairs).T
    rows = np.arange(len(pairs))
    ones, shape = np.ones(len(pairs)), (len(pairs), count + len(pairs))
    for end in (first, second):
        entries = (np.concatenate([ones, -ones]), (np.tile(rows, 2), np.concatenate([count + rows, end])))
        yield LinearConstraint(coo_array(entries, shape=shape), -np.inf, 0)
    entries = (np.concatenate([ones, ones, -ones]), (np.tile(rows, 3), np.concatenate([first, second, count + rows])))
    yield LinearConstraint(coo_array(entries, shape=shape), -np.inf, 1)


def curve(problem: Problem, limits: Iterable[float]) -> tuple[Candidate, ...]:
    """The best plan for each limit, from the strictest to the loosest: the predicted rise never grows.

    Limits that no plan meets are left out. Raises BudgetError where that leaves none. Nothing is measured again.
    """
    strictest_first = sorted(set(limits), reverse=problem.budget.unit == "speed")
    found: list[Candidate] = []
    refused: BudgetError | None = None
    for limit in strictest_first:
        try:
            best = solve(replace(problem, budget=replace(problem.budget, limit=limit)))
        except BudgetError as error:
            refused = error
            continue
        # Equal plans of a smaller budget stay: sums that differ by rounding alone are no improvement.
        if found and found[-1].predicted <= best.predicted:
            best = replace(found[-1], name=best.name, budget=limit)
        found.append(best)
    if refused is not None and not found:
        raise refused
    return tuple(found)
