"""Graphs for tests: writing them as functions, running them, and printing them so that two can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from nvfp4c import pipeline
from nvfp4c.capture import CapturedGraph, capture
from nvfp4c.dialect import ASSIGNMENT, MATMUL, OPERATIONS, Assignment, Matmul, Stage, matmul_of
from nvfp4c.formats import DEFAULT_SIGNS, TILE_BLOCK
from nvfp4c.passes.insert_scaling import SEED
from nvfp4c.pipeline import Step
from nvfp4c.plan import PrecisionPlan
from nvfp4c.prologue import Prologue
from nvfp4c.recipe import Recipe
from nvfp4c.region import Output, Region
from nvfp4c.sites import ModelNames
from nvfp4c.verify import verify

aten = torch.ops.aten
nvfp4 = torch.ops.nvfp4

SIGNS = list(DEFAULT_SIGNS)
SEED_VALUE = 20250929


def trace(function: Callable[..., Any], *inputs: Tensor | int) -> fx.Graph:
    """The aten graph of a function of tensors like these, with fake values and placeholders named as its arguments.

    Nothing is decomposed: the functions are written in the operations that passes see.
    """
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(given) if isinstance(given, Tensor) else given for given in inputs]
        module = make_fx(function)(*fakes)
    graph = module.graph
    names = function.__code__.co_varnames
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=False):
        node._rename(name)
        node.target = name
    return graph


def bf16(*shape: int) -> Tensor:
    """A random matrix, for `trace`."""
    return torch.randn(shape).bfloat16()


def turned(x: Tensor) -> Tensor:
    """The transpose of each matrix, as one node."""
    return aten.permute(x, [*range(x.dim() - 2), x.dim() - 1, x.dim() - 2])


def text(graph: fx.Graph) -> str:
    """One line a node, in order. Nodes are numbered by operation, so equal graphs print equally whatever the names."""
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0], names)}")
            continue
        if node.op == "placeholder":
            names[node] = f"%{node.target}"
            lines.append(f"{names[node]} = placeholder")
            continue
        call = _short(node.target)
        stem = call.split(".")[1] if "." in call else call
        counts[stem] += 1
        names[node] = f"%{stem}" + (f"_{counts[stem]}" if counts[stem] > 1 else "")
        arguments = [_argument(argument, names) for argument in node.args]
        if node.target is nvfp4.region.default and len(node.args[0]) == 1:
            arguments[0] = arguments[0][1:-1]
        arguments += [f"{key}={_argument(given, names)}" for key, given in node.kwargs.items()]
        lines.append(f"{names[node]} = {call}({', '.join(arguments)})")
    return "\n".join(lines)


def _short(target: Any) -> str:
    """`nvfp4.amax` for torch.ops.nvfp4.amax.default, `aten.sum.dim_IntList` for an overload with a name."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return target if isinstance(target, str) else target.__name__


def _argument(argument: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names[argument]
    if isinstance(argument, (list, tuple)):
        return "SIGNS" if list(argument) == SIGNS else f"[{', '.join(_argument(item, names) for item in argument)}]"
    if isinstance(argument, str) and argument.startswith("{"):
        region = Region.from_json(argument)
        outputs = "; ".join(map(_output, region.outputs))
        return outputs if region.prologue.is_identity else f"{outputs} of {_prologue(region.prologue)}"
    return str(argument)


def _output(output: Output) -> str:
    """`packed columns with SIGNS stochastic 3 by amax 1`, of a region; what is usual is left out."""
    words = [output.form.value]
    words += ["columns"] if output.down else []
    words += ["tiles"] if output.block == TILE_BLOCK else []
    words += ["with SIGNS"] if output.signs == DEFAULT_SIGNS else [] if output.signs is None else [str(output.signs)]
    words += [f"stochastic {output.stream}"] if output.stochastic else []
    words += [f"by amax {output.amax}"] if output.amax else []
    words += [f"of matrix {output.matrix}"] if output.matrix else []
    words += ["native"] if output.native else []
    return " ".join(words)


def _prologue(prologue: Prologue) -> str:
    """`0 full, 1 row: 2 = mul(0, 1) bfloat16 -> 2`."""
    inputs = ", ".join(f"{place} {kind.value}" for place, kind in enumerate(prologue.inputs))
    steps = "; ".join(
        f"{place} = {step.operation}({', '.join(map(str, step.arguments))}) {step.dtype}"
        for place, step in enumerate(prologue.steps, len(prologue.inputs))
    )
    return f"{inputs}: {steps} -> {', '.join(map(str, prologue.results))}"


def regions(graph: fx.Graph) -> list[str]:
    """The regions of a graph, in order: what each of them reads and what it gives."""
    return [line.partition("nvfp4.region")[2] for line in text(graph).splitlines() if "nvfp4.region(" in line]


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph with the same nodes and metadata, to keep one as it was before a pass."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, nodes))
    return copy


def partitioned(graph: fx.Graph) -> tuple[fx.Graph, fx.Graph]:
    """The forward and backward graphs that PyTorch's partitioner makes of a joint graph with one output."""
    module = fx.GraphModule(nn.Module(), copied(graph))
    forward, backward = min_cut_rematerialization_partition(module, (), num_fwd_outputs=1)
    return forward.graph, backward.graph


class Reference(fx.Interpreter):
    """Runs a graph eagerly, where the dialect's operations are the reference arithmetic. The seed is a constant."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is SEED:
            return torch.tensor(SEED_VALUE)
        return super().call_function(target, args, kwargs)


def run(graph: fx.Graph, *inputs: Any, root: nn.Module | None = None) -> list[Any]:
    """What a graph gives on these inputs. root: holds the constants of the graph, if it has any."""
    module = fx.GraphModule(root if root is not None else nn.Module(), graph)
    with torch.no_grad():
        result = Reference(module).run(*inputs)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def example_inputs(graph: fx.Graph, seed: int = 0, symbol: int | None = None) -> list[Any]:
    """Random values for a graph's placeholders, of the shapes and types that they were traced with.

    symbol: value of every symbolic size, instead of the one that it was traced with.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_example(node.meta["val"], generator, symbol) for node in graph.find_nodes(op="placeholder")]


