"""The sensitivity probe on a GPU measures what it measures on the CPU, where every number is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvfp4c.bench.memory import on_gpu
from nvfp4c.recipe import Recipe
from nvfp4c.sensitivity.intercepted import observed
from nvfp4c.sensitivity.measure import everywhere, measure, measure_batch
from nvfp4c.sensitivity.measurements import LOSS_TERMS, Measurements
from nvfp4c.sensitivity.probe import Probe
from nvfp4c.sensitivity.replayed import Replays
from nvfp4c.sensitivity.switched import SwitchedModel

# What is compared is a GPU with the CPU.
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NEAREST = Recipe("nearest", gradient_rounding="nearest")
CLOSE = 1e-2
"""Relative: both compute products in FP32, in another order; where a number lies between two codes that decides, so
some of the errors are other ones."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 72, bias=False), nn.Tanh(), nn.Linear(72, 40))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.mse_loss(model(batch), batch[..., :40])


def measured(device: str, dtype: torch.dtype, recipe: Recipe) -> Measurements:
    torch._dynamo.reset()
    model = network().to(device, dtype)
    batches = [torch.randn(4, 48, 96, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    return measure(model, [batch.to(device, dtype) for batch in batches], loss, recipe)


def test_it_measures_what_it_does_on_the_cpu() -> None:
    here, there = (measured(device, torch.float32, NEAREST) for device in ("cpu", "cuda"))
    assert there.loss == pytest.approx(here.loss, rel=1e-5)
    assert [site.site for site in there.sites] == [site.site for site in here.sites]
    for site, expected in zip(there.sites, here.sites, strict=True):
        assert set(site.roles) == set(expected.roles)
        for name, role in site.roles.items():
            wanted = expected.roles[name]
            assert (role.m, role.n, role.k, role.operations) == (wanted.m, wanted.n, wanted.k, wanted.operations)
            assert role.signal == pytest.approx(wanted.signal, rel=1e-5)
            assert role.noise == pytest.approx(wanted.noise, rel=CLOSE)
            for term in LOSS_TERMS if name == "fprop" else ():
                value = getattr(wanted, term)
                # A sum whose terms cancel is off by a share of what they amount to.
                assert getattr(role, term) == pytest.approx(value, rel=3 * CLOSE, abs=CLOSE * wanted.samples**0.5)
            for operand, known in zip(role.operands, wanted.operands, strict=True):
                assert (operand.operand, operand.elements) == (known.operand, known.elements)
                assert operand.signal == pytest.approx(known.signal, rel=1e-5)
                assert operand.noise == pytest.approx(known.noise, rel=CLOSE)
                assert sum(operand.scales) == sum(known.scales)
                moved = sum(abs(a - b) for a, b in zip(operand.before, known.before, strict=True))
                assert moved <= CLOSE * known.elements


def test_the_input_and_the_weights_are_the_same_bits() -> None:
    """So what quantising does to them is the same, to the last count."""
    here, there = (measured(device, torch.bfloat16, NEAREST) for device in ("cpu", "cuda"))
    for site, expected in zip(there.sites, here.sites, strict=True):
        pairs = list(zip(site.roles["fprop"].operands, expected.roles["fprop"].operands, strict=True))
        for operand, known in pairs if site is there.sites[0] else pairs[1:]:
            for counts in ("elements", "vanished", "saturated", "zeros", "before", "after", "scales"):
                assert getattr(operand, counts) == getattr(known, counts), (site.site, operand.operand, counts)


def test_a_run_is_repeated_with_stochastic_rounding() -> None:
    assert (
        measured("cuda", torch.bfloat16, Recipe("all")).sites == measured("cuda", torch.bfloat16, Recipe("all")).sites
    )


class Experts(nn.Module):
    """Matrices of a stack read the same columns of a wider tensor, as it lies; then a layer that adds them up."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 40, 72) / 6)
        self.add = nn.Linear(72, 24)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.add(torch.bmm(x.flatten(0, 1)[:, 5:45].expand(3, -1, -1), self.matrices).sum(0))
        return found


def summed(model: nn.Module, batch: Tensor) -> Tensor:
    """Its gradient is one number for all elements."""
    return model(batch).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("make", "loss_of", "tokens", "graphs"),
    [
        pytest.param(network, loss, (48, 48, 48), 3, id="layers"),
        pytest.param(network, summed, (11, 11, 7, 7, 11, 7), 6, id="odd sizes"),
        pytest.param(Experts, summed, (13, 13, 5, 5, 13, 5), 4, id="experts"),
    ],
)
def test_what_is_replayed_is_what_is_computed(
    make: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    tokens: Sequence[int],
    graphs: int,
    dtype: torch.dtype,
) -> None:
    """To the last bit: the first batch is computed, in the second what then is replayed is captured."""
    batches = [torch.randn(4, n, 96, generator=torch.Generator().manual_seed(seed)) for seed, n in enumerate(tokens)]
    found, probes = [], []
    for replays in (Replays[Any](), Replays[Any](off=True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        probe, model = Probe(3, replays=replays), make().to("cuda", dtype)
        watched = observed(model, everywhere(Recipe("all")), probe)
        parts = []
        for number, batch in enumerate(batches):
            parts.append(measure_batch(model, watched, batch.to("cuda", dtype), loss_of, probe, number, {}))
        found.append([part.sites for part in parts])
        probes.append(probe)
    replayed, computed = probes
    assert len(replayed.replays.recorded) == graphs and not computed.replays.recorded
    assert found[0] == found[1]
    assert found[0][-1] != found[0][-2]


def test_where_memory_runs_out_in_a_capture_nothing_is_replayed_any_more() -> None:
    x, much = torch.ones(1 << 10, device="cuda"), 1 << 50

    def work(views: Sequence[Tensor | None], seed: Tensor) -> tuple[list[Tensor], None]:
        (view,) = views
        assert view is not None
        if torch.cuda.is_current_stream_capturing() and hungry:
            torch.empty(much, dtype=torch.uint8, device="cuda")
        return [view.sum().reshape(1)], None

    for hungry in (False, True, False):
        replays: Replays[None] = Replays()
        assert replays.suit((x,))
        found = [replays(None, [x], 0, x.device, work) for _ in range(3)]
        assert replays.off is hungry is not replays.suit((x,))
        assert found[0] is None
        assert [one is None for one in found[1:]] == [hungry, hungry]
        assert hungry or all(float(one[0][0]) == len(x) for one in found[1:] if one)


def test_memory_counts_what_graphs_keep() -> None:
    """What a replayed graph computes in between is in memory that nobody allocates then."""
    x, size = torch.ones(1 << 24, device="cuda"), 4 << 24
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (x * 2).sum()
    found, held = on_gpu(graph.replay), torch.cuda.memory_allocated()
    assert size <= found.resident - held <= found.peak - held < 2 * size


def test_switches_give_the_loss_that_they_give_on_the_cpu() -> None:
    batch = torch.randn(4, 48, 96, generator=torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        torch._dynamo.reset()
        switched = SwitchedModel(network().to(device), everywhere("nvfp4"))
        found[device] = [
            switched.losses(sites, [batch.to(device)], loss)[0] for sites in ([], [("0", "fprop")], [("2", "fprop")])
        ]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)
    assert len(set(found["cuda"])) == 3
