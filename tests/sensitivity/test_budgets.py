"""What a budget counts, worked out by hand, and budgets that make no sense."""

from __future__ import annotations

from dataclasses import replace

import pytest
from invented import measurements, rising, site, sized, stack

from nvfp4c.cost import MACHINES, Machine, matmul_seconds
from nvfp4c.errors import BudgetError, DataError, OptionError
from nvfp4c.plan import from_rules
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.analysis import Key
from nvfp4c.sensitivity.budgets import Budget, costs
from nvfp4c.sensitivity.constraints import Constraints
from nvfp4c.sensitivity.measurements import Measurements
from nvfp4c.sensitivity.problem import Problem
from nvfp4c.sensitivity.solve import solve

OBSTACLE = "the weight is no matrix"


def cost(found: Measurements, budget: Budget, *bf16: Key) -> float:
    return costs(found, budget).of(bf16)


def test_operations() -> None:
    """What cannot run in FP4 counts, and cannot be saved."""
    found = measurements(site("a", (1, 2, 3)), site("b", (4, 0, 0)), site("c", (10, 0, 0), obstacle=OBSTACLE))
    assert cost(found, Budget(1)) == pytest.approx(10 / 20)
    assert cost(found, Budget(1), ("a", "wgrad"), ("b", "fprop")) == pytest.approx(17 / 20)


def test_bits() -> None:
    """Of the weights, whose precision is that of fprop; a shared weight counts once, what cannot be packed has 16."""
    found = measurements(
        site("a", elements=30),
        site("b", elements=30, weight="w"),
        site("c", elements=30, weight="w"),
        site("d", elements=40, obstacle=OBSTACLE),
    )
    bits = Budget(16, "bits")
    assert cost(found, bits) == pytest.approx((30 * 4.5 + 30 * 4.5 + 40 * 16) / 100)
    assert cost(found, bits, ("a", "dgrad"), ("a", "wgrad")) == pytest.approx(cost(found, bits))
    assert cost(found, bits, ("a", "fprop")) == pytest.approx((30 * 16 + 30 * 4.5 + 40 * 16) / 100)
    shared = (("b", "fprop"), ("c", "fprop"))
    assert cost(found, bits, *shared) == pytest.approx((30 * 4.5 + 30 * 16 + 40 * 16) / 100)


def test_a_weight_that_is_not_read_in_fprop_stays_whole() -> None:
    assert cost(measurements(site("a", (0, 1, 1))), Budget(16, "bits")) == 16


def test_gradients_cost_no_bits() -> None:
    found = stack(1)
    kept = solve(Problem(found, rising(found), Budget(4.5, "bits"))).bf16
    assert kept == tuple((one.site, role) for one in found.sites for role in ("dgrad", "wgrad"))


def test_seconds() -> None:
    """By hand, on a machine of round numbers: [2, 8] times [4, 8], 128 operations, 48 elements of operands."""
    machine = Machine(bandwidth=10.0, operations=1e9, launch=0.5, matmul={"bf16": 1.0, "nvfp4": 4.0})
    assert matmul_seconds(2, 4, 8, "bf16", machine) == pytest.approx(128 + 0.5)
    assert matmul_seconds(2, 4, 8, "nvfp4", machine) == pytest.approx(128 / 4 + 48 * (2 + 0.5625) / 10 + 3 * 0.5)
    emulated = replace(machine, matmul={"bf16": 1.0})
    assert matmul_seconds(2, 4, 8, "nvfp4", emulated) == pytest.approx(128 + 48 * (2 + 2) / 10 + 3 * 0.5)
    narrow = replace(machine, bandwidth=0.1)
    assert matmul_seconds(2, 4, 8, "bf16", narrow) == pytest.approx((48 * 2 + 8 * 2) / 0.1 + 0.5)


@pytest.mark.parametrize("target", MACHINES)
def test_large_matmuls_gain_where_tensor_cores_take_fp4(target: str) -> None:
    found = sized(stack(1), 8192)
    speed = Budget(1, "speed", target)
    everything = rising(found)
    assert cost(found, speed, *everything) == pytest.approx(1)
    assert (cost(found, speed) < 0.6) == ("nvfp4" in MACHINES[target].matmul)
    assert (cost(found, speed) > 1) == ("nvfp4" not in MACHINES[target].matmul)


def test_a_gpu_without_fp4_is_fastest_in_bf16() -> None:
    found = sized(stack(1), 4096)
    problem = Problem(found, rising(found), Budget(1, "speed", "sm_90"))
    assert solve(problem).bf16 == tuple(rising(found))
    slower = solve(replace(problem, budget=Budget(0.9, "speed", "sm_90"), scores=dict.fromkeys(rising(found), -1.0)))
    assert 0 < len(slower.bf16) < len(rising(found))


def test_what_does_not_fit_says_what_would() -> None:
    found = stack(2, head=4)
    must = Constraints(from_rules({"head": "bf16", "layers.0.*": {"wgrad": "bf16"}}))
    problem = Problem(found, rising(found), Budget(0.15), must)
    # 12 + 2 of 24 operations.
    with pytest.raises(BudgetError, match=r"leaves only 0\.15 of .* at least 0\.5834; ask for 0\.5834 or more$"):
        solve(problem)
    assert solve(replace(problem, budget=Budget(0.5834))).share == pytest.approx(14 / 24)
    with pytest.raises(BudgetError, match=r"4\.5 bits an element.* at least 6\.8000; ask for 6\.8000 or more$"):
        solve(replace(problem, budget=Budget(4.5, "bits")))
    fast = replace(problem, measurements=sized(found, 8192), budget=Budget(4, "speed", "sm_100"))
    with pytest.raises(
        BudgetError, match=r"4 times as fast as BF16 on sm_100: .* at most (\d\.\d{4}); ask for \1 or less$"
    ):
        solve(fast)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((15,), r"0\.\.1, got 15; for 15% write 0\.15"),
        ((-0.1,), "0 or more, got -0.1"),
        ((float("nan"),), "must be a number of 0 or more, got nan"),
        ((0.1, "operation"), "did you mean 'operations'"),
        ((0, "speed", "sm_90"), "must be above 0"),
        ((1, "speed"), "needs a GPU as its target, got ''"),
        ((1, "speed", "cpu"), "needs a GPU as its target, got 'cpu'"),
        ((0.15, "operations", "sm_90"), "only a budget of speed has a target"),
    ],
)
def test_budgets_that_make_no_sense(arguments: tuple[float, str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Budget(*arguments)


def test_nothing_to_count() -> None:
    empty = replace(site("a"), roles={})
    with pytest.raises(DataError, match="no matmul with operations"):
        costs(measurements(empty), Budget(0.15))
    with pytest.raises(DataError, match="no weight"):
        costs(measurements(replace(site("a"), weight="", weight_elements=0)), Budget(5, "bits"))


def test_all_roles_are_counted_once() -> None:
    found = stack(1)
    assert sum(costs(found, Budget(1)).bf16.values()) == pytest.approx(1)
    assert set(costs(found, Budget(1)).bf16) == {(one.site, role) for one in found.sites for role in ROLES}
