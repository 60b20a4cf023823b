"""The whole analysis on a small model: what it writes, that plans it holds were really run, and what a user sees."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Counted, Net, batches, loss
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from nvfp4c import plan as plans
from nvfp4c.cli import INTERRUPTED, USER_ERROR, app
from nvfp4c.errors import BudgetError, DataError, OptionError, PlanError
from nvfp4c.sensitivity import report
from nvfp4c.sensitivity.analysis import Analysis, Key, Together
from nvfp4c.sensitivity.analyze import Settings, analyze, data_of, plan_of
from nvfp4c.sensitivity.budgets import Budget
from nvfp4c.sensitivity.constraints import Constraints
from nvfp4c.sensitivity.measure import everywhere
from nvfp4c.sensitivity.score import GRADIENT_SHARE, Second, damped, gradient_errors, scores, second_order
from nvfp4c.sensitivity.switched import SwitchedModel
from nvfp4c.tasks import Task

pytestmark = pytest.mark.usefixtures("uncompiled")

ABLATE = Settings(method="ablate", budget=Budget(0.2))
KEPT = Constraints(plans.from_rules({"blocks.0.*": "bf16"}, "--keep"))


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def found(model: Net) -> Analysis:
    with pytest.MonkeyPatch.context() as patch:
        from nvfp4c.codegen import cpu_compiler

        patch.setattr(cpu_compiler, "compile_kind", lambda function, kind: function)
        torch._dynamo.reset()
        return analyze(model, batches(3, 1), loss, batches(2, 2), Settings(budget=Budget(0.2)))


def test_the_plan_keeps_to_its_budget_and_is_the_best_of_all(found: Analysis) -> None:
    """Under the same budget no rival is predicted to be better; and the curve falls."""
    chosen = next(plan for plan in found.candidates if plan.name == found.chosen)
    assert chosen.kind == "solved" and chosen.budget == 0.2 and chosen.share <= 0.2
    rivals = [plan for plan in found.candidates if plan.kind != "solved"]
    assert {plan.kind for plan in rivals} == {"paper", "weights", "random"} and len(rivals) == 5
    assert all(plan.share <= 0.2 and plan.predicted >= chosen.predicted for plan in rivals)
    solved = [plan for plan in found.candidates if plan.kind == "solved"]
    assert [plan.budget for plan in solved] == sorted(plan.budget for plan in solved)
    predicted = [plan.predicted for plan in solved]
    assert predicted == sorted(predicted, reverse=True)


def test_plans_were_really_run(found: Analysis, model: Net) -> None:
    """Each with its own choice, on the held-out batches."""
    switched = SwitchedModel(model, everywhere("nvfp4"))
    plain = switched.losses((), batches(2, 2), loss)
    for plan in found.candidates:
        if plan.measured is None:
            assert plan.kind == "solved" and plan.name != found.chosen
            continue
        fp4 = set(found.scores).difference(plan.bf16)
        losses = switched.losses(fp4, batches(2, 2), loss)
        assert plan.measured == pytest.approx([one - other for one, other in zip(losses, plain, strict=True)])


def test_the_plan_file_says_what_was_solved(found: Analysis, tmp_path: Path) -> None:
    plan_of(found).save(tmp_path / "plan.json")
    plan = plans.load(tmp_path / "plan.json")
    chosen = next(candidate for candidate in found.candidates if candidate.name == found.chosen)
    for site, role in found.scores:
        decision = plan.decide(site, role)
        assert decision is not None and decision[0] == ("bf16" if (site, role) in chosen.bf16 else "nvfp4")
    for key in ("model", "data_hash", "weights_hash", "versions", "method", "budget", "recipe"):
        assert key in plan.provenance


def test_gradients_weigh_what_they_should(found: Analysis) -> None:
    """All backward roles together a set share of all forward ones; within them by what they reach."""
    forward = sum(max(0.0, value) for (_, role), value in found.scores.items() if role == "fprop")
    backward = sum(value for (_, role), value in found.scores.items() if role != "fprop")
    assert backward == pytest.approx(GRADIENT_SHARE * forward)
    errors = gradient_errors(found.measurements)
    assert ("blocks.0.up", "dgrad") not in errors, "nobody wants the gradient of the model's input"
    first, last = errors["blocks.0.down", "dgrad"], errors["head", "dgrad"]
    assert 0 < first < last, "the error of the last data gradient reaches all weights"


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [(2.0, None, 2.0), (2.0, 0.0, 2.0), (2.0, 2.0, 1.0), (-2.0, 2.0, -1.0), (1.0, 3.0, 0.1), (0.0, 1.0, 0.0)],
)
def test_what_the_spread_explains_is_damped(mean: float, error: float | None, expected: float) -> None:
    assert damped(mean, error) == pytest.approx(expected)


def test_scores_add_up_to_what_was_measured(found: Analysis) -> None:
    """With everything in FP4; unless the first-order terms alone are more, for second-order ones are never negative."""
    measured = [site.roles["fprop"] for site in found.measurements.sites]
    first = sum(damped(role.first, role.first_error) for role in measured)  # type: ignore[arg-type]
    for everything in (first + 0.25, first + 1e-6):
        forward = [value for (_, role), value in scores(found.measurements, everything).items() if role == "fprop"]
        assert sum(forward) == pytest.approx(everything, rel=1e-6, abs=1e-12)
    assert second_order(found.measurements, first - 1.0).weight == 0
    everything = found.measurements.provenance["rise_with_everything_in_fp4"]
    assert found.scores == scores(found.measurements, everything)
    assert found.measurements.provenance["second_order"] == asdict(second_order(found.measurements, everything))


@pytest.mark.parametrize(
    ("rows", "samples", "expected"),
    [(0.5, 0.01, Second("rows", 0.4)), (20.0, 0.25, Second("samples", 0.8)), (0.0, 0.1, Second("samples", 2.0))],
)
def test_second_order_is_of_what_has_a_loss_of_its_own(
    found: Analysis, rows: float, samples: float, expected: Second
) -> None:
    """That is where the sum is nearest to what is missing."""
    site, *_ = found.measurements.sites
    role = replace(site.roles["fprop"], first=0.1, first_error=0.0, rows=rows, samples=samples)
    alone = replace(found.measurements, sites=(replace(site, roles={"fprop": role}),))
    chosen = second_order(alone, 0.3)
    assert chosen.unit == expected.unit and chosen.weight == pytest.approx(expected.weight)
    assert scores(alone, 0.3)[site.site, "fprop"] == pytest.approx(0.3)


def test_blocks_are_run_whole(model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores do not add up, pairs are measured, and everything in FP4 is what scores and pairs say together."""
    monkeypatch.setattr(Together, "adds_up", property(lambda one: one.block != "blocks.2."))
    data = batches(2, 1)
    found = analyze(model, data, loss, (), Settings(budget=Budget(0.2)))
    switched = SwitchedModel(model, everywhere("nvfp4"))
    plain = switched.losses((), data, loss)

    def rises(*names: str) -> list[float]:
        fp4 = [(name, "fprop") for name in names]
        return [one - other for one, other in zip(switched.losses(fp4, data, loss), plain, strict=True)]

    assert [one.block for one in found.together] == [f"blocks.{block}." for block in range(5)]
    for block, one in enumerate(found.together):
        assert one.measured == pytest.approx(rises(f"blocks.{block}.up", f"blocks.{block}.down"))
    (((first, second), term),) = found.pairs.items()
    assert {first[0], second[0]} == {"blocks.2.up", "blocks.2.down"}
    alone = zip(rises(first[0], second[0]), rises(first[0]), rises(second[0]), strict=True)
    assert abs(term) <= abs(sum(both - one - other for both, one, other in alone)) / 2 + 1e-9, "damped, never more"
    everything = found.measurements.provenance["rise_with_everything_in_fp4"]
    assert found.scores == scores(found.measurements, everything - term)
    assert found.to_dict()["pairs"] == [{"pair": [list(first), list(second)], "rise": term}]
    page = report.render(found)
    assert "Do the scores add up?" in page and "What two forward matmuls do together" in page


