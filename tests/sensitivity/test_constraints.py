"""What is decided together, and what is decided beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from invented import measurements, site, stack

from nvfp4c.errors import PlanError
from nvfp4c.plan import EMPTY_PLAN, from_rules
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.constraints import UNCONSTRAINED, Constraints, Group, choices, groups
from nvfp4c.sensitivity.measurements import Measurements

OBSTACLE = "the weight is no matrix"


def together(found: Measurements, constraints: Constraints = UNCONSTRAINED) -> list[str]:
    """Each group as `site.role` of all its members."""
    return [" ".join(f"{name}.{role}" for name, role in group.keys) for group in groups(found, constraints)]


def test_each_on_its_own() -> None:
    found = stack(2)
    assert groups(found, UNCONSTRAINED) == tuple(Group((key,)) for key in choices(found))


def test_an_obstacle_leaves_nothing_to_choose() -> None:
    found = measurements(site("a", obstacle=OBSTACLE), site("b", (1, 0, 0)))
    assert together(found) == ["b.fprop"]


def test_a_shared_weight() -> None:
    """Role by role; a site that lacks a role is no hindrance."""
    found = measurements(site("a", (1, 0, 1), weight="w"), site("b", weight="w"), site("c", (1, 0, 0)))
    assert together(found) == ["a.fprop b.fprop", "a.wgrad b.wgrad", "b.dgrad", "c.fprop"]


def test_sites_without_a_weight_share_none() -> None:
    sites = [site("a", (1, 0, 0)), site("b", (1, 0, 0)), site("c", obstacle=OBSTACLE)]
    nameless = measurements(*(replace(one, weight="") for one in sites))
    assert groups(nameless, UNCONSTRAINED) == (Group((("a", "fprop"),)), Group((("b", "fprop"),)))


def test_a_shared_weight_that_cannot_run_in_fp4() -> None:
    found = measurements(site("a", (1, 0, 0), weight="w", obstacle=OBSTACLE), site("b", (1, 0, 0), weight="w"))
    assert groups(found, UNCONSTRAINED) == (Group((("b", "fprop"),), "bf16"),)
    with pytest.raises(PlanError, match=r"^b \(fprop\) must run in nvfp4, but a site that shares its weight 'w'"):
        groups(found, Constraints(from_rules({"b": "nvfp4"})))


def test_a_shared_input() -> None:
    found = measurements(*(site(name, (1, 0, 1), reads=reads) for name, reads in (("q", 1), ("o", 2), ("k", 1))))
    assert together(found) == ["q.fprop", "q.wgrad", "o.fprop", "o.wgrad", "k.fprop", "k.wgrad"]
    joined = ["q.fprop k.fprop", "q.wgrad k.wgrad", "o.fprop", "o.wgrad"]
    assert together(found, Constraints(shared_input=True)) == joined


def test_whole_blocks() -> None:
    """Of each stack: an encoder's block 0 is not its decoder's. What lies outside is free."""
    names = ("encoder.0.q", "encoder.0.k", "encoder.1.q", "decoder.0.q", "head")
    found = measurements(*(site(name, (1, 1, 0)) for name in names))
    assert together(found, Constraints(whole_blocks=True)) == [
        "encoder.0.q.fprop encoder.0.q.dgrad encoder.0.k.fprop encoder.0.k.dgrad",
        "encoder.1.q.fprop encoder.1.q.dgrad",
        "decoder.0.q.fprop decoder.0.q.dgrad",
        "head.fprop",
        "head.dgrad",
    ]


def test_ties_reach_on() -> None:
    """a and b share a weight, b and c an input: all three agree."""
    found = measurements(
        site("a", (1, 0, 0), weight="w"), site("b", (1, 0, 0), weight="w", reads=1), site("c", (1, 0, 0), reads=1)
    )
    assert together(found, Constraints(shared_input=True)) == ["a.fprop b.fprop c.fprop"]


def test_an_obstacle_does_not_hold_back_its_block() -> None:
    found = measurements(site("layers.0.q", obstacle=OBSTACLE, reads=1), site("layers.0.k", (1, 0, 0), reads=1))
    assert groups(found, Constraints(EMPTY_PLAN, True, True)) == (Group((("layers.0.k", "fprop"),)),)


def test_must() -> None:
    """By the rules of a plan: the last that matches wins, for each role apart."""
    rules = {"*": {"fprop": "nvfp4"}, "layers.0.*": "bf16", "layers.0.down": {"wgrad": "nvfp4"}}
    must = {group.keys[0]: group.must for group in groups(stack(2), Constraints(from_rules(rules)))}
    assert [must["layers.0.q", role] for role in ROLES] == ["bf16"] * 3
    assert [must["layers.0.down", role] for role in ROLES] == ["bf16", "bf16", "nvfp4"]
    assert [must["layers.1.q", role] for role in ROLES] == ["nvfp4", None, None]


def test_one_rule_decides_for_a_group() -> None:
    found = measurements(site("q", (1, 0, 0), reads=1), site("k", (1, 0, 0), reads=1))
    constraints = Constraints(from_rules({"k": "nvfp4"}), shared_input=True)
    assert groups(found, constraints) == (Group((("q", "fprop"), ("k", "fprop")), "nvfp4"),)


def test_rules_that_contradict_each_other() -> None:
    found = measurements(site("layers.0.q"), site("layers.0.k"))
    constraints = Constraints(from_rules({"*.q": "bf16", "*.k": {"wgrad": "nvfp4"}}), whole_blocks=True)
    with pytest.raises(
        PlanError, match=r"layers.0.q \(\w+\) must stay in bf16 and layers.0.k \(wgrad\) must run in nv"
    ):
        groups(found, constraints)


def test_a_rule_that_names_nothing() -> None:
    with pytest.raises(PlanError, match=r"the model has no such site; did you mean 'layers\.0\.down'"):
        groups(stack(1), Constraints(from_rules({"layers.0.dwn": "bf16"})))
