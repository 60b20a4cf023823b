"""The cache of quantised weights: what counts as the same weight, and how long anything is kept. No GPU is needed."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nvfp4c
from nvfp4c.weight_cache import CACHE, Info, Packed, WeightCache, cacheable

KIND = "tiles"


@pytest.fixture
def cache() -> WeightCache:
    """One that has seen an optimizer: so every unchanged weight is found again."""
    cache = WeightCache()
    cache.after_step()
    return cache


def packed() -> Packed:
    return Packed(torch.tensor(1.0), torch.zeros(8, dtype=torch.uint8), torch.zeros(1, dtype=torch.float8_e4m3fn))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape or (16, 16)))


def keep(cache: WeightCache, p: Tensor, kind: str = KIND) -> Packed:
    made = packed()
    cache.keep(p, kind, cache.state(p), made)
    return made


def find(cache: WeightCache, p: Tensor, kind: str = KIND, sure: bool = False) -> Packed | None:
    return cache.find(p, kind, cache.state(p), sure)


def test_an_unchanged_parameter_is_found(cache: WeightCache) -> None:
    p = parameter()
    assert find(cache, p) is None
    made = keep(cache, p)
    assert find(cache, p) is made
    assert find(cache, p, "another kind") is None
    assert find(cache, parameter()) is None
    assert cache.info() == Info(hits=1, misses=3, entries=1, bytes=4 + 8 + 1)


def add(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.add_(1)


def copy_into(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.copy_(torch.ones_like(p))


def initialise(p: nn.Parameter) -> None:
    nn.init.normal_(p)


def load(p: nn.Parameter) -> None:
    module = nn.Module()
    module.p = p
    module.load_state_dict({"p": torch.ones_like(p)})


def give_other_data(p: nn.Parameter) -> None:
    p.data = torch.ones_like(p)


def give_part_of_its_data(p: nn.Parameter) -> None:
    p.data = p.data[:8]


def give_its_transpose(p: nn.Parameter) -> None:
    p.data = p.data.T


def convert(p: nn.Parameter) -> None:
    nn.ParameterList([p]).to(torch.bfloat16)


@pytest.mark.parametrize(
    "edit",
    [add, copy_into, initialise, load, give_other_data, give_part_of_its_data, give_its_transpose, convert],
)
def test_an_edited_parameter_is_not(cache: WeightCache, edit: Callable[[nn.Parameter], None]) -> None:
    p = parameter()
    keep(cache, p)
    edit(p)
    assert find(cache, p, sure=True) is None


OPTIMIZERS = {
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "one by one": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
}


@pytest.mark.parametrize("made", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_of_an_optimizer(made: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Fused ones leave the version of a parameter as it was."""
    p = parameter()
    optimizer = made([p])
    before = CACHE.state(p)
    assert CACHE.state(p) == before
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert CACHE.state(p) != before


def test_a_compiled_step_of_a_fused_optimizer() -> None:
    """Dynamo traces the hook; it must take effect at every call, and never make Dynamo compile anew."""
    torch._dynamo.reset()
    p = parameter()
    optimizer = torch.optim.SGD([p], lr=0.1, fused=True)
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    step = torch.compile(optimizer.step, backend=backend)
    p.grad = torch.ones_like(p)
    step()
    count = len(graphs)
    for _ in range(3):
        before = CACHE.state(p)
        step()
        assert CACHE.state(p) != before
    assert len(graphs) == count
    torch._dynamo.reset()


def test_another_state_of_the_same_kind_replaces_the_first(cache: WeightCache) -> None:
    p = parameter()
    keep(cache, p)
    add(p)
    made = keep(cache, p)
    assert find(cache, p) is made
    assert cache.info().entries == 1


def test_nothing_outlives_its_parameter(cache: WeightCache) -> None:
    p = parameter()
    keep(cache, p)
    keep(cache, p, "another kind")
    alias = p.detach()
    assert cache.info().entries == 2
    del p
    gc.collect()
    assert cache.info().entries == 2, "its memory lives"
    del alias
    gc.collect()
    assert cache.info() == Info(0, 0, 0, 0)


