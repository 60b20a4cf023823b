"""A trained GPT: trained by the example, written, read again, and handed to a command as a task."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nvfp4c.errors import DataError
from nvfp4c.quickstart import checkpoint, data
from nvfp4c.quickstart.model import SIZES, Gpt
from nvfp4c.quickstart.train import Settings, build_model, validate, validation_batches
from nvfp4c.tasks import load_task

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_gpt.py"
SMALL = replace(SIZES["tiny"], layers=1, width=32, heads=2, hidden=48, sequence=16, batch=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text that is easy to learn."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"file {number} has a quick brown fox over a lazy dog\n" * 20)
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example writes after a short training."""
    out = tmp_path_factory.mktemp("trained") / "gpt.safetensors"
    size = ("--layers", 1, "--width", 64, "--sequence", 32, "--batch", 4, "--learning-rate", 4e-3)
    found = run("--out", out, "--data", text, "--steps", 60, "--device", "cpu", "--backend", "eager", *size)
    assert found.returncode == 0, found.stderr
    assert f"with the weights in {out}" in found.stdout
    return out


def test_the_example_learns_and_says_how(trained: Path) -> None:
    results = json.loads(trained.with_suffix(".json").read_text())
    losses = [loss for _, loss in results["run"]["validation"]]
    # Random weights guess, which is log(256) = 5.5 nats; letters alone are worth about 3.
    assert losses[0] > 5
    assert losses[-1] < 3
    assert "--steps 60" in results["command"]
    assert results["settings"]["size"]["width"] == 64
    assert sorted(path.name for path in trained.parent.iterdir()) == ["gpt.json", "gpt.safetensors"]


def test_the_written_file_gives_the_loss_it_was_written_with(trained: Path, text: Path) -> None:
    results = json.loads(trained.with_suffix(".json").read_text())
    model, size = checkpoint.load(trained)
    assert asdict(size) == results["settings"]["size"]
    settings = Settings(size, 1, 0, "cpu")
    loss = validate(model, validation_batches(data.load(text, minimum=settings.minimum_bytes), settings))
    # The same weights on the same text in FP32, in another process: threads may sum in another order.
    assert loss == pytest.approx(results["written_validation_loss"], rel=1e-5)
    # FP16 keeps 11 bits of a weight: an error of 2^-12 in each, of random sign, is lost in a loss of four digits.
    assert loss == pytest.approx(results["run"]["final_validation_loss"], rel=1e-3)


def test_the_file_is_a_task_with_batches_held_out(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT", str(trained))
    task = load_task(f"{EXAMPLE}:task")
    batches, loss = task.training()
    assert len(list(batches)) == len(list(task.held_out or ())) == 8
    loss(task.model, *task.example()).backward()
    assert all(parameter.grad is not None for parameter in task.model.parameters())


def test_no_two_samples_of_the_task_overlap(trained: Path, tmp_path: Path) -> None:
    """13 characters of this text hold a whole number, and stand in one place alone."""
    (tmp_path / "all.txt").write_text(" ".join(f"{number:06d}" for number in range(8000)))
    task = runpy.run_path(str(EXAMPLE))["task_of"](trained, tmp_path)
    samples = [tokens for batch in (*task.batches, *task.held_out) for tokens in batch[0].tolist()]
    assert len(samples) == 2 * 8 * 8
    pieces = [bytes(sample[at : at + 13]) for sample in samples for at in range(len(sample) - 12)]
    assert len(set(pieces)) == len(pieces)


def test_weights_are_rounded_to_fp16_and_nothing_else(tmp_path: Path) -> None:
    model = build_model(Settings(SMALL, 1, 0, "cpu"))
    checkpoint.save(model, SMALL, tmp_path / "gpt.safetensors")
    again, size = checkpoint.load(tmp_path / "gpt.safetensors")
    assert size == SMALL
    expected = model.state_dict()
    assert {name: weight.dtype for name, weight in again.state_dict().items()} == dict.fromkeys(expected, torch.float32)
    assert all(torch.equal(weight, expected[name].half().float()) for name, weight in again.state_dict().items())


def spoilt(path: Path, metadata: dict[str, str] | None, drop: str = "") -> None:
    weights = {name: weight for name, weight in Gpt(SMALL).state_dict().items() if name != drop}
    save_file(weights, path, metadata=metadata)


RIGHT = {"size": json.dumps(asdict(SMALL))}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_bytes(b"weights"), "holds no GPT"),
        (lambda path: torch.save({"size": 1}, path), "holds no GPT"),
        (lambda path: spoilt(path, None), "holds no GPT"),
        (lambda path: spoilt(path, {"size": "{"}), "holds no GPT"),
        (lambda path: spoilt(path, {"size": '{"depth": 3}'}), "holds no GPT"),
        (lambda path: spoilt(path, RIGHT, drop="lm_head.weight"), "holds no GPT"),
        (lambda path: spoilt(path, {"size": json.dumps({**asdict(SMALL), "hidden": 64})}), "holds no GPT"),
    ],
)
def test_a_file_that_is_no_gpt_is_refused(tmp_path: Path, make, said: str) -> None:
    make(tmp_path / "gpt.safetensors")
    with pytest.raises(DataError, match=said):
        checkpoint.load(tmp_path / "gpt.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "gpt.json"), "must end in .safetensors"),
        (("--out", "gpt.safetensors", "--width", "100"), "must be a multiple of 64"),
        (("--out", "gpt.safetensors", "--steps", "0"), "no whole number above 0"),
        (("--out", "gpt.safetensors", "--data", "absent"), "does not exist"),
    ],
)
def test_the_example_refuses_what_cannot_be(arguments: tuple[str, ...], said: str) -> None:
    found = run(*arguments, "--device", "cpu")
    assert found.returncode != 0
    assert said in found.stderr
    assert "Traceback" not in found.stderr
