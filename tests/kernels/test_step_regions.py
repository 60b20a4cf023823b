"""`bench regions` and `explain --measure`: each kind of region is timed once, on inputs that lie as in the graph.

What is said of measurements, and of tasks that cannot be measured: `../test_measured_regions.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nvfp4c import dialect
from nvfp4c.bench import step_regions
from nvfp4c.bench.llama import SIZES
from nvfp4c.cli import app
from nvfp4c.codegen import targets
from nvfp4c.codegen.chips import TARGETS


@pytest.fixture
def regions_here(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> dialect.KernelTable:
    """The table of an H100, on the CPU too where the interpreter runs its kernels."""
    table = targets.kernel_table(TARGETS["sm_90"])
    monkeypatch.setattr(step_regions, "resolve", lambda name, given: TARGETS["sm_90"])
    return table


def test_every_kind_of_region(device: torch.device, regions_here: dialect.KernelTable) -> None:
    told: list[str] = []
    found = step_regions.measure_llama(
        SIZES["tiny"], device.type, torch.bfloat16, 2, lambda what, done, of: told.append(what)
    )
    assert {"capturing", "timing"} <= set(told)
    assert {one.row.graph for one in found} == {"forward", "backward"}
    assert sum(one.launches for one in found) > len(found)
    times = [one.launches * one.samples.median for one in found]
    assert times == sorted(times, reverse=True)
    # The same ratio for all: bytes are worth the time that they take at the rate of one copy.
    rates = [one.worth / one.samples.median for one in found]
    assert max(rates) == pytest.approx(min(rates), rel=1e-9)  # FP64 products of the same number
    # The gate of the MLP is computed where it is reduced.
    assert any("exp" in one.row.operations and one.row.decision == "kept" for one in found)


TASK = """
import torch
from torch import nn
def training():
    model = nn.Linear(32, 48).to({device!r}, torch.bfloat16)
    x = torch.randn(20, 32, device={device!r}, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    return model, [x], lambda model, batch: model(batch).sum()
"""


def test_the_kernels_of_a_task(
    device: torch.device, regions_here: dialect.KernelTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of rows; the last gradient is one number, expanded."""
    monkeypatch.setitem(step_regions.ROUNDS, device.type, 1)
    path = tmp_path / "task.py"
    path.write_text(TASK.format(device=device.type))
    command = ["explain", f"{path}:training", "--recipe", "nvfp4-all", "--measure", "--json"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    kernels = json.loads(found.stdout)["kernels"]
    assert {row["graph"] for row in kernels} == {"forward", "backward"}
    timed = [row for row in kernels if row["measured_bytes"] is not None]
    assert {row["computes"] for row in kernels if row not in timed} == {
        "amax, packed and operand by rows of a weight, once a version"
    }
    assert {"bfloat16 [20, 32]", "bfloat16 [20, 48]"} == {read for row in timed for read in row["reads"]}
    for row in timed:
        assert row["measured_over_predicted"] == row["measured_bytes"] / row["bytes"]
    rates = [row["measured_bytes"] / row["median_seconds"] for row in timed]
    assert max(rates) == pytest.approx(min(rates), rel=1e-9)  # FP64 products of the same number
