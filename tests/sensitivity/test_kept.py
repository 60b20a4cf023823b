"""No run of the model is made twice: not for another budget, nor after an interruption. What changed is run anew."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import Counted, Net, batches

from nvfp4c.codegen import cpu_compiler
from nvfp4c.sensitivity.analysis import Analysis, Together
from nvfp4c.sensitivity.analyze import Settings, analyze
from nvfp4c.sensitivity.budgets import Budget
from nvfp4c.sensitivity.kept import Question, kept

pytestmark = pytest.mark.usefixtures("uncompiled")

ABLATE = Settings(method="ablate", budget=Budget(0.2))
PROBE = Settings(budget=Budget(0.2), pairs=False)

BLOCKS, FORWARD, ROLES = 2, 5, 14
"""Of the model, and its matmuls: nobody wants the gradient of its input."""

BEFORE = 2 + 2 + 2
"""Calls of the loss on two batches before anything is ablated: the probe's, in high precision, everything in FP4."""

ALONE = 2 * 2 * FORWARD
GRADIENTS = 1 + 2 * ROLES + 1
CHECKED = 2 * BLOCKS


def net() -> Net:
    torch.manual_seed(0)
    return Net(BLOCKS)


def run(loss: Counted, folder: Path | None, settings: Settings = ABLATE, model: Net | None = None) -> Analysis:
    return analyze(model or net(), batches(2, 1), loss, batches(2, 2), settings, folder)


def plans_of(found: Analysis) -> set[frozenset[tuple[str, str]]]:
    """The different plans that were really run."""
    return {frozenset(plan.bf16) for plan in found.candidates if plan.measured is not None}


@pytest.fixture(scope="module")
def whole() -> Analysis:
    """Of a run that kept nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_compiler, "compile_kind", lambda function, kind: function)
        torch._dynamo.reset()
        return run(Counted(), None)


def test_another_budget_runs_nothing_but_its_plans(whole: Analysis, tmp_path: Path) -> None:
    loss = Counted()
    first = run(loss, tmp_path)
    assert first == whole and not first.pairs
    assert loss.calls == BEFORE + ALONE + GRADIENTS + CHECKED + 2 * (1 + len(plans_of(first)))
    before = loss.calls
    second = run(loss, tmp_path, replace(ABLATE, budget=Budget(0.5)))
    new = plans_of(second) - plans_of(first)
    assert new and loss.calls - before == 2 * len(new)
    for name in ("scores", "single", "all_but", "cosine", "cosine_all_but", "together"):
        assert getattr(second, name) == getattr(first, name)
    before = loss.calls
    assert run(loss, tmp_path) == first
    assert loss.calls == before


@pytest.mark.parametrize(
    ("stop", "repeated"),
    [
        (BEFORE, 0),
        (BEFORE + 7, 1),
        (BEFORE + ALONE + 6, 1),
        (BEFORE + ALONE + GRADIENTS + CHECKED + 5, 1),
    ],
    ids=["at first", "between two batches", "in gradients, which need the exact one again", "in plans"],
)
def test_an_interrupted_run_goes_on(whole: Analysis, tmp_path: Path, stop: int, repeated: int) -> None:
    """Only what was under way is run again, and all is found as if nothing had happened."""
    loss = Counted(stop)
    with pytest.raises(KeyboardInterrupt):
        run(loss, tmp_path)
    assert loss.calls == stop
    assert run(loss, tmp_path) == whole
    everything = BEFORE + ALONE + GRADIENTS + CHECKED + 2 * (1 + len(plans_of(whole)))
    assert loss.calls == everything + repeated


def test_pairs_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Together, "adds_up", property(lambda one: one.block != "blocks.1."))
    loss, settings = Counted(), replace(PROBE, pairs=True)
    first = run(loss, tmp_path, settings)
    before = loss.calls
    assert first.pairs and run(loss, tmp_path, settings) == first
    assert loss.calls == before


def test_other_weights_and_other_batches_are_measured_anew(tmp_path: Path) -> None:
    """Also where only the held-out ones are others: then nothing but plans is run."""
    loss, model = Counted(), net()
    run(loss, tmp_path, PROBE, model)
    analyze(model, batches(2, 1), loss, batches(2, 3), PROBE, tmp_path)
    before = loss.calls
    found = analyze(model, batches(2, 1), loss, batches(2, 4), PROBE, tmp_path)
    assert loss.calls - before == 2 * (1 + len(plans_of(found)))
    before = loss.calls
    analyze(model, batches(2, 5), loss, (), PROBE, tmp_path)
    assert loss.calls - before == BEFORE
    with torch.no_grad():
        model.head.weight.mul_(1.125)
    before = loss.calls
    changed = run(loss, tmp_path, PROBE, model)
    assert loss.calls - before == BEFORE + 2 * (1 + len(plans_of(changed)))
    assert changed == run(Counted(), None, PROBE, model)


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    """That one alone, with the same result."""
    loss = Counted()
    expected = run(loss, tmp_path, PROBE)
    files = sorted(tmp_path.iterdir())
    assert {path.name.partition("-")[0] for path in files} == {"part", "losses"}
    for path in (files[0], files[-1]):
        text, before = path.read_text(), loss.calls
        path.write_text(text[: len(text) // 2])
        assert run(loss, tmp_path, PROBE) == expected
        assert loss.calls - before == (1 if path.name.startswith("part") else 2)
        assert path.read_text() == text


QUESTION: Question = {"fp4": [("a", "fprop")], "model": "Net"}
FOUND = (0.1, math.inf)


def ask(folder: Path, question: Question = QUESTION) -> tuple[tuple[float, ...], bool]:
    """The answer, and whether it had to be measured."""
    measured = []

    def measure() -> tuple[float, ...]:
        measured.append(True)
        return FOUND

    return kept(folder, "losses", question, 2, measure), bool(measured)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:-4],
        lambda text: "[]",
        lambda text: "\xff",
        lambda text: json.dumps({**json.loads(text), "question": {}}),
        lambda text: json.dumps({**json.loads(text), "numbers": [1.0]}),
        lambda text: json.dumps({**json.loads(text), "numbers": ["1", "2"]}),
        lambda text: json.dumps({**json.loads(text), "numbers": None}),
    ],
)
def test_only_the_answer_to_the_question_counts(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    assert ask(tmp_path) == (FOUND, True)
    assert ask(tmp_path) == (FOUND, False)
    (path,) = tmp_path.iterdir()
    path.write_text(change(path.read_text()), encoding="latin-1")
    assert ask(tmp_path) == (FOUND, True)
    assert ask(tmp_path) == (FOUND, False)
    assert ask(tmp_path, {**QUESTION, "model": "Other"}) == (FOUND, True)
    assert len(list(tmp_path.iterdir())) == 2
