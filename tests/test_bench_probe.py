"""What the sensitivity probe costs: ratios from samples that are made up, memory of known tensors, the command once."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from nvfp4c.bench import memory, probe
from nvfp4c.bench.memory import Memory
from nvfp4c.bench.probe import DESCRIPTIONS, EAGER, INDUCTOR, PROBE, Cost, ProbeResult, quickstart_task
from nvfp4c.bench.report import report
from nvfp4c.bench.timing import Samples
from nvfp4c.cli import USER_ERROR, app
from nvfp4c.quickstart.model import SIZES
from nvfp4c.tasks import Task
from nvfp4c.watch import unwatched

MADE_UP = ProbeResult(
    Cost(PROBE, Samples((12.0, 16.0, 90.0)), Memory(100, 260)),
    (Cost(EAGER, Samples((8.0, 1.0, 9.0)), Memory(100, 208)), Cost(INDUCTOR, Samples((4.0,)), Memory(100, 200))),
)

TASKS = """
import torch

def mse(model, batch):
    return model(batch).square().mean()

def good():
    return torch.nn.Linear(32, 32), [torch.randn(16, 32)], mse

def frozen():
    model = torch.nn.Linear(32, 32).requires_grad_(False)
    return model, [torch.randn(16, 32)], mse

def no_parameters():
    return torch.nn.ReLU(), [torch.randn(16, 32)], mse

def no_matmul():
    return torch.nn.LayerNorm(32), [torch.randn(16, 32)], mse

def no_loss():
    return torch.nn.Linear(32, 32), (torch.randn(16, 32),)
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generating code would take most of the test."""
    monkeypatch.setattr(
        probe, "compile_model", lambda model, backend, options: torch.compile(model, backend="aot_eager")
    )


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "probe", *arguments], env={"COLUMNS": "120"})


def test_the_probe_is_gone_when_the_memory_of_steps_is_measured(
    without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs would count as theirs."""
    probes: list[weakref.ref[probe.Probe]] = []
    alive: list[bool] = []

    class Watched(probe.Probe):
        def __post_init__(self) -> None:
            super().__post_init__()
            probes.append(weakref.ref(self))

    def measured(call: Callable[[], object], held: Iterable[Tensor]) -> Memory:
        alive.append(probes[0]() is not None)
        return memory.on_cpu(call, held)

    monkeypatch.setattr(probe, "Probe", Watched)
    monkeypatch.setattr(probe, "on_cpu", measured)
    model = nn.Linear(32, 32)
    task = Task("one layer", model, [torch.randn(16, 32)], lambda model, batch: model(batch).square().mean())
    probe.measure(task, rounds=1, in_a_row=1, watch=unwatched)
    assert alive == [True, False, False]


def test_ratios_are_of_the_probe_to_each_step() -> None:
    found = MADE_UP.to_dict()
    assert [found[name]["probe_time_ratio"] for name in (EAGER, INDUCTOR)] == [16.0 / 8.0, 16.0 / 4.0]
    assert [found[name]["probe_memory_ratio"] for name in (EAGER, INDUCTOR)] == [260 / 208, 260 / 200]
    assert not any(key.endswith("ratio") for key in found[PROBE])
    assert found[PROBE]["memory"] == {"resident": 100, "peak": 260}


def test_the_peak_is_of_tensors_that_live_at_once() -> None:
    held = torch.empty(5000, dtype=torch.uint8)

    def call() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(3 << 20, dtype=torch.uint8)
        del first
        third = torch.empty(2 << 20, dtype=torch.uint8)
        del second
        return third

    # A view has the memory that it is a view of, once.
    assert memory.on_cpu(call, [held, held[:10]]) == Memory(5000, 5000 + (5 << 20))


def test_the_peak_of_a_backward_pass_is_counted() -> None:
    """What autograd keeps and frees in its own code counts as well."""
    x = torch.randn(1 << 16, requires_grad=True)
    size = x.nbytes

    def call() -> None:
        # exp keeps its result for the backward pass, whose gradient comes beside it and the gradient of the sum.
        x.exp().mul(torch.ones_like(x)).sum().backward()

    x.grad = None
    found = memory.on_cpu(call, [x])
    assert found.resident == size
    # At least exp's result and the incoming gradient and x's own; at most all that is ever made: exp, ones, product,
    # and the gradients of product, exp and x. Scalars are some bytes.
    assert 3 * size <= found.peak - found.resident <= 6 * size + 4096


