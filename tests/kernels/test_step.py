"""Whole training steps through the emitted kernels: each does on real data what the reference does, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import LOOPS_RUN, needs_loops
from regions import value_bits
from torch import Tensor, fx, nn

from nvfp4c import backend, dialect, numerics, pipeline
from nvfp4c.capture import CapturedGraph, capture
from nvfp4c.codegen import block_scaled_gemm, chips, cpu_compiler, operations, targets
from nvfp4c.codegen.targets import TARGETS
from nvfp4c.formats import block_count
from nvfp4c.passes.fold_residual import fold_residual
from nvfp4c.passes.fuse import fuse
from nvfp4c.passes.insert_scaling import SEED
from nvfp4c.plan import EMPTY_PLAN
from nvfp4c.recipe import RECIPES
from nvfp4c.region import Form, Region, evaluate
from nvfp4c.scale_layout import unswizzle

SEED_VALUE = 1234
WIDTH, HIDDEN, OUT, TOKENS = (40, 70, 10, (3, 13)) if operations.INTERPRETED else (200, 500, 10, (3, 37))
"""No whole number of blocks anywhere."""


class Model(nn.Module):
    """A residual MLP with a bias, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture
def table(device: torch.device) -> dialect.KernelTable:
    """The kernels that are tested, which are a GPU's in the interpreter too."""
    return targets.kernel_table(TARGETS["sm_90"] if operations.INTERPRETED else targets.resolve("auto", device))


@pytest.fixture
def native(device: torch.device) -> dialect.KernelTable:
    """Those that multiply packed operands; without FP4 tensor cores their one instruction is emulated."""
    here = None if operations.INTERPRETED else chips.newest(torch.cuda.get_device_capability(device))
    return targets.kernel_table(here if here is not None and here.native_fp4 else TARGETS["sm_100"])


def check_region(
    region: Region, inputs: Sequence[Tensor], amaxes: Sequence[Tensor], seed: Tensor | None, found: list[Tensor]
) -> None:
    """Every tensor that a kernel gave is the reference's on the CPU, but for the sign of an operand's zero."""
    given, scales = [x.cpu() for x in inputs], [amax.cpu() for amax in amaxes]
    expected = evaluate(region, given, scales, None if seed is None else seed.cpu())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(value_bits(one), value_bits(other)), region


def check_product(a: Tensor, b: Tensor, factor: float, terms: Sequence[Tensor | None], found: Tensor) -> None:
    """A product of exact operands is off by the order of its sum and by one rounding.

    K additions in FP32, each off by a unit in the last place (2^-23) at most of the sum of magnitudes; the factor, the
    bias and the residual round once each; then the result is rounded to its type.
    """
    a, b = a.double(), b.double()
    exact, size = a @ b.mT * factor, a.abs() @ b.abs().mT * factor
    for term in terms:
        if term is not None:
            exact, size = exact + term.double(), size + term.double().abs()
    bound = (a.shape[-1] + 3) * 2.0**-23 * size + torch.finfo(found.dtype).eps * exact.abs()
    assert bool(((found.double() - exact).abs() <= bound).all())


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """code * scale of codes and scales in the native layout."""
    linear = unswizzle(scales, codes.shape[-2], block_count(2 * codes.shape[-1]))
    return numerics.block_values(numerics.unpack(codes), linear)


class BothWays(fx.Interpreter):
    """Runs a fused graph with reference operations, and checks the target's kernels on the very same arguments."""

    def __init__(self, module: fx.GraphModule, table: dialect.KernelTable, seed: Tensor) -> None:
        super().__init__(module)
        self.compared: Counter[Any] = Counter()
        self.folded = 0
        self._table = table
        self._seed = seed

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is SEED:
            return self._seed
        expected = super().call_function(target, args, kwargs)
        self.compared[target] += 1
        if target is dialect.REGION:
            assert self._table.region is not None
            inputs, amaxes, seed, text = args
            check_region(Region.from_json(text), inputs, amaxes, seed, list(self._table.region(*args)))
        elif target is dialect.PRODUCT:
            a, b, a_amax, b_amax, *terms, _ = args
            check_product(a, b, float(a_amax * b_amax) / 2688**2, terms, self._table.product(*args))
            self.folded += terms[1] is not None
        elif target is dialect.BLOCK_SCALED_MM:
            assert self._table.block_scaled_mm is not None
            a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, *terms, _ = args
            a, b = values_of(a_codes, a_scales), values_of(b_codes, b_scales)
            check_product(a, b, float(a_amax * b_amax) / 2688**2, terms, self._table.block_scaled_mm(*args))
            self.folded += terms[1] is not None
        elif target is dialect.DEQUANTIZE:
            codes, scales, _, k, _ = args
            assert torch.equal(value_bits(self._table.dequantize(codes, scales, k)), value_bits(expected))
        return expected


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        ("nvfp4-all", torch.float32),
        ("nvfp4-all", torch.bfloat16),
        ("nvfp4-all", torch.float16),
        ("nvfp4-weight-only", torch.bfloat16),
    ],
)
def test_kernels_equal_the_reference_on_the_graph_of_a_step(
    device: torch.device, table: dialect.KernelTable, recipe: str, dtype: torch.dtype
) -> None:
    compared = compare(device, table, recipe, dtype)
    assert compared[dialect.PRODUCT] == (9 if recipe == "nvfp4-all" else 0)  # three layers in three roles
    assert compared[dialect.REGION] > 0


