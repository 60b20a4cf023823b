"""Capture the graphs that the backend would see, without compiling them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from nvfp4c.sites import ModelNames, names_of


@dataclass(frozen=True)
class CapturedGraph:
    """A joint (or inference) graph, and the names of what is in it."""

    module: fx.GraphModule
    names: ModelNames

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


@dataclass
class Recorder:
    """A Dynamo backend that keeps a copy of every graph, then runs it as it is."""

    root: nn.Module | None
    graphs: list[CapturedGraph] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names = names_of(gm, inputs, self.root)

        def partition(joint: fx.GraphModule, arguments: Sequence[Any], **kwargs: Any) -> Any:
            self._keep(joint, names)
            return min_cut_rematerialization_partition(joint, arguments, **kwargs)

        def inference(module: fx.GraphModule, arguments: Sequence[Any]) -> Callable[..., Any]:
            self._keep(module, names)
            return module.forward

        backend = aot_autograd(
            fw_compiler=lambda module, arguments: module.forward,
            inference_compiler=inference,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        return backend(gm, inputs)

    def _keep(self, module: fx.GraphModule, names: ModelNames) -> None:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(module.graph, copies)
        graph.output(output)
        self.graphs.append(CapturedGraph(fx.GraphModule(module, graph), names))


def capture(model: Callable[..., Any], *args: Any, call: Callable[..., Any] | None = None) -> tuple[CapturedGraph, ...]:
    """The graphs of one call of `model(*args)`, or of `call(model, *args)`; the call is really made.

    A joint graph where something needs a gradient, else a forward graph. Dynamo's own state is left as it was found,
    except that what it compiled for this model is dropped.
    """
    recorder = Recorder(model if isinstance(model, nn.Module) else None)
    run_with(recorder, model, *args, call=call)
    return tuple(recorder.graphs)


def run_with(
    backend: Callable[..., Any], model: Callable[..., Any], *args: Any, call: Callable[..., Any] | None = None
) -> None:
    """One call, as in `capture`, of a model that this Dynamo backend is given the graphs of."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    try:
        if call is None:
            compiled(*args)
        else:
            call(compiled, *args)
    finally:
        torch._dynamo.reset()
