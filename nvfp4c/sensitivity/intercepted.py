"""A model whose matmuls ask someone: compiled by Dynamo and AOTAutograd, with `passes.intercept`, and run uncompiled.

A watcher gets every call by the number of its session. The model itself is not touched, and other compiled forms of it
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from nvfp4c import pipeline
from nvfp4c.passes.intercept import Observe, Switch
from nvfp4c.plan import EMPTY_PLAN
from nvfp4c.recipe import Recipe
from nvfp4c.sites import ModelNames, names_of

LIBRARY = torch.library.Library("nvfp4_sensitivity", "DEF")


class Watcher(Protocol):
    """Who is asked. Graphs are shown when they are captured, their matmuls classified and assigned."""

    def captured(self, graph: fx.Graph, names: ModelNames) -> None: ...

    def matmul(self, left: Tensor, right: Tensor, bias: Tensor | None, site: str, role: str) -> Tensor: ...

    def observe(
        self, left: Tensor, right: Tensor, fprop: Sequence[Tensor], other: Sequence[Tensor], site: str, role: str
    ) -> Tensor: ...


_sessions: WeakValueDictionary[int, Watcher] = WeakValueDictionary()
_numbers = count()


def _matmul(left: Tensor, right: Tensor, bias: Tensor | None, session: int, site: str, role: str) -> Tensor:
    return _sessions[session].matmul(left, right, bias, site, role)


def _observe(
    left: Tensor, right: Tensor, fprop: Sequence[Tensor], other: Sequence[Tensor], session: int, site: str, role: str
) -> Tensor:
    return _sessions[session].observe(left, right, fprop, other, site, role)


def _fake(left: Tensor, right: Tensor, *_: object) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


for _definition, _implementation in (
    ("matmul(Tensor left, Tensor right, Tensor? bias, int session, str site, str role) -> Tensor", _matmul),
    (
        "observe(Tensor left, Tensor right, Tensor[] fprop, Tensor[] other, int session, str site, str role) -> Tensor",
        _observe,
    ),
):
    _name = _definition.split("(", 1)[0]
    LIBRARY.define(_definition, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4_sensitivity::{_name}", _fake, lib=LIBRARY)

MATMUL = torch.ops.nvfp4_sensitivity.matmul.default
OBSERVE = torch.ops.nvfp4_sensitivity.observe.default


def switched(model: nn.Module, recipe: Recipe, watcher: Watcher) -> Callable[..., Any]:
    """The model with `watcher.matmul` in place of every matmul that can run in FP4 under a recipe."""
    return _compiled(model, recipe, watcher, lambda session: Switch(MATMUL, session))


def observed(model: nn.Module, recipe: Recipe, watcher: Watcher) -> Callable[..., Any]:
    """The model with `watcher.observe` in place of the last backward matmul of every site."""
    return _compiled(model, recipe, watcher, lambda session: Observe(OBSERVE, session))


def _compiled(
    model: nn.Module, recipe: Recipe, watcher: Watcher, make: Callable[[int], pipeline.Pass]
) -> Callable[..., Any]:
    session = next(_numbers)
    _sessions[session] = watcher
    rewrite = make(session)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names = names_of(gm, inputs, model)
        steps = pipeline.decide(recipe, EMPTY_PLAN, names)

        def intercept(module: fx.GraphModule) -> fx.GraphModule:
            graph = pipeline.run(module.graph, steps, "sensitivity")
            watcher.captured(graph, names)
            rewrite(graph)
            module.recompile()
            return module

        def partition(joint: fx.GraphModule, arguments: Sequence[Any], **kwargs: Any) -> Any:
            return min_cut_rematerialization_partition(intercept(joint), arguments, **kwargs)

        return aot_autograd(
            fw_compiler=lambda module, arguments: make_boxed_func(module.forward),
            inference_compiler=lambda module, arguments: make_boxed_func(intercept(module).forward),
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )(gm, inputs)

    return torch.compile(model, backend=backend)
