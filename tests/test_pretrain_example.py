"""The example that pretrains with plans: which plans it trains with, and what it says of the runs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nvfp4c.quickstart.train import Run

EXAMPLE = Path(__file__).parents[1] / "examples" / "pretrain_with_plans.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_with_plans", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(loss: float) -> Run:
    return Run("made up", (3.0, loss), ((0, 5.5), (2, loss)), 100.0, 1.0, 1.0, None, None)


def test_gaps_are_of_runs_with_the_same_seed(example: ModuleType) -> None:
    runs = {
        "high precision": {0: run_of(2.0), 1: run_of(4.0)},
        "solved": {0: run_of(2.02), 1: run_of(4.04)},
        "paper": {0: run_of(2.01), 1: run_of(4.2)},
    }
    assert example.gaps(runs, "solved") == pytest.approx([0.01, 0.01])
    assert example.gaps(runs, "paper") == pytest.approx([0.005, 0.05])
    mean, half = example.results(runs)["gaps"]["solved"]["mean_and_half_interval"]
    assert mean == pytest.approx(0.01) and half == pytest.approx(0, abs=1e-9)
    assert "ahead with 1 of 2 seeds, by +1.75% on average" in example.summary(runs)[-1]
    del runs["solved"][1], runs["paper"][1]
    mean, half = example.results(runs)["gaps"]["paper"]["mean_and_half_interval"]
    assert mean == pytest.approx(0.005) and math.isnan(half)


def test_every_run_has_its_plan(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pilot and the analysis are real, on a tiny GPT; the runs with plans are only taken down."""
    seen: list[tuple[int, str, Mapping[str, Any] | None]] = []

    def train(settings: Any, corpus: Any, backend: str, options: Mapping[str, Any] | None, watch: Any) -> Run:
        seen.append((settings.seed, backend, options))
        return run_of(2.0 + len(seen) / 100)

    fit = example.fit
    monkeypatch.setattr(example, "train", train)
    monkeypatch.setattr(
        example, "fit", lambda model, settings, corpus, backend, *rest: fit(model, settings, corpus, "eager")
    )
    arguments = ["--model-size", "tiny", "--steps", "8", "--seeds", "3", "5", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pretrain_with_plans.py", *arguments])
    example.main()
    each = ("inductor", "nvfp4", "nvfp4")
    assert [(seed, backend) for seed, backend, _ in seen] == [(seed, backend) for seed in (3, 5) for backend in each]
    written = json.loads((tmp_path / "pretraining-plans-cpu-tiny.json").read_text())
    solved, paper = (options["plan"] for _, _, options in seen[1:3] if options)
    assert written["settings"]["plans"] == {"solved": solved.to_dict(), "paper": paper.to_dict()}
    assert solved.rules != paper.rules
    assert max(solved.provenance["share_in_bf16"], paper.provenance["share_in_bf16"]) <= 0.15
    assert paper.decide("lm_head", "fprop")[0] == "bf16"
    assert set(written["results"]["runs"]) == {"high precision", "solved", "paper"}

    # What is there is not run again; another seed is, with the plans that are known.
    before = len(seen)
    monkeypatch.setattr(sys, "argv", ["pretrain_with_plans.py", *arguments[:4], "--seeds", "5", "7", *arguments[7:]])
    sys.argv.append("--resume")
    example.main()
    assert [(seed, backend) for seed, backend, _ in seen[before:]] == [(7, backend) for backend in each]
    again = json.loads((tmp_path / "pretraining-plans-cpu-tiny.json").read_text())
    assert again["settings"] == written["settings"]
    assert seen[-2][2]["plan"] == solved and seen[-1][2]["plan"] == paper  # type: ignore[index]
    assert all(set(own) == {"3", "5", "7"} for own in again["results"]["runs"].values())
    assert again["results"]["runs"]["paper"]["3"] == written["results"]["runs"]["paper"]["3"]
    sys.argv[sys.argv.index("8")] = "9"
    with pytest.raises(SystemExit, match="is of another steps"):
        example.main()
