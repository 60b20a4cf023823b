"""The bench: its statistics on a clock that is made up, its steps against the reference, and both commands once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from nvfp4c import dialect, numerics
from nvfp4c.bench import compile_time, kernel_cases, kernels, timing, train
from nvfp4c.bench import variants as bench_variants
from nvfp4c.bench.compile_time import CompileTime
from nvfp4c.bench.fake_quantized import (
    FakeQuantizedLinear,
    Quantize,
    fake_quantize,
    fake_quantized,
    hadamard_matrix,
    reference_quantize,
    rotated,
    rounded,
)
from nvfp4c.bench.kernel_cases import Case, Ceiling
from nvfp4c.bench.llama import SIZES, Llama
from nvfp4c.bench.memory import Memory
from nvfp4c.bench.profiling import top_kernels
from nvfp4c.bench.timing import Samples, interleaved
from nvfp4c.bench.train import Measured, TrainResult
from nvfp4c.bench.variants import REFERENCE, build_steps, variants
from nvfp4c.cli import USER_ERROR, app
from nvfp4c.codegen.targets import TARGETS, kernel_table
from nvfp4c.errors import OptionError, TargetError
from nvfp4c.formats import DEFAULT_SIGNS, TILE_BLOCK
from nvfp4c.quickstart import environment

TINY = SIZES["tiny"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "140"})


# Timing


def test_samples_know_their_median_and_spread():
    samples = Samples((4.0, 1.0, 2.0, 3.0, 5.0))
    assert samples.median == 3.0
    assert samples.spread == (4.0 - 2.0) / 3.0
    assert Samples((7.0,)).spread == 0.0
    assert samples.to_dict()["seconds"] == [4.0, 1.0, 2.0, 3.0, 5.0]


def test_each_round_times_each_call_once_and_keeps_no_warmup():
    log: list[str] = []
    told: list[tuple[str, int, int]] = []
    ticks = count()

    def clock(call: timing.Call) -> float:
        call()
        return float(next(ticks))

    calls = {name: (lambda name=name: log.append(f"call {name}")) for name in "abc"}
    samples = interleaved(
        calls,
        clock,
        rounds=4,
        warmups=2,
        before=lambda name: log.append(f"before {name}"),
        watch=lambda *state: told.append(state),
    )
    assert {name: len(found.seconds) for name, found in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert sorted(second for found in samples.values() for second in found.seconds) == list(range(6, 18))
    assert log[::2] == [line.replace("call", "before") for line in log[1::2]]
    rounds = ["".join(line[-1] for line in log[start : start + 6 : 2]) for start in range(0, len(log), 6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert told[-1] == ("timing", 4, 4)


def test_a_drifting_device_drifts_for_all():
    """Seconds double while the rounds go on. Timed one after the other, equal calls would differ by half."""
    ticks = count()
    names = ("a", "b")
    samples = interleaved({name: int for name in names}, lambda call: 1 + next(ticks) / 80, rounds=40)
    medians = [samples[name].median for name in names]
    # The two calls of a round are one tick apart, and so are the medians at most.
    assert abs(medians[0] - medians[1]) <= 1 / 80


def test_a_cpu_sample_is_the_mean_of_its_calls(monkeypatch):
    made: list[int] = []
    times = iter((10.0, 18.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert timing.clock_for("cpu", 4, short=False)(lambda: made.append(1)) == 2.0
    assert len(made) == 4


# Kernels


def test_the_fastest_reference_is_the_ceiling():
    found = [
        Case("slow copy", Ceiling.COPY, 100, int, reference=True),
        Case("fast copy", Ceiling.COPY, 300, int, reference=True),
        Case("read", Ceiling.READ, 400, int, reference=True),
        Case("product", Ceiling.PRODUCT, 500, int, reference=True),
        Case("quantise", Ceiling.COPY, 150, int),
        Case("amax", Ceiling.READ, 100, int),
    ]
    timed = kernels.compared(found, {case.name: Samples((2.0, 2.0, 9.0)) for case in found})
    assert [one.ratio for one in timed] == [100 / 300, 1, 1, 1, 150 / 300, 100 / 400]
    assert timed[0].rate == 50


def test_bytes_of_packed_operands():
    """Half a byte an element and one a block, whose last one may be padded: what quantising really returns."""
    for rows, columns in ((32, 64), (5, 40)):
        x = torch.randn(rows, columns)
        found = numerics.quantize(x)
        assert kernel_cases.packed_bytes(rows, columns) == found.codes.nbytes + found.scales.nbytes


def test_inputs_take_turns_and_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(kernel_cases, "cache_bytes", lambda device: 1000)
    inputs = kernel_cases._inputs("cpu", 16, 32)
    assert len(inputs) * kernel_cases.packed_bytes(16, 32) > 2 * 1000
    seen: list[int] = []
    call = kernel_cases._rotating([1, 2, 3], seen.append)
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]


def test_cases_move_what_is_counted(monkeypatch):
    """Kernels are the reference functions here: compiling the CPU's would take a minute, and is tested elsewhere."""
    table = replace(
        kernel_table(TARGETS["cpu"]),
        amax=dialect.amax,
        quantize=dialect.quantize,
        operand=lambda *given: numerics.block_values(*dialect.quantize_values(*given)),
        dequantize=lambda codes, scales, k: dialect.dequantize(codes, scales, None, k, torch.float32),
    )
    monkeypatch.setattr(kernel_cases, "kernel_table", lambda target: table)
    monkeypatch.setitem(kernel_cases.LARGE_BYTES, "cpu", 2**20)
    rows, columns = 32, 48
    found = kernel_cases.cases("cpu", rows, columns)
    read = rows * columns * torch.float32.itemsize
    for case in found:
        moved = sum(tensor.nbytes for tensor in tree_leaves(case.call()))
        if case.ceiling is Ceiling.PRODUCT:
            assert case.amount == 2 * rows * columns * columns
        elif case.name == "dequantise":
            assert case.amount == kernel_cases.packed_bytes(rows, columns) + moved
        elif case.ceiling is Ceiling.COPY and not case.reference:
            assert case.amount == read + moved
        elif not case.reference:
            assert case.amount == read
    for ceiling in Ceiling:
        assert {case.reference for case in found if case.ceiling is ceiling} == {True, False}


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reference and one kernel for each ceiling, none of which needs compiling."""
    x = torch.randn(64, 64)
    found = [
        Case(f"{'reference' if reference else 'kernel'}, {ceiling.value}", ceiling, 1000, lambda: x + 1, reference)
        for ceiling in Ceiling
        for reference in (True, False)
    ]
    monkeypatch.setattr(kernels, "cases", lambda device, rows, columns: found)


def test_kernels_from_end_to_end(few_cases, tmp_path):
    arguments = ("--rows", "32", "--columns", "64", "--rounds", "2", "--device", "cpu", "--commit", "abc")
    found = invoke("bench", "kernels", *arguments, "--json", "--out", str(tmp_path))
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record == json.loads((tmp_path / "bench-kernels-cpu.json").read_text())
    assert record["about"]["commit"] == "abc"
    assert {"command", "device", "system", "python", "torch"} <= set(record["about"])
    (shape,) = record["results"]
    assert (shape["rows"], shape["columns"]) == (32, 64)
    assert len(shape["cases"]) == 2 * len(Ceiling)
    for case in shape["cases"]:
        assert len(case["seconds"]) == 2
        assert case["rate"] == case["amount"] / statistics.median(case["seconds"])
        assert case["ratio"] == 1 or not case["reference"]


def test_kernels_print_a_table(few_cases):
    found = invoke("bench", "kernels", "--rows", "16", "--columns", "16", "--rounds", "1", "--device", "cpu")
    assert found.exit_code == 0, found.output
    assert "16 x 16" in found.stdout
    assert "kernel, product" in found.stdout
    assert found.stderr == "16 x 16: making inputs\n16 x 16: timing\n"


# The step and its variants


def test_the_llama_is_causal():
    torch.manual_seed(0)
    model, x = Llama(TINY), torch.randn(2, TINY.sequence, TINY.width)
    changed = x.clone()
    changed[:, -1] += 1
    one, other = model(x), model(changed)
    assert one.shape == x.shape
    assert torch.equal(one[:, :-1], other[:, :-1])
    assert not torch.equal(one[:, -1], other[:, -1])


@pytest.mark.parametrize("quantize", [fake_quantize, reference_quantize])
def test_fake_quantisation_is_the_references(monkeypatch, quantize: Quantize):
    """Forward and backward, bit for bit: integers, so that sums of the transform are exact in any order."""
    torch.manual_seed(0)
    x, w, dy = (torch.randint(-8, 9, shape).float() for shape in ((48, 40), (24, 40), (48, 24)))
    byte = 77
    # A tensor of the bytes asked for, all equal, so that both round the same elements up.
    monkeypatch.setattr(torch, "randint", lambda high, shape, dtype, device: torch.full(shape, byte, dtype=dtype))

    def exact(tensor: torch.Tensor, **how: object) -> torch.Tensor:
        if how.get("rounding") == "stochastic":
            columns = -(-tensor.shape[1] // 16) * 16
            how["random_bits"] = torch.full((tensor.shape[0], columns), byte, dtype=torch.uint8)
        return numerics.quantize(tensor, **how).dequantize()  # type: ignore[arg-type]

    linear = nn.Linear(40, 24, bias=False)
    linear.weight.data = w
    x.requires_grad_()
    y = FakeQuantizedLinear(linear, quantize)(x.view(2, 24, 40))
    y.backward(dy.view(2, 24, 24))
    weight = exact(w, block=TILE_BLOCK)
    assert torch.equal(y.view(48, 24), exact(x.detach()) @ weight.t())
    assert torch.equal(x.grad, exact(dy, rounding="stochastic") @ weight)
    left = exact(dy.t(), rounding="stochastic", signs=DEFAULT_SIGNS)
    assert torch.equal(linear.weight.grad, left @ exact(x.detach().t(), signs=DEFAULT_SIGNS).t())


@pytest.mark.parametrize("byte", [None, 0, 77, 255])
def test_fake_rounding_is_the_references(byte: int | None):
    """Between all codes, on ties and on the thresholds of random bytes."""
    y = torch.cat([torch.arange(-6, 6.01, 2.0**-10), torch.randn(1000).clamp(-6, 6)])
    bits = None if byte is None else torch.full(y.shape, byte, dtype=torch.uint8)
    assert torch.equal(rounded(y, bits), numerics.round_e2m1(y, bits))


def test_the_matrix_is_the_transform():
    x = torch.randint(-8, 9, (3, 40)).float()
    assert torch.equal(rotated(x, hadamard_matrix()), numerics.rotate(x, DEFAULT_SIGNS))


def test_every_linear_layer_is_replaced():
    model = Llama(TINY)
    weights = {id(parameter) for parameter in model.parameters()}
    replaced = fake_quantized(model)
    assert not any(isinstance(module, nn.Linear) for module in replaced.modules())
    assert {id(parameter) for parameter in replaced.parameters()} == weights


def test_what_is_not_compiled_is_the_reference_as_it_stands():
    steps = build_steps([variant for variant in variants("cpu") if variant.fake], TINY, "cpu")
    ways = {
        name: {module.quantize for module in step.model.modules() if isinstance(module, FakeQuantizedLinear)}
        for name, step in steps.items()
    }
    assert ways == {"fake": {fake_quantize}, "eager": {reference_quantize}}


def test_one_compile_serves_all_fake_quantised_blocks():
    (fake,) = (variant for variant in variants("cpu") if variant.name == "fake")
    size, results = replace(TINY, blocks=3), []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = build_steps([replace(fake, backend=backend)], size, "cpu")["fake"]
        torch.manual_seed(1)
        step()
        results.append([parameter.grad for parameter in step.parameters])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (0 if backend is None else 1)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_steps_of_one_dtype_share_their_data():
    steps = build_steps(variants("cpu"), TINY, "cpu")
    assert next(iter(steps)) == REFERENCE
    first, other, low = steps[REFERENCE], steps["eager"], steps["inductor-bf16"]
    assert all(one is two for one, two in zip(first.parameters, other.parameters, strict=True))
    assert first.x is other.x
    assert {parameter.dtype for parameter in low.parameters} == {torch.bfloat16}
    # Angles in BF16 would be wrong by whole turns after a few hundred positions.
    assert {buffer.dtype for buffer in low.model.buffers()} == {torch.float32}


def test_a_step_begins_as_an_optimizer_leaves_it():
    step = build_steps(variants("cpu"), TINY, "cpu")["eager"]
    step()
    assert all(tensor.grad is not None for tensor in (*step.parameters, step.x))
    versions = [parameter._version for parameter in step.parameters]
    step.prepare()
    assert all(tensor.grad is None for tensor in (*step.parameters, step.x))
    assert all(parameter._version > old for parameter, old in zip(step.parameters, versions, strict=True))


def test_micro_batches_add_up():
    """They are all of one step: no parameter counts as changed between them."""
    model, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    once = train.Step(model, tuple(model.parameters()), x, torch.randn(4, 8))
    once.prepare()
    once()
    gradient, version = model.weight.grad, model.weight._version
    twice = replace(once, micro_batches=2)
    twice.prepare()
    twice()
    # The same gradient twice: a power of two rounds nothing.
    assert torch.equal(model.weight.grad, 2 * gradient)
    assert model.weight._version == version + 1


def test_ratios_are_to_the_first():
    one, two = variants("cpu", ["nvfp4"])
    cold = tuple(CompileTime(forward, 9.0, 1.0) for forward in (6.0, 1.0, 80.0))
    result = TrainResult(
        (
            Measured(one, Samples((2.0,)), Memory(50, 100), (CompileTime(4.0, 6.0, 1.0),), None),
            Measured(two, Samples((4.0,)), Memory(50, 102), cold, None),
        )
    )
    found = result.to_dict()["nvfp4"]
    assert (found["speed"], found["memory_ratio"], found["compile_ratio"]) == (0.5, 1.02, 1.5)
    assert result.to_dict()[REFERENCE]["speed"] == 1


def test_a_profile_counts_what_one_call_spends():
    x = torch.randn(64, 64)
    prepared: list[int] = []
    found = top_kernels(lambda: x @ x, "cpu", lambda: prepared.append(1))
    (product,) = [kernel for kernel in found if kernel["name"] == "aten::mm"]
    assert product["launches"] == 1
    assert sum(kernel["share"] for kernel in found) == pytest.approx(1, abs=1e-9)  # FP64 sum of a few terms
    assert prepared


def test_train_from_end_to_end(tmp_path, monkeypatch):
    """Without Inductor's code generation, which the test of compile times has."""
    monkeypatch.setattr(
        bench_variants, "compile_model", lambda model, backend, options: torch.compile(model, backend="aot_eager")
    )

    seconds = iter((1.0, 4.0, 2.0))

    def pretended(variant: str, size: str, device: str) -> CompileTime:
        assert (variant, size, device) == (REFERENCE, "tiny", "cpu")
        return CompileTime(next(seconds), 2.0, 0.5)

    monkeypatch.setattr(compile_time, "measure", pretended)
    arguments = ("--size", "tiny", "--variant", "eager", "--rounds", "2", "--device", "cpu", "--profile", "--json")
    arguments += ("--compiles", "3")
    found = invoke("bench", "train", *arguments, "--out", str(tmp_path))
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record == json.loads((tmp_path / "bench-train-cpu-tiny.json").read_text())
    assert list(record["results"]) == [REFERENCE, "eager"]
    eager = record["results"]["eager"]
    assert eager["memory"] is None
    assert eager["compile_seconds"] is None
    assert len(eager["step"]["seconds"]) == 2
    assert any(kernel["name"] == "aten::mm" for kernel in eager["profile"])
    assert record["results"][REFERENCE]["compile_seconds"]["median"] == 4.0
    assert record["settings"]["recipe"] == "nvfp4-all"


