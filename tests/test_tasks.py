"""Tasks: what a user hands to a command, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4c.errors import TaskError
from nvfp4c.tasks import load_task

HEADER = "import torch\nfrom torch import nn\nmodel = nn.Linear(4, 2)\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_task(body: str, name: str = "task.py") -> str:
        path = tmp_path / name
        path.write_text(HEADER + body)
        return f"{path}:make"

    return write_task


def refused(task: str) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(task)
    return str(caught.value)


def test_a_training_task_gives_model_batches_and_loss(write):
    body = "def make():\n    return model, [torch.ones(3, 4)], lambda model, batch: model(batch).sum()\n"
    task = load_task(write(body))
    batches, loss = task.training()
    (batch,) = task.example()
    assert torch.equal(batch, torch.ones(3, 4))
    assert [torch.equal(again, batch) for again in batches] == [True]
    assert torch.equal(loss(task.model, batch), task.model(batch).sum())


def test_a_task_without_a_loss_gives_arguments(write):
    task = load_task(write("def make():\n    return model, (torch.ones(3, 4), 7)\n"))
    assert task.loss is None
    assert task.example()[1] == 7


def test_a_task_may_say_what_is_held_out(write):
    body = "def make():\n    return Task('mine', model, [1], lambda model, batch: 3, held_out=[2])\n"
    task = load_task(write("from nvfp4c.tasks import Task\n" + body))
    assert (task.batches, task.held_out) == ([1], [2])
    with pytest.raises(TaskError, match="returned an int"):
        task.loss(task.model, 1)


def test_a_task_without_batches_is_refused(write):
    body = "def make():\n    return Task('mine', model)\n"
    assert "as the loss" in refused(write("from nvfp4c.tasks import Task\n" + body))


def test_a_single_tensor_may_stand_for_the_arguments(write):
    task = load_task(write("def make():\n    return model, torch.ones(3, 4)\n"))
    assert len(task.example()) == 1


def test_a_command_that_needs_a_loss_says_so(write):
    name = write("def make():\n    return model, (torch.ones(3, 4),)\n")
    with pytest.raises(TaskError, match=r"returned \(model, args\), but this command needs \(model, batches, loss\)"):
        load_task(name).training()


def test_a_module_name_works_and_finds_the_current_folder(write, tmp_path, monkeypatch):
    write("def make():\n    return model, (torch.ones(3, 4),)\n", name="task_in_current_folder.py")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_task("task_in_current_folder:make").model, torch.nn.Linear)


def test_a_file_can_import_its_neighbour(write, tmp_path):
    (tmp_path / "task_neighbour.py").write_text("width = 5\n")
    name = write("from task_neighbour import width\ndef make():\n    return model, (torch.ones(width, 4),)\n")
    assert load_task(name).example()[0].shape == (5, 4)


@pytest.mark.parametrize("name", ["task.py", "task", ":make", "task.py:", ""])
def test_what_is_no_task_is_told_how_to_write_one(name):
    assert "write FILE.py:callable or package.module:callable" in refused(name)


def test_a_missing_file_names_the_nearest(write, tmp_path):
    write("")
    assert f"did you mean '{tmp_path / 'task.py'}'?" in refused(f"{tmp_path / 'tsak.py'}:make")


def test_a_missing_file_in_an_empty_folder(tmp_path):
    assert f"there is no Python file in {tmp_path}" in refused(f"{tmp_path / 'task.py'}:make")


def test_a_missing_module_says_which():
    assert "there is no module 'no_such_package'" in refused("no_such_package.inner:make")


def test_a_missing_callable_names_the_nearest(write):
    name = write("def train_it():\n    return None\n").replace(":make", ":train")
    message = refused(name)
    assert "has no 'train'" in message
    assert "did you mean 'train_it'?" in message


def test_something_that_cannot_be_called(write):
    assert "make is an int, not a callable" in refused(write("make = 3\n"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('stop')\n", "SystemExit: stop"),
        ("def make(:\n", "SyntaxError"),
    ],
)
def test_an_import_that_raises_shows_the_error_and_its_line(write, body, said):
    message = refused(write(body))
    assert said in message
    assert "line 4" in message
    assert "\n" not in message


def test_a_callable_that_raises_shows_the_error_and_its_line(write):
    message = refused(write("def make():\n    raise RuntimeError('first\\nsecond')\n"))
    assert "make failed: RuntimeError: first" in message
    assert "line 5" in message
    assert "second" not in message


def test_a_callable_that_needs_arguments(write):
    assert "missing 1 required positional argument: 'width'" in refused(write("def make(width):\n    return model\n"))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("None", "returned nothing (None)"),
        ("model", "returned a Linear"),
        ("(model, 1, 2, 3)", "returned a tuple of 4 (Linear, int, int, int)"),
        ("('model', ())", "returned a str as the model"),
        ("(model, 3)", "returned an int as the arguments"),
        ("(model, [1], 3)", "returned an int as the loss"),
        ("(model, 3, len)", "returned an int as the batches"),
        ("(model, (x for x in [1]), len)", "batches (a generator) that can be iterated only once"),
        ("(model, iter([1]), len)", "can be iterated only once"),
    ],
)
def test_a_result_that_is_no_task_is_described(write, result, said):
    assert said in refused(write(f"def make():\n    return {result}\n"))


def test_no_batches(write):
    with pytest.raises(TaskError, match="batches that are empty"):
        load_task(write("def make():\n    return model, [], len\n")).example()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("model(batch)", r"a tensor of shape \(3, 2\)"),
        ("model(batch).sum().item()", "returned a float"),
        ("model(batch).argmax()", "torch.int64"),
        ("None", "returned nothing"),
    ],
)
def test_a_loss_that_is_no_scalar(write, loss, said):
    task = load_task(write(f"def make():\n    return model, [torch.ones(3, 4)], lambda model, batch: {loss}\n"))
    assert task.loss is not None
    with pytest.raises(TaskError, match=said):
        task.loss(task.model, *task.example())
