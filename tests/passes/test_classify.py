"""classify: which layer and role each matmul belongs to, in training and inference, and what cannot run in FP4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graphs import captured, found_in, run_step, text, trace
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nvfp4c.capture import capture
from nvfp4c.dialect import Stage, matmul_of
from nvfp4c.passes.classify import Classify, origin
from nvfp4c.pipeline import Step
from nvfp4c.sites import GraphInput, ModelNames

aten = torch.ops.aten

ACTIVATIONS = "no weight: a product of two activations"
WEIGHTS = "a product of two weights"


class Layer(nn.Module):
    """A module that holds some parameters and sub-modules, and does one thing with them."""

    def __init__(self, function: Callable[..., Tensor], **held: nn.Module | Tensor) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def classified(model: Callable[..., Any], *args: Any, train: bool = True) -> fx.Graph:
    found = captured(model, *args, train=train)
    return run_step(found.graph, Step("classify", Classify(found.names), Stage.CLASSIFIED), Stage.AOT)


def rows(graph: fx.Graph) -> list[str]:
    """`site role left right` of each matmul that nothing stands in the way of."""
    return [found.label for found in found_in(graph) if found.obstacle is None]


def obstacles(graph: fx.Graph) -> list[tuple[str, str]]:
    return [(found.label, found.obstacle) for found in found_in(graph) if found.obstacle is not None]


def sites(graph: fx.Graph) -> list[str]:
    """Sites of the forward matmuls."""
    return [label.split()[0] for label in (found.label for found in found_in(graph)) if " fprop " in label]


@dataclass(frozen=True)
class Case:
    """One way to write a layer. shape: of its input. expected: its three roles."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    expected: tuple[str, str, str]


X_FIRST = ("w fprop x w", "w dgrad dy w", "w wgrad x dy")
W_FIRST = ("w fprop w x", "w dgrad w dy", "w wgrad dy x")
TURNED = ("w fprop x w", "w dgrad dy w", "w wgrad dy x")


def of_module(name: str) -> tuple[str, str, str]:
    return (f"{name} fprop x w", f"{name} dgrad dy w", f"{name} wgrad dy x")


def layer(function: Callable[..., Tensor], **held: nn.Module | Tensor) -> Callable[[], nn.Module]:
    return lambda: Layer(function, **held)


LAYERS = {
    "mm": Case(layer(lambda s, x: torch.mm(x, s.w), w=torch.randn(32, 48)), (16, 32), X_FIRST),
    "mm, weight first": Case(layer(lambda s, x: torch.mm(s.w, x), w=torch.randn(48, 16)), (16, 32), W_FIRST),
    "addmm": Case(
        layer(lambda s, x: torch.addmm(s.b, x, s.w), w=torch.randn(32, 48), b=torch.randn(48)), (16, 32), X_FIRST
    ),
    "bmm": Case(layer(lambda s, x: torch.bmm(x, s.w), w=torch.randn(4, 32, 48)), (4, 16, 32), X_FIRST),
    "baddbmm": Case(
        layer(lambda s, x: torch.baddbmm(s.b, x, s.w), w=torch.randn(4, 32, 48), b=torch.randn(4, 1, 48)),
        (4, 16, 32),
        X_FIRST,
    ),
    "bmm, one weight for all": Case(
        layer(lambda s, x: torch.bmm(x, s.w.expand(4, 32, 48)), w=torch.randn(32, 48)), (4, 16, 32), X_FIRST
    ),
    "matmul 2-D": Case(layer(lambda s, x: x @ s.w, w=torch.randn(32, 48)), (16, 32), X_FIRST),
    "matmul 3-D": Case(layer(lambda s, x: x @ s.w, w=torch.randn(32, 48)), (4, 16, 32), X_FIRST),
    "matmul 4-D": Case(layer(lambda s, x: x @ s.w, w=torch.randn(32, 48)), (2, 3, 16, 32), X_FIRST),
    "matmul of a transpose": Case(layer(lambda s, x: x @ s.w.mT, w=torch.randn(48, 32)), (4, 16, 32), TURNED),
    "einsum": Case(layer(lambda s, x: torch.einsum("bsd,de->bse", x, s.w), w=torch.randn(32, 48)), (4, 8, 32), X_FIRST),
    "einsum, a weight for each expert": Case(
        layer(lambda s, x: torch.einsum("ebd,edf->ebf", x, s.w), w=torch.randn(4, 32, 48)), (4, 8, 32), X_FIRST
    ),
    "einsum, heads": Case(
        layer(lambda s, x: torch.einsum("btd,ndh->bnth", x, s.w), w=torch.randn(4, 32, 48)), (4, 8, 32), X_FIRST
    ),
    "F.linear": Case(
        layer(lambda s, x: F.linear(x, s.w, s.b), w=torch.randn(48, 32), b=torch.randn(48)), (4, 16, 32), TURNED
    ),
    "F.linear of a part": Case(layer(lambda s, x: F.linear(x, s.w[:48]), w=torch.randn(96, 32)), (16, 32), TURNED),
    "F.linear of chunks": Case(
        layer(lambda s, x: F.linear(x, s.w.chunk(2)[1]), w=torch.randn(96, 32)), (16, 32), TURNED
    ),
    "F.linear of a cast": Case(
        layer(lambda s, x: F.linear(x, s.w.float()), w=torch.randn(48, 32).half()), (16, 32), TURNED
    ),
    "nn.Linear": Case(layer(lambda s, x: s.fc(x), fc=nn.Linear(32, 48)), (4, 16, 32), of_module("fc")),
    "nn.Linear without bias": Case(
        layer(lambda s, x: s.fc(x), fc=nn.Linear(32, 48, bias=False)), (16, 32), of_module("fc")
    ),
    "nn.Linear of a vector": Case(layer(lambda s, x: s.fc(x), fc=nn.Linear(32, 48)), (32,), of_module("fc")),
    "Conv1D": Case(
        layer(lambda s, x: s.c(x), c=Conv1D(48, 32)), (4, 16, 32), ("c fprop x w", "c dgrad dy w", "c wgrad x dy")
    ),
}