def test_train_prints_a_table(monkeypatch):
    one, two = variants("cpu", ["nvfp4"])
    result = TrainResult(
        (Measured(one, Samples((2.0,)), None, (), None), Measured(two, Samples((4.0,)), None, (), None))
    )
    monkeypatch.setattr(train, "measure", lambda *args, **how: result)
    found = invoke("bench", "train", "--device", "cpu", "--compiles", "0")
    assert found.exit_code == 0, found.output
    assert "small: 2 blocks" in found.stdout
    assert "nvfp4: NVFP4" in found.stdout
    assert "0.50x" in found.stdout


def test_compile_time_is_that_of_a_new_process_with_empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "not-used"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = compile_time.measure(REFERENCE, "tiny", "cpu")
    assert min(found.forward, found.backward, found.startup) > 0
    assert found.total == found.forward + found.backward
    assert not (tmp_path / "not-used").exists()


def test_a_failing_compile_says_why():
    with pytest.raises(TargetError, match=r"no variant 'nothing'.*--compiles 0"):
        compile_time.measure("nothing", "tiny", "cpu")


# The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--size", "huge"], "'huge'"),
        (["train", "--device", "cpu", "--variant", "nvfp5"], "did you mean 'nvfp4'?"),
        (["train", "--device", "tpu"], "auto, cpu or cuda"),
        (["train", "--device", "cpu", "--out", "FILE"], "cannot write to"),
        (["kernels", "--device", "cpu", "--rows", "64"], "both --rows and --columns"),
        (["kernels", "--device", "tpu"], "auto, cpu or cuda"),
        (["kernels", "--device", "cpu", "--out", "FILE"], "cannot write to"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path: Path, arguments, said):
    (tmp_path / "file").write_text("")
    found = invoke("bench", *[argument.replace("FILE", str(tmp_path / "file")) for argument in arguments])
    assert found.exit_code == USER_ERROR
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert said in found.stderr


