"""Looking inside a compiled step: the graph it was made from, and what its kernels were given and gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from graphs import copied
from torch import Tensor, fx, nn

from nvfp4c import dialect, numerics, philox
from nvfp4c.backend import compile_graph
from nvfp4c.formats import block_count, padded
from nvfp4c.options import parse
from nvfp4c.passes.insert_scaling import SEED


@dataclass(frozen=True)
class KernelCall:
    """One call of a CPU kernel: "hadamard", "quantize", "operand" or "dequantize"."""

    kernel: str
    x: Tensor
    others: tuple[Any, ...]
    result: Any

    @property
    def seed(self) -> Tensor | None:
        """Of stochastic rounding."""
        return self.others[3] if self.kernel in ("quantize", "operand") else None

    @property
    def values(self) -> Tensor:
        """code * scale of what a "quantize" or "operand" call gave."""
        if self.kernel == "operand":
            return self.result
        codes, scales = self.result
        return numerics.block_values(numerics.unpack(codes), scales)[..., : self.x.shape[-1]]


def expected_values(x: Tensor, block: Sequence[int], rounding: str, seed: Tensor | None, stream: Tensor) -> Tensor:
    """code * scale of a matrix as `numerics.quantize` quantises it, with the bits of this seed and stream."""
    bits = None
    if rounding == "stochastic":
        assert seed is not None
        blocks = x.shape[0] * block_count(x.shape[1])
        bits = philox.random_bytes(seed, int(stream), blocks).reshape(x.shape[0], padded(x.shape[1]))
    found = numerics.quantize(x, block=tuple(block), rounding=rounding, random_bits=bits)
    return numerics.block_values(numerics.unpack(found.codes), found.scales)[:, : x.shape[1]]


def check_kernels(calls: Sequence[KernelCall]) -> None:
    """Every operand of a step is what numerics makes of the tensor that its kernel was given, bit for bit."""
    assert calls
    for call in calls:
        if call.kernel == "hadamard":
            assert torch.equal(call.result, numerics.hadamard(call.x, call.others[0]))
        elif call.kernel in ("quantize", "operand"):
            amax, block, rounding, seed, stream = call.others
            assert torch.equal(amax, numerics.tensor_amax(call.x))
            assert torch.equal(call.values, expected_values(call.x, block, rounding, seed, stream))


@dataclass
class Watched:
    """The backend with these options, keeping the SCALED stage of each graph and the arguments of its last call.

    Who observes passes is not served from a cache, where no pass would run.
    """

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

    def _keep(self, name: str, stage: dialect.Stage, graph: fx.Graph) -> None:
        if name == "share":
            self.graphs.append(fx.GraphModule(graph.owning_module, copied(graph)))


class Reference(fx.Interpreter):
    """Runs a joint graph with reference operations and a given seed. quantised: tensor and values of each operand."""

    def __init__(self, graph: fx.GraphModule, seed: Tensor) -> None:
        super().__init__(graph)
        self.seed = seed
        self.quantised: list[tuple[Tensor, Tensor]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is SEED:
            return self.seed
        result = super().call_function(target, args, kwargs)
        if target is dialect.QUANTIZE:
            codes, scales = result
            values = numerics.block_values(numerics.unpack(codes), scales)[..., : args[0].shape[-1]]
            self.quantised.append((args[0], values))
        return result


class Mlp(nn.Module):
    """Two layers, a residual and a head, without any function whose result depends on how it is computed.

    Sums of so few code * scale products are exact in FP32 whatever their order, so two correct ways to compute a step
    agree to the last bit.
    """

    def __init__(self, width: int = 32, hidden: int = 64, out: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.head = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))