class After(nn.Module):
    """A layer after an elementwise one with a parameter, so that the layer's input wants a gradient."""

    def __init__(self, inner: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    """Each way to write a layer gives one matmul a role, with the same site in training and in inference."""
    case = LAYERS[name]
    model, x = After(case.build(), case.shape), torch.randn(case.shape)
    trained, inferred = classified(model, x), classified(model, x, train=False)
    assert sorted(rows(trained)) == sorted(f"inner.{label}" for label in case.expected)
    assert rows(inferred) == [f"inner.{case.expected[0]}"]
    assert obstacles(trained) == obstacles(inferred) == []


def test_only_metadata_is_written() -> None:
    """The graph stays as it is, and finding everything a second time finds the same."""
    found = captured(nn.Linear(32, 48), torch.randn(16, 32))
    before = text(found.graph)
    once = found_in(Classify(found.names)(found.graph))
    assert text(found.graph) == before
    assert len(once) == 2
    assert found_in(Classify(found.names)(found.graph)) == once


def test_mlp() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    assert rows(classified(model, torch.randn(16, 32))) == [
        "0 fprop x w",
        "2 fprop x w",
        "2 dgrad dy w",
        "2 wgrad dy x",
        "0 wgrad dy x",
    ]


def test_one_input_of_three_layers() -> None:
    """Weight gradients are told apart although q, k and v read the same tensor."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))

    graph = classified(Attention(), torch.randn(2, 8, 32))
    assert sorted(label for label in rows(graph) if "wgrad" in label) == [f"{name} wgrad dy x" for name in "koqv"]
    assert sites(graph) == ["q", "k", "matmul", "v", "matmul#1", "o"]
    assert obstacles(graph) == [
        ("matmul fprop x x", ACTIVATIONS),
        ("matmul#1 fprop x x", ACTIVATIONS),
        *[("matmul#1 dgrad dy dy", ACTIVATIONS)] * 2,
        *[("matmul dgrad dy dy", ACTIVATIONS)] * 2,
    ]


def test_multihead_attention() -> None:
    model, x = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 8, 32)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    trained, inferred = classified(Wrapped(), x), classified(Wrapped(), x, train=False)
    assert rows(trained) == [
        "attention.in_proj_weight fprop x w",
        "attention.out_proj fprop x w",
        "attention.out_proj dgrad dy w",
        "attention.out_proj wgrad dy x",
        "attention.in_proj_weight wgrad dy x",
    ]
    assert rows(inferred) == rows(trained)[:2]
    assert {reason for _, reason in obstacles(trained) + obstacles(inferred)} == {ACTIVATIONS}
    assert sites(trained) == sites(inferred)


def test_tied_weights() -> None:
    """A head that shares the embedding's weight is named after the head."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.fc = nn.Linear(32, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.fc(self.embedding(tokens)))

    tokens = torch.randint(0, 64, (2, 8))
    graph = classified(Tied(), tokens)
    assert sorted(rows(graph)) == sorted([*of_module("fc"), *of_module("head")])
    assert sites(graph) == sites(classified(Tied(), tokens, train=False)) == ["fc", "head"]


def test_a_layer_called_twice() -> None:
    """The second call has an ordinal, and each call its own gradients."""
    model = Layer(lambda s, x: s.fc(torch.relu(s.fc(x))), fc=nn.Linear(32, 32))
    assert rows(classified(model, torch.randn(16, 32))) == [
        "fc fprop x w",
        "fc#1 fprop x w",
        "fc#1 dgrad dy w",
        "fc#1 wgrad dy x",
        "fc wgrad dy x",
    ]


def test_frozen_weights() -> None:
    """A frozen layer is still a layer; it only has no weight gradient."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].requires_grad_(False)
    assert [label for label in rows(classified(model, torch.randn(16, 32))) if label.startswith("2 ")] == [
        "2 fprop x w",
        "2 dgrad dy w",
    ]


def test_a_buffer_is_a_weight() -> None:
    model = Layer(lambda s, x: s.fc(x) @ s.fixed, fc=nn.Linear(32, 32))
    model.register_buffer("fixed", torch.randn(32, 48))
    assert rows(classified(model, torch.randn(16, 32)))[1] == "fixed fprop x w"


def test_an_input_that_wants_a_gradient_is_no_weight() -> None:
    x = torch.randn(16, 32, requires_grad=True)
    assert rows(classified(nn.Sequential(nn.Linear(32, 48)), x)) == ["0 fprop x w", "0 dgrad dy w", "0 wgrad dy x"]


def test_autocast() -> None:
    """Weights and inputs that autocast converts stay what they are."""
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = classified(model, torch.randn(16, 32))
    assert sorted(rows(graph)) == sorted([*of_module("2"), "0 fprop x w", "0 wgrad dy x"])
    assert {str(node.meta["val"].dtype) for node in graph.nodes if matmul_of(node)} == {"torch.bfloat16"}


def test_graph_breaks() -> None:
    """After a break the names go on as if there were none."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    x = torch.randn(16, 32)
    trained = capture(Broken(), x)
    with torch.no_grad():
        inferred = capture(Broken(), x)
    for graphs in (trained, inferred):
        assert [sites(Classify(found.names)(found.graph)) for found in graphs] == [["layers.0"], ["layers.1"]]
    assert "layers.1 dgrad dy w" in rows(trained[1].graph)


def test_a_compiled_function() -> None:
    """The modules of a function are named as the function reaches them, its own weights as its arguments."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    class Trainer:
        def __init__(self) -> None:
            self.model = model

        def step(self, x: Tensor) -> Tensor:
            return self.model(x).sum()

    def closure(x: Tensor) -> Tensor:
        return model(x).sum()

    def bare(x: Tensor, w: Tensor, others: dict[str, Tensor]) -> Tensor:
        return x @ w @ others["v"]

    x = torch.randn(16, 32)
    w, v = torch.randn(32, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    assert sites(classified(closure, x)) == ["0", "2"]
    assert sites(classified(Trainer().step, x)) == ["model.0", "model.2"]
    assert rows(classified(bare, x, w, {"v": v})) == [
        "w fprop x w",
        "others.v fprop x w",
        "others.v wgrad x dy",
        "others.v dgrad dy w",
        "w wgrad x dy",
    ]


class TwoProducts(torch.autograd.Function):
    """A layer with a backward of its own, which computes its product again to square it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.mm(x, w) ** 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        gradient = 2 * torch.mm(x, w) * dy
        return torch.mm(gradient, w.t()), torch.mm(x.t(), gradient)


def test_a_custom_autograd_function() -> None:
    """What autograd did not make carries no tag, and is recognised all the same; a repeated product keeps its name."""
    model = Layer(lambda s, x: TwoProducts.apply(s.fc(x), s.w), fc=nn.Linear(32, 32), w=torch.randn(32, 48))
    graph = classified(model, torch.randn(16, 32))
    assert [label for label in rows(graph) if label.startswith("w ")] == [
        "w fprop x w",
        "w fprop x w",
        "w dgrad dy w",
        "w wgrad x dy",
    ]
    assert sorted(label for label in rows(graph) if label.startswith("fc ")) == ["fc fprop x w", "fc wgrad dy x"]


def test_a_product_of_two_weights() -> None:
    """B @ A of a low-rank update stays as it is, and so do its gradients; so does what multiplies the result."""
    model = Layer(lambda s, x: x @ (s.b @ s.a), a=torch.randn(4, 32), b=torch.randn(32, 4))
    graph = classified(model, torch.randn(16, 32))
    assert rows(graph) == []
    assert obstacles(graph) == [
        ("b fprop x x", WEIGHTS),
        ("matmul fprop x x", ACTIVATIONS),
        ("matmul dgrad dy dy", ACTIVATIONS),
        *[("b dgrad dy dy", WEIGHTS)] * 2,
    ]


def test_gradients_of_two_weights_are_not_those_of_a_layer() -> None:
    """`w` is the weight of a layer and also a factor of a product of weights, whose gradients are no layer's."""
    model = Layer(lambda s, x: (x @ s.w).sum() + (s.w @ s.v).sum(), w=torch.randn(32, 48), v=torch.randn(48, 16))
    graph = classified(model, torch.randn(16, 32))
    assert rows(graph) == ["w fprop x w", "w wgrad x dy"]
    assert obstacles(graph) == [("w#1 fprop x x", WEIGHTS), *[("w#1 dgrad dy dy", WEIGHTS)] * 2]


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Conv1d(32, 48, 1), (2, 32, 8)),
        (nn.Conv2d(32, 48, 1), (2, 32, 4, 4)),
        (nn.Conv3d(32, 48, 1), (2, 32, 2, 2, 2)),
    ],
)
def test_pointwise_convolution(model: nn.Module, x: tuple[int, ...]) -> None:
    graph = classified(nn.Sequential(model), torch.randn(x))
    assert obstacles(graph) == [("0 fprop x w", "1x1 convolution")]