def _example(value: Any, generator: torch.Generator, symbol: int | None) -> Any:
    if isinstance(value, torch.SymInt):
        return _size(value, symbol)
    shape = [_size(size, symbol) for size in value.shape]
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(value.dtype)
    return torch.randint(0, 4, shape, generator=generator).to(value.dtype)


def _size(size: int | torch.SymInt, symbol: int | None) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return size.node.hint if symbol is None else int(expression.subs(dict.fromkeys(expression.free_symbols, symbol)))


def same_bits(left: Any, right: Any) -> bool:
    """Whether two results are the same to the last bit; NaN equals NaN."""
    if isinstance(left, Tensor):
        return (left.dtype, left.shape) == (right.dtype, right.shape) and bool((_bytes(left) == _bytes(right)).all())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


def _bytes(tensor: Tensor) -> Tensor:
    return (
        tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_zeros(1, dtype=torch.uint8)
    )


def run_step(graph: fx.Graph, step: Step, before: Stage) -> fx.Graph:
    """One pass, with the verifier around it."""
    verify(graph, before)
    graph = step.run(graph)
    verify(graph, step.stage)
    return graph


ALL_STEPS = ("classify", "assign", "insert_hadamard", "insert_scaling", "share", "fold_hadamard", "place", "save_sums")


def steps_of(
    recipe: Recipe, names: ModelNames, plan: PrecisionPlan | None = None, packed: bool = False
) -> tuple[Step, ...]:
    """All passes that run on the joint graph. packed: for a target whose products read packed operands."""
    return (*pipeline.decide(recipe, plan or PrecisionPlan(), names), *pipeline.rewrite(packed))


def run_until(
    captured: CapturedGraph, last: str, recipe: Recipe, plan: PrecisionPlan | None = None, packed: bool = False
) -> fx.Graph:
    """A captured graph after the pass called `last`, with the verifier around every pass before it."""
    graph, stage = captured.graph, Stage.AOT
    for step in steps_of(recipe, captured.names, plan, packed):
        graph = run_step(graph, step, stage)
        stage = step.stage
        if step.name == last:
            return graph
    raise AssertionError(f"no pass is called {last!r}")


def captured(model: Callable[..., Any], *args: Any, train: bool = True, call: Any = None) -> CapturedGraph:
    """The only graph of a model, in training or in inference."""
    with torch.set_grad_enabled(train):
        (graph,) = capture(model, *args, call=call)
    return graph


@dataclass(frozen=True)
class Found:
    """A matmul as tests name it: `"fc1 dgrad dy w"`, and what stands in its way."""

    label: str
    obstacle: str | None


def found_in(graph: fx.Graph) -> list[Found]:
    """What `classify` found, in the order of the graph."""
    matmuls = [matmul for node in graph.nodes if (matmul := matmul_of(node)) is not None]
    return [
        Found(f"{matmul.site} {matmul.role.value} {' '.join(kind.value for kind in matmul.operands)}", matmul.obstacle)
        for matmul in matmuls
    ]


def decide(graph: fx.Graph, target: Any, matmul: Matmul, assignment: Assignment) -> None:
    """Write decisions on the only node of this target, as `classify` and `assign` would."""
    (node,) = graph.find_nodes(op="call_function", target=target)
    node.meta[MATMUL], node.meta[ASSIGNMENT] = matmul, assignment


def targets(graph: fx.Graph) -> Counter[str]:
    """How often each operation is called."""
    return Counter(_short(node.target) for node in graph.nodes if node.op == "call_function")


def dialect_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in OPERATIONS]