def test_ablation_measures_one_at_a_time(model: Net) -> None:
    data = batches(2, 1)
    found = analyze(model, data, loss, (), Settings(method="ablate", budget=Budget(0.2)))
    switched = SwitchedModel(model, everywhere("nvfp4"))
    plain = switched.losses((), data, loss)
    assert set(found.single) == {(site.site, "fprop") for site in found.measurements.sites}
    for key, rise in found.single.items():
        losses = switched.losses([key], data, loss)
        assert rise == pytest.approx(sum(losses) / 2 - sum(plain) / 2, abs=1e-7)
        assert found.scores[key] == rise
        others = [other for other in found.single if other != key]
        losses = switched.losses(others, data, loss)
        assert found.all_but[key] == pytest.approx(sum(losses) / 2 - sum(plain) / 2, abs=1e-7)
    assert set(found.cosine) == set(found.cosine_all_but) == set(found.scores)
    exact = switched.gradient((), data[0], loss)

    def cosine(fp4: Iterable[Key]) -> Any:
        return pytest.approx(float(F.cosine_similarity(switched.gradient(fp4, data[0], loss), exact, dim=0)), abs=1e-6)

    everything = found.measurements.provenance["cosine_with_everything_in_fp4"]
    assert everything == cosine(found.scores)
    for key in (("blocks.2.up", "fprop"), ("blocks.2.up", "wgrad"), ("head", "dgrad")):
        assert found.cosine[key] == cosine([key])
        assert found.cosine_all_but[key] == cosine(set(found.scores) - {key})
    assert all(everything < alone < 1 for alone in found.cosine.values())
    assert all(abs(but_it - everything) < 1 - everything for but_it in found.cosine_all_but.values())
    assert found.to_dict()["cosine_all_but"]["head"]["dgrad"] == found.cosine_all_but["head", "dgrad"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(plan.measured is None for plan in found.candidates)


def test_another_budget_needs_no_new_measurement(model: Net, tmp_path: Path) -> None:
    counted = Counted()
    first = analyze(model, batches(3, 1), counted, (), Settings(budget=Budget(0.2), pairs=False), tmp_path)
    assert counted.calls == 3 + 6, "the probe, and everything in FP4 beside nothing"
    second = analyze(model, batches(3, 1), counted, (), Settings(budget=Budget(0.5), pairs=False), tmp_path)
    assert counted.calls == 3 + 6
    assert first.scores == second.scores and first.chosen != second.chosen


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (replace(ABLATE, budget=Budget(4.0, "bits")), BudgetError, r"ask for 4\.5"),
        (replace(ABLATE, constraints=Constraints(plans.from_rules({"haed": "bf16"}, "--keep"))), PlanError, "'head'"),
        (Settings(budget=Budget(0.01), constraints=KEPT), BudgetError, "no plan leaves only 0.01"),
    ],
)
def test_what_no_plan_can_be_is_refused_at_once(
    model: Net, settings: Settings, error: type[Exception], words: str
) -> None:
    """After the probe: nothing is run in FP4, not even on held-out batches."""
    counted = Counted()
    with pytest.raises(error, match=words):
        analyze(model, batches(2, 1), counted, batches(2, 2), settings)
    assert counted.calls == 2


