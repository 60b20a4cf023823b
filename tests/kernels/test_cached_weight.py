"""The weight operation and its cache, by itself and in compiled steps: every bit is what it is without a cache."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from interpreter import needs_loops
from regions import value_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nvfp4c
from nvfp4c import backend, dialect
from nvfp4c.codegen import cached_weight, native_product, operations, targets
from nvfp4c.codegen.cached_weight import WEIGHT
from nvfp4c.codegen.targets import TARGETS
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK
from nvfp4c.recipe import RECIPES, Recipe
from nvfp4c.region import Axis, Form, Layout, Output, Region, shapes
from nvfp4c.weight_cache import CACHE, WeightCache

TILES = Output(Form.OPERAND, block=TILE_BLOCK)
NATIVE = Output(Form.PACKED, block=TILE_BLOCK, layout=Layout.NATIVE)
NATIVE_DOWN = replace(NATIVE, axis=Axis.COLUMNS)
KINDS = {
    "tiles": Region((TILES,)),
    "tiles down": Region((replace(TILES, axis=Axis.COLUMNS),)),
    "rows": Region((Output(Form.OPERAND, block=ROW_BLOCK),)),
    "rotated": Region((Output(Form.OPERAND, signs=DEFAULT_SIGNS),)),
    "rotated down": Region((Output(Form.OPERAND, Axis.COLUMNS, signs=DEFAULT_SIGNS),)),
    "packed": Region((replace(TILES, form=Form.PACKED),)),
    "both": Region((TILES, replace(TILES, form=Form.PACKED))),
    "native": Region((NATIVE,)),
    "native down": Region((NATIVE_DOWN,)),
    "native rows": Region((replace(NATIVE, block=ROW_BLOCK),)),
    "native rotated down": Region((replace(NATIVE_DOWN, block=ROW_BLOCK, signs=DEFAULT_SIGNS),)),
}
TEXT = KINDS["tiles"].to_json()


RECIPE = replace(RECIPES["nvfp4-all"], roles=("fprop", "dgrad"), rotate=(), gradient_rounding="nearest")
"""The products that read weights; random words and transforms would take long in the interpreter."""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> WeightCache:
    """A cache of the test's own, which has seen an update."""
    found = WeightCache()
    found.after_step()
    monkeypatch.setattr(cached_weight, "CACHE", found)
    torch.manual_seed(0)
    return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    """The regions of parameters that were really computed."""
    found: list[Region] = []
    original = cached_weight._quantised

    def watched(matrix: Tensor, known: Tensor | None, reduce: Region, quantise: Region) -> tuple[Tensor, list[Tensor]]:
        found.append(quantise)
        return original(matrix, known, reduce, quantise)

    monkeypatch.setattr(cached_weight, "_quantised", watched)
    return found


def parameter(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (40, 50)).to(device, dtype))


def check(w: Tensor, dtype: torch.dtype = torch.bfloat16, text: str = TEXT, sure: bool = False) -> list[Tensor]:
    """The operation's results, which are the reference's on what w holds now."""
    found = WEIGHT(w, dtype, text, sure)
    expected = dialect.weight(w.detach().cpu(), dtype, text, sure)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous() and one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(value_bits(one), value_bits(other))
    return found


