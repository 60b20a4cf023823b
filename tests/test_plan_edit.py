"""Rules by hand: how they are written, what they change in a plan and what not, and how two plans are compared."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4c.errors import PlanError
from nvfp4c.plan import PRECISIONS, PrecisionPlan, Rule, from_rules
from nvfp4c.plan_edit import RuleChange, compare, edited, parse_rule, rule_text
from nvfp4c.recipe import ROLES

ALL_BF16 = dict.fromkeys(ROLES, "bf16")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("lm_head: nvfp4", Rule("lm_head", dict.fromkeys(ROLES, "nvfp4"))),
        ("layers.*.down: {wgrad: bf16}", Rule("layers.*.down", {"wgrad": "bf16"})),
        ("a:{fprop:bf16,dgrad:nvfp4}", Rule("a", {"fprop": "bf16", "dgrad": "nvfp4"})),
        ("  layers.[0-9].*  :  bf16  ", Rule("layers.[0-9].*", ALL_BF16)),
        ('"a b": {\'wgrad\': "bf16"}', Rule("a b", {"wgrad": "bf16"})),
    ],
)
def test_how_a_rule_is_written(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rule '' is not a rule; write 'PATTERN: bf16' or 'PATTERN: {wgrad: bf16, ...}'"),
        ("layers.*", "rule 'layers.*' is not a rule; write"),
        (": bf16", "is not a rule"),
        ("a:", "is not a rule"),
        ("a: bf61", "unknown precision 'bf61'; valid: nvfp4, bf16"),
        ("a: {wgard: bf16}", "unknown role 'wgard'; did you mean 'wgrad'?"),
        ("a: {wgrad: fp8}", "unknown precision 'fp8'"),
        ("a: {wgrad}", "'wgrad' is not 'ROLE: PRECISION'"),
        ("a: {wgrad: bf16,}", "'' is not 'ROLE: PRECISION'"),
        ("a: {}", "'' is not 'ROLE: PRECISION'"),
        ("a: {wgrad: bf16", "a '{' is never closed, or something follows its '}'"),
        ("a: {wgrad: bf16} bf16", "a '{' is never closed, or something follows its '}'"),
        ("a: {wgrad: bf16, wgrad: nvfp4}", "names the role 'wgrad' twice"),
        ("a: __import__('os').abort()", "unknown precision"),
    ],
)
def test_a_text_that_is_no_rule(text: str, message: str) -> None:
    with pytest.raises(PlanError) as raised:
        parse_rule(text)
    assert message in str(raised.value)
    assert repr(text) in str(raised.value)


def test_the_form_that_is_printed() -> None:
    assert rule_text(Rule("a", ALL_BF16)) == "a: bf16"
    assert rule_text(Rule("a", {"wgrad": "bf16", "fprop": "nvfp4"})) == "a: {fprop: nvfp4, wgrad: bf16}"


def test_a_new_rule_wins() -> None:
    plan = edited(from_rules({"a": "bf16", "b": "bf16"}), [parse_rule("*: nvfp4"), parse_rule("b: {wgrad: bf16}")])
    assert [rule_text(rule) for rule in plan.rules] == ["a: bf16", "*: nvfp4", "b: {wgrad: bf16}"]
    assert plan.decide("a", "fprop") == ("nvfp4", "*")


def test_edits_are_remembered() -> None:
    plan = from_rules({"a": "bf16"}, provenance={"method": "probe", "budget": 0.15})
    once = edited(plan, [parse_rule("b: bf16")])
    twice = edited(once, [parse_rule("c: {wgrad: bf16}"), parse_rule("d: nvfp4")])
    assert dict(twice.provenance) == {
        "method": "probe",
        "budget": 0.15,
        "edits": ["b: bf16", "c: {wgrad: bf16}", "d: nvfp4"],
    }
    assert plan.provenance == {"method": "probe", "budget": 0.15}


def test_a_rule_is_changed_where_it_is_when_it_cannot_move() -> None:
    """At the end, `a.*` would take dgrad of a.b away from the rule after it."""
    plan = edited(from_rules({"a.*": {"dgrad": "bf16"}, "a.b": {"dgrad": "nvfp4"}}), [parse_rule("a.*: {wgrad: bf16}")])
    assert [rule_text(rule) for rule in plan.rules] == ["a.*: {dgrad: bf16, wgrad: bf16}", "a.b: {dgrad: nvfp4}"]


def test_where_no_place_is_right() -> None:
    plan = from_rules({"a.*": "bf16", "a.b": "nvfp4"})
    with pytest.raises(PlanError, match=r"has the rule 'a\.\*: bf16' already, and 'a\.b: nvfp4' comes after it"):
        edited(plan, [parse_rule("a.*: {wgrad: bf16}")])
    whole = edited(plan, [parse_rule("a.*: {fprop: nvfp4, dgrad: bf16, wgrad: bf16}")])
    assert [rule.pattern for rule in whole.rules] == ["a.b", "a.*"]


SITES = ("a", "a#1", "b", "a.b", "a.c", "b.c")
patterns = st.sampled_from(("a", "a#1", "a.b", "*", "?", "a.*", "*.c", "[ab].c"))
precisions = st.dictionaries(st.sampled_from(ROLES), st.sampled_from(PRECISIONS), min_size=1)
plans = st.builds(from_rules, st.dictionaries(patterns, precisions, min_size=2))


@settings(max_examples=500)
@given(plan=plans, place=st.integers(0, 1), precision=precisions)
def test_what_the_rule_says_holds_and_nothing_else_changes(
    plan: PrecisionPlan, place: int, precision: dict[str, str]
) -> None:
    """For a rule whose pattern is in the plan, with others after it."""
    rule = Rule(plan.rules[place].pattern, precision)
    try:
        after = edited(plan, [rule])
    except PlanError as error:
        assert "comes after it" in str(error)
        return
    for site in SITES:
        for role in ROLES:
            named = role in rule.precision and rule.matches(site)
            before = plan.decide(site, role)
            expected = rule.precision[role] if named else before and before[0]
            found = after.decide(site, role)
            assert (found and found[0]) == expected


@given(plan=plans)
def test_a_rule_is_read_as_it_is_printed(plan: PrecisionPlan) -> None:
    assert [parse_rule(rule_text(rule)) for rule in plan.rules] == list(plan.rules)


def test_differences_rule_by_rule() -> None:
    before = from_rules({"a": "bf16", "b": {"wgrad": "bf16"}, "c": "nvfp4"}, provenance={"method": "probe"})
    after = from_rules({"b": {"wgrad": "nvfp4"}, "c": "nvfp4", "d": {"fprop": "bf16"}})
    found = compare(before, after)
    assert found.changes == (
        RuleChange("a", ALL_BF16, None),
        RuleChange("b", {"wgrad": "bf16"}, {"wgrad": "nvfp4"}),
        RuleChange("d", None, {"fprop": "bf16"}),
    )
    assert not found.reordered
    assert found


def test_order_is_a_difference_and_provenance_is_none() -> None:
    one = from_rules({"a": "bf16", "*": "nvfp4"})
    assert not compare(one, from_rules({"a": "bf16", "*": "nvfp4"}, provenance={"method": "by hand"}))
    other = compare(one, from_rules({"*": "nvfp4", "a": "bf16"}))
    assert other
    assert other.reordered
    assert other.changes == ()
