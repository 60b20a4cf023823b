"""What a probe replays is what it computes. Here a graph is a fake: replaying it does the work again on its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_probe_models import Attention
from torch import Tensor, nn

from nvfp4c.recipe import Recipe
from nvfp4c.sensitivity import replayed, samples
from nvfp4c.sensitivity.intercepted import observed
from nvfp4c.sensitivity.measure import everywhere
from nvfp4c.sensitivity.measurements import SiteMeasure
from nvfp4c.sensitivity.probe import Probe
from nvfp4c.sensitivity.quantized import Quantized, Quantizer
from nvfp4c.sensitivity.replayed import Graphs, Replays, signed

STOCHASTIC = Recipe("all")


class Again(Graphs):
    """Counts what is done again. small: bytes of tensors that there is room for."""

    def __init__(self, small: int = 1 << 20) -> None:
        super().__init__()
        self.small = small
        self.replays = 0

    def room(self, device: torch.device) -> int:
        return self.small

    def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        found = work()

        def replay() -> None:
            self.replays += 1
            found.copy_(work())

        return found, replay


class Twins(nn.Module):
    """Layers of one shape. The first two read the same tensor, and get the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x) + self.b(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 24, bias=False))


def batch_of(seed: int, tokens: int = 8) -> Tensor:
    return torch.randn(4, tokens, 32, generator=torch.Generator().manual_seed(seed))


def mean_square(found: Tensor) -> Tensor:
    return found.square().mean()


def passes(
    make: Callable[[], nn.Module],
    probe: Probe,
    batches: list[Tensor],
    loss: Callable[[Tensor], Tensor] = mean_square,
) -> list[tuple[SiteMeasure, ...]]:
    """What a probe measures in each batch, of a model whose weights change in between."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    compiled = observed(model, everywhere(STOCHASTIC), probe)
    found = []
    for number, batch in enumerate(batches):
        probe.begin(number)
        loss(compiled(batch)).backward()
        found.append(probe.take())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
    return found


@pytest.fixture
def alone(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are looked at one by one, as on a GPU: together with others, sums are in another order. And tensors lie
    alike, which those of a CPU do to a multiple of 64 bytes."""
    monkeypatch.setattr(samples, "TOGETHER", 1)
    monkeypatch.setattr(replayed, "ALIGNED", 64)


@pytest.mark.parametrize("make", [mlp, Attention, Twins])
def test_what_is_replayed_is_what_is_computed(make: Callable[[], nn.Module], alone: None) -> None:
    graphs = Again()
    batches = [batch_of(seed) for seed in range(4)]
    found = passes(make, Probe(3, replays=Replays(graphs)), batches)
    assert found == passes(make, Probe(3), batches)
    assert found[2] != found[3] and graphs.replays > 0


def test_a_gradient_that_is_expanded(alone: None) -> None:
    """It has one number for many elements: no copy could be written to as it lies."""
    graphs, batches = Again(), [batch_of(seed) for seed in range(3)]
    found = passes(mlp, Probe(replays=Replays(graphs)), batches, Tensor.sum)
    assert found == passes(mlp, Probe(), batches, Tensor.sum)
    assert graphs.replays == 6


def test_random_numbers_do_not_depend_on_earlier_batches(alone: None) -> None:
    """Nor on whether those were replayed."""
    batches = [batch_of(seed) for seed in range(3)]
    probe = Probe(replays=Replays(Again()))
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = observed(mlp(), everywhere(STOCHASTIC), probe)

    def measured(number: int) -> tuple[SiteMeasure, ...]:
        probe.begin(number)
        mean_square(compiled(batches[number])).backward()
        return probe.take()

    first = [measured(number) for number in range(3)]
    assert [measured(number) for number in (2, 0, 1)] == [first[2], first[0], first[1]]


def test_seeds_are_counted_alike() -> None:
    """By one quantiser, and by one that begins where another stopped."""
    one, other = Quantizer(5), Quantizer(5)
    one.begin(7), other.begin(7)
    device = torch.device("cpu")
    expected = [int(one._seed(device)) for _ in range(4)]
    seeds = [int(other._seed(device))]
    within = Quantizer.after(torch.tensor(other.last))
    seeds += [int(within._seed(device)) for _ in range(2)]
    other.drawn += within.drawn
    assert [*seeds, int(other._seed(device))] == expected
    assert len(set(expected)) == 4


def test_layers_of_one_shape_share_a_graph(alone: None) -> None:
    """Wherever their tensors lie: of three layers there are two graphs, in one buffer or one that outgrew it."""
    replays: Replays[Any] = Replays(Again())
    passes(Twins, Probe(replays=replays), [batch_of(seed) for seed in range(3)])
    kinds = {tuple(kind.role for kind, _ in one.key) for one in replays.recorded}  # type: ignore[attr-defined]
    assert len(replays.recorded) == len(kinds) == 2  # with a gradient of what it reads, and without
    assert len({one.inputs[0].untyped_storage().data_ptr() for one in replays.recorded.values()}) <= 2


def test_another_shape_has_another_graph(alone: None) -> None:
    replays: Replays[Any] = Replays(Again())
    batches = [batch_of(seed, tokens) for seed, tokens in enumerate((8, 8, 6, 6, 8, 6))]
    found = passes(mlp, Probe(replays=replays), batches)
    assert len(replays.recorded) == 6
    assert found == passes(mlp, Probe(), batches)


