"""`nvfp4c plan`: what it prints of a plan alone and with a model, what it writes, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import invoke

from nvfp4c import files
from nvfp4c.cli import USER_ERROR
from nvfp4c.plan import from_rules, load

TASK = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.mix = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 16)
    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.mix(x.mT.unsqueeze(-1)).squeeze(-1).mT)
def make():
    return Model(), [torch.randint(16, (2, 24))], lambda model, tokens: model(tokens).square().mean()
"""
RULES = {"layers.*": {"wgrad": "bf16"}, "layers.1": {"fprop": "bf16"}}
PROVENANCE = {"method": "probe", "budget": 0.15, "model": {"name": "gpt"}}


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return f"{path}:make"


@pytest.fixture
def plan(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    from_rules(RULES, provenance=PROVENANCE).save(path)
    return str(path)


def lines(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_show_prints_rules_and_where_they_come_from(plan: str) -> None:
    found = invoke("plan", "show", plan)
    assert found.exit_code == 0, found.output
    shown = lines(found.stdout)
    assert ["layers.*", "bf16"] in shown
    assert ["layers.1", "bf16"] in shown
    assert ["budget:", "0.15"] in shown
    assert ["model:", '{"name":', '"gpt"}'] in shown
    assert json.loads(invoke("plan", "show", plan, "--json").stdout) == json.loads(Path(plan).read_text())


def test_show_says_what_a_plan_means_for_a_model(plan: str, task: str) -> None:
    found = invoke("plan", "show", plan, task, "--recipe", "nvfp4-all", "--json")
    assert found.exit_code == 0, found.output
    effect = json.loads(found.stdout)["effect"]
    rows = {(row["site"], row["role"]): row for row in effect["rows"]}
    decisions = {key: (row["precision"], row["reason"]) for key, row in rows.items()}
    assert decisions["layers.0", "wgrad"] == ("bf16", "plan: layers.*")
    assert decisions["layers.1", "fprop"] == ("bf16", "plan: layers.1")
    assert decisions["layers.1", "dgrad"] == ("nvfp4", "recipe nvfp4-all")
    assert effect["decided"] == {"layers.*": 3, "layers.1": 1}
    assert effect["warnings"] == []
    assert effect["share"] == pytest.approx(
        sum(row["share"] for row in rows.values() if row["precision"] == "nvfp4"), abs=1e-9
    )  # FP64 sums of 14 terms


def test_show_prints_who_decided(plan: str, task: str) -> None:
    found = invoke("plan", "show", plan, task)
    assert found.exit_code == 0, found.output
    shown = lines(found.stdout)
    assert ["layers.*", "bf16", "3"] in shown
    assert any(line[:1] == ["wgrad"] and line[-3:] == ["bf16", "plan:", "layers.*"] for line in shown)
    assert "of all." in found.stdout


@pytest.mark.parametrize(
    ("rules", "warning"),
    [
        (
            {"layer.0": "bf16"},
            "torch.compile refuses this plan: the plan names 'layer.0', but the model has no",
        ),
        ({"embed": "bf16"}, "the plan's rule 'embed' decides nothing; no matmul that it names has one of its roles"),
        ({"layers.0": "bf16", "*": "bf16"}, "rule 'layers.0' decides nothing; later ones win, such as '*'"),
        ({"mix": "nvfp4"}, "rule 'mix' asks for nvfp4, but fprop of mix stays in bf16: 1x1 convolution"),
    ],
)
def test_show_warns_of_rules_that_do_nothing(rules: dict[str, object], warning: str, tmp_path: Path, task: str) -> None:
    path = tmp_path / "odd.json"
    from_rules(rules).save(path)
    found = invoke("plan", "show", str(path), task)
    assert found.exit_code == 0, found.output
    (line,) = found.stderr.splitlines()
    assert line.startswith("warning: ")
    assert warning in line


def other(tmp_path: Path, rules: dict[str, object]) -> str:
    path = tmp_path / "other.json"
    from_rules(rules).save(path)
    return str(path)


def test_diff_of_equal_plans(plan: str, tmp_path: Path) -> None:
    found = invoke("plan", "diff", plan, other(tmp_path, RULES))
    assert found.exit_code == 0
    assert found.stdout == "The rules are equal.\n"


def test_diff_rule_by_rule(plan: str, tmp_path: Path) -> None:
    second = other(tmp_path, {"layers.*": {"wgrad": "nvfp4"}, "head": "bf16", "layers.1": {"fprop": "bf16"}})
    found = invoke("plan", "diff", plan, second)
    assert found.exit_code == 1
    shown = lines(found.stdout)
    assert ["layers.*", "{wgrad:", "bf16}", "{wgrad:", "nvfp4}"] in shown
    assert ["head", "-", "bf16"] in shown
    assert "layers.1" not in found.stdout
    as_json = invoke("plan", "diff", plan, second, "--json")
    assert as_json.exit_code == 1
    assert [change["pattern"] for change in json.loads(as_json.stdout)["rules"]["changes"]] == ["layers.*", "head"]


def test_diff_of_the_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    from_rules({"a": "bf16", "*": "nvfp4"}).save(first)
    from_rules({"*": "nvfp4", "a": "bf16"}).save(second)
    found = invoke("plan", "diff", str(first), str(second))
    assert found.exit_code == 1
    assert found.stdout == "Rules of both stand in another order, and the last that matches wins.\n"


def test_diff_for_a_model(plan: str, task: str, tmp_path: Path) -> None:
    second = other(tmp_path, {**RULES, "layers.[02]": {"fprop": "bf16"}})
    given = ("plan", "diff", plan, second, task, "--recipe", "nvfp4-all")
    found = invoke(*given)
    assert found.exit_code == 1, found.output
    (line,) = [line for line in lines(found.stdout) if line[:2] == ["layers.{0,2}", "fprop"]]
    assert line[3:5] == ["nvfp4", "bf16"]
    as_json = json.loads(invoke(*given, "--json").stdout)
    assert [(row["site"], row["role"]) for row in as_json["sites"]] == [("layers.0", "fprop"), ("layers.2", "fprop")]
    assert as_json["sites"][0]["after"] == {"precision": "bf16", "decided_by": "plan: layers.[02]"}
    moved = sum(row["share"] for row in as_json["sites"])
    assert as_json["shares"][0] - as_json["shares"][1] == pytest.approx(moved, abs=1e-9)  # FP64 sums of 14 terms


def test_diff_of_other_rules_that_mean_the_same(plan: str, task: str, tmp_path: Path) -> None:
    second = other(tmp_path, {"layers.1": {"fprop": "bf16", "wgrad": "bf16"}, "layers.[02]": {"wgrad": "bf16"}})
    found = invoke("plan", "diff", plan, second, task)
    assert found.exit_code == 0, found.output
    assert "For this model both plans mean the same." in found.stdout


def test_apply_writes_a_new_plan(plan: str, task: str, tmp_path: Path) -> None:
    before, out = Path(plan).read_text(), tmp_path / "new" / "plan.json"
    rules = ("--rule", "head: bf16", "--rule", "layers.*: {wgrad: nvfp4}")
    found = invoke("plan", "apply", plan, task, *rules, "--out", str(out))
    assert found.exit_code == 0, found.output
    assert ["head", "-", "bf16"] in lines(found.stdout)
    written = load(out)
    assert written.decide("layers.1", "wgrad") == ("nvfp4", "layers.*")
    assert written.decide("layers.1", "fprop") == ("bf16", "layers.1")
    assert written.provenance == {**PROVENANCE, "edits": ["head: bf16", "layers.*: {wgrad: nvfp4}"]}
    assert Path(plan).read_text() == before


def test_apply_in_place(plan: str) -> None:
    found = invoke("plan", "apply", plan, "--rule", "head: bf16", "--in-place", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == json.loads(Path(plan).read_text())
    assert load(plan).decide("head", "fprop") == ("bf16", "head")


def test_apply_is_all_or_nothing(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Path(plan).read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    found = invoke("plan", "apply", plan, "--rule", "head: bf16", "--in-place")
    assert found.exit_code == USER_ERROR
    assert found.stderr == f"error: cannot write the plan {plan}: No space left on device\n"
    assert Path(plan).read_text() == before
    assert list(Path(plan).parent.iterdir()) == [Path(plan)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "absent.json"], "cannot read the plan absent.json"),
        (["show", "PLAN", "nothing"], "'nothing' is not a task"),
        (["show", "PLAN", "TASK", "--recipe", "nvfp5"], "did you mean 'nvfp4'?"),
        (["diff", "PLAN", "absent.json"], "cannot read the plan absent.json"),
        (["apply", "PLAN", "--rule", "a: fp8", "--in-place"], "rule 'a: fp8': rules['a']: unknown precision 'fp8'"),
        (["apply", "PLAN", "TASK", "--rule", "layer.1: bf16", "--in-place"], "did you mean 'layers.1'?"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments: list[str], said: str, plan: str, task: str) -> None:
    before = Path(plan).read_text()
    found = invoke("plan", *({"PLAN": plan, "TASK": task}.get(argument, argument) for argument in arguments))
    assert found.exit_code == USER_ERROR
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert said in found.stderr
    assert Path(plan).read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["apply", "PLAN", "--rule", "a: bf16"], "either --out FILE or --in-place"),
        (["apply", "PLAN", "--rule", "a: bf16", "--in-place", "--out", "x.json"], "either --out FILE or --in-place"),
        (["apply", "PLAN", "--in-place"], "give at least one, such as --rule"),
        (["show", "PLAN", "--recipe", "nvfp4"], "only matters with a model"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], said: str, plan: str) -> None:
    found = invoke("plan", *(plan if argument == "PLAN" else argument for argument in arguments))
    assert found.exit_code == 2
    assert said in found.stderr
