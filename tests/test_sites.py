"""Names of sites: from expressions, modules and weights, and of the model that is being compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nvfp4c.sites import GraphInput, ModelNames, dotted, find_root, names_of, site_name, under_fsdp


@pytest.mark.parametrize(
    ("expression", "path"),
    [
        ("L['self']", ""),
        ("L['self'].fc1", "fc1"),
        ("L['self']._modules['layers']._modules['0']._modules['fc']", "layers.0.fc"),
        ("L['self']._modules['layers']._modules['0']._parameters['weight']", "layers.0.weight"),
        ("L['self']._buffers['scale']", "scale"),
        ("L['model'].layers[3].mlp", "layers.3.mlp"),
        ("L['self'].model.head", "model.head"),
        ("G['model']._modules['fc']", "fc"),
        ("L['step'].__closure__[0].cell_contents._modules['fc']", "fc"),
    ],
)
def test_dotted(expression: str, path: str) -> None:
    assert dotted(expression) == path


@pytest.mark.parametrize(
    ("module", "weights", "name"),
    [
        ("layers.0.fc", ("layers.0.fc.weight",), "layers.0.fc"),
        ("layers.0.mlp", ("layers.0.mlp.w1",), "layers.0.mlp.w1"),
        ("head", ("embedding.weight", "head.weight"), "head"),
        ("", ("embedding.weight", "head.weight"), "embedding"),
        ("", ("w",), "w"),
        ("attention", ("attention.out_proj.weight",), "attention.out_proj"),
        ("attention", (), "attention"),
        ("adapter", ("base.weight",), "adapter"),
        ("fc", ("fc2.weight",), "fc"),
        ("", (), "matmul"),
        ("", ("",), "matmul"),
    ],
)
def test_site_name(module: str, weights: tuple[str, ...], name: str) -> None:
    """A weight inside the module gives the name; of the names of a tied weight, the one in this module."""
    assert site_name(module, weights) == name


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32)
        self.head.weight = self.embedding.weight
        self.register_buffer("mix", torch.eye(16))

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens) @ self.mix) * scale)


def compiled_names(model: Callable[..., Any], root: nn.Module | None, *args: Any) -> ModelNames:
    """What `names_of` finds for the graph that Dynamo captures."""
    found = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(names_of(gm, inputs, root))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*args)
    (names,) = found
    return names


TOKENS = torch.randint(0, 32, (2, 4))


def test_inputs_of_a_model() -> None:
    """Parameters and buffers by all their names; data by its argument, whether or not it wants a gradient."""
    model = Model()
    names = compiled_names(model, model, TOKENS, torch.ones(16, requires_grad=True))
    assert set(names.inputs) == {
        GraphInput(("embedding.weight", "head.weight"), True),
        GraphInput(("norm.weight",), True),
        GraphInput(("norm.bias",), True),
        GraphInput(("head.bias",), True),
        GraphInput(("mix",), True),
        GraphInput(("tokens",), False),
        GraphInput(("scale",), False),
    }
    assert names.weights == ("embedding", "head", "mix")


def test_inputs_of_a_function() -> None:
    """Without modules, what is trained is a weight."""

    def function(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return x @ parameters["w"]

    names = compiled_names(function, None, torch.randn(4, 16), {"w": torch.randn(16, 16, requires_grad=True)})
    assert set(names.inputs) == {GraphInput(("x",), False), GraphInput(("parameters.w",), True)}
    assert names.weights == ()
    assert names.modules is None


def test_inputs_of_a_function_with_modules() -> None:
    """Where the root is not known, modules are named as the function reaches them; trained data is no weight."""
    model = nn.Sequential(nn.Linear(16, 16))

    def function(x: Tensor) -> Tensor:
        return model(x)

    names = compiled_names(function, None, torch.randn(4, 16, requires_grad=True))
    assert set(names.inputs) == {
        GraphInput(("x",), False),
        GraphInput(("0.weight",), True),
        GraphInput(("0.bias",), True),
    }


def test_symbolic_sizes_are_no_weights() -> None:
    x = torch.randn(6, 16)
    torch._dynamo.mark_dynamic(x, 0)
    names = compiled_names(lambda x: x.reshape(-1), None, x)
    assert {described.is_weight for described in names.inputs} == {False}


def placeholder(name: str, **meta: object) -> fx.Node:
    node = fx.Graph().placeholder(name)
    node.meta.update(meta)
    return node


def test_input_of() -> None:
    """AOTAutograd says which input a placeholder is; where it does not, its place does. Tangents are no inputs."""
    w, x = GraphInput(("w",), True), GraphInput(("x",), False)
    names = ModelNames((w, x))
    assert [names.input_of(placeholder("primals"), position) for position in (0, 1)] == [w, x]
    described = type("Description", (), {"idx": 1})()
    assert names.input_of(placeholder("primals", desc=described), 0) is x
    nothing = GraphInput((), False)
    assert names.input_of(placeholder("tangents", partitioner_tag="is_backward"), 0) == nothing
    assert names.input_of(placeholder("seed"), 7) == nothing


def test_module_of() -> None:
    """The innermost module of the stack, by its identity where the model is known, else by its path."""
    stack = {"111": ("L['self']", Model), "222@1": ("L['self'].layers[0]", nn.Linear)}
    assert ModelNames(modules={"222": "layers.0"}).module_of(placeholder("x", nn_module_stack=stack)) == "layers.0"
    assert ModelNames().module_of(placeholder("x", fwd_nn_module_stack=stack)) == "layers.0"
    assert ModelNames(modules={"111": ""}).module_of(placeholder("x", nn_module_stack={"111": stack["111"]})) == ""
    assert ModelNames().module_of(placeholder("x")) == ""


def roots_of(call: Callable[[Callable[..., Any]], object]) -> list[nn.Module | None]:
    """The root found while `call` runs something compiled with the backend that it is given."""
    found = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(find_root())
        return gm.forward

    torch._dynamo.reset()
    call(backend)
    return found


class Outer(nn.Module):
    """A model one part of which is compiled."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


