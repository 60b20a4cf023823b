"""The probe measures what numerics says, at every site and role, and changes nothing of what the model computes."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvfp4c import numerics, recipe
from nvfp4c.errors import DataError
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK
from nvfp4c.sensitivity import measurements
from nvfp4c.sensitivity.measure import code_hash, everywhere, measure
from nvfp4c.sensitivity.measurements import Measurements, merged
from nvfp4c.sensitivity.switched import SwitchedModel

pytestmark = pytest.mark.usefixtures("uncompiled")

NEAREST = "nvfp4"
SUMS = 1e-3
"""Relative: sums in FP32 of thousands of terms in another order, of a difference whose own terms are rounded by 6e-8 of
numbers a hundred times as large."""


class Net(nn.Module):
    """Two layers that read the same tensor, and one after them that reads heads joined, as after attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(32, 48), "b": nn.Linear(32, 48, bias=False)})])
        self.down = nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        heads = (torch.tanh(block["a"](x)) * block["b"](x)).unflatten(-1, (3, 16)).transpose(1, 2)
        return self.down(torch.sin(heads).transpose(1, 2).flatten(-2))


def loss(model: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return F.mse_loss(model(batch), batch.mean(-1, keepdim=True).expand(*batch.shape[:-1], 24))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def dequantized(x: Tensor, block: tuple[int, int]) -> Tensor:
    amax = numerics.tensor_amax(x)
    codes, scales = numerics.block_codes(x, amax, block, None)
    return numerics.block_values(codes, scales)[..., : x.shape[-1]] * (amax / 2688)


def test_a_forward_matmul_is_measured_as_numerics_computes_it(model: Net, batches: list[Tensor]) -> None:
    """Error, loss terms and the operands' own statistics, against the same computed from the definitions."""
    found = measure(model, batches[:1], loss)
    site = next(site for site in found.sites if site.site == "blocks.0.a")
    role = site.roles["fprop"]
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        kept["x"] = given[0].detach()
        result.retain_grad()
        kept["y"] = result

    with model.blocks[0]["a"].register_forward_hook(keep):
        loss(model, batches[0]).backward()
    x, w = kept["x"].reshape(-1, 32), model.blocks[0]["a"].weight.detach()
    gradient = kept["y"].grad
    assert gradient is not None
    g = gradient.reshape(-1, 48)
    y, error = x @ w.T, dequantized(x, ROW_BLOCK) @ dequantized(w, TILE_BLOCK).T - x @ w.T
    change = g * error
    assert (role.m, role.n, role.k, role.operations) == (32, 48, 32, 2.0 * 32 * 48 * 32)
    expected = {
        "signal": y.square().sum(),
        "noise": error.square().sum(),
        "aligned": (error * y).sum(),
        "first": change.sum(),
        "diagonal": change.square().sum(),
        "rows": change.sum(1).square().sum() * 32 / 2,
        "samples": change.reshape(4, -1).sum(1).square().sum() * 4 / 2,
    }
    for name, value in expected.items():
        assert getattr(role, name) == pytest.approx(float(value), rel=SUMS, abs=1e-9), name
    operand = role.operands[0]
    assert operand.operand == "x" and operand.elements == x.numel() and role.operands[1].operand == "w"
    quantised = dequantized(x, ROW_BLOCK)
    assert operand.noise == pytest.approx(float((quantised - x).square().sum()), rel=SUMS)
    assert operand.signal == pytest.approx(float(x.square().sum()), rel=SUMS)
    assert operand.kurtosis == pytest.approx(float(x.pow(4).mean() / x.square().mean() ** 2), rel=SUMS)
    assert operand.vanished == int(((quantised == 0) & (x != 0)).sum())
    assert sum(operand.before) == x.numel() and sum(operand.after) == int(quantised.count_nonzero())
    assert sum(operand.scales) == x.numel() // 16


def test_samples_are_known_where_heads_are_joined(model: Net, batches: list[Tensor]) -> None:
    """The input of `down` is made of [batch, heads, tokens, features]; its samples are the batch's all the same."""
    role = next(site for site in measure(model, batches[:1], loss).sites if site.site == "down").roles["fprop"]
    kept: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        y.retain_grad()
        kept.extend((given[0].detach(), y))

    with model.down.register_forward_hook(keep):
        loss(model, batches[0]).backward()
    x, y = kept
    error = dequantized(x.reshape(-1, 48), ROW_BLOCK) @ dequantized(model.down.weight.detach(), TILE_BLOCK).T
    change = (y.grad.reshape(-1, 24) * (error - x.reshape(-1, 48) @ model.down.weight.detach().T)).reshape(4, -1)  # type: ignore[union-attr]
    assert role.samples == pytest.approx(float(change.sum(1).square().sum() * 4 / 2), rel=SUMS)


def test_backward_matmuls_are_measured(model: Net, batches: list[Tensor]) -> None:
    """With rotation and without stochastic rounding, so that the reference can be computed here."""
    quiet = recipe.Recipe("quiet", gradient_rounding="nearest")
    found = measure(model, batches[:1], loss, quiet)
    role = next(site for site in found.sites if site.site == "down").roles["wgrad"]
    kept: dict[str, Any] = {}
    with (
        model.down.register_full_backward_hook(lambda m, i, o: kept.update(dy=o[0].detach())),
        model.down.register_forward_hook(lambda m, given, result: kept.update(x=given[0].detach())),
    ):
        loss(model, batches[0]).backward()
    dy, x = kept["dy"].reshape(-1, 24).T, kept["x"].reshape(-1, 48).T
    exact = dy @ x.T
    rotated = [numerics.rotate(operand, DEFAULT_SIGNS) for operand in (dy, x)]
    error = dequantized(rotated[0], ROW_BLOCK) @ dequantized(rotated[1], ROW_BLOCK).T - exact
    assert role.signal == pytest.approx(float(exact.square().sum()), rel=SUMS)
    # Rotated operands are rounded to BF16, and sums differ in order: both are far below 1% of the error's square.
    assert role.noise == pytest.approx(float(error.square().sum()), rel=1e-2)
    assert [operand.operand for operand in role.operands] == ["dy", "x"]
    assert role.first is None


def test_the_model_computes_what_it_did(model: Net, batches: list[Tensor]) -> None:
    """Gradients there before are there after, the generator goes on where it was, and the loss is the model's own."""
    loss(model, batches[1]).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    state = torch.get_rng_state()
    found = measure(model, batches, loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, before[name])
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        expected = sum(float(loss(model, batch)) for batch in batches) / 3
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_sites_say_where_they_are(model: Net, batches: list[Tensor]) -> None:
    found = measure(model, batches, loss)
    a, b, down = found.sites
    assert [(site.site, site.block, site.projection) for site in found.sites] == [
        ("blocks.0.a", 0, "a"),
        ("blocks.0.b", 0, "b"),
        ("down", None, "down"),
    ]
    assert a.reads == b.reads != down.reads
    assert a.weight == "blocks.0.a.weight" and a.weight_elements == 32 * 48
    # Nobody wants the gradient of the model's input.
    assert set(a.roles) == {"fprop", "wgrad"} and set(down.roles) == {"fprop", "dgrad", "wgrad"}


def test_batches_add_up(model: Net, batches: list[Tensor]) -> None:
    """All at once is what each alone is, merged; and the spread of the first-order term is over batches."""
    quiet = recipe.Recipe("quiet", gradient_rounding="nearest")
    alone = [measure(model, [batch], loss, quiet) for batch in batches]
    together = measure(model, batches, loss, quiet)
    assert together.sites == merged(alone).sites and together.batches == 3
    firsts = torch.tensor([part.sites[0].roles["fprop"].first for part in alone], dtype=torch.float64)
    role = together.sites[0].roles["fprop"]
    assert role.first == pytest.approx(float(firsts.mean()))
    assert role.first_error == pytest.approx(float(firsts.std()) / math.sqrt(3))


def test_an_interrupted_run_goes_on(model: Net, batches: list[Tensor], tmp_path: Path) -> None:
    """Batches that were measured are not run again; those of another recipe, or other data, are."""
    runs = 0

    def counted(model: Callable[..., Tensor], batch: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise KeyboardInterrupt
        return loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        measure(model, batches, counted, folder=tmp_path)
    assert all(parameter.grad is None for parameter in model.parameters())
    found = measure(model, batches, counted, folder=tmp_path)
    assert runs == 4
    assert found == measure(model, batches, loss)
    measure(model, batches, counted, "nvfp4-forward", folder=tmp_path)
    assert runs == 7


def test_code_that_was_changed_is_measured_again(tmp_path: Path) -> None:
    """The file of the model's class, or of the loss: no matter whether its functions are the same."""
    text = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 48)

    def forward(self, x):
        return self.a(x)

def loss(model, batch):
    return model(batch).square().mean()

class Loss:
    def __call__(self, model, batch):
        return loss(model, batch)
"""
    hashes = []
    for name, more in (("one.py", ""), ("two.py", ""), ("three.py", "# changed")):
        (tmp_path / name).write_text(text + more)
        space = runpy.run_path(str(tmp_path / name))
        hashes.append(code_hash(space["Net"](), loss))
        hashes.append(code_hash(nn.Linear(32, 48), space["loss"]))
        hashes.append(code_hash(nn.Linear(32, 48), partial(space["loss"], nn.Identity())))
        hashes.append(code_hash(nn.Linear(32, 48), space["Loss"]()))
    assert hashes[:4] == hashes[4:8]
    assert all(one != other for one, other in zip(hashes[4:8], hashes[8:], strict=True))
    assert len(set(hashes[1:4])) == 1, "torch's own modules are not among the files"


def test_measurements_survive_a_file(model: Net, batches: list[Tensor], tmp_path: Path) -> None:
    found = measure(model, batches[:1], loss)
    found.save(tmp_path / "found.json")
    assert measurements.load(tmp_path / "found.json") == found
    for text in ("", "[]", '{"version": 2}', '{"version": 1, "sites": []}', '{"version": 7, "sites": []}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(DataError, match=r"broken\.json.*measure again"):
            measurements.load(tmp_path / "broken.json")
    with pytest.raises(DataError, match="cannot read"):
        measurements.load(tmp_path / "none.json")


def test_what_a_user_can_get_wrong(model: Net, batches: list[Tensor]) -> None:
    with pytest.raises(DataError, match="no batches"):
        measure(model, [], loss)
    with pytest.raises(DataError, match="batch 1 is built differently"):
        measure(model, [batches[0], (batches[1],)], loss)
    with pytest.raises(DataError, match="loss of batch 1 is nan"):
        measure(model, [batches[0], batches[1] * math.nan], loss)
    with pytest.raises(DataError, match="no scalar"):
        measure(model, batches, lambda model, batch: model(batch))
    with pytest.raises(DataError, match="needs no gradient"):
        measure(model, batches, lambda model, batch: model(batch).detach().sum())
    with pytest.raises(DataError, match="no matmul with a weight"):
        measure(nn.LayerNorm(32), batches, lambda model, batch: model(batch).square().mean())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_site_that_no_gradient_reaches(model: Net, batches: list[Tensor]) -> None:
    """It cannot be scored, so it is no choice; the others are measured. Its operations are counted apart."""
    for name in ("a", "b"):
        model.blocks[0][name].requires_grad_(False)
    measured = measure(model, batches, loss)
    found = {site.site: site for site in measured.sites}
    assert set(found) == {"blocks.0.a", "blocks.0.b", "down"}
    assert not found["blocks.0.a"].roles and "no gradient" in (found["blocks.0.a"].obstacle or "")
    assert found["down"].obstacle is None and set(found["down"].roles) == {"fprop", "wgrad"}
    frozen = [site.unmeasured for site in measured.sites]
    assert frozen == [2 * 32 * 32 * 48, 2 * 32 * 32 * 48, 0]
    counted = sum(role.operations for role in found["down"].roles.values())
    assert measured.unmeasured_share == sum(frozen) / (sum(frozen) + counted)


def test_what_is_not_measured_is_counted_as_it_runs(model: Net, batches: list[Tensor]) -> None:
    """In every call of the model, whatever the size; and no more where a gradient came at last."""
    for name in ("a", "b"):
        model.blocks[0][name].requires_grad_(False)

    def twice(model: Callable[..., Tensor], batch: Tensor) -> Tensor:
        return loss(model, batch) + loss(model, batch[:1])

    rows = [8 * 4, 8 * 3, 8 * 2]
    found = measure(model, [batch[: 4 - number] for number, batch in enumerate(batches)], twice)
    assert found.sites[0].unmeasured == 2 * 32 * 48 * (sum(rows) / 3 + 8)
    assert found.sites[2].roles["fprop"].operations == 2 * 48 * 24 * (sum(rows) / 3 + 8)
    assert found.unmeasured_share == pytest.approx(2 * 32 * 48 * 2 / (2 * 32 * 48 * 2 + 2 * 48 * 24 * 2))

    def late(model: Callable[..., Tensor], batch: Tensor) -> Tensor:
        with torch.no_grad():
            aside = model(batch[:1]).mean()
        return loss(model, batch) + 0 * aside

    model.requires_grad_(True)
    found = measure(model, batches[:1], late)
    assert all(site.obstacle is None for site in found.sites)
    assert [site.unmeasured for site in found.sites] == [2 * 8 * 32 * 48, 2 * 8 * 32 * 48, 2 * 8 * 48 * 24]


def test_switches_give_the_loss_of_the_backend(model: Net, batches: list[Tensor]) -> None:
    """Of everything in FP4 and of one site, what `torch.compile` computes with such a plan; of nothing, the model's."""
    switched = SwitchedModel(model, everywhere(NEAREST))
    with torch.no_grad():
        plain = tuple(float(loss(model, batch)) for batch in batches)
    assert switched.losses((), batches, loss) == pytest.approx(plain, rel=1e-6)
    names = ("blocks.0.a", "blocks.0.b", "down")
    for chosen in (names, names[1:2]):
        plan = {name: "nvfp4" if name in chosen else "bf16" for name in names}
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="nvfp4", options={"plan": plan, "recipe": "nvfp4-all"})
        with torch.no_grad():
            expected = [float(loss(compiled, batch)) for batch in batches]
        found = switched.losses([(name, "fprop") for name in chosen], batches, loss)
        assert found == pytest.approx(expected, rel=1e-5)
        assert found != pytest.approx(plain, rel=1e-5)


def test_one_site_in_fp4_changes_the_loss_as_predicted(model: Net, batches: list[Tensor]) -> None:
    """The first-order term is most of it: 20%, or 2% of the loss, is left to the higher orders."""
    found: Measurements = measure(model, batches, loss)
    switched = SwitchedModel(model, everywhere(NEAREST))
    plain = sum(switched.losses((), batches, loss)) / 3
    for site in found.sites:
        rise = sum(switched.losses([(site.site, "fprop")], batches, loss)) / 3 - plain
        first = site.roles["fprop"].first
        assert first is not None
        assert rise == pytest.approx(first, rel=0.2, abs=0.02 * plain), site.site