def test_a_step_counts_what_lies_in_memory(without_inductor: None) -> None:
    """Parameters, two states of AdamW and a gradient for each: no plain step and no pass of the probe has less."""
    task = quickstart_task(SIZES["tiny"], "cpu")
    before = {name: parameter.clone() for name, parameter in task.model.named_parameters()}
    found = probe.measure(task, rounds=1, in_a_row=1, watch=unwatched)
    parameters = sum(parameter.nbytes for parameter in task.model.parameters())
    for cost in (found.probe, *found.steps):
        assert cost.memory.resident >= 3 * parameters
        assert cost.memory.peak >= cost.memory.resident + parameters
    assert all(torch.equal(before[name], parameter) for name, parameter in task.model.named_parameters())


def test_from_end_to_end(tmp_path: Path, without_inductor: None) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    arguments = ("--rounds", "2", "--commit", "abc1234567", "--json", "--out", str(tmp_path))
    found = invoke(f"{tmp_path / 'tasks.py'}:good", *arguments)
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record == json.loads((tmp_path / "bench-probe-cpu-task.json").read_text())
    assert list(record["results"]) == [PROBE, EAGER, INDUCTOR]
    assert record["about"]["commit"] == "abc1234567"
    assert record["settings"]["parameters"] == 32 * 32 + 32
    for name, cost in record["results"].items():
        assert cost["description"] == DESCRIPTIONS[name]
        assert len(cost["time"]["seconds"]) == 2
        assert cost["memory"]["peak"] > cost["memory"]["resident"] > 0
    page = report(tmp_path)
    assert f"{record['results'][INDUCTOR]['probe_time_ratio']:.2f}x" in page
    assert f"{record['results'][EAGER]['probe_memory_ratio']:.2f}x" in page


def test_a_table_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure", lambda *given: MADE_UP)
    found = invoke("--size", "tiny", "--device", "cpu")
    assert found.exit_code == 0, found.output
    rows = {line.split()[0]: line.split() for line in found.stdout.splitlines() if line.split()}
    assert (rows[EAGER][3], rows[EAGER][5]) == ("2.00x", "1.25x")
    assert (rows[INDUCTOR][3], rows[INDUCTOR][5]) == ("4.00x", "1.30x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "is not a task"),
        (["TASKS:missing"], "has no 'missing'"),
        (["TASKS:no_loss"], "needs (model, batches, loss)"),
        (["TASKS:frozen"], "the loss needs no gradient"),
        (["TASKS:no_parameters"], "has no parameters"),
        (["TASKS:no_matmul"], "no matmul with a weight"),
        (["TASKS:good", "--size", "tiny"], "a task brings its own model"),
        (["TASKS:good", "--device", "cpu"], "a task brings its own model"),
        (["--size", "huge"], "'huge'"),
        (["--device", "tpu"], "auto, cpu or cuda"),
        (["TASKS:good", "--out", "TASKS"], "cannot write to"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    path = tmp_path / "tasks.py"
    path.write_text(TASKS)
    found = invoke(*[argument.replace("TASKS", str(path)) for argument in arguments])
    assert found.exit_code == USER_ERROR
    assert found.stdout == ""
    *progress, error = found.stderr.splitlines()
    assert all(line.startswith("first pass") for line in progress)
    assert error.startswith("error: ")
    assert said in error


def test_a_model_without_a_gradient_for_its_matmuls_is_refused() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32).requires_grad_(False)
            self.norm = nn.LayerNorm(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.norm(self.linear(x))
            return out

    from nvfp4c.errors import DataError
    from nvfp4c.tasks import Task

    task = Task("frozen", Frozen(), batches=[torch.randn(16, 32)], loss=lambda model, batch: model(batch).sum())
    with pytest.raises(DataError, match="no gradient reaches"):
        probe.measure(task, rounds=1, in_a_row=1, watch=unwatched)