def test_what_shares_memory_is_copied_once() -> None:
    """However it is seen; and what only begins at the same place is apart."""
    x, w = torch.randn(4, 6), torch.randn(6)
    signature, memories = signed("key", [x, x.T, x.reshape(2, 2, 6), w.expand(3, 6), None, w, x[:2]], x.device)
    assert [len(one) for one in memories] == [24, 6, 12]
    assert [view and view[0] for view in signature.views] == [0, 0, 0, 1, None, 1, 2]
    again, _ = signed("key", [x, x.clone().T, None, None, None, None, None], x.device)
    assert [view and view[0] for view in again.views[:2]] == [0, 1]


def test_a_copy_lies_as_its_tensor_does() -> None:
    """With its gaps, its strides, and to a multiple of what kernels ask about."""
    whole = torch.arange(96.0).reshape(4, 24)
    tensors = [whole[:, 4:12], whole[:, 4:12].T, whole[1, 3:4].expand(5, 5), torch.arange(7)]
    given: list[list[Tensor]] = []

    def work(views: Any, seed: Tensor) -> tuple[list[Tensor], int]:
        given.append(list(views))
        return [view.sum().reshape(1) for view in views], len(views)

    replays: Replays[int] = Replays(Again())
    assert replays("key", tensors, 0, whole.device, work) is None
    found = replays("key", tensors, 0, whole.device, work)
    assert found is not None and found[1] == 4
    assert [float(one) for one in found[0]] == [float(x.sum()) for x in tensors]
    for view, x in zip(given[0], tensors, strict=True):
        assert torch.equal(view, x) and view.stride() == x.stride() and view.dtype == x.dtype
    start = given[0][0].untyped_storage().data_ptr()
    assert [(view.data_ptr() - start) % 256 for view in given[0]] == [x.data_ptr() % 256 for x in tensors]


def test_large_sites_are_computed_as_ever(alone: None) -> None:
    """Of three layers the last has the smallest tensors."""
    x, w, dy, result = 32 * 32, 24 * 32, 32 * 24, 32 * 32
    graphs, batches = Again(4 * (x + w + dy + result)), [batch_of(seed) for seed in range(3)]
    replays: Replays[Any] = Replays(graphs)
    found = passes(mlp, Probe(replays=replays), batches)
    assert len(replays.recorded) == 1 and graphs.replays == 2
    assert found == passes(mlp, Probe(), batches)


def test_a_site_is_as_large_as_what_would_be_copied() -> None:
    """The first token of each sample lies far from the next one's."""
    hidden = torch.empty(64, 128, 32)
    replays: Replays[Any] = Replays(Again(4 * 64 * 128 * 32))
    assert replays.suit((hidden, hidden[:, 0], hidden.mT)) is False
    assert replays.suit((hidden, hidden.mT)) and replays.suit((hidden[:, 0],))
    assert not Replays[Any](Again(4 * 64 * 32)).suit((hidden[:, 0],))


@pytest.mark.parametrize("tokens", [8, 5])
def test_what_a_graph_reads_is_held(alone: None, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Where tiles of operands are drawn from is remembered for so many shapes only. A rotated operand has whole blocks,
    however many rows it is made of."""
    read: list[Tensor] = []

    def sample(operand: Quantized, block: tuple[int, int]) -> samples.Sample:
        read.extend(samples.drawn(operand.source.shape[:-1].numel(), operand.source.shape[-1], torch.device("cpu"))[:2])
        return looked(operand, block)

    looked = samples.sample
    monkeypatch.setattr(samples, "sample", sample)
    replays: Replays[Any] = Replays(Again())
    passes(mlp, Probe(replays=replays), [batch_of(0, tokens)] * 3)
    held = {id(x) for one in replays.recorded.values() for x in one.form.held}
    assert {id(x) for x in read} <= held


def test_no_copy_is_kept_for_the_next_site(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contents will be another's."""
    probe = Probe(replays=Replays(Again()))
    kept: list[int] = []
    observe = Probe.observe

    def looked_at(self: Probe, *arguments: Any) -> Tensor:
        found = observe(self, *arguments)
        buffers = {buffer.untyped_storage().data_ptr() for buffer in self.replays._buffers.values()}
        kept.append(len(self._comparing._recent))
        assert not any(x.untyped_storage().data_ptr() in buffers for x, _, _ in self._comparing._recent)
        return found

    monkeypatch.setattr(Probe, "observe", looked_at)
    passes(mlp, probe, [batch_of(seed) for seed in range(3)])
    assert max(kept[:3]) > 0 and kept[3:] == [0] * 6


def test_what_goes_wrong_is_not_hidden(alone: None) -> None:
    class Failing(Again):
        def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
            raise RuntimeError("capture failed")

    with pytest.raises(RuntimeError, match="capture failed"):
        passes(mlp, Probe(replays=Replays(Failing())), [batch_of(0)] * 2)


def test_where_memory_runs_out_nothing_is_replayed_any_more(alone: None) -> None:
    """And the memory of graphs there were is given back."""

    class Full(Again):
        def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
            if len(probe.replays.recorded) == 2:
                raise torch.OutOfMemoryError
            return super().record(work, device)

    batches = [batch_of(seed) for seed in range(3)]
    probe = Probe(replays=Replays(Full()))
    assert passes(mlp, probe, batches) == passes(mlp, Probe(), batches)
    assert probe.replays.off and not probe.replays.recorded and not probe.replays._buffers


def test_a_cpu_has_no_graphs(alone: None) -> None:
    probe = Probe()
    passes(mlp, probe, [batch_of(0)] * 3)
    assert not probe.replays.recorded and not probe.replays._met