@pytest.mark.parametrize("arguments", [["kernels", "--rows", "0"], ["train", "--rounds", "0"], ["nothing"], []])
def test_wrong_usage_exits_with_2(arguments):
    assert invoke("bench", *arguments).exit_code == 2


@pytest.mark.parametrize("command", ["kernels", "train"])
def test_every_command_has_help(command):
    found = invoke("bench", command, "--help")
    assert found.exit_code == 0
    assert "--json" in found.output


def test_an_unknown_shape_is_the_devices_own():
    assert kernels.shapes("cuda", None, None) == ((8192, 4096), (8192, 14336))
    assert kernels.shapes("cuda", 64, 32) == ((64, 32),)
    with pytest.raises(OptionError):
        kernels.shapes("cuda", 64, None)


def test_the_bench_needs_no_plotly():
    code = (
        "import sys; sys.modules['plotly'] = None; import nvfp4c.bench.train, nvfp4c.bench.kernels, nvfp4c.bench.record"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_commit_is_of_the_checkout_that_tracks_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() == "not in a git checkout"
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    # A checkout that does not hold the file is another project's.
    assert environment.commit() == "not in a git checkout"


# Regions


def test_a_device_without_regions_is_told_so():
    found = CliRunner().invoke(app, ["bench", "regions", "--size", "tiny", "--device", "cpu"])
    assert found.exit_code != 0
    assert "has no regions to time" in str(found.exception) + found.output


# The page of results


def test_the_page_of_results_is_what_the_command_writes():
    from nvfp4c.bench.report import report

    docs = Path(__file__).parents[1] / "docs"
    assert (docs / "performance.md").read_text(encoding="utf-8") == report(docs / "results")
