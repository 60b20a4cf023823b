"""What the tests of the backend share: one cache of compiled code, one thread, and a way to look inside a compiled step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from nvfp4c import numerics, philox
from nvfp4c.backend import compile_graph
from nvfp4c.codegen import cpu
from nvfp4c.dialect import QUANTIZE, Stage
from nvfp4c.formats import block_count, padded
from nvfp4c.options import parse
from nvfp4c.passes.insert_scaling import SEED


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code compiled by one test is found by the next. A cache folder set by the caller is used, and kept."""
    with pytest.MonkeyPatch.context() as patch:
        if "TORCHINDUCTOR_CACHE_DIR" not in __import__("os").environ:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class KernelCall:
    """One call of a CPU kernel while a compiled step ran: its name, arguments and result."""

    kernel: str
    x: Tensor
    others: tuple[Any, ...]
    result: Any


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[KernelCall]:
    """All calls of CPU kernels, in order, as they are made."""
    calls: list[KernelCall] = []
    original = cpu._call

    def recorded(function: Callable[..., Any], x: Tensor, *others: Any) -> Any:
        result = original(function, x, *others)
        calls.append(KernelCall(function.__name__.strip("_"), x.detach().clone(), others, result))
        return result

    monkeypatch.setattr(cpu, "_call", recorded)
    return calls


@dataclass
class Watched:
    """The backend, keeping of each graph the SCALED stage and the arguments of its last call."""

    options: dict[str, object]
    graphs: list[fx.GraphModule] = field(default_factory=list)
    arguments: list[Sequence[Any]] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        number = len(self.arguments)
        self.arguments.append(())
        compiled = compile_graph(gm, inputs, parse(self.options), [self._keep])

        def run(*arguments: Any) -> Any:
            self.arguments[number] = arguments
            return compiled(*arguments)

        return run

    def _keep(self, name: str, stage: Stage, graph: fx.Graph) -> None:
        if name == "share":
            copy = fx.Graph()
            copy.output(copy.graph_copy(graph, {}))
            self.graphs.append(fx.GraphModule(graph.owning_module, copy))


class Reference(fx.Interpreter):
    """Runs a joint graph at the SCALED stage with reference operations and a given seed, noting what is quantised."""

    def __init__(self, graph: fx.GraphModule, seed: Tensor) -> None:
        super().__init__(graph)
        self.seed = seed
        self.quantised: dict[tuple[object, ...], Tensor] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is SEED:
            return self.seed
        result = super().call_function(target, args, kwargs)
        return result