X = torch.randn(4, 16)


def test_root_of_a_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    (root,) = roots_of(lambda backend: torch.compile(model, backend=backend)(X))
    assert root is model


def test_root_of_a_compiled_part() -> None:
    """Names are those of what was compiled, whatever it lies in."""
    part = nn.Sequential(nn.Linear(16, 16))
    (root,) = roots_of(lambda backend: Outer(torch.compile(part, backend=backend))(X))
    assert root is part


def test_root_of_a_model_compiled_in_place() -> None:
    model = Outer(nn.Linear(16, 16))

    def call(backend: Callable[..., Any]) -> None:
        model.compile(backend=backend)
        model(X)

    (root,) = roots_of(call)
    assert root is model


def test_root_of_a_function_called_by_a_model() -> None:
    """The outermost module knows the most names."""

    def build(backend: Callable[..., Any]) -> nn.Module:
        return Outer(Outer(torch.compile(lambda x: x * 2, backend=backend)))

    models = []
    (root,) = roots_of(lambda backend: models.append(build(backend)) or models[0](X))
    assert root is models[0]


def test_a_function_has_no_root() -> None:
    assert roots_of(lambda backend: torch.compile(lambda x: x * 2, backend=backend)(X)) == [None]


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


@pytest.mark.parametrize("wrapped", ["the compiled module", "the module around it", "nothing"])
def test_fsdp_is_noticed(process_group: None, wrapped: str) -> None:
    """FSDP gathers parameters into the same memory again and again, and leaves their versions as they were."""
    found: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: list[object]) -> object:
        found.append(under_fsdp())
        return gm.forward

    model = nn.Sequential(Layer(), Layer())
    mesh = init_device_mesh("cpu", (1,))
    if wrapped != "nothing":
        fully_shard(model[0] if wrapped == "the compiled module" else model, mesh=mesh)
    torch._dynamo.reset()
    model[0].compile(backend=backend)
    model(torch.randn(2, 4))
    torch._dynamo.reset()
    assert found == [wrapped != "nothing"]
