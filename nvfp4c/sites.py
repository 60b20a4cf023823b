"""Names of sites: the same for a layer in training and inference graphs, and across graph breaks.

A site is named after its module (`layers.3.mlp.up_proj`), or after its weight where that is not called "weight"
(`layers.3.mlp.w1`). A second use in the same graph gets an ordinal (`decoder#1`). Names are found through the
identity of modules and parameters in the model being compiled; where no model is known (a compiled function) they come
from the expressions by which the function reaches its modules.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule


@dataclass(frozen=True)
class GraphInput:
    """One input of a captured graph. names: where it is found in the model (several when tied)."""

    names: tuple[str, ...]
    is_weight: bool


@dataclass(frozen=True)
class ModelNames:
    """Everything passes may know about the model beyond the graph.

    inputs: of the captured graph, in order. modules: name of each module by its id. weights: names of all sites that
    the whole model could have, empty when the model is not known. held: parameters and buffers that the graph holds
    itself, instead of as inputs, by their attribute; so it is where Inductor freezes weights.
    """

    inputs: tuple[GraphInput, ...] = ()
    modules: Mapping[str, str] | None = None
    weights: tuple[str, ...] = ()
    held: Mapping[str, GraphInput] = field(default_factory=dict)

    def input_of(self, placeholder: fx.Node, position: int) -> GraphInput:
        """What a placeholder of the joint graph is; `position` is its place among the graph's primal inputs."""
        described = placeholder.meta.get("desc")
        attribute = getattr(described, "target", None)
        if attribute is not None:
            return self.held.get(attribute, GraphInput((), False))
        index = getattr(described, "idx", position)
        if placeholder.meta.get("partitioner_tag") == "is_backward" or not 0 <= index < len(self.inputs):
            return GraphInput((), False)
        return self.inputs[index]

    def module_of(self, node: fx.Node) -> str:
        """Name of the innermost module that a node belongs to, "" for none."""
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
        if not stack:
            return ""
        key, (path, _) = list(stack.items())[-1]
        name = (self.modules or {}).get(str(key).partition("@")[0])
        return dotted(path) if name is None else name


ARGUMENT = re.compile(r"L\['(\w+)'\]((\[[^\]]+\])*)")
"""How Dynamo reaches an argument, or another local variable, of the function that it compiles, or an item of one."""


def dotted(expression: str) -> str:
    """`L['model']._modules['layers'][0].fc` to `layers.0.fc`: how Dynamo reaches something, as a path in its model."""
    text = re.sub(r"^[LG]\['\w+'\](.*\.cell_contents)?", "", expression)
    text = re.sub(r"\.?(_modules|_parameters|_buffers)(?=\[)", "", text)
    text = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", text)
    return text.strip(".")


def site_name(module: str, weight_names: Iterable[str]) -> str:
    """The name of a matmul in `module` whose weight is known under these names."""
    names = tuple(weight_names)
    inside = [name for name in names if module == "" or name.startswith(f"{module}.")]
    chosen = inside[0] if inside else (f"{module}." if module else names[0] if names else "")
    return chosen.removesuffix(".weight").rstrip(".") or "matmul"


def find_root() -> nn.Module | None:
    """The model being compiled: the nearest `torch.compile`d module on the call stack, else the outermost module."""
    outermost = None
    for candidate in _called_modules():
        if isinstance(candidate, OptimizedModule):
            return candidate._orig_mod
        if not isinstance(candidate, fx.GraphModule):
            outermost = candidate
    return outermost


def under_fsdp() -> bool:
    """Whether a module on the call stack is managed by FSDP, which fills parameters anew without a new version."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    managed = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    return any(isinstance(module, managed) for module in _called_modules())


def _called_modules() -> Iterator[nn.Module]:
    """The modules whose methods are on the call stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, nn.Module):
            yield candidate
        frame = frame.f_back


def names_of(gm: fx.GraphModule, inputs: Iterable[object], root: nn.Module | None) -> ModelNames:
    """Names for one graph that Dynamo captured from `root`, with its example inputs."""
    known: dict[int, list[str]] = {}
    modules = None
    weights: tuple[str, ...] = ()
    if root is not None:
        for name, tensor in _held(root):
            known.setdefault(id(tensor), []).append(name)
        modules = {str(id(module)): name for name, module in root.named_modules()}
        weights = weight_sites(root)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    found = [(_source(node), node.name, value) for node, value in zip(placeholders, inputs, strict=True)]
    arguments_are_data = any(_is_held(source, value) for source, _, value in found)
    described = tuple(_describe(*each, known, arguments_are_data) for each in found)
    own = {
        name: GraphInput(tuple(known.get(id(tensor), ())) or (name,), True)
        for name, tensor in (*gm.named_parameters(), *gm.named_buffers())
    }
    return ModelNames(described, modules, weights, own)


def weight_sites(root: nn.Module) -> tuple[str, ...]:
    """Names of all sites that a model could have, each after its weight; what rules of a plan are checked against."""
    return tuple(name.removesuffix(".weight") for name, tensor in _held(root) if tensor.dim() >= 2)


def _held(root: nn.Module) -> tuple[tuple[str, torch.Tensor], ...]:
    """Parameters and buffers of a model; tied ones under each of their names."""
    return (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))


def _source(placeholder: fx.Node) -> str:
    """The expression by which Dynamo reaches an input, "" where it is not known."""
    name = getattr(getattr(placeholder.meta.get("grapharg"), "source", None), "name", "")
    return name() if callable(name) else name


def _is_held(source: str, value: object) -> bool:
    """Whether a module holds an input as its parameter or buffer."""
    return isinstance(value, nn.Parameter) or "_parameters[" in source or "_buffers[" in source


def _describe(
    source: str, placeholder: str, value: object, known: Mapping[int, list[str]], arguments_are_data: bool
) -> GraphInput:
    """A tensor counts as a weight when a module holds it, or when it is trained. A function's own arguments are its
    weights only where no module has any: elsewhere they are data, whose gradient somebody wants."""
    if not isinstance(value, torch.Tensor):
        return GraphInput((), False)
    argument = ARGUMENT.fullmatch(source)
    name = dotted(argument[1] + argument[2]) if argument else dotted(source) or placeholder
    trained = value.requires_grad and value.is_leaf and not (argument and arguments_are_data)
    return GraphInput(tuple(known.get(id(value), ())) or (name,), _is_held(source, value) or trained)
