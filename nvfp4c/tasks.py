"""Tasks: how a user hands a model to a command.

A task is ``FILE.py:callable`` or ``package.module:callable``. The callable takes no arguments and returns
``(model, batches, loss)``: `batches` can be iterated again and again, and ``loss(model, batch)`` is a scalar tensor.
For commands that need no loss it may return ``(model, args)`` instead; the model is then called as ``model(*args)``.
A `Task` may be returned too: it can also say which batches are held out.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from nvfp4c.errors import TaskError, nearest

Loss = Callable[[nn.Module, Any], Tensor]

FORMS = "(model, batches, loss), or (model, args) for commands that need no loss"


@dataclass(frozen=True)
class Task:
    """A model and what to feed it: either `batches` and `loss`, or `args`; what is not there is None.

    loss: raises TaskError where the user's function returns anything but a scalar tensor. held_out: more batches, for
    a verdict on what was chosen with `batches`.
    """

    name: str
    model: nn.Module
    batches: Iterable[Any] | None = None
    loss: Loss | None = None
    args: tuple[Any, ...] | None = None
    held_out: Iterable[Any] | None = None

    def example(self) -> tuple[Any, ...]:
        """Arguments of one call: of the loss, after the model, (first batch,); of a model without a loss, `args`."""
        if self.args is not None:
            return self.args
        batches, _ = self.training()
        for batch in batches:
            return (batch,)
        raise TaskError(f"{self.name} returned batches that are empty; at least one batch is needed")

    def training(self) -> tuple[Iterable[Any], Loss]:
        """`batches` and `loss`, for a command that cannot do without; TaskError when the task has none."""
        if self.batches is None or self.loss is None:
            raise TaskError(f"{self.name} returned (model, args), but this command needs (model, batches, loss)")
        return self.batches, self.loss


def load_task(name: str) -> Task:
    """Import and call what `name` says, and check what it returns. Raises TaskError saying what is wrong and where."""
    place, separator, attribute = name.rpartition(":")
    if not separator or not place or not attribute:
        raise TaskError(f"{name!r} is not a task; write FILE.py:callable or package.module:callable")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    return _checked(name, _call(name, _callable_in(module, attribute, place)))


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        siblings = [str(file) for file in folder.glob("*.py")] if folder.is_dir() else []
        hint = nearest(str(path), siblings) if siblings else f"there is no Python file in {folder.absolute()}"
        raise TaskError(f"there is no file {path}; {hint}")
    # The folder goes on the path, as `python FILE.py` does it, so that the file can import what lies beside it.
    sys.path.insert(0, str(path.absolute().parent))
    spec = importlib.util.spec_from_file_location(f"nvfp4c_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a name that ends in .py always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise TaskError(f"{path} cannot be imported: {_one_line(error)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    # The current folder goes on the path, as `python -m` does it.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise TaskError(
                f"there is no module {error.name!r}; a file is given with its ending, as in FILE.py:callable, "
                f"a module must be installed or lie below {Path.cwd()}"
            ) from error
        raise TaskError(f"module {name} cannot be imported: {_one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise TaskError(f"module {name} cannot be imported: {_one_line(error)}") from error


def _callable_in(module: ModuleType, attribute: str, place: str) -> Callable[[], Any]:
    if not hasattr(module, attribute):
        own = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        ]
        hint = nearest(attribute, own) if own else "it defines no function; add one that returns " + FORMS
        raise TaskError(f"{place} has no {attribute!r}; {hint}")
    function = getattr(module, attribute)
    if not callable(function):
        raise TaskError(
            f"{place}:{attribute} is {_one(function)}, not a callable; write a function that returns {FORMS}"
        )
    return function


def _call(name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise TaskError(f"{name} failed: {_one_line(error)}") from error


def _checked(name: str, result: Any) -> Task:
    """The task that `result` is; TaskError naming the first thing wrong with it."""
    if isinstance(result, Task):
        parts = (result.model, result.batches, result.loss) if result.args is None else (result.model, result.args)
        return replace(_checked(name, parts), held_out=result.held_out)
    if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
        raise TaskError(f"{name} returned {_describe(result)}; it must return {FORMS}")
    model = result[0]
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name} returned {_one(model)} as the model; it must be a torch.nn.Module")
    if len(result) == 2:
        return Task(name, model, args=_checked_args(name, result[1]))
    _, batches, loss = result
    if not callable(loss):
        raise TaskError(f"{name} returned {_one(loss)} as the loss; it must be a function loss(model, batch)")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TaskError(f"{name} returned {_one(batches)} as the batches; it must be a list or another iterable")
    if iter(batches) is batches:
        raise TaskError(
            f"{name} returned batches ({_one(batches)}) that can be iterated only once; return a list, a "
            "DataLoader, or an object whose __iter__ starts afresh"
        )
    return Task(name, model, batches=batches, loss=_scalar(name, loss))


def _checked_args(name: str, args: Any) -> tuple[Any, ...]:
    if isinstance(args, Tensor):
        return (args,)
    if not isinstance(args, (tuple, list)):
        raise TaskError(
            f"{name} returned {_one(args)} as the arguments; it must return (model, args), where args is a tuple "
            "of what the model is called with"
        )
    return tuple(args)


def _scalar(name: str, loss: Loss) -> Loss:
    """`loss`, refusing whatever is not one number."""

    def scalar_loss(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        if not isinstance(value, Tensor):
            raise TaskError(f"the loss of {name} returned {_describe(value)}; it must return a scalar tensor")
        if value.numel() != 1 or not value.is_floating_point():
            raise TaskError(
                f"the loss of {name} returned a tensor of shape {tuple(value.shape)} and type {value.dtype}; it must "
                "return a floating-point scalar, for example by .mean()"
            )
        return value.squeeze()

    return scalar_loss


def _kind(value: Any) -> str:
    return type(value).__name__


def _one(value: Any) -> str:
    """The kind with its article: a list, an int."""
    kind = _kind(value)
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{_one(value)} of {len(value)} ({', '.join(map(_kind, value))})"
    return "nothing (None)" if value is None else _one(value)


def _one_line(error: BaseException) -> str:
    """Kind, first line of the message, and the place in the user's own code where it was raised."""
    message = next(iter(str(error).splitlines()), "")
    if isinstance(error, SyntaxError):
        return f"{_kind(error)}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in _NOT_THE_USERS]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{_kind(error)}: {message}{place}"


_NOT_THE_USERS = (
    __file__,
    "<frozen importlib._bootstrap>",
    "<frozen importlib._bootstrap_external>",
    importlib.__file__,
)