@pytest.mark.parametrize("region", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("shape", "dtype", "cast"),
    [
        ((40, 50), torch.float32, torch.float32),
        ((33, 47), torch.float32, torch.bfloat16),
        ((3, 20, 34), torch.bfloat16, torch.bfloat16),
    ],
)
def test_first_and_second_time(
    device: torch.device,
    cache: WeightCache,
    launched: list[Region],
    region: Region,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    cast: torch.dtype,
) -> None:
    """And a third, after all that was handed out has been written over."""
    w = parameter(device, *shape, dtype=dtype)
    for _ in range(3):
        for result in check(w, cast, region.to_json()):
            result.unsqueeze(-1).view(torch.uint8).fill_(255)
    assert len(launched) == 1
    info = cache.info()
    assert (info.hits, info.misses, info.entries) == (2, 1, 1)
    kept = shapes(replace(region.outputs[0], form=Form.PACKED), shape, cast)
    assert info.bytes == sum(math.prod(size) * kind.itemsize for size, kind in kept) + 4, "and an amax"
    if not region.outputs[0].native:
        whole = [-(-size // 16) * 16 for size in shape]
        assert info.bytes <= torch.Size(whole).numel() * 9 // 16 + 4, "4.5 bits an element"


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    """The amaxes that were really computed."""
    found: list[Region] = []
    original = operations.region

    def watched(inputs: list[Tensor], amaxes: list[Tensor], seed: Tensor | None, text: str) -> list[Tensor]:
        given = Region.from_json(text)
        found.extend([given] if given.outputs[0].form is Form.AMAX else [])
        return original(inputs, amaxes, seed, text)

    monkeypatch.setattr(operations, "region", watched)
    return found


def test_both_axes_of_a_weight(
    device: torch.device, cache: WeightCache, launched: list[Region], reduced: list[Region]
) -> None:
    """As the forward and the backward read it packed: each is kept as it is asked for, and the second finds an amax."""
    w = parameter(device)
    for update in (1, 2):
        for _ in range(2):
            check(w, text=Region((NATIVE,)).to_json())
            check(w, text=Region((NATIVE_DOWN,)).to_json(), sure=True)
        assert (len(launched), len(reduced)) == (2 * update, update)
        assert cache.info().entries == 2
        add(w)


def test_an_amax_that_says_nothing_of_another(
    device: torch.device, cache: WeightCache, launched: list[Region], reduced: list[Region]
) -> None:
    """After a cast to another type, along another axis of a rotated matrix, or of a state that is not trusted."""
    w = parameter(device)
    check(w, torch.float32, Region((NATIVE,)).to_json())
    check(w, torch.bfloat16, Region((NATIVE_DOWN,)).to_json())
    rotated = replace(NATIVE, block=ROW_BLOCK, signs=DEFAULT_SIGNS)
    check(w, text=Region((rotated,)).to_json())
    check(w, text=Region((replace(rotated, axis=Axis.COLUMNS),)).to_json())
    assert len(reduced) == len(launched) == 4
    cache.clear()
    cache._updated = False
    check(w, text=Region((NATIVE,)).to_json())
    w.data.mul_(3)
    check(w, text=Region((NATIVE_DOWN,)).to_json())
    assert len(reduced) == len(launched) == 6


def add(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.add_(1)


def copy_into(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.copy_(torch.randn_like(p))


def give_other_data(p: nn.Parameter) -> None:
    p.data = torch.randn_like(p)


def step_of_a_fused_optimizer(p: nn.Parameter) -> None:
    p.grad = torch.randn_like(p)
    version = p._version
    torch.optim.AdamW([p], lr=0.5, fused=True).step()
    assert p._version == version, "its version alone says nothing"


@pytest.mark.parametrize("edit", [add, copy_into, give_other_data, step_of_a_fused_optimizer])
def test_an_edit(device: torch.device, monkeypatch: pytest.MonkeyPatch, edit: Callable[[nn.Parameter], None]) -> None:
    monkeypatch.setattr(cached_weight, "CACHE", CACHE)  # the one that optimizers tell
    w = parameter(device)
    check(w, sure=True)
    before = CACHE.info()
    check(w, sure=True)
    edit(w)
    check(w, sure=True)
    check(w, sure=True)
    after = CACHE.info()
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 1)


def test_what_has_no_version_is_never_kept(device: torch.device, cache: WeightCache) -> None:
    """As Inductor's own memory, which it writes to again."""
    w = parameter(device).detach()
    for _ in range(2):
        check(w)
        w.view(-1)[:100] = 7.0
    with torch.inference_mode():
        inferred = parameter(device)
        check(inferred)
    assert cache.info().entries == 0


def test_a_parameter_that_is_transposed_in_memory(device: torch.device, cache: WeightCache) -> None:
    w = nn.Parameter(torch.randn(50, 40).to(device).T)
    for _ in range(2):
        check(w)
    assert cache.info().hits == 1


def test_freed_with_the_model(device: torch.device, cache: WeightCache) -> None:
    model = nn.Linear(50, 40, device=device)
    check(model.weight)
    assert cache.info().entries == 1
    del model
    assert cache.info().entries == 0
    check(parameter(device))  # perhaps where the other was
    assert cache.info().hits == 0


def test_from_another_thread(device: torch.device, cache: WeightCache) -> None:
    w = parameter(device)
    first = check(w)
    found: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(WEIGHT(w, torch.bfloat16, TEXT, True)))
    thread.start()
    thread.join()
    assert cache.info().hits == 1
    assert all(torch.equal(value_bits(one), value_bits(other)) for one, other in zip(first, found[0], strict=True))


def test_opcheck(device: torch.device) -> None:
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(WEIGHT, (parameter(device).detach(), torch.bfloat16, TEXT, False), test_utils=tests)


class Model(nn.Module):
    """Two layers that share one weight, a frozen one, and one that is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.second.weight = self.first.weight
        self.frozen, self.last = nn.Linear(32, 48, bias=False).requires_grad_(False), nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.second(self.first(x)))
        result: Tensor = checkpoint(self.last, x, use_reentrant=False)
        return result


PARAMETERS = 3
MICRO_BATCHES = 3


PRODUCTS = [
    "sm_90",
    pytest.param("sm_100", marks=needs_loops),
]
"""Targets of which the first dequantises what its products read, and the second does not."""


@pytest.fixture(params=PRODUCTS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gpu_kernels(target: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels that are tested, which are a GPU's in the interpreter too; and no graph that was compiled before.

    A GPU that has no FP4 tensor cores runs those of sm_100 with their one instruction emulated, one that has them its
    own: what they are compiled for follows from the GPU.
    """
    table = targets.kernel_table(TARGETS[target])
    monkeypatch.setattr(targets, "kernel_table", lambda target, product: table)
    monkeypatch.setattr(backend.GraphPass, "uuid", lambda self: None)
    monkeypatch.setattr(cached_weight, "CACHE", CACHE)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(device: torch.device, autocast: bool, weight_cache: object) -> list[Tensor]:
    """Losses, gradients and parameters of two steps of three micro-batches each, then a loss without a gradient."""
    torch.manual_seed(0)
    model = Model().to(device)
    compiled = torch.compile(
        model, backend="nvfp4", options={"recipe": RECIPE, "weight_cache": weight_cache}, fullgraph=True
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                output = compiled(torch.randn(16, 32).to(device))
            output.float().square().mean().backward()
            found.append(output.detach().clone())
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        found += [p.detach().clone() for p in model.parameters()]
    return found


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what products of packed operands gave."""
    found: list[torch.Size] = []
    original = native_product.block_scaled_gemm.block_scaled_mm

    def watched(*args: object) -> Tensor:
        result: Tensor = original(*args)  # type: ignore[arg-type]
        found.append(result.shape)
        return result

    monkeypatch.setattr(native_product.block_scaled_gemm, "block_scaled_mm", watched)
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("gpu_kernels")
def test_accumulated_gradients(
    device: torch.device,
    launched: list[Region],
    reduced: list[Region],
    multiplied: list[torch.Size],
    target: str,
    autocast: bool,
) -> None:
    """Every weight is quantised once a step, for all micro-batches, both directions and both of its layers.

    Once along each axis where products read it packed; its amax is taken once.
    """
    nvfp4c.clear_weight_cache()
    CACHE.after_step()  # some optimizer has made a step: forwards trust what is kept only then
    before = CACHE.info()
    found = train(device, autocast, True)
    after = CACHE.info()
    native = TARGETS[target].native_fp4
    assert len(launched) == after.misses - before.misses == 2 * PARAMETERS * (2 if native else 1)
    assert len(reduced) == 2 * PARAMETERS
    assert {output.native for region in launched for output in region.outputs} == {native} == {bool(multiplied)}
    assert after.hits > 2 * (MICRO_BATCHES - 1) * PARAMETERS
    assert after.entries == 0, "the model is gone"
    torch._dynamo.reset()
    expected = train(device, autocast, False)
    assert CACHE.info() == after
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("gpu_kernels")
def test_updates_through_data_alone(
    device: torch.device, launched: list[Region], reduced: list[Region], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop without an optimizer, and without a new version: each forward quantises, and only backwards do not."""
    monkeypatch.setattr(cached_weight, "CACHE", WeightCache())
    model = nn.Linear(32, 32, bias=False).to(device)
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": RECIPE})
    outputs = []
    for _ in range(3):
        x = torch.ones(16, 32, device=device, requires_grad=True)
        output = compiled(x)
        output.sum().backward()
        model.weight.data -= 0.5 * model.weight.grad
        outputs.append(output.detach().clone())
    assert len(reduced) == 3, "a backward trusts what its own forward has left"
    assert len(launched) == 3 * (2 if TARGETS[target].native_fp4 else 1)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


FORMS = {
    "blocks of rows": replace(RECIPE, weight_block=ROW_BLOCK),
    "data gradients alone": replace(RECIPE, roles=("dgrad",)),
}


@pytest.mark.parametrize("recipe", FORMS.values(), ids=FORMS)
@pytest.mark.usefixtures("gpu_kernels")
def test_forms_that_only_the_backward_reads(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    """Of a weight that is updated through `.data` alone they are never an earlier step's."""
    monkeypatch.setattr(cached_weight, "CACHE", WeightCache())
    model = nn.Linear(32, 32, bias=False).to(device)
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": recipe})
    gradients = []
    for _ in range(2):
        x = torch.ones(16, 32, device=device, requires_grad=True)
        compiled(x).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
        model.weight.data *= 2
    assert torch.equal(gradients[1], 2 * gradients[0]), "a power of two passes through quantisation"


@pytest.mark.parametrize(("weight_cache", "misses"), [("training", 0), ("always", 1), ("off", 0)])
@pytest.mark.usefixtures("gpu_kernels")
def test_inference(device: torch.device, launched: list[Region], weight_cache: str, misses: int) -> None:
    model = nn.Linear(32, 32, bias=False).to(device)
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": RECIPE, "weight_cache": weight_cache})
    x = torch.randn(16, 32).to(device)
    with torch.no_grad():
        outputs = [compiled(x).clone() for _ in range(3)]
        assert torch.equal(outputs[0], outputs[2])
        assert len(launched) == misses
        model.weight.mul_(2)
        assert torch.equal(compiled(x), 2 * outputs[0]), "a power of two passes through quantisation"
        assert len(launched) == 2 * misses


@pytest.mark.usefixtures("gpu_kernels")
def test_never_with_cuda_graphs(device: torch.device, launched: list[Region], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph has found once, it would find for ever: so they quantise, at every replay."""
    seen: list[str] = []
    original = backend.pipeline.remember
    monkeypatch.setattr(backend.pipeline, "remember", lambda names, kept: seen.append(kept) or original(names, kept))
    for mode in ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        model = nn.Linear(32, 32, bias=False).to(device)
        options = {"recipe": RECIPE, "mode": mode}
        torch.compile(model, backend="nvfp4", options=options)(torch.randn(16, 32).to(device))
    assert seen == ["off", "off", "training"]
