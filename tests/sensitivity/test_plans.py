"""A choice becomes a plan, and the plan decides what was chosen."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from invented import measurements, site, stack

from nvfp4c.plan import PrecisionPlan, load
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.analysis import Key
from nvfp4c.sensitivity.measurements import Measurements
from nvfp4c.sensitivity.plans import to_plan

ALL = dict.fromkeys(ROLES, "bf16")
LOW = dict.fromkeys(ROLES, "nvfp4")
NAMES = [
    "layers.0.q",
    "layers.0.q#1",
    "layers.0.k",
    "layers.1.q",
    "layers.1.k",
    "layers.10.q",
    "head",
    "head#1",
    "a[0]*",
]


def rules(plan: PrecisionPlan) -> dict[str, dict[str, str]]:
    return {rule.pattern: dict(rule.precision) for rule in plan.rules}


@given(st.data(), st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
def test_a_plan_decides_what_was_chosen(data: st.DataObject, names: list[str]) -> None:
    """For every site and role: repeated uses, names with brackets, roles that a site lacks, and obstacles."""
    counts = st.sampled_from([(1, 1, 1), (1, 0, 1), (1, 0, 0)])
    found = measurements(
        *(
            site(name, data.draw(counts), obstacle="the weight is no matrix" if data.draw(st.booleans()) else None)
            for name in names
        )
    )
    keys = [(one.site, role) for one in found.sites if not one.obstacle for role in one.roles]
    bf16 = {key for key in keys if data.draw(st.booleans())}
    plan = to_plan(found, bf16, {"method": "probe"})
    for one in found.sites:
        for role in one.roles:
            decided = plan.decide(one.site, role)
            assert decided is not None
            assert decided[0] == ("bf16" if one.obstacle or (one.site, role) in bf16 else "nvfp4")
    plan.check_sites(one.site for one in found.sites)


def kept(found: Measurements, *names: str) -> set[Key]:
    return {(one.site, role) for one in found.sites if one.site in names for role in one.roles}


def test_rules_are_few() -> None:
    """One for a block whose sites agree, one for a site, and none for what runs in FP4."""
    found = stack(3, head=1)
    chosen = kept(found, "layers.0.q", "layers.0.down", "layers.1.q", "head") - {("head", "dgrad")}
    assert rules(to_plan(found, chosen, {})) == {
        "*": LOW,
        "layers.0.*": ALL,
        "layers.1.q": ALL,
        "head": {"fprop": "bf16", "wgrad": "bf16"},
    }


def test_a_site_that_lacks_a_role_is_left_alone_whole() -> None:
    found = measurements(site("a", (1, 0, 1)), site("b"))
    assert rules(to_plan(found, kept(found, "a"), {})) == {"*": LOW, "a": ALL}


def test_roles_that_were_not_measured_are_left_to_the_recipe() -> None:
    """An inference recipe has no dgrad; a plan for it switches none on."""
    found = measurements(site("a", (1, 0, 0)))
    assert rules(to_plan(found, (), {})) == {"*": {"fprop": "nvfp4"}}


def test_a_repeated_use_may_differ_from_the_first() -> None:
    found = measurements(site("a"), site("a#1"))
    assert rules(to_plan(found, kept(found, "a"), {})) == {"*": LOW, "a": ALL, "a#1": LOW}


def test_a_plan_file(tmp_path: Path) -> None:
    found = stack(2)
    plan = to_plan(found, kept(found, "layers.1.q"), {"method": "probe", "budget": 0.15})
    plan.save(tmp_path / "plan.json")
    assert load(tmp_path / "plan.json") == plan
    assert plan.provenance == {"method": "probe", "budget": 0.15}
