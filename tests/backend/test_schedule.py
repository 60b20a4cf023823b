"""Another plan for a compiled model: from the next call on it is as if it had been compiled with it at first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import Mlp
from torch import Tensor, nn
from torch._dynamo.utils import counters

import nvfp4c
from nvfp4c.errors import OptionError, PlanError

OPTIONS = {"recipe": "nvfp4-all"}
FORWARD_BF16 = {"*": {"fprop": "bf16"}}
TOKENS = 48

pytestmark = pytest.mark.usefixtures("eager_kernels")


class Broken(Mlp):
    """As its base, in two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        torch._dynamo.graph_break()
        return self.head(x + self.down(hidden))


class Training:
    """A model, its optimizer, and steps on batches that are always the same."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        self.model, self.call = model, call
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(self, number: int) -> float:
        """The loss. Stochastic rounding draws its seed here, from the generator as the last step left it."""
        x = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        loss = self.call(x).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="nvfp4", options={**OPTIONS, **options})


def graphs() -> int:
    """How many graphs Dynamo has compiled."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("kind", "count"), [(Mlp, 1), (Broken, 2)])
def test_a_new_plan_is_as_if_it_had_always_been_there(kind: type[Mlp], count: int) -> None:
    """Losses bit for bit, with stochastic rounding; each graph is compiled once more, and never again."""
    torch.manual_seed(0)
    model = kind()
    call = compiled(model)
    switched = Training(model, call)
    for number in range(2):
        switched.step(number)

    state = switched.optimizer.state
    generator = torch.get_rng_state()
    parameters = [id(parameter) for parameter in model.parameters()]
    assert nvfp4c.set_plan(call, FORWARD_BF16) is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert switched.optimizer.state is state
    assert [id(parameter) for parameter in model.parameters()] == parameters
    saved = copy.deepcopy((model.state_dict(), switched.optimizer.state_dict()))

    before = graphs()
    losses = [switched.step(number) for number in range(2, 5)]
    assert graphs() - before == count

    other = kind()
    always = Training(other, compiled(other, plan=FORWARD_BF16))
    other.load_state_dict(saved[0])
    always.optimizer.load_state_dict(saved[1])
    torch.set_rng_state(generator)
    assert [always.step(number) for number in range(2, 5)] == losses
    assert [p.tolist() for p in other.parameters()] == [p.tolist() for p in model.parameters()]


def run(call: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return call(torch.linspace(-1, 1, TOKENS * 32).view(TOKENS, 32))


def test_plans_there_and_back() -> None:
    """An equal plan changes nothing, and code of an earlier plan is used again, that of the first one too."""
    model = Mlp()
    call = compiled(model)
    high = run(model)
    low = run(call)
    assert not torch.equal(low, high)
    before = graphs()
    nvfp4c.set_plan(call, nvfp4c.PrecisionPlan())
    assert torch.equal(run(call), low)
    assert graphs() == before
    nvfp4c.set_plan(call, {"*": "bf16"})
    assert torch.equal(run(call), high)
    nvfp4c.set_plan(call, {"*": "bf16"})
    run(call)
    assert graphs() == before + 1
    nvfp4c.set_plan(call, None)
    assert torch.equal(run(call), low)
    assert graphs() == before + 1


def test_a_file_that_was_edited_is_read_again(tmp_path: Path) -> None:
    model = Mlp()
    path = tmp_path / "plan.json"
    nvfp4c.PrecisionPlan().save(path)
    call = compiled(model, plan=path)
    assert not torch.equal(run(call), run(model))
    path.write_text('{"version": 1, "rules": {"*": "bf16"}}')
    nvfp4c.set_plan(call, str(path))
    assert torch.equal(run(call), run(model))


def test_other_models_keep_their_plan() -> None:
    """They may share code of one class, compiled with equal options, that Dynamo keeps once."""
    torch.manual_seed(0)
    first = Mlp()
    second = copy.deepcopy(first)
    options = dict(OPTIONS)
    calls = [torch.compile(model, backend="nvfp4", options=options) for model in (first, second)]
    low = [run(call) for call in calls]
    nvfp4c.set_plan(calls[0], {"*": "bf16"})
    assert torch.equal(run(calls[0]), run(first))
    assert torch.equal(run(calls[1]), low[1])
    assert options == OPTIONS


def test_more_plans_than_dynamo_keeps_code_for() -> None:
    """Dynamo would run the model uncompiled from then on, which looks like a plan of bf16 everywhere."""
    model = Mlp()
    call = compiled(model)
    with torch._dynamo.config.patch(recompile_limit=2):
        for site in ("up", "down", "head"):
            nvfp4c.set_plan(call, {site: "bf16"})
            run(call)
        expected = run(compiled(copy.deepcopy(model), plan={"head": "bf16"}))
        assert torch.equal(run(call), expected)
    assert not torch.equal(expected, run(model))


def test_a_module_compiled_in_place() -> None:
    model = Mlp()
    high = run(model)
    model.compile(backend="nvfp4", mode="max-autotune-no-cudagraphs")
    model.register_forward_hook(lambda *_: calls.append(1))
    calls: list[int] = []
    run(model)
    nvfp4c.set_plan(model, {"*": "bf16"})
    assert torch.equal(run(model), high)
    assert len(calls) == 2


def test_a_compiled_function() -> None:
    """In the strict form, where Dynamo builds another chain of callbacks."""
    model = Mlp()

    @torch.compile(backend="nvfp4", options=OPTIONS, fullgraph=True)
    def doubled(x: Tensor) -> Tensor:
        return 2 * model(x)

    assert not torch.equal(run(doubled), 2 * run(model))
    nvfp4c.set_plan(doubled, {"*": "bf16"})
    assert torch.equal(run(doubled), 2 * run(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Mlp, r"an object of type Mlp, which is not compiled; call it on what torch\.compile returned"),
        (lambda: 3, "an object of type int, which is not compiled"),
        (lambda: run, "an object of type function, which is not compiled"),
        (lambda: nn.Sequential(compiled(Mlp())), "not compiled itself, only parts of it are, such as '0'"),
        (lambda: torch.compile(Mlp()), "compiled with the backend 'inductor', which has no plans; use backend='nvfp4'"),
        (lambda: torch.compile(Mlp(), backend="eager"), "compiled with the backend 'eager'"),
        (lambda: torch.compile(run, backend="eager"), "compiled with the backend 'eager'"),
    ],
)
def test_what_has_no_plan(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        nvfp4c.set_plan(make(), None)


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    call = compiled(Mlp())
    low = run(call)
    with pytest.raises(PlanError, match="names 'dwn', but the model has no such site; did you mean 'down'"):
        nvfp4c.set_plan(call, {"dwn": "bf16"})
    with pytest.raises(PlanError, match=r"cannot read the plan absent\.json"):
        nvfp4c.set_plan(call, "absent.json")
    before = graphs()
    assert torch.equal(run(call), low)
    assert graphs() == before
