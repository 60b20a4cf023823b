"""The Dynamo backend: `torch.compile(model, backend="nvfp4")`.

Inductor does the compiling. It is handed a pass that rewrites the joint forward and backward graph, where the roles of
matmuls are still visible. What compiles the two graphs that the partitioner cuts it into lowers each of them first.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner, fake_tensor_prop
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from nvfp4c import debug, pipeline
from nvfp4c import options as option_parsing
from nvfp4c.codegen import targets
from nvfp4c.codegen.targets import Target
from nvfp4c.errors import TargetError
from nvfp4c.options import Options
from nvfp4c.pipeline import Observer, Step
from nvfp4c.sites import ModelNames, find_root, names_of, under_fsdp

PACKAGE = Path(__file__).parent


class GraphPass(CustomGraphPass):
    """Steps of the pipeline as Inductor runs them.

    key: names everything that their result depends on; None keeps Inductor's caches out, so that the steps do run.
    """

    def __init__(self, title: str, steps: Sequence[Step], key: str | None, observers: Sequence[Observer] = ()) -> None:
        self._title = title
        self._steps = tuple(steps)
        self._key = key
        self._observers = tuple(observers)

    def __call__(self, graph: fx.Graph) -> None:
        pipeline.run(graph, self._steps, self._title, self._observers)

    def uuid(self) -> str | None:
        return self._key


@contextmanager
def no_collection() -> Iterator[None]:
    """Leave garbage for later: compiling makes many objects and few cycles, and a collection looks at all there are, a
    fifth of a second each time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def nvfp4(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured. options, mode: as given to `torch.compile`.

    Raises OptionError, PlanError or TargetError, each saying what to do.
    """
    option_parsing.check_torch()
    return compile_graph(gm, example_inputs, option_parsing.parse(options, mode))


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, observers: Sequence[Observer] = ()
) -> Callable[..., Any]:
    """Compile with options already parsed; each observer sees every graph after every pass."""
    inner_compile: Callable[..., Any] = compile_fx_inner
    patches: dict[str, Any] = dict(list_mode_options(options.mode)) if options.mode != "default" else {}
    if not options.changes_nothing:
        names = names_of(gm, example_inputs, find_root())
        if names.weights:
            options.plan.check_sites(names.weights)
        target = targets.resolve(options.target, device_of(example_inputs))
        if target.name == "cpu":
            check_cpp_compiler()
        targets.get_ready(target)
        table = targets.kernel_table(target, options.product)
        cudagraphs = patches.get("triton.cudagraphs", inductor_config.triton.cudagraphs)
        kept = "off" if table.weight is None or cudagraphs or under_fsdp() else options.weight_cache
        key = None if observers or debug.wanted() else cache_key(gm, options, target, names, kept)
        joint = pipeline.joint(options.recipe, options.plan, names, table.native, kept)
        patches["joint_custom_pre_pass"] = GraphPass("joint", joint, key, observers)
        lower = pipeline.lowering(table)
        inner_compile = lowered_first(lambda graph: pipeline.run(graph, lower, "lower", observers))
    with no_collection():
        compiled: Callable[..., Any] = compile_fx(  # type: ignore[assignment]
            gm, list(example_inputs), inner_compile=inner_compile, config_patches=patches
        )
    return compiled


def lowered_first(lower: Callable[[fx.Graph], object]) -> Callable[..., Any]:
    """What compiles one graph, forward or backward: `lower`, then Inductor.

    As a pass of Inductor's, `lower` would run after Inductor has worked out the value of every node. It would then do
    so once more for all that changed, which is nearly everything.
    """

    def compile_one(gm: fx.GraphModule, example_inputs: Sequence[Any], **how: Any) -> Any:
        with no_collection():
            trace_as_given(gm, example_inputs)
            for module in with_branches(gm):
                lower(module.graph)
                module.recompile()
            return compile_fx_inner(gm, example_inputs, **how)

    return compile_one


def with_branches(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph, and those that its control flow calls."""
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


def trace_as_given(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Work out the values of a graph for its inputs, if any of these lies otherwise in memory than when it was traced:
    Inductor may have chosen other strides for what a forward saves. What could be viewed before may need a copy then.
    """
    traced = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    for before, given in zip(traced, example_inputs, strict=True):
        both = isinstance(before, torch.Tensor) and isinstance(given, torch.Tensor)
        if both and not statically_known_true(sym_eq(before.stride(), given.stride())):
            view_to_reshape(gm)
            for module in with_branches(gm):  # branches are run as they were compiled
                module.recompile()
            fake_tensor_prop(gm, example_inputs)
            return


def device_of(inputs: Iterable[object]) -> torch.device:
    """The device that a graph runs on: the first accelerator among its inputs, else the CPU."""
    devices = [value.device for value in inputs if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def check_cpp_compiler() -> None:
    """Raise TargetError when Inductor would find no C++ compiler."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise TargetError(
            "no C++ compiler found, and Inductor needs one to compile for the CPU; "
            "install g++ or clang++, or set CXX to the one to use"
        ) from error


def cache_key(
    gm: fx.GraphModule, options: Options, target: Target, names: ModelNames, weight_cache: str = "off"
) -> str:
    """Everything that compiled code depends on beyond the graph itself: our sources, the policy, the names of sites."""
    policy = {
        "recipe": options.recipe.to_dict(),
        "plan": options.plan.to_dict(),
        "target": target.name,
        "product": options.product,
        "weight_cache": weight_cache,
        "inputs": [asdict(described) for described in names.inputs],
        "held": {name: asdict(described) for name, described in names.held.items()},
        "weights": list(names.weights),
        "modules": [names.module_of(node) for node in gm.graph.nodes if node.op == "call_function"],
    }
    text = json.dumps(policy, sort_keys=True)
    return hashlib.sha256((source_hash() + text).encode()).hexdigest()


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of the sources that shape compiled code: the package, its passes and its kernels."""
    digest = hashlib.sha256()
    for folder in (PACKAGE, PACKAGE / "passes", PACKAGE / "codegen"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
