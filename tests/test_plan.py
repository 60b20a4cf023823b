"""Precision plans: what a rule reaches, which rule wins, and what a malformed plan says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvfp4c import files
from nvfp4c.errors import PlanError
from nvfp4c.plan import PRECISIONS, PrecisionPlan, Rule, from_rules, get, load
from nvfp4c.recipe import ROLES


def test_a_rule_for_all_roles() -> None:
    plan = from_rules({"layers.0.*": "bf16"})
    assert [plan.decide("layers.0.up", role) for role in ROLES] == [("bf16", "layers.0.*")] * 3
    assert plan.decide("layers.1.up", "fprop") is None


def test_a_rule_for_some_roles() -> None:
    plan = from_rules({"*.down": {"wgrad": "bf16"}})
    assert plan.decide("layers.0.down", "wgrad") == ("bf16", "*.down")
    assert plan.decide("layers.0.down", "fprop") is None


def test_the_last_rule_wins() -> None:
    """For each role apart: a later rule that says nothing of a role leaves it to earlier ones."""
    plan = from_rules({"*": "bf16", "layers.*": "nvfp4", "layers.3.*": {"dgrad": "bf16"}})
    assert plan.decide("head", "fprop") == ("bf16", "*")
    assert plan.decide("layers.3.up", "fprop") == ("nvfp4", "layers.*")
    assert plan.decide("layers.3.up", "dgrad") == ("bf16", "layers.3.*")


def test_repeated_uses_of_a_layer() -> None:
    """A pattern reaches every use of a layer, unless it names one."""
    assert Rule("decoder", {}).matches("decoder#1")
    assert Rule("decoder#1", {}).matches("decoder#1")
    assert not Rule("decoder#1", {}).matches("decoder")
    assert not Rule("decoder", {}).matches("decoder2")


def test_case_counts() -> None:
    assert not Rule("Layers.*", {}).matches("layers.0")


SITES = ("layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "lm_head")


def test_every_rule_names_a_site() -> None:
    from_rules({"layers.*.mlp.*": "bf16", "lm_head": "nvfp4"}).check_sites(SITES)


@pytest.mark.parametrize(
    ("pattern", "sites", "message"),
    [
        ("lm_haed", SITES, r"names 'lm_haed', but the model has no such site; did you mean 'lm_head'\?"),
        ("layers.0.mlp.up", SITES, "did you mean 'layers.0.mlp.up_proj'"),
        ("*.router", (), "the model has no matmul with a weight"),
    ],
)
def test_a_rule_that_names_no_site(pattern: str, sites: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        from_rules({"lm_*" if sites else pattern: "bf16", pattern: "bf16"}).check_sites(sites)


patterns = st.text(st.characters(codec="utf-8"), max_size=12)
precisions = st.dictionaries(st.sampled_from(ROLES), st.sampled_from(PRECISIONS), min_size=1)
plans = st.builds(
    lambda rules, provenance: from_rules(rules, provenance=provenance),
    st.dictionaries(patterns, precisions | st.sampled_from(PRECISIONS), max_size=5),
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers() | st.text(st.characters(codec="utf-8"))),
)


@given(plan=plans)
def test_round_trip(plan: PrecisionPlan, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A saved plan is read back as it was, the order of its rules and where it came from included."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    again = load(path)
    assert again == plan
    assert [rule.pattern for rule in again.rules] == [rule.pattern for rule in plan.rules]


def test_a_pattern_named_twice() -> None:
    """A file can hold a pattern once; two rules for it would lose one when saved."""
    with pytest.raises(PlanError, match=r"the plan names 'a' 2 times; join its rules into one"):
        PrecisionPlan((Rule("a", {"fprop": "bf16"}), Rule("b", {"fprop": "bf16"}), Rule("a", {"wgrad": "bf16"})))


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption leaves the old plan and nothing else."""
    path = tmp_path / "plans" / "plan.json"
    from_rules({"a": "bf16"}).save(path)
    before = path.read_text()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        from_rules({"b": "bf16"}).save(path)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 1,\n "rules": {"a" "bf16"}}', r"plan.json, line 2, column 16: not valid JSON: Expecting ':'"),
        ("[]", "a plan is a JSON object with 'version' and 'rules', got list"),
        ('{"rules": {}}', "plan version None is not supported; expected 1"),
        ('{"version": 2, "rules": {}}', "plan version 2 is not supported; expected 1"),
        ('{"version": 1, "rule": {}}', r"unknown key 'rule'; did you mean 'rules'\?"),
        ('{"version": 1, "rules": []}', "'rules' must be an object of pattern: precision, got list"),
        ('{"version": 1, "rules": {}, "provenance": "me"}', "'provenance' must be an object, got str"),
        ('{"version": 1, "rules": {"a": "fp4"}}', r"rules\['a'\]: unknown precision 'fp4'; valid: nvfp4, bf16"),
        ('{"version": 1, "rules": {"a": 16}}', r"rules\['a'\]: unknown precision 16"),
        ('{"version": 1, "rules": {"a": ["bf16"]}}', r"rules\['a'\]: unknown precision \['bf16'\]"),
        ('{"version": 1, "rules": {"a": {}}}', r"rules\['a'\]: names no role; use one of fprop, dgrad, wgrad"),
        (
            '{"version": 1, "rules": {"a": {"dgra": "bf16"}}}',
            r"rules\['a'\]: unknown role 'dgra'; did you mean 'dgrad'",
        ),
        ('{"version": 1, "rules": {"a": {"dgrad": null}}}', r"rules\['a'\]: unknown precision None"),
        ('{"version": 1, "rules": {"a": "bf16", "a": "nvfp4"}}', "plan.json: 'a' stands 2 times in one object"),
    ],
)
def test_a_malformed_file(text: str, message: str, tmp_path: Path) -> None:
    """The message says which file, and where in it."""
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the plan .*missing.json"):
        load(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(PlanError, match=r"cannot read the plan .*binary.json"):
        load(tmp_path / "binary.json")
    with pytest.raises(PlanError, match=r"cannot read the plan"):
        load(tmp_path)


def test_get(tmp_path: Path) -> None:
    plan = from_rules({"a": "bf16"})
    plan.save(tmp_path / "plan.json")
    assert get(None) == PrecisionPlan()
    assert get(plan) is plan
    assert get(tmp_path / "plan.json") == get(str(tmp_path / "plan.json")) == get({"a": "bf16"}) == plan


@pytest.mark.parametrize("wrong", [4, ["a"]])
def test_what_is_no_plan(wrong: Any) -> None:
    with pytest.raises(PlanError, match=r"plan must be a path, a nvfp4c\.PrecisionPlan or a mapping of rules, got"):
        get(wrong)


def test_a_plan_is_a_file_to_edit(tmp_path: Path) -> None:
    """One rule a line, in plain words."""
    from_rules({"layers.*.mlp": {"wgrad": "bf16"}}, provenance={"method": "by hand"}).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert json.loads(text) == {
        "version": 1,
        "rules": {"layers.*.mlp": {"wgrad": "bf16"}},
        "provenance": {"method": "by hand"},
    }
    assert '    "layers.*.mlp": {\n' in text
