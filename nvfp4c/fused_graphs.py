"""The graphs that a compiled model runs on a GPU, without compiling: forward and backward, partitioned and fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

from nvfp4c import pipeline
from nvfp4c.backend import GraphPass
from nvfp4c.capture import run_with
from nvfp4c.codegen.chips import TARGETS
from nvfp4c.dialect import arguments, matmul_of
from nvfp4c.options import Options
from nvfp4c.sites import names_of
from nvfp4c.tasks import Task

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Half:
    """A fused graph. saved: what the backward reads of it, by the nodes of this graph, as the inputs that it is there.

    title: "forward" or "backward", numbered where the task has several of them.
    """

    title: str
    graph: fx.Graph
    saved: Mapping[fx.Node, fx.Node]


def fused_graphs(task: Task, options: Options, target: str) -> list[Half]:
    """The forward and backward graphs of a task as they are before the target's operations replace the dialect's.

    They come out of Inductor's `compile_fx`, as in the backend: its own passes change what there is to fuse. The task
    itself runs uncompiled. What a forward saves is taken to lie in memory as it was traced: a compiled one may choose
    other strides, as for convolutions.
    """
    found: list[_Halves] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names = names_of(gm, inputs, task.model)
        if names.weights:
            options.plan.check_sites(names.weights)
        packed = TARGETS[target].native_fp4
        joint = pipeline.joint(options.recipe, options.plan, names, packed, options.weight_cache)
        halves = _Halves(target)
        patches = {"joint_custom_pre_pass": GraphPass("emit-joint", joint, key=None)}
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            compile_fx(gm, list(inputs), inner_compile=halves.keep, config_patches=patches)
        found.append(halves)
        return gm.forward

    with torch.set_grad_enabled(task.loss is not None):
        run_with(backend, task.model, *task.example(), call=task.loss)
    return [
        Half(f"{title} {number}" if len(found) > 1 else title, graph, halves.saved if title == FORWARD else {})
        for number, halves in enumerate(found, 1)
        for title, graph in halves.graphs.items()
    ]


@dataclass
class _Halves:
    """What is compiled of one graph that Dynamo captured.

    results: what the forward returns, by the names that the backward knows it by. saved: as in `Half`.
    """

    target: str
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    results: dict[str, fx.Node] = field(default_factory=dict)
    saved: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def keep(self, gm: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
        """Fuse a graph, and keep it, where Inductor would compile it. Nothing calls what is returned."""
        graph = gm.graph
        names = [node.name for node in _results(graph)]
        pipeline.run(graph, pipeline.fusing(self.target), "emit")
        if how.get("is_backward", False):
            given = {node.name: node for node in graph.find_nodes(op="placeholder")}
            self.saved = {node: given[name] for name, node in self.results.items() if name in given}
            self.graphs[BACKWARD] = graph
        else:
            # Fusing makes new nodes for what is saved, at the same places.
            self.results = dict(zip(names, _results(graph), strict=True))
            self.graphs[FORWARD] = graph
        return make_boxed_func(gm.forward)


def _results(graph: fx.Graph) -> list[fx.Node]:
    """What a graph returns, without constants."""
    (output,) = graph.find_nodes(op="output")
    return [node for node in arguments(output)[0] if isinstance(node, fx.Node)]


def sites(half: Half, node: fx.Node) -> tuple[str, ...]:
    """Sites and roles of the matmuls that read what a node computes, in this graph or in the one that it saves for."""
    found: dict[str, None] = {}
    seen = {node}
    waiting = [node]
    for one in waiting:
        matmul = matmul_of(one)
        if matmul is not None:
            found[f"{matmul.site} {matmul.role.value}"] = None
            continue
        readers = [*one.users, *([half.saved[one]] if one in half.saved else [])]
        waiting += [reader for reader in readers if reader not in seen]
        seen.update(readers)
    return tuple(found)
