"""Another plan for a model that is compiled already, as when the last steps of a training run in higher precision.

Dynamo keeps compiled code together with the backend and the options that it was compiled with, and uses it only while
they are equal to those of the call. So a plan is replaced by handing Dynamo equal options with another plan in them:
no code of the old plan can run from then on, in any graph of the model, and nothing else is touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import config, convert_frame
from torch._dynamo.eval_frame import OptimizedModule, _debug_get_cache_entry_list

from nvfp4c import plan as plans
from nvfp4c.backend import nvfp4
from nvfp4c.errors import OptionError
from nvfp4c.plan import EMPTY_PLAN, PrecisionPlan
from nvfp4c.sites import weight_sites

NEXT = "_torchdynamo_orig_backend"
"""By this attribute each link of Dynamo's chain of callbacks knows the next; the last is what `torch.compile` made."""


def set_plan(compiled: Callable[..., Any], plan: object) -> None:
    """Give a compiled model another precision plan; it is compiled once more with it on its next call.

    compiled: what `torch.compile(model, backend="nvfp4")` returned, a module after `module.compile(backend="nvfp4")`,
    or a compiled function. plan: whatever `options["plan"]` takes; None for none.
    To be called between steps. The recipe and the other options stay, as do parameters, hooks, optimizers and random
    number generators. A plan equal to that of the model changes nothing; unless the model has its plan from a file,
    for that may have changed since. A model that is given an earlier plan again mostly finds its code still there.

    Raises OptionError for what is not compiled, or with another backend, and PlanError for a plan that cannot be read
    or that has a rule that names no site of the model. The sites of a function are known only when it is compiled:
    there the next call raises PlanError.
    """
    chosen = plans.get(plan)
    held = _held_options(compiled)
    root = compiled._orig_mod if isinstance(compiled, OptimizedModule) else compiled
    if isinstance(root, nn.Module):
        chosen.check_sites(weight_sites(root))
    old = held.options.get("plan")
    if not isinstance(old, (str, Path)) and plans.get(old) == chosen:
        return
    _make_room(held.compiler)
    held.replace_plan(chosen)


@dataclass(frozen=True)
class HeldOptions:
    """Where Dynamo holds the options of one compiled model. link: the last link but one of its chain of callbacks."""

    link: Any

    @property
    def compiler(self) -> Any:
        """What `torch.compile` made of the name of the backend and the options."""
        return getattr(self.link, NEXT)

    @property
    def options(self) -> dict[str, object]:
        return dict(self.compiler.kwargs.get("options", {}))

    def replace_plan(self, plan: PrecisionPlan) -> None:
        """Never in place: code that is compiled already goes by the object that is replaced here."""
        options = {name: value for name, value in self.options.items() if name != "plan"}
        if plan != EMPTY_PLAN:
            options["plan"] = plan
        compiler = copy.copy(self.compiler)
        others = {name: value for name, value in compiler.kwargs.items() if name != "options"}
        compiler.kwargs = {**others, "options": options} if options else others
        setattr(self.link, NEXT, compiler)


def _held_options(compiled: Callable[..., Any]) -> HeldOptions:
    """Raises OptionError where there are none, or they are of another backend."""
    link = _callback(compiled)
    while hasattr(getattr(link, NEXT, None), NEXT):
        link = getattr(link, NEXT)
    compiler = getattr(link, NEXT, None)
    if getattr(compiler, "compiler_fn", None) is not nvfp4:
        name = getattr(compiler, "compiler_name", None) or getattr(compiler, "__name__", repr(compiler))
        raise OptionError(f"this was compiled with the backend {name!r}, which has no plans; use backend='nvfp4'")
    return HeldOptions(link)


def _callback(compiled: Callable[..., Any]) -> object:
    """What Dynamo calls for each frame of a compiled model; the first link of the chain."""
    if isinstance(compiled, OptimizedModule):
        return compiled.dynamo_ctx.callback
    function = getattr(compiled, "_compiled_call_impl", None) if isinstance(compiled, nn.Module) else compiled
    if callable(function) and hasattr(function, "_torchdynamo_orig_callable"):
        return inspect.getclosurevars(function).nonlocals["callback"]
    raise OptionError(f"set_plan was given {_describe(compiled)}; call it on what torch.compile returned")


def _describe(found: object) -> str:
    kind = f"an object of type {type(found).__name__}"
    for name, module in found.named_modules() if isinstance(found, nn.Module) else ():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            return f"{kind} that is not compiled itself, only parts of it are, such as {name!r}"
    return f"{kind}, which is not compiled"


def _make_room(compiler: object) -> None:
    """Forget all code of a frame where the next plan could need more than Dynamo keeps of it; it would then run the
    frame uncompiled. A plan may need as many pieces of code as the last one did: for training, evaluation, shapes."""
    for code in _compiled_codes():
        entries = _debug_get_cache_entry_list(code)
        needed = sum(entry.backend == compiler for entry in entries)
        if needed and len(entries) + needed > config.recompile_limit:
            reset_code(code)


def _compiled_codes() -> Iterator[CodeType]:
    """Every function that Dynamo has compiled and that still exists."""
    for reference in convert_frame.input_codes.seen:
        code = reference()
        if code is not None:
            yield code
