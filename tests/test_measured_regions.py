"""What `explain --measure` times and says, by kernels and measurements that are made up: no GPU is needed.

With Triton's kernels: `kernels/test_step_regions.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, fx, nn
from typer.testing import CliRunner

from nvfp4c.bench import step_regions
from nvfp4c.bench.step_regions import COPY, Measured, kernels_at_hand, measure
from nvfp4c.bench.timing import Samples
from nvfp4c.cli import app
from nvfp4c.cli.tables import kernels_table
from nvfp4c.codegen import targets
from nvfp4c.codegen.chips import TARGETS
from nvfp4c.dialect import REGION, KernelTable
from nvfp4c.errors import TargetError
from nvfp4c.kernel_plan import KernelRow, kernel_plan
from nvfp4c.options import parse
from nvfp4c.tasks import Task
from nvfp4c.watch import unwatched

pytest.importorskip("triton", reason="no triton for this system")


@dataclass
class Launches:
    """Stands for the kernels of a target: what each launch was given."""

    given: list[tuple[list[Tensor], list[Tensor], Tensor | None, str]] = field(default_factory=list)

    def region(self, inputs: list[Tensor], amaxes: list[Tensor], seed: Tensor | None, text: str) -> None:
        self.given.append((inputs, amaxes, seed, text))

    @property
    def table(self) -> KernelTable:
        return replace(targets.kernel_table(TARGETS["sm_90"]), region=self.region)


class Summed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum()


def layers(rows: int, dynamic: bool = False) -> Task:
    """Two equal layers, and one whose gradient is one number, expanded."""
    model = Summed(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 48)).bfloat16()
    x = torch.randn(rows, 32).bfloat16()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    return Task("layers", model, [x], lambda model, batch: model(batch))


def planned(task: Task) -> dict[fx.Node, KernelRow]:
    return kernel_plan(task, parse({"recipe": "nvfp4-all"}), "sm_90")


def measured(plan: Mapping[fx.Node, KernelRow], launches: Launches) -> list[Measured]:
    return measure(plan, launches.table, "cpu", rounds=1, watch=unwatched)


@pytest.mark.parametrize("dynamic", [False, True])
def test_each_region_is_of_one_kind(dynamic: bool) -> None:
    """And each kind is launched as its nodes are: symbolic sizes at those of the example."""
    plan, launches = planned(layers(40, dynamic)), Launches()
    found = measured(plan, launches)
    regions = {node for node in plan if node.target is REGION}
    assert sorted(node.name for one in found for node in one.nodes) == sorted(node.name for node in regions)
    assert any(one.launches == 2 for one in found)
    shown = {(one.row.reads, one.row.computes) for one in found}
    assert len(shown) == len(found)
    shapes = {tuple(f"bfloat16 {list(x.shape)}" for x in inputs) for inputs, *_ in launches.given}
    assert shapes == {reads for reads, _ in shown}
    assert (0, 0) in {x.stride() for inputs, *_ in launches.given for x in inputs}
    assert all((seed is not None) == ("stochastic" in text) for *_, seed, text in launches.given)


def test_nothing_is_launched_on_an_empty_matrix() -> None:
    launches = Launches()
    assert measured(planned(layers(0)), launches) == [] and launches.given == []


def test_bytes_are_those_of_a_copy_that_takes_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a copy of 64 MB, which moves twice that, takes 4 seconds, and every region one."""

    def timed(calls: Mapping[str, Any], *given: Any, **more: Any) -> dict[str, Samples]:
        return {name: Samples((4.0 if name == COPY else 1.0,)) for name in calls}

    monkeypatch.setattr(step_regions, "interleaved", timed)
    monkeypatch.setitem(step_regions.LARGE_BYTES, "cpu", 64_000_000)
    found = measured(planned(layers(40)), Launches())
    assert {one.worth for one in found} == {32_000_000}
    assert [one.ratio for one in found] == [32_000_000 / one.row.bytes for one in found]
    assert [one.launches for one in found] == sorted((one.launches for one in found), reverse=True)


