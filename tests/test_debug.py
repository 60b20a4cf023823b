"""Looking inside: what NVFP4C_DEBUG says at each level, and what NVFP4C_DUMP leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphs import ALL_STEPS, captured, steps_of
from torch import nn

from nvfp4c import pipeline
from nvfp4c.capture import CapturedGraph
from nvfp4c.debug import dump_folder, level, readable
from nvfp4c.errors import OptionError
from nvfp4c.recipe import RECIPES


def mlp() -> CapturedGraph:
    return captured(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), torch.randn(16, 32))


def said(number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the pipeline writes to the terminal at a level."""
    found = mlp()
    monkeypatch.setenv("NVFP4C_DEBUG", number)
    pipeline.run(found.graph, steps_of(RECIPES["nvfp4"], found.names), "joint")
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()


def test_level_0_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert said("0", monkeypatch, capsys) == []


def test_level_1_says_a_line_a_graph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said("1", monkeypatch, capsys)
    assert line.startswith("nvfp4c joint: ")
    assert line.endswith(" nodes")


def test_level_2_says_every_decision(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason of what stays in bf16."""
    head = "bf16 output head: no other matmul follows it"
    assert said("2", monkeypatch, capsys)[:-1] == [
        "nvfp4c joint: 0 fprop: nvfp4",
        f"nvfp4c joint: 2 fprop: {head}",
        f"nvfp4c joint: 2 dgrad: {head}",
        f"nvfp4c joint: 2 wgrad: {head}",
        "nvfp4c joint: 0 wgrad: nvfp4",
    ]


def test_level_3_says_what_each_pass_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.removeprefix("nvfp4c joint: ") for line in said("3", monkeypatch, capsys)]
    changes = dict(line.split(": ", 1) for line in lines if line.split(":")[0] in ALL_STEPS)
    assert tuple(changes) == ALL_STEPS
    assert changes["classify"] == changes["assign"] == changes["place"] == "metadata only"
    assert changes["insert_hadamard"] == "+2 aten.permute.default, +2 nvfp4.hadamard.default"
    assert "+2 nvfp4.scaled_mm.default" in changes["insert_scaling"]
    assert "-1 aten.addmm.default" in changes["insert_scaling"]
    assert changes["fold_hadamard"] == "-2 nvfp4.hadamard.default"


def test_level_4_shows_the_graphs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(said("4", monkeypatch, capsys))
    for step in ("input", *ALL_STEPS):
        assert f"nvfp4c joint: after {step}:\n%primals_1 : " in text


@pytest.mark.parametrize("wrong", ["5", "-1", "1.0", "yes"])
def test_a_wrong_level(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4C_DEBUG", wrong)
    with pytest.raises(OptionError, match=f"NVFP4C_DEBUG must be 0, 1, 2, 3 or 4, got '{wrong}'"):
        level()


def test_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable set to nothing is not set."""
    for value in ("", None):
        for name in ("NVFP4C_DEBUG", "NVFP4C_DUMP"):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert (level(), dump_folder()) == (0, None)


def test_dumps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A numbered folder a graph, in it a numbered file a pass, so that neighbours can be compared with diff."""
    monkeypatch.setenv("NVFP4C_DUMP", str(tmp_path / "dumps"))
    graphs = [mlp(), mlp()]
    for found in graphs:
        pipeline.run(found.graph, steps_of(RECIPES["nvfp4-all"], found.names), "joint")
    pipeline.run(mlp().graph, (), "lower")
    folders = sorted(folder.name for folder in (tmp_path / "dumps").iterdir())
    assert folders == ["000-joint", "000-lower", "001-joint"]
    names = ["00-input.txt", *(f"{index:02d}-{name}.txt" for index, name in enumerate(ALL_STEPS, 1))]
    for folder in ("000-joint", "001-joint"):
        assert sorted(path.name for path in (tmp_path / "dumps" / folder).iterdir()) == names
    assert (tmp_path / "dumps" / "001-joint" / names[-1]).read_text() == readable(graphs[1].graph)


def test_readable() -> None:
    """A line a node: its call, its type and shape, and what passes wrote on it."""
    found = mlp()
    pipeline.run(found.graph, steps_of(RECIPES["nvfp4"], found.names)[:2], "explain")
    lines = readable(found.graph).splitlines()
    assert len(lines) == len(found.graph.nodes)
    (first, second) = (line for line in lines if line.startswith("%addmm"))
    assert first.endswith("  float32[16, 48]  # 0 fprop nvfp4")
    assert second.endswith("  float32[16, 32]  # 2 fprop bf16 output head: no other matmul follows it")
    assert lines[-1].startswith("return ")
