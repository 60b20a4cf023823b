"""The graphs that a compiled model runs on a GPU, without compiling: forward and backward, partitioned and fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import fake_tensor_prop

from nvfp4c import pipeline
from nvfp4c.capture import CapturedGraph, capture
from nvfp4c.codegen.chips import TARGETS
from nvfp4c.dialect import arguments, matmul_of
from nvfp4c.options import Options
from nvfp4c.passes.graph_edit import backward_nodes
from nvfp4c.tasks import Task


@dataclass(frozen=True)
class Half:
    """A fused graph. saved: what the backward reads of it, by the nodes of this graph, as the inputs that it is there.

    title: "forward" or "backward", numbered where the task has several of them.
    """

    title: str
    graph: fx.Graph
    saved: Mapping[fx.Node, fx.Node]


def fused_graphs(task: Task, options: Options, target: str) -> list[Half]:
    """The forward and backward graphs of a task as they are before the target's operations replace the dialect's."""
    with torch.set_grad_enabled(task.loss is not None):
        captured = capture(task.model, *task.example(), call=task.loss)
    halves: list[Half] = []
    for number, one in enumerate(captured, 1):
        if one.names.weights:
            options.plan.check_sites(one.names.weights)
        packed = TARGETS[target].native_fp4
        steps = (*pipeline.decide(options.recipe, options.plan, one.names), *pipeline.rewrite(packed))
        steps += pipeline.remember(one.names, "off" if packed else options.weight_cache)
        pipeline.run(one.graph, steps, "emit-joint")
        forward, *backward = partitioned(one)
        inputs = {node.name: node for module in backward for node in module.graph.find_nodes(op="placeholder")}
        names = [node.name for node in _results(forward.graph)]
        _fuse(forward, {}, target)
        # Fusing makes new nodes for what is saved, at the same places.
        results = dict(zip(names, _results(forward.graph), strict=True))
        for module in backward:
            _fuse(module, results, target)
        saved = {node: inputs[name] for name, node in results.items() if name in inputs}
        suffix = f" {number}" if len(captured) > 1 else ""
        halves.append(Half(f"forward{suffix}", forward.graph, saved))
        halves += [Half(f"backward{suffix}", module.graph, {}) for module in backward]
    return halves


def partitioned(captured: CapturedGraph) -> tuple[fx.GraphModule, ...]:
    """The forward and the backward graph that AOTAutograd would make of a joint graph; an inference graph as it is.

    A joint graph returns what the forward gives, then a gradient for each input of the forward.
    """
    backward = backward_nodes(captured.graph)
    if not backward:
        return (captured.module,)
    inputs = [node for node in captured.graph.find_nodes(op="placeholder") if node not in backward]
    (output,) = captured.graph.find_nodes(op="output")
    count = len(arguments(output)[0]) - len(inputs)
    joint = fx.GraphModule(captured.module, captured.graph)
    return min_cut_rematerialization_partition(joint, (), num_fwd_outputs=count)


def _results(graph: fx.Graph) -> list[fx.Node]:
    """What a graph returns, without constants."""
    (output,) = graph.find_nodes(op="output")
    return [node for node in arguments(output)[0] if isinstance(node, fx.Node)]


def _fuse(module: fx.GraphModule, given: Mapping[str, fx.Node], target: str) -> None:
    """The passes that gather what one kernel can compute.

    given: what an input is in another graph, by its name. As in Inductor, values are derived anew first: strides too
    are then those of what is really saved.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    inputs = [given.get(node.name, node).meta["val"] for node in graph.find_nodes(op="placeholder")]
    fake_tensor_prop(module, inputs, force_allow_non_fake_inputs=True)
    pipeline.run(graph, pipeline.fusing(target), "emit")


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