def test_memory_that_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step_regions, "interleaved", full)
    with pytest.raises(TargetError, match="does not fit into this GPU's memory; take smaller batches"):
        measured(planned(layers(40)), Launches())


ROW = KernelRow("forward", "operand by rows", (), ("bfloat16 [40, 32]",), 2_000_000, ("fc fprop",), "", ())


def shown(rows: Sequence[tuple[KernelRow, Measured | None]], *given: bool) -> list[str]:
    console = Console(width=160)
    with console.capture() as text:
        console.print(kernels_table(rows, "sm_90", *given))
    return [" ".join(line.split()) for line in text.get().splitlines()]


def test_a_table_of_predicted_and_measured_bytes() -> None:
    """Kernels of the same words that lie otherwise have lines of their own; what was not timed has no figures."""
    samples = Samples((1e-5,))
    quick, slow = (Measured(ROW, (), samples, worth) for worth in (3_000_000.0, 5_040_000.0))
    lines = shown([(ROW, quick), (ROW, quick), (ROW, slow), (ROW, None)], True)
    assert "graph computes from MB measured MB ratio" in lines
    assert "forward 2 x operand by rows bfloat16 [40, 32] 2.0 3.0 1.50" in lines
    assert "forward operand by rows bfloat16 [40, 32] 2.0 5.0 2.52" in lines
    assert "forward operand by rows bfloat16 [40, 32] 2.0" in lines


def test_a_table_of_predicted_bytes_alone() -> None:
    lines = shown([(ROW, None), (ROW, None)])
    assert "forward 2 x operand by rows bfloat16 [40, 32] 2.0" in lines
    assert not any("measured" in line for line in lines)


TASK = """
import torch
from torch import nn
def training():
    return nn.Linear(32, 48), [torch.randn(40, 32)], lambda model, batch: model(batch).square().mean()
"""


@pytest.fixture
def command(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`explain --measure` of a layer, with every region measured to take twice the bytes that were predicted."""
    path = tmp_path / "task.py"
    path.write_text(TASK)

    def made_up(plan: Mapping[fx.Node, KernelRow], *given: object) -> list[Measured]:
        regions = {node: row for node, row in plan.items() if node.target is REGION}
        return [Measured(row, (node,), Samples((0.25,)), 2.0 * row.bytes) for node, row in regions.items()]

    monkeypatch.setattr(step_regions, "resolve", lambda name, device: TARGETS["sm_90"])
    monkeypatch.setattr(step_regions, "measure", made_up)
    return ["explain", f"{path}:training", "--recipe", "nvfp4-all", "--measure"]


def test_the_command_prints_both(command: list[str]) -> None:
    found = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert found.exit_code == 0, found.output
    assert "Kernels for sm_90" in found.stdout
    assert "measured MB" in found.stdout and "2.00" in found.stdout


def test_the_json_holds_both(command: list[str]) -> None:
    found = CliRunner().invoke(app, [*command, "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["kernels"]
    weights = [row for row in rows if "a weight" in row["computes"]]
    timed = [row for row in rows if row not in weights]
    assert weights and timed
    figures = ("measured_bytes", "measured_over_predicted", "median_seconds")
    assert {tuple(row[name] for name in figures) for row in weights} == {(None, None, None)}
    assert all(tuple(row[name] for name in figures) == (2 * row["bytes"], 2, 0.25) for row in timed)


def test_another_target_than_the_one_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 runs the code for sm_80, but a compiled model would not."""
    monkeypatch.setattr(step_regions, "resolve", lambda name, device: TARGETS[{"auto": "sm_90"}.get(name, name)])
    at_hand = torch.device("cuda:0")
    assert (
        kernels_at_hand("auto", at_hand) == kernels_at_hand("sm_90", at_hand) == targets.kernel_table(TARGETS["sm_90"])
    )
    with pytest.raises(TargetError, match=r"for 'sm_80' are not what cuda:0 would run.*; use 'sm_90', or 'auto'"):
        kernels_at_hand("sm_80", at_hand)
