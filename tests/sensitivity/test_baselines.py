"""Baselines on models small enough to fill by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from invented import measurements, problems, rising, site, stack

from nvfp4c.errors import BudgetError
from nvfp4c.plan import from_rules
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.analysis import KINDS, Candidate
from nvfp4c.sensitivity.baselines import FORWARD, paper, random, weights
from nvfp4c.sensitivity.budgets import Budget
from nvfp4c.sensitivity.constraints import Constraints
from nvfp4c.sensitivity.measurements import Measurements
from nvfp4c.sensitivity.problem import SLACK, Problem
from nvfp4c.sensitivity.solve import solve

CLOSE = 1e-9
"""Scores are at most 1, and the solver works to one part in 10^10."""


def asked(found: Measurements, share: float, **more: object) -> Problem:
    return Problem(found, rising(found), Budget(share), **more)  # type: ignore[arg-type]


def sites(candidate: Candidate) -> list[str]:
    """What is in BF16, all roles of it."""
    found = list(dict.fromkeys(name for name, _ in candidate.bf16))
    assert len(candidate.bf16) == len(found) * len(ROLES)
    return found


def blocks(candidate: Candidate) -> set[int]:
    return {int(name.split(".")[1]) for name in sites(candidate)}


@pytest.mark.parametrize(
    ("count", "kept"),
    [(0, []), (1, [61]), (2, [60, 61]), (3, [0, 60, 61]), (5, [0, *range(58, 62)]), (10, [0, 1, *range(54, 62)])],
)
def test_the_papers_blocks(count: int, kept: list[int]) -> None:
    """Ten blocks of its model with 62: the first 2 and the last 8."""
    found = paper(asked(stack(62), count / 62))
    assert blocks(found) == set(kept)
    assert len(found.bf16) == 6 * count
    assert found.share == pytest.approx(count / 62)


def test_the_papers_last_block_is_begun_from_the_end() -> None:
    """A budget of 1.5 blocks of 4: the last block, and what lies last in the one before."""
    assert sites(paper(asked(stack(4), 1.5 / 4))) == ["layers.2.down", "layers.3.q", "layers.3.down"]


def test_the_papers_first_block_is_begun_from_its_start() -> None:
    found = paper(asked(stack(4), 2.5 / 4))
    assert sites(found) == ["layers.0.q", *(f"layers.{index}.{name}" for index in (2, 3) for name in ("q", "down"))]


def test_no_block_follows_one_that_does_not_fit() -> None:
    """Of blocks that take 3, 3, 15 and 3 operations, the last one; then nothing."""
    found = measurements(*(site(f"layers.{index}.q", count) for index, count in enumerate((1, 1, 5, 1))))
    assert sites(paper(asked(found, 9 / 24))) == ["layers.3.q"]


def test_the_head_comes_first() -> None:
    """9 of 21 operations: the head takes 3, the last block 6."""
    assert sites(paper(asked(stack(3, head=1), 9 / 21))) == ["layers.2.q", "layers.2.down", "head"]
    assert sites(paper(asked(stack(3, head=1), 3 / 21))) == ["head"]


def test_a_head_too_large_is_passed_over() -> None:
    """6 of 36 operations, and the head has 18 of them."""
    assert sites(paper(asked(stack(3, head=6), 6 / 36))) == ["layers.2.q", "layers.2.down"]


@pytest.mark.parametrize("make", [paper, weights, lambda problem, roles: random(problem, [3], roles)[0]])
def test_forward_matmuls_alone(make: Callable[..., Candidate]) -> None:
    """Three times as many sites, for the same share."""
    problem = asked(stack(9), 1 / 3)
    found = make(problem, FORWARD)
    assert {role for _, role in found.bf16} == {"fprop"} and len(found.bf16) == 18
    assert found.share == pytest.approx(1 / 3) and found.name.endswith(", fprop")


def test_weights_by_their_error() -> None:
    """The worst first; a site that does not fit is passed over, and one without a measured weight comes last."""
    unmeasured = site("d")
    bare = {name: replace(role, operands=role.operands[:1]) for name, role in unmeasured.roles.items()}
    found = measurements(
        site("a", error=0.09),
        site("b", error=0.12),
        site("c", 5, error=0.11),
        replace(unmeasured, roles=bare),
        site("e", error=0.1),
    )
    assert sites(weights(asked(found, 1 / 9))) == ["b"]
    assert sites(weights(asked(found, 2 / 9))) == ["b", "e"]
    assert sites(weights(asked(found, 3 / 9))) == ["a", "b", "e"]
    assert sites(weights(asked(found, 4 / 9))) == ["a", "b", "d", "e"]
    assert sites(weights(asked(found, 6 / 9))) == ["b", "c"]


def test_chance() -> None:
    """The same seeds give the same plans; every site has its turn, and the budget is used up."""
    problem = asked(stack(4), 0.25)
    found = random(problem, range(40))
    assert found == random(problem, range(40))
    assert [one.name for one in found] == [f"random 0.25 #{seed}" for seed in range(40)]
    assert all(one.share == pytest.approx(0.25) for one in found)
    assert {name for one in found for name in sites(one)} == {one.site for one in problem.measurements.sites}


def test_rules_hold_for_all() -> None:
    """What must be in FP4 is not kept, what must be in BF16 takes its part of the budget first."""
    rules = from_rules({"layers.3.*": "nvfp4", "layers.0.q": "bf16"})
    problem = asked(stack(4), 3 / 8, constraints=Constraints(rules))
    assert sites(paper(problem)) == ["layers.0.q", "layers.2.q", "layers.2.down"]
    for found in (weights(problem), *random(problem, range(10))):
        assert len(sites(found)) == 3
        assert "layers.0.q" in sites(found)
        assert not any(name.startswith("layers.3.") for name in sites(found))


@given(problems(), st.integers(0, 3))
def test_none_beats_the_solver(problem: Problem, seed: int) -> None:
    """At the same budget, by the same count, under the same rules."""
    try:
        best = solve(problem)
    except BudgetError as refusal:
        for baseline in (paper, weights, lambda problem: random(problem, [seed])):
            with pytest.raises(BudgetError) as caught:
                baseline(problem)
            assert str(caught.value) == str(refusal)
        return
    for found in (paper(problem), weights(problem), *random(problem, [seed])):
        assert found.kind in KINDS
        assert problem.costs.of(found.bf16) <= problem.budget.ceiling + 2 * SLACK
        for group in problem.groups:
            inside = {"bf16" if key in found.bf16 else "nvfp4" for key in group.keys}
            assert len(inside) == 1
            assert group.must is None or inside == {group.must}
        assert best.predicted <= found.predicted + CLOSE