def test_an_address_that_is_used_again(cache: WeightCache) -> None:
    """Another parameter of the same shape and version, where the first one was."""
    memory = bytearray(4 * 256)
    first = nn.Parameter(torch.frombuffer(memory, dtype=torch.float32).view(16, 16))
    second = nn.Parameter(torch.frombuffer(memory, dtype=torch.float32).view(16, 16))
    assert (first.data_ptr(), first._version) == (second.data_ptr(), second._version)
    keep(cache, first)
    assert find(cache, second, sure=True) is None
    del first
    gc.collect()
    assert find(cache, second, sure=True) is None


def test_two_parameters_in_one_storage(cache: WeightCache) -> None:
    storage = torch.randn(2, 16, 16)
    first, second = (nn.Parameter(storage.data[place]) for place in (0, 1))
    made = [keep(cache, first), keep(cache, second)]
    assert [find(cache, first), find(cache, second)] == made
    assert cache.info().entries == 2
    same = nn.Parameter(first.data)
    assert find(cache, same, sure=True) is None, "with a version of its own"


def test_updates_that_nobody_sees() -> None:
    """A loop that updates through `.data` alone: no forward may use what an earlier one has left."""
    cache, p = WeightCache(), parameter()
    for _ in range(3):
        assert find(cache, p) is None
        made = keep(cache, p)
        assert find(cache, p, sure=True) is made, "the backward of the same step"
        p.data -= 0.1
    cache.clear()
    keep(cache, p)
    add(p)
    made = keep(cache, p)
    assert find(cache, p) is made, "an update was seen"


def test_a_form_that_only_the_backward_asks_for() -> None:
    """It is not the forward's, so no forward makes it anew: each forward that trusts nothing forgets it."""
    storage = torch.randn(2, 16, 16)
    cache, p, other = WeightCache(), nn.Parameter(storage.data[0]), nn.Parameter(storage.data[1])
    for _ in range(3):
        assert find(cache, p) is None
        keep(cache, p)
        beside = keep(cache, other)
        assert find(cache, p, "columns", sure=True) is None
        made = keep(cache, p, "columns")
        assert find(cache, p, "columns", sure=True) is made
        p.data -= 0.1
    assert find(cache, p) is None
    assert cache.info().entries == 1
    assert find(cache, other, sure=True) is beside, "which shares no more than its storage"


def test_clearing(cache: WeightCache) -> None:
    p = parameter()
    keep(cache, p)
    cache.clear()
    assert find(cache, p) is None
    assert cache.info().entries == 0
    keep(CACHE, p)
    nvfp4c.clear_weight_cache()
    assert nvfp4c.weight_cache_info().entries == 0


class Derived(nn.Parameter):
    """Could mean anything."""


def test_what_can_be_kept() -> None:
    p = parameter()
    with torch.inference_mode():
        inferred = parameter()
    assert cacheable(p)
    assert cacheable(nn.Parameter(torch.ones(4), requires_grad=False))
    # Memory of Inductor's is written to without a new version.
    assert not cacheable(p.detach())
    assert not cacheable(p[:8])
    assert not cacheable(torch.ones(4, requires_grad=True))
    assert not cacheable(inferred)
    assert not cacheable(Derived(torch.ones(4)))


def test_parameters_stay_as_they_are(cache: WeightCache) -> None:
    """They can still be swapped, which weak references would forbid, and copies hold nothing more."""
    p = parameter()
    keep(cache, p)
    assert not vars(p)
    assert find(cache, copy.deepcopy(p), sure=True) is None
    torch.utils.swap_tensors(p, parameter())
    assert find(cache, p, sure=True) is None


def test_another_thread_finds_it(cache: WeightCache) -> None:
    """As where autograd runs the backward."""
    p = parameter()
    made = keep(cache, p)
    found: list[Packed | None] = []
    thread = threading.Thread(target=lambda: found.append(find(cache, p)))
    thread.start()
    thread.join()
    assert found == [made]


def test_many_threads(cache: WeightCache) -> None:
    parameters = [parameter() for _ in range(8)]
    failures: list[str] = []

    def work() -> None:
        for place in range(300):
            p = parameters[place % len(parameters)]
            if find(cache, p) is None:
                keep(cache, p)
            if place % 50 == 0:
                cache.after_step()
                cache.info()
            find(cache, parameter())
            keep(cache, parameter())  # dies at once

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=guarded) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not failures
    assert cache.info().entries == len(parameters)
