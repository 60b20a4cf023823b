"""A model whose matmuls ask someone: compiled by Dynamo and AOTAutograd, with `passes.intercept`, and run uncompiled.

A watcher gets every call by the number of its session. The model itself is not touched, and other compiled forms of it
stay as they are. Dynamo keeps every backend for good, so a backend holds neither its model nor its watcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.eval_frame import OptimizedModule
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from nvfp4c import pipeline
from nvfp4c.passes.intercept import Observe, Switch
from nvfp4c.plan import EMPTY_PLAN
from nvfp4c.recipe import Recipe
from nvfp4c.sites import ModelNames, names_of

LIBRARY = torch.library.Library("nvfp4_sensitivity", "DEF")


class Watcher(Protocol):
    """Who is asked: shown every graph when it is captured, its matmuls classified and assigned."""

    def captured(self, graph: fx.Graph, names: ModelNames) -> None: ...


class Decider(Watcher, Protocol):
    """Gives the result of every matmul. Arguments: see `passes.intercept.Switch`."""

    def matmul(self, left: Tensor, right: Tensor, bias: Tensor | None, site: str, role: str) -> Tensor: ...


class Observer(Decider, Protocol):
    """Gives the result of the last backward matmul of every site, and of the forward matmul of a site that has no
    other. Arguments: see `passes.intercept.Observe`."""

    def observe(
        self,
        left: Tensor,
        right: Tensor,
        fprop: Sequence[Tensor],
        other: Sequence[Tensor],
        samples: int,
        site: str,
        role: str,
    ) -> Tensor: ...


_sessions: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Watchers by the number that their graphs hold."""

_numbers = count()


def _matmul(session: int, *arguments: Any) -> Tensor:
    decider: Decider = _sessions[session]
    return decider.matmul(*arguments)


def _observe(session: int, *arguments: Any) -> Tensor:
    observer: Observer = _sessions[session]
    return observer.observe(*arguments)


def _fake(session: int, left: Tensor, right: Tensor, *_: object) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


for _definition, _implementation in (
    ("matmul(int session, Tensor left, Tensor right, Tensor? bias, str site, str role) -> Tensor", _matmul),
    (
        "observe(int session, Tensor left, Tensor right, Tensor[] fprop, Tensor[] other, SymInt samples, str site, "
        "str role) -> Tensor",
        _observe,
    ),
):
    _name = _definition.split("(", 1)[0]
    LIBRARY.define(_definition, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4_sensitivity::{_name}", _fake, lib=LIBRARY)

MATMUL = torch.ops.nvfp4_sensitivity.matmul.default
OBSERVE = torch.ops.nvfp4_sensitivity.observe.default


def switched(model: nn.Module, recipe: Recipe, watcher: Decider) -> Callable[..., Any]:
    """The model with `watcher.matmul` in place of every matmul that can run in FP4 under a recipe."""
    return _compiled(model, recipe, watcher, lambda session: Switch(MATMUL, session))


def observed(model: nn.Module, recipe: Recipe, watcher: Observer) -> Callable[..., Any]:
    """The model with `watcher.observe` in place of the last backward matmul of every site, and with `watcher.matmul` in
    place of a forward matmul whose site has no other."""
    return _compiled(model, recipe, watcher, lambda session: Observe(OBSERVE, MATMUL, session))


def plain(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """What the matmul gives that a `Decider` is asked for."""
    if bias is None:
        return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)
    return torch.addmm(bias, left, right) if left.dim() == 2 else torch.baddbmm(bias, left, right)


aten = torch.ops.aten

WHOLE = frozenset(
    {
        aten._to_copy.default,
        aten.gelu.default,
        aten.gelu_backward.default,
        aten.silu.default,
        aten.silu_backward.default,
        aten.native_layer_norm.default,
        aten.native_layer_norm_backward.default,
        aten.native_group_norm.default,
        aten.native_group_norm_backward.default,
        aten._softmax.default,
        aten._softmax_backward_data.default,
        aten._log_softmax.default,
        aten._log_softmax_backward_data.default,
        aten.embedding_dense_backward.default,
    }
)
"""Operations that stay whole. Run uncompiled, what they would become takes several times as long."""

DECOMPOSITIONS = {
    operation: function for operation, function in select_decomp_table().items() if operation not in WHOLE
}
"""Inductor's, but for those."""

ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
)
"""What lies behind a graph break is compiled as the model's own code, where Dynamo counts every compiled form towards
one limit, unless told to keep them apart (since torch 2.12)."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given, if it was: its layers have their own names."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


def _compiled(
    model: nn.Module, recipe: Recipe, watcher: Watcher, make: Callable[[int], pipeline.Pass]
) -> Callable[..., Any]:
    model = uncompiled(model)
    held = ref(model)
    session = next(_numbers)
    _sessions[session] = watcher
    rewrite = make(session)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names = names_of(gm, inputs, held())
        steps = pipeline.decide(recipe, EMPTY_PLAN, names)

        def intercept(module: fx.GraphModule) -> fx.GraphModule:
            graph = pipeline.run(module.graph, steps, "sensitivity")
            _sessions[session].captured(graph, names)
            rewrite(graph)
            module.recompile()
            return module

        def partition(joint: fx.GraphModule, arguments: Sequence[Any], **kwargs: Any) -> Any:
            return min_cut_rematerialization_partition(intercept(joint), arguments, **kwargs)

        return aot_autograd(
            fw_compiler=boxed_nop,
            inference_compiler=lambda module, arguments: boxed_nop(intercept(module), arguments),
            partition_fn=partition,
            decompositions=DECOMPOSITIONS,
        )(gm, inputs)

    compiled = torch.compile(model, backend=backend)
    assert isinstance(compiled, OptimizedModule)
    compiled.forward = torch.compile(_entry(model, session), backend=backend, **ISOLATED)
    return compiled


def _entry(model: nn.Module, session: int) -> Callable[..., Any]:
    """A call of the model with a code object of its own: what Dynamo compiles is kept with that, and goes with it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"watched_{session}")
    return call