@needs_loops
def test_kernels_of_packed_operands_equal_the_reference_on_the_graph_of_a_step(
    device: torch.device, native: dialect.KernelTable
) -> None:
    compared = compare(device, native, "nvfp4-all", torch.bfloat16)
    assert compared[dialect.BLOCK_SCALED_MM] == 9 and compared[dialect.REGION] > 0
    assert compared[dialect.PRODUCT] == compared[dialect.DEQUANTIZE] == 0


def compare(device: torch.device, table: dialect.KernelTable, recipe: str, dtype: torch.dtype) -> Counter[Any]:
    """Runs a step of the model both ways; returns what was compared, and how often."""
    model = Model().to(device, dtype)
    x = torch.randn(*TOKENS, WIDTH).to(device, dtype)
    (found,) = capture(model, x)
    steps = (*pipeline.decide(RECIPES[recipe], EMPTY_PLAN, found.names), *pipeline.rewrite(table.native))
    fold_residual(fuse(pipeline.run(found.graph, steps, "test")))
    found.module.recompile()
    runner = BothWays(found.module, table, torch.tensor(SEED_VALUE, device=device))
    with torch.no_grad():
        runner.run(*inputs_of(found, model, x, torch.randn(*TOKENS, OUT).to(device, dtype)))
    assert runner.folded == (recipe == "nvfp4-all")
    return runner.compared


def inputs_of(found: CapturedGraph, model: nn.Module, x: Tensor, tangent: Tensor) -> list[Tensor]:
    """What the joint graph's placeholders stand for, in their order."""
    parameters = dict(model.named_parameters())
    values = []
    for position, node in enumerate(found.graph.find_nodes(op="placeholder")):
        known = found.names.input_of(node, position)
        if node.meta.get("partitioner_tag") == "is_backward":
            values.append(tangent)
        else:
            values.append(parameters[known.names[0]] if known.is_weight else x)
    return [value.detach() for value in values]


def step(model: nn.Module, x: Tensor, tangent: Tensor) -> list[Tensor]:
    """Output and gradients of a compiled model, which draws the same seed at each call."""
    torch._dynamo.reset()
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(SEED_VALUE)
    output = torch.compile(model, backend="nvfp4", options={"recipe": "nvfp4-all"})(x)
    output.backward(tangent)
    assert x.grad is not None
    return [output.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


class Small(nn.Module):
    """Without any function whose result depends on how it is computed; in both directions a product adds a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(33, 70), nn.Linear(70, 33, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_a_compiled_step(
    device: torch.device, table: dialect.KernelTable, native: dialect.KernelTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Inductor calls is checked as it is called; in the interpreter the step is the CPU target's, bit for bit.

    With packed operands too: the kernel sums in another order, but all sums of this model are exact in FP32.
    """
    # No graph may come from a cache: one for other kernels would be taken for one for these.
    monkeypatch.setattr(backend.GraphPass, "uuid", lambda self: None)
    model = Small().to(device)
    x, tangent = torch.randn(37, 33).to(device), torch.randn(37, 33).to(device)
    seen: list[Form] = []
    original = operations.run

    def watched(launch: Any, inputs: Sequence[Tensor], amaxes: Sequence[Tensor], seed: Tensor | None) -> list[Tensor]:
        found = original(launch, inputs, amaxes, seed)
        check_region(launch.region, inputs, amaxes, seed, found)
        seen.extend(output.form for output in launch.region.outputs)
        return found

    multiply, scaled = block_scaled_gemm.block_scaled_mm, operations._scaled
    products = folded = 0

    def counted(*args: Any) -> Tensor:
        nonlocal folded
        folded += args[4] is not None
        return scaled(*args)

    def exact(*args: Any) -> Tensor:
        nonlocal products, folded
        products += 1
        folded += args[7] is not None
        a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, *terms, dtype, _, _ = args
        a, b = values_of(a_codes, a_scales).double(), values_of(b_codes, b_scales).double()
        found = multiply(*args)
        # On the CPU, as all references: CUDA multiplies by the reciprocal where it is asked to divide by a number.
        rest = [x if x is None else x.cpu() for x in (a_amax, b_amax, *terms)]
        assert torch.equal(found.cpu(), dialect.scale_product((a @ b.mT).float().cpu(), *rest, dtype))
        return found

    monkeypatch.setattr(operations, "run", watched)
    monkeypatch.setattr(operations, "_scaled", counted)
    monkeypatch.setattr(block_scaled_gemm, "block_scaled_mm", exact)
    steps = []
    tables = [(table, {Form.OPERAND, Form.PACKED}), *([(native, {Form.PACKED})] if LOOPS_RUN else [])]
    # Two operands of each of six products, but that a matrix is not quantised twice where once will do.
    for used, forms in tables:
        seen.clear()
        folded = 0
        with monkeypatch.context() as patch:
            patch.setattr(targets, "kernel_table", lambda target, product, used=used: used)
            steps.append(step(model, x, tangent))
        assert set(seen) == {Form.AMAX, Form.VALUE, *forms} and len(seen) > 12
        assert products == (6 if used.native else 0)
        assert folded == 2
    if operations.INTERPRETED:
        seen.clear()
        # The CPU's own kernels as they are written: compiling them takes seconds, and is tested elsewhere.
        monkeypatch.setattr(cpu_compiler, "compile_kind", lambda function, kind: function)
        expected = step(model, x, tangent)
        assert all(torch.equal(one, other) for found in steps for one, other in zip(found, expected, strict=True))
        assert not seen
