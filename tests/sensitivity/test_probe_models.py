"""The probe on what models do beside matmuls: draw random numbers, keep buffers, break graphs, change their shapes."""

from __future__ import annotations

import gc
import math
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from nvfp4c import numerics
from nvfp4c.errors import DataError
from nvfp4c.formats import ROW_BLOCK, TILE_BLOCK
from nvfp4c.sensitivity.intercepted import ISOLATED, observed
from nvfp4c.sensitivity.measure import digest, everywhere, measure
from nvfp4c.sensitivity.measurements import Measurements, RoleMeasure
from nvfp4c.sensitivity.probe import Probe
from nvfp4c.sensitivity.switched import SwitchedModel

pytestmark = pytest.mark.usefixtures("uncompiled")

isolated = pytest.mark.skipif(not ISOLATED, reason="this PyTorch counts all compiled forms of code after a graph break")

SUMS = 1e-3
"""Relative, of sums in FP32 in another order; see `test_probe`."""


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), *between, nn.Tanh(), nn.Linear(48, 24))


def loss(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def batch_of(tokens: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(4, tokens, 32, generator=torch.Generator().manual_seed(seed))


def fprop(found: Measurements, site: str) -> RoleMeasure:
    return next(each for each in found.sites if each.site == site).roles["fprop"]


def by_sample(error: Tensor, gradient: Tensor) -> float:
    """error, gradient: [samples, ..]."""
    change = (error * gradient).flatten(1).sum(1)
    return float(change.square().sum() * len(change) / 2)


class Attention(nn.Module):
    """Attention written out: what the last layer reads was [batch * heads, tokens, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Experts(nn.Module):
    """Every expert reads every token."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 32, 48) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btc,ech->beth", x, self.up)


class Broken(nn.Module):
    """Two graphs, with Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(torch.tanh(y))


class Spoil(torch.autograd.Function):
    """A gradient that overflows, as in FP16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.inf


def watched(module: nn.Module, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer reads, and the gradient of what it gives."""
    kept: dict[str, Tensor] = {}
    with (
        module.register_forward_hook(lambda m, given, result: kept.update(x=given[0].detach())),
        module.register_full_backward_hook(lambda m, i, o: kept.update(gradient=o[0].detach())),
    ):
        loss(model, batch).backward()
    model.zero_grad()
    return kept["x"], kept["gradient"]


def error_of(x: Tensor, weight: Tensor, whole: Tensor | None = None) -> Tensor:
    """Of x [.., K] @ weight [N, K]^T, quantised as the default recipe does; whole: what the weight is part of."""
    rows, weight = x.reshape(-1, x.shape[-1]), weight.detach()
    values = []
    for operand, block, of in ((rows, ROW_BLOCK, rows), (weight, TILE_BLOCK, weight if whole is None else whole)):
        amax = numerics.tensor_amax(of.detach())
        codes, scales = numerics.block_codes(operand, amax, block, None)
        values.append(numerics.block_values(codes, scales)[..., : operand.shape[-1]] * (amax / 2688))
    return (values[0] @ values[1].T - rows @ weight.T).reshape(*x.shape[:-1], -1)


def test_samples_of_attention_written_out() -> None:
    model, batch = Attention(), batch_of()
    x, gradient = watched(model.out, model, batch)
    found = fprop(measure(model, [batch], loss), "out")
    assert found.samples == pytest.approx(by_sample(error_of(x, model.out.weight), gradient), rel=SUMS)


def test_samples_of_a_layer_that_reads_another() -> None:
    """With nothing between two layers, what the second reads comes from a matmul of rows."""
    model, batch = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 24)), batch_of()
    second = model[1]
    assert isinstance(second, nn.Linear)
    x, gradient = watched(second, model, batch)
    found = fprop(measure(model, [batch], loss), "1")
    assert found.samples == pytest.approx(by_sample(error_of(x, second.weight), gradient), rel=SUMS)


def test_samples_of_experts() -> None:
    """What all experts do to a sample is one change."""
    model, batch = Experts(), batch_of()
    found = fprop(measure(model, [batch], loss), "up")
    error = torch.stack([error_of(batch, weight.T, model.up) for weight in model.up], 1)
    exact = torch.einsum("btc,ech->beth", batch, model.up).detach()
    assert found.samples == pytest.approx(by_sample(error, 2 * exact / exact.numel()), rel=SUMS)


def test_batches_of_other_lengths() -> None:
    """Each is measured as if it were alone, though a graph serves several lengths."""
    batches = [batch_of(tokens) for tokens in (16, 8, 12, 8)]
    together = fprop(measure(mlp(), batches, loss), "2")
    alone = [fprop(measure(mlp(), [batch], loss), "2") for batch in batches]
    for name in ("samples", "rows", "first"):
        expected = sum(getattr(each, name) for each in alone) / len(alone)
        assert getattr(together, name) == pytest.approx(expected, rel=SUMS), name


def test_a_loss_that_calls_the_model_twice() -> None:
    once = fprop(measure(mlp(), [batch_of()], loss), "0")
    twice = fprop(measure(mlp(), [batch_of()], lambda model, batch: loss(model, batch) + loss(model, -batch)), "0")
    assert twice.operations == 2 * once.operations
    assert twice.signal > 1.5 * once.signal


def test_buffers_and_gradients_of_batches_stay() -> None:
    model = mlp(nn.Flatten(0, 1), nn.BatchNorm1d(48))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batch_of().requires_grad_()
    found = measure(model, [batch, batch_of(seed=1)], loss)
    SwitchedModel(model, everywhere("nvfp4")).losses([("0", "fprop")], [batch], loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert batch.grad is None and "dgrad" in found.sites[0].roles


def test_dropout_is_the_same_in_every_run() -> None:
    """So that plans are compared on the same numbers, and a run that was interrupted goes on as it would have."""
    model, batches = mlp(nn.Dropout(0.5)), [batch_of(), batch_of(seed=1)]
    assert measure(model, batches, loss) == measure(model, batches, loss)
    switched = SwitchedModel(model, everywhere("nvfp4"))
    state = torch.get_rng_state()
    plain = switched.losses((), batches, loss)
    rounded = switched.losses([("0", "fprop")], batches, loss)
    assert switched.losses((), batches, loss) == plain != rounded
    # The masks alone make a difference of more than 5%.
    assert rounded == pytest.approx(plain, rel=0.05)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [mlp, pytest.param(Broken, marks=isolated)])
def test_a_model_is_measured_many_times(make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo gives up on code that it has compiled too often, here or by whoever compiles the model afterwards."""
    limit = torch._dynamo.config.recompile_limit
    model = make()
    for _ in range(limit + 2):
        assert len(measure(model, [batch_of()], loss).sites) == 2
    torch.compile(model, backend="eager", fullgraph=make is mlp)(batch_of())
    assert "recompile_limit" not in caplog.text


def test_a_model_that_was_measured_goes() -> None:
    model = mlp()
    measure(model, [batch_of()], loss)
    SwitchedModel(model, everywhere("nvfp4")).losses((), [batch_of()], loss)
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_nothing_is_kept_between_batches() -> None:
    """No tensor of a batch: the graphs hold shapes only."""
    probe, model = Probe(), mlp()
    compiled = observed(model, everywhere("nvfp4"), probe)

    def activations() -> list[Tensor]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is Tensor and each.shape == (32, 48)]

    others = set(map(id, before := activations()))  # of other tests, kept so that their ids stay theirs
    loss(compiled, batch_of()).backward()
    probe.take()
    assert [each.shape for each in activations() if id(each) not in others] == [], len(before)


def test_a_compiled_model_is_measured_by_its_own_names() -> None:
    model = torch.compile(mlp(), backend="eager")
    assert [site.site for site in measure(model, [batch_of()], loss).sites] == ["0", "2"]  # type: ignore[arg-type]


def test_a_gradient_that_overflows() -> None:
    with pytest.raises(DataError, match=r"2, (fprop|dgrad|wgrad): .*infinite or NaN"):
        measure(mlp(), [batch_of()], lambda model, batch: Spoil.apply(model(batch)).square().mean())  # type: ignore[no-untyped-call]


def test_small_gradients_have_a_kurtosis() -> None:
    """It does not depend on the scale of a loss, though FP32 holds no fourth power of 1e-12."""
    ordinary = measure(mlp(), [batch_of()], loss)
    small = measure(mlp(), [batch_of()], lambda model, batch: loss(model, batch) * 2**-33)
    for one, other in zip(ordinary.sites, small.sites, strict=True):
        assert other.roles["wgrad"].operands[0].kurtosis == pytest.approx(one.roles["wgrad"].operands[0].kurtosis)


def test_a_part_that_cannot_be_read_is_measured_again(tmp_path: Path) -> None:
    found = measure(mlp(), [batch_of()], loss, folder=tmp_path)
    (tmp_path / "part-0000.json").write_text("{")
    assert measure(mlp(), [batch_of()], loss, folder=tmp_path) == found


def test_a_part_is_of_the_same_buffers_and_mode(tmp_path: Path) -> None:
    """All that a model computes with: a model in training is another one than in evaluation."""
    model = mlp(nn.Flatten(0, 1), nn.BatchNorm1d(48))
    training = measure(model, [batch_of()], loss, folder=tmp_path)
    evaluated = measure(model.eval(), [batch_of()], loss, folder=tmp_path)
    norm = model[2]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_var is not None
    norm.running_var.fill_(9.0)
    assert len({training.loss, evaluated.loss, measure(model, [batch_of()], loss, folder=tmp_path).loss}) == 3


def test_a_digest_is_of_all_that_a_batch_holds() -> None:
    """A text of a long tensor, or array, leaves out what is in the middle."""
    one, other = torch.zeros(5000), torch.zeros(5000)
    other[2500] = 1
    assert digest([UserDict(x=one)]) != digest([UserDict(x=other)])
    assert digest([one.numpy()]) != digest([other.numpy()])
    assert digest([UserDict(x=one)]) == digest([UserDict(x=one.clone())])
    assert digest([lambda: one]) != digest([one])
