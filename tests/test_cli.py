"""The command line: what it prints, its exit codes, and the one line it makes of each error."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from typer.testing import CliRunner

from nvfp4c.cli import INTERRUPTED, USER_ERROR, app, user_error
from nvfp4c.cli.doctor import Check
from nvfp4c.errors import TargetError, TaskError
from nvfp4c.quickstart.model import SIZES

TASK = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    return model, [torch.randn(8, 32) for _ in range(2)], lambda model, batch: model(batch).square().mean()
def run():
    return make()[0].eval().requires_grad_(False), (torch.randn(8, 32),)
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return str(path)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


def test_help_names_the_commands_and_needs_no_torch():
    code = "import sys, nvfp4c.cli as cli\ntry: cli.main()\nfinally: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert found.returncode == 0
    for command in ("quickstart", "doctor", "explain", "emit", "plan", "bench"):
        assert command in found.stdout
    assert found.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "command",
    [
        "quickstart",
        "doctor",
        "explain",
        "emit",
        "plan show",
        "plan diff",
        "plan apply",
        "bench kernels",
        "bench train",
        "bench probe",
    ],
)
def test_every_command_has_help(command):
    found = invoke(*command.split(), "--help")
    assert found.exit_code == 0
    assert "--json" in found.output


def test_the_installed_command_is_this_one():
    (script,) = entry_points(group="console_scripts", name="nvfp4c")
    assert script.value == "nvfp4c.cli:main"


def test_explain_prints_sites_and_totals(task):
    found = invoke("explain", f"{task}:make", "--recipe", "nvfp4-all")
    assert found.exit_code == 0, found.output
    assert "dgrad" in found.output
    assert "NVFP4 does 100.0% of the forward and 100.0% of the backward" in found.output


def test_explain_json_holds_every_row(task):
    found = invoke("explain", f"{task}:make", "--json")
    assert found.exit_code == 0, found.output
    explanation = json.loads(found.stdout)
    sites = {(row["site"], row["role"]) for row in explanation["rows"]}
    roles = ("fprop", "dgrad", "wgrad")
    # The first layer's input needs no gradient.
    assert sites == {(site, role) for site in "024" for role in roles} - {("0", "dgrad")}
    assert sum(row["share"] for row in explanation["rows"]) == pytest.approx(1, abs=1e-9)  # FP64 sum of 8 terms


def test_explain_takes_a_task_without_a_loss(task):
    found = invoke("explain", f"{task}:run", "--json")
    assert found.exit_code == 0, found.output
    explanation = json.loads(found.stdout)
    assert {row["role"] for row in explanation["rows"]} == {"fprop"}
    assert explanation["backward_share"] is None


def test_explain_says_what_kernels_compute_together(task):
    found = invoke("explain", f"{task}:make", "--recipe", "nvfp4-all", "--kernels", "sm_90")
    assert found.exit_code == 0, found.output
    assert "Kernels for sm_90" in found.output
    assert "operand by rows" in found.output


def test_explain_json_holds_kernels_and_what_was_weighed(task):
    found = invoke("explain", f"{task}:make", "--recipe", "nvfp4-all", "--kernels", "sm_90", "--json")
    assert found.exit_code == 0, found.output
    kernels = json.loads(found.stdout)["kernels"]
    assert {row["graph"] for row in kernels} == {"forward", "backward"}
    assert any("a weight" in row["computes"] for row in kernels)
    assert all(row["bytes"] > 0 and row["sites"] for row in kernels)
    weighed = [row for row in kernels if row["decision"]]
    assert weighed
    for row in weighed:
        ways = {way["way"]: way["microseconds"] for way in row["ways"]}
        assert ways[row["decision"]] == min(ways.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "nothing"], "'nothing' is not a task"),
        (["explain", "TASK:maek"], "did you mean 'make'?"),
        (["explain", "TASK:make", "--recipe", "nvfp5"], "nvfp4"),
        (["explain", "TASK:make", "--target", "sm_12"], "sm_12"),
        (["explain", "TASK:make", "--plan", "absent.json"], "absent.json"),
        (["explain", "TASK:make", "--kernels", "sm_91"], "did you mean 'sm_90'?"),
        (["explain", "TASK:make", "--measure"], "target 'cpu' has no regions to time"),
        (["explain", "TASK:make", "--measure", "--kernels", "sm_90"], "the model is on the CPU"),
        (["explain", "TASK:make", "--measure", "--kernels", "sm_91"], "did you mean 'sm_90'?"),
        (["quickstart", "--model-size", "huge"], "'huge'"),
        (["quickstart", "--device", "tpu"], "auto, cpu or cuda"),
        (["quickstart", "--recipe", "nvfp5", "--out", "TASK-out"], "nvfp5"),
        (["quickstart", "--data", "TASK-absent", "--out", "TASK-out"], "does not exist"),
        (["quickstart", "--out", "TASK"], "cannot write to"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(task, arguments, said):
    found = invoke(*[argument.replace("TASK", task) for argument in arguments])
    assert found.exit_code == USER_ERROR
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert said in found.stderr


@pytest.mark.parametrize("arguments", [["quickstart", "--steps", "0"], ["no-such-command"], ["explain"]])
def test_wrong_usage_exits_with_2(arguments):
    assert invoke(*arguments).exit_code == 2


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> list[Check]:
        raise error

    monkeypatch.setattr(sys.modules["nvfp4c.cli.doctor"], "examine", fail)


def test_ctrl_c_exits_with_130(monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    found = invoke("doctor")
    assert found.exit_code == INTERRUPTED
    assert found.stderr == "interrupted\n"


def test_an_error_that_is_ours_is_found_inside_dynamos(monkeypatch):
    fail_with(monkeypatch, BackendCompilerFailed(lambda: None, TargetError("no GPU\nhere"), []))
    found = invoke("doctor")
    assert found.exit_code == USER_ERROR
    assert found.stderr == "error: no GPU here\n"


def test_an_error_that_is_not_ours_is_not_hidden(monkeypatch):
    fail_with(monkeypatch, ZeroDivisionError("a fault"))
    assert isinstance(invoke("doctor").exception, ZeroDivisionError)


def test_user_error_follows_causes():
    ours = TaskError("wrong")
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = ours
    assert user_error(wrapped) is ours
    assert user_error(RuntimeError("alone")) is None


def test_doctor_is_content_here():
    found = invoke("doctor", "--json")
    assert found.exit_code == 0, found.output
    diagnosis = json.loads(found.stdout)
    assert diagnosis["ok"] is True
    names = [check["name"] for check in diagnosis["checks"]]
    assert names[:3] == ["python", "torch", "triton"]
    assert {"backend", "device", "target", "C++ compiler", "cache folder"} <= set(names)
    assert invoke("doctor").exit_code == 0


def test_doctor_fails_with_a_sentence_when_something_is_missing(monkeypatch):
    def compilers_gone() -> list[Check]:
        return [Check("torch", "2.13.0"), Check("C++ compiler", "not found", "install g++")]

    monkeypatch.setattr(sys.modules["nvfp4c.cli.doctor"], "examine", compilers_gone)
    found = invoke("doctor")
    assert found.exit_code == 1
    assert found.stderr == "C++ compiler: install g++\n"
    assert json.loads(invoke("doctor", "--json").stdout)["ok"] is False


def test_doctor_sees_a_missing_compiler_and_an_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with inductor_config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        problems = {check.name: check.problem for check in sys.modules["nvfp4c.cli.doctor"].examine()}
    assert "g++" in problems["C++ compiler"]
    assert "TORCHINDUCTOR_CACHE_DIR" in problems["cache folder"]


def test_the_quickstart_works_from_end_to_end(tmp_path, monkeypatch):
    # One layer and a recipe with few kinds of operands: what takes time here is g++.
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], layers=1))
    out = tmp_path / "out"
    arguments = ["--steps", "2", "--model-size", "tiny", "--recipe", "nvfp4-forward", "--device", "cpu", "--json"]
    found = invoke("quickstart", *arguments, "--out", str(out))
    assert found.exit_code == 0, found.output
    results = json.loads(found.stdout)
    assert results == json.loads((out / "results.json").read_text())
    for run in results["runs"].values():
        assert len(run["train_losses"]) == 2
        assert [step for step, _ in run["validation"]] == [0, 1, 2]
    # Equal weights and batches: before the first step, rounding to 4 bits moves the loss of logits near zero by
    # little, but it must move it, or nothing was quantised.
    (_, high), (_, low) = (run["validation"][0] for run in results["runs"].values())
    assert 0 < abs(low - high) < 0.05
    assert results["explanation"]["forward_share"] > 0.5
    assert results["explanation"]["backward_share"] == 0
    assert "What became of every matmul" in (out / "report.html").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