def test_an_unknown_method() -> None:
    with pytest.raises(OptionError, match="unknown method 'prob'"):
        Settings(method="prob")


def test_a_held_out_loss_that_is_not_finite_is_refused(model: Net) -> None:
    """Before anything is decided: no matmul was yet run in FP4. By the same words as a batch to measure on."""
    held_out = batches(2, 2)
    held_out[1][0][:] = math.nan
    counted = Counted()
    with pytest.raises(DataError, match="the loss of held-out batch 1 is nan; it must be finite in high precision"):
        analyze(model, batches(2, 1), counted, held_out, ABLATE)
    assert counted.calls == 2 + 2 + 2
    with pytest.raises(DataError, match="the loss of batch 1 is nan; it must be finite in high precision"):
        analyze(model, held_out, loss, batches(2, 1))


def test_a_held_out_loss_that_only_fp4_spoils_is_found(model: Net) -> None:
    """It is no bad input: the plans that do so are shown as what they are."""
    held_out = batches(2, 2)
    exact = {id(batch[0]): model(batch[0]).detach() for batch in held_out}

    def brittle(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = loss(model, batch)
        expected = exact.get(id(batch[0]))
        return (
            found if expected is None else torch.where((model(batch[0]) - expected).abs().max() < 1e-4, found, math.nan)
        )

    found = analyze(model, batches(2, 1), brittle, held_out, Settings(budget=Budget(0.2), pairs=False))
    assert found.plan.measured is not None and all(map(math.isnan, found.plan.measured))
    assert "its loss was not finite" in report.verdict(found)


def test_batches_are_shared_out(model: Net) -> None:
    """A task's own held-out batches, or those that come next; half of them where there are few."""
    all_of_them = list(range(7))
    assert data_of(Task("t", model, all_of_them, loss), 2) == ([0, 1], [2, 3])
    assert data_of(Task("t", model, all_of_them, loss), 5) == ([0, 1, 2, 3], [4, 5, 6])
    assert data_of(Task("t", model, all_of_them, loss, held_out=[9]), 2) == ([0, 1], [9])
    with pytest.raises(DataError, match="at least two"):
        data_of(Task("t", model, [1], loss), 2)


TASK = """
import sys
import torch
sys.path.insert(0, {folder!r})
from small import Counted, Net, batches, loss
def task():
    torch.manual_seed(0)
    return Net(), batches(4, 1), loss
def few():
    return Net(), batches(1, 1), loss
def spoiled(number):
    found = batches(4, 1)
    found[number][0][:] = float("nan")
    return Net(), found, loss
def spoiled_measured():
    return spoiled(1)
def spoiled_held_out():
    return spoiled(3)
def interrupted():
    torch.manual_seed(0)
    return Net(), batches(4, 1), Counted(stop=15)
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(TASK.format(folder=str(Path(__file__).parent)))
    return str(path)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["sensitivity", *arguments], env={"COLUMNS": "120"})


def test_a_loss_that_only_fp4_spoils() -> None:
    """Nothing can be weighed by it, and nothing more is run."""
    torch.manual_seed(0)
    layers, calls = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)), []

    def loss(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        calls.append(batch)
        found, exact = model(batch), layers(batch)
        return found.square().mean() + torch.log(1e-3 - (found - exact).abs().amax())

    with pytest.raises(DataError, match="with every forward matmul in FP4 the loss rises by nan"):
        analyze(layers, [torch.randn(16, 32)], loss, settings=Settings(method="ablate"))
    assert len(calls) == 3, "the probe, the plain loss, everything in FP4"


def test_the_command(task: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    found = run(f"{task}:task", "--budget", "0.2", "--batches", "2", "--out", str(out), "--keep", "head")
    assert found.exit_code == 0, found.output
    assert (
        "solved 0.2" in found.stdout and "paper 0.2" in found.stdout and "matmuls that FP4 costs most" in found.stdout
    )
    assert plans.load(out / "plan.json").decide("head", "fprop") == ("bf16", "head")
    data = json.loads((out / "sensitivity.json").read_text())
    assert data["chosen"] == "solved 0.2" and data["measurements"]["provenance"]["task"].endswith("net.py:task")
    assert "<html" in (out / "report.html").read_text()
    again = run(f"{task}:task", "--budget", "0.5", "--batches", "2", "--out", str(out), "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["chosen"] == "solved 0.5"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give either a task"),
        (("{task}:task", "--text", "x.txt"), "--text goes with --hf"),
        (("{task}:task", "--length", "64"), "--length goes with --hf"),
        (("{task}:task", "--hf", "x"), "give either a task"),
        (("--hf", "nowhere"), "--text"),
        (("--hf", "nowhere", "--text", "nothing.txt"), "nowhere"),
        (("{task}:few",), "at least two"),
        (("{task}:task", "--unit", "bits"), "say how much"),
        (("{task}:task", "--unit", "bit", "--budget", "5"), "did you mean 'bits'"),
        (("{task}:task", "--method", "x"), "valid: ablate, probe"),
        (("{task}:task", "--budget", "15"), "for 15% write 0.15"),
    ],
)
def test_what_a_user_can_get_wrong(task: str, arguments: tuple[str, ...], words: str) -> None:
    found = run(*(argument.format(task=task) for argument in arguments))
    assert found.exit_code == USER_ERROR
    assert words in found.output and len(found.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "words"), [("measured", "loss of batch 1 is nan"), ("held_out", "held-out batch 1 is nan")]
)
def test_a_loss_that_is_not_finite(task: str, name: str, words: str, tmp_path: Path) -> None:
    found = run(f"{task}:spoiled_{name}", "--batches", "2", "--out", str(tmp_path / "out"))
    assert found.exit_code == USER_ERROR and not found.stdout
    assert found.stderr.splitlines()[-1].startswith("error: the loss of ") and words in found.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parts"]


@pytest.mark.parametrize("method", ["probe", "ablate"])
def test_ctrl_c_says_how_to_go_on(task: str, tmp_path: Path, method: str) -> None:
    """What was found is there, whole; nothing else is. The next run finds what it would have found."""
    out, arguments = tmp_path / "out", ("--batches", "2", "--method", method)
    found = run(f"{task}:interrupted", *arguments, "--out", str(out))
    assert found.exit_code == INTERRUPTED and not found.stdout
    assert found.stderr.splitlines()[-1] == (
        f"interrupted: what was measured is kept in {out / 'parts'}; the same command goes on from there"
    )
    assert [path.name for path in out.iterdir()] == ["parts"]
    kept = {path: path.read_text() for path in (out / "parts").iterdir()}
    assert len(kept) == 2 + 6 and all(json.loads(text) and path.suffix == ".json" for path, text in kept.items())
    assert run(f"{task}:task", *arguments, "--out", str(out)).exit_code == 0
    assert all(path.read_text() == text for path, text in kept.items())
    assert run(f"{task}:task", *arguments, "--out", str(tmp_path / "whole")).exit_code == 0
    for name in ("plan.json", "sensitivity.json"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_ctrl_c_where_nothing_is_kept(task: str) -> None:
    found = run(f"{task}:interrupted", "--batches", "2")
    assert found.exit_code == INTERRUPTED
    assert found.stderr.splitlines()[-1].startswith("interrupted: nothing was kept; with --out FOLDER")
