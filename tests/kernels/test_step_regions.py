"""`bench regions`: each kind of region of a step is timed once, on inputs that lie as in the graph."""

from __future__ import annotations

import pytest
import torch

from nvfp4c import dialect
from nvfp4c.bench import step_regions
from nvfp4c.bench.llama import SIZES
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
    found = step_regions.measure(
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