def test_other_convolutions_are_no_matmuls() -> None:
    assert found_in(classified(nn.Conv2d(32, 48, 3), torch.randn(2, 32, 8, 8))) == []


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.Linear(32, 48).double(), torch.randn(16, 32).double(), "dtype float64"),
        (nn.Linear(32, 48), torch.randn(0, 32), "empty: a dimension is 0"),
        (nn.Linear(0, 48), torch.randn(16, 0), "empty: a dimension is 0"),
        (layer(lambda s, x: x.int() @ s.w.int(), w=torch.randn(32, 48))(), torch.randn(16, 32), "dtype int32"),
        (
            layer(lambda s, x: torch.addmm(s.b, x, s.w, beta=2), w=torch.randn(32, 48), b=torch.randn(48))(),
            torch.randn(16, 32),
            "addmm with alpha or beta",
        ),
        (
            layer(lambda s, x: torch._int_mm(x.to(torch.int8), s.w.to(torch.int8)), w=torch.randn(32, 48))(),
            torch.randn(32, 32),
            "integer matmul",
        ),
    ],
)
def test_obstacles(model: nn.Module, x: Tensor, reason: str) -> None:
    """What cannot run in FP4 is found all the same, with its reason, in inference as in training."""
    with torch.no_grad():
        graph = classified(model, x, train=False)
    ((label, found),) = obstacles(graph)
    assert label.endswith("fprop x w")
    assert found == reason


