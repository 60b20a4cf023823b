"""Every error this project raises on purpose: what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Nvfp4Error(Exception):
    """Base of all errors raised on purpose; its text is a whole sentence meant for the user."""


class OptionError(Nvfp4Error, ValueError):
    """An option, recipe or target name that does not exist, or a value it cannot take."""


class PlanError(Nvfp4Error, ValueError):
    """A precision plan that cannot be read, or that names a site the model does not have."""


class BudgetError(Nvfp4Error, ValueError):
    """A budget that no precision plan can meet; the text names the nearest one that can be met."""


class TargetError(Nvfp4Error, RuntimeError):
    """This machine, or this version of PyTorch, cannot compile for the target asked for."""


class TaskError(Nvfp4Error, ValueError):
    """A task that cannot be imported, or that returns something that is not a task."""


class DataError(Nvfp4Error, ValueError):
    """Text or batches that cannot be used."""


class NumericsError(Nvfp4Error, ValueError):
    """Arguments that the reference arithmetic does not accept."""


class VerifyError(Nvfp4Error, AssertionError):
    """A graph that is not legal at its stage: a fault of a pass, never of the user."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A clause naming what is closest to `word`, or all `choices` when nothing is close."""
    options = sorted(set(choices))
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(options)}"