def hand_made(target: Any, *values: Tensor, **kwargs: Any) -> fx.Graph:
    """A graph of one call, for operands that Dynamo would not hand on."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"arg{index}") for index in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    call = graph.call_function(target, tuple(nodes), kwargs)
    call.meta["val"] = torch.empty(16, 48, device="meta")
    graph.output(call)
    return graph


def test_sparse_operand() -> None:
    graph = hand_made(aten.mm.default, torch.eye(16).to_sparse(), torch.randn(16, 48))
    Classify(ModelNames((GraphInput((), False), GraphInput(("w",), True))))(graph)
    assert obstacles(graph) == [("w fprop x w", "sparse operand (torch.sparse_coo, torch.strided)")]


def test_matrix_times_vector() -> None:
    graph = hand_made(aten.addmv.default, torch.randn(16), torch.randn(16, 32), torch.randn(32))
    Classify(ModelNames((GraphInput(("b",), True), GraphInput(("w",), True), GraphInput((), False))))(graph)
    assert obstacles(graph) == [("w fprop w x", "matrix times vector")]


def test_nothing_is_known_about_the_model() -> None:
    """Without names every operand is an activation."""
    graph = Classify(ModelNames())(trace(lambda x, w: torch.mm(x, w), torch.randn(16, 32), torch.randn(32, 48)))
    assert obstacles(graph) == [("matmul fprop x x", ACTIVATIONS)]


def test_the_type_is_the_first_obstacle() -> None:
    """A product of two activations that are integers is named by what nothing could change."""
    graph = hand_made(aten.mm.default, torch.ones(16, 32).int(), torch.ones(32, 48).int())
    assert obstacles(Classify(ModelNames())(graph)) == [("matmul fprop x x", "dtype int32")]


def test_origin_stops_at_arithmetic() -> None:
    graph = trace(lambda x: (x * 2).t().reshape(-1).chunk(2)[0].bfloat16(), torch.randn(16, 32))
    last = graph.output_node().args[0]
    assert isinstance(last, fx.Node)
    assert origin(last).target is aten.mul.Tensor
