"""nvfp4c emit: the kernels of a task, compiled for GPUs that are not there, and what is written about them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from typer.testing import CliRunner

pytest.importorskip("triton", reason="no triton for this system")

from nvfp4c.backend import compile_graph
from nvfp4c.cli import USER_ERROR, app
from nvfp4c.codegen import operations, targets
from nvfp4c.dialect import (
    BLOCK_SCALED_MM,
    DEQUANTIZE,
    PRODUCT,
    REGION,
    WEIGHT,
    Stage,
    arguments,
    region_outputs,
    weight,
)
from nvfp4c.emission import NativeProduct, emit_task, programs, whole_folder
from nvfp4c.errors import OptionError
from nvfp4c.fused_graphs import fused_graphs
from nvfp4c.options import parse
from nvfp4c.tasks import Task, load_task

pytestmark = pytest.mark.skipif(operations.INTERPRETED, reason="compiles, which the interpreter does not")

TASK = """
import torch
from torch import nn
def layers():
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 48, bias=False)).bfloat16()
def training():
    return layers(), [torch.randn(40, 32).bfloat16()], lambda model, batch: model(batch).float().square().mean()
def inference():
    return layers()[1:], (torch.randn(48, 64).bfloat16(),)
"""
ROLES = {"0 fprop", "0 wgrad", "1 fprop", "1 dgrad", "1 wgrad"}
"""The first layer's input needs no gradient."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "two_layers.py"
    path.write_text(TASK)
    return str(path)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["emit", *arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def trained(task: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a training task on sm_90, and what the command printed."""
    out = tmp_path_factory.mktemp("emitted") / "new" / "kernels"
    found = invoke(f"{task}:training", "--target", "sm_90", "--recipe", "nvfp4-all", "--out", str(out), "--json")
    assert found.exit_code == 0, found.output
    return out, json.loads(found.stdout)


Trained = tuple[Path, dict[str, Any]]


def test_the_command_has_help() -> None:
    found = invoke("--help")
    assert found.exit_code == 0
    assert all(option in found.output for option in ("--target", "--out", "--recipe", "--plan", "--json"))


def test_every_kernel_has_its_source_and_its_ptx(trained: Trained) -> None:
    out, summary = trained
    names = [kernel["name"] for kernel in summary["kernels"]]
    assert [name[:3] for name in names] == [f"{number:02d}-" for number in range(1, len(names) + 1)]
    written = {f"{name}{ending}" for name in names for ending in (".py", ".ptx")}
    assert {path.name for path in out.iterdir()} == written | {"summary.json"}
    assert list(out.parent.iterdir()) == [out]
    for name in names:
        compile((out / f"{name}.py").read_text(), name, "exec")
        assert ".target sm_90a" in (out / f"{name}.ptx").read_text()


def test_the_summary_is_what_is_printed(trained: Trained) -> None:
    out, summary = trained
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (summary["target"], summary["recipe"], summary["note"]) == ("sm_90", "nvfp4-all", "")
    assert summary["graphs"] == ["forward", "backward"]


def test_kernels_know_what_they_are_for(trained: Trained) -> None:
    """Every matmul is served, in both graphs; and what is packed in one of them is unpacked in the other."""
    _, summary = trained
    kernels = summary["kernels"]
    uses = [use for kernel in kernels for use in kernel["uses"]]
    assert {use["graph"] for use in uses} == {"forward", "backward"}
    assert {site for use in uses for site in use["sites"]} == ROLES
    assert all(use["sites"] for use in uses)
    counts = Counter((use["graph"], use["node"]) for use in uses)
    # A weight is reduced and packed where nothing is kept of it, else unpacked.
    assert set(counts.values()) == {1, 3}
    assert {node for (_, node), count in counts.items() if count == 3} == {"weight_default", "weight_default_1"}
    (packing,) = [kernel for kernel in kernels if "packed columns 1x16 nearest rotated" in kernel["computes"]]
    assert [(use["graph"], use["sites"]) for use in packing["uses"]] == [("forward", ["1 fprop", "1 wgrad"])]
    (unpacking,) = [kernel for kernel in kernels if kernel["name"].endswith("unpack_columns")]
    assert [(use["graph"], use["sites"]) for use in unpacking["uses"]] == [("backward", ["1 wgrad"])]


def test_kernels_are_compiled_as_they_are_launched(trained: Trained) -> None:
    _, summary = trained
    regions = [kernel for kernel in summary["kernels"] if not kernel["name"][3:].startswith(("unpack", "product"))]
    for kernel in summary["kernels"]:
        assert 0 < kernel["registers"] <= 255
        assert kernel["spills"] == 0
        assert kernel["mma"] == []
    for kernel in regions:
        assert {"i0: *bf16", "NATIVE = 1", "4 warps", "COLUMNS = 256"} <= set(kernel["specialisation"])
        assert ("seed = None" not in kernel["specialisation"]) == ("stochastic" in kernel["computes"])
        quantises = {output.split()[0] for output in kernel["computes"].split("; ")} != {"amax"}
        assert kernel["conversions"] == (["cvt.rn.satfinite.e4m3x2.f32"] if quantises else [])
    assert len({(kernel["computes"], *kernel["specialisation"]) for kernel in regions}) == len(regions)


def test_a_source_says_where_it_comes_from(trained: Trained) -> None:
    out, summary = trained
    for kernel in summary["kernels"]:
        text = (out / f"{kernel['name']}.py").read_text()
        comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        assert comment.startswith(f"# Compiled for sm_90 by nvfp4c emit: {kernel['computes']}.\n")
        for use in kernel["uses"]:
            line = f"#   {use['graph']}: {use['node']} on {use['shape']}, for {', '.join(use['sites'])}\n"
            assert line in comment
        assert "@triton.jit" in text
    inputs = {use["shape"] for kernel in summary["kernels"] for use in kernel["uses"] if use["sites"] == ["0 fprop"]}
    assert "bfloat16 [64, 32]" in inputs


def launches(graph: fx.Graph) -> list[tuple[object, ...]]:
    """What a fused graph gives to kernels, in order, down to the strides."""
    found = []
    for node in graph.nodes:
        if node.target in (REGION, WEIGHT, DEQUANTIZE):
            given = arguments(node)[0] if node.target is REGION else arguments(node)[:1]
            layouts = [operations.layout(x) for x in (one.meta["val"] for one in given)]
            constants = [other for other in arguments(node)[1:] if isinstance(other, (str, torch.dtype, bool, int))]
            found.append((node.target, *layouts, *constants))
    return found


@pytest.mark.parametrize(("target", "counts"), [("sm_90", [6, 8]), ("sm_100", [6, 7])])
def test_graphs_are_those_that_inductor_compiles(
    task: str, monkeypatch: pytest.MonkeyPatch, target: str, counts: list[int]
) -> None:
    """A training step through the backend, with the GPU's passes on a CPU: both graphs launch the same, in order.

    Where products read packed operands, the backward unpacks nothing of what was saved.
    """
    loaded, options = load_task(f"{task}:training"), parse({"recipe": "nvfp4-all"})
    _, loss = loaded.training()
    table = targets.kernel_table(targets.TARGETS[target])
    monkeypatch.setattr(targets, "kernel_table", lambda target, product: table)
    compiled: list[list[tuple[object, ...]]] = []

    def observe(step: str, stage: Stage, graph: fx.Graph) -> None:
        if step == "absorb":
            compiled.append(launches(graph))

    with torch.library._scoped_library("nvfp4_triton", "IMPL") as library:
        library.impl("region", region_outputs, "CPU")
        library.impl("weight", weight, "CPU")
        library.impl("product", PRODUCT, "CPU")
        library.impl("block_scaled_mm", BLOCK_SCALED_MM, "CPU")
        # The step's numbers are not looked at: the fake makes empty tensors of the right sizes.
        library.impl("dequantize", operations._fake_dequantize, "CPU")
        torch._dynamo.reset()
        model = torch.compile(loaded.model, backend=lambda gm, given: compile_graph(gm, given, options, [observe]))
        loss(model, *loaded.example()).backward()
    torch._dynamo.reset()
    assert [launches(half.graph) for half in fused_graphs(loaded, options, target)] == compiled
    assert [len(half) for half in compiled] == counts
    assert [sum(launch[0] is WEIGHT for launch in half) for half in compiled] == [2, 1]


def test_blackwell_multiplies_packed_operands(task: str, tmp_path: Path) -> None:
    """Both directions: nothing is dequantised, and the product on the FP4 tensor cores is called for every matmul."""
    out = tmp_path / "kernels"
    found = invoke(f"{task}:training", "--target", "sm_120", "--recipe", "nvfp4-all", "--out", str(out))
    assert found.exit_code == 0, found.output
    assert "No kernel for sm_120 has run on such a GPU yet" in " ".join(found.stdout.split())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["graphs"] == ["forward", "backward"]
    products = [kernel for kernel in summary["kernels"] if kernel["mma"]]
    assert all("kind::mxf4nvf4" in kind for kernel in products for kind in kernel["mma"])
    assert [product["specialisation"] for product in products] == [
        ["a result in bfloat16", "a bias in bfloat16", "no residual"],
        ["a result in bfloat16", "no bias", "no residual"],
    ]
    assert {site for product in products for use in product["uses"] for site in use["sites"]} == ROLES
    computed = {kernel["computes"] for kernel in summary["kernels"] if not kernel["mma"]}
    quantised = {text for texts in computed for text in texts.split("; ") if not text.startswith("amax")}
    assert quantised == {
        "packed rows 1x16 nearest native",
        "packed rows 16x16 nearest native",
        "packed columns 1x16 nearest rotated native",
        "packed columns 16x16 nearest native",
        "packed rows 1x16 stochastic native",
        "packed columns 1x16 stochastic rotated native",
    }
    uses = Counter(
        (use["graph"], use["node"], *use["sites"])
        for kernel in summary["kernels"]
        for use in kernel["uses"]
        if use["node"].startswith("weight")
    )
    # Of each weight an amax, and what is packed along one axis: nothing is unpacked.
    assert uses == {
        ("forward", "weight_default", "0 fprop"): 2,
        ("forward", "weight_default_1", "1 fprop"): 2,
        ("backward", "weight_default", "1 dgrad"): 2,
    }
    for kernel in summary["kernels"]:
        assert kernel["name"] in found.stdout
        assert kernel["spills"] == 0
        assert ".target sm_120a" in (out / f"{kernel['name']}.ptx").read_text()
        if "nearest" in kernel["computes"]:
            assert "cvt.rn.satfinite.e2m1x2.f32" in kernel["conversions"]


def test_a_product_with_a_residual_is_a_kernel_of_its_own() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](x + self[0](x))

    model = Residual(nn.Linear(32, 32), nn.Linear(32, 32)).bfloat16().requires_grad_(False)
    task = Task("residual", model, args=(torch.randn(40, 32).bfloat16(),))
    found = programs(fused_graphs(task, parse({"recipe": "nvfp4-all"}), "sm_100"), "sm_100")
    assert [product.specialisation for product in found if isinstance(product, NativeProduct)] == [
        ("a result in bfloat16", "a bias in bfloat16", "a residual in bfloat16"),
        ("a result in bfloat16", "a bias in bfloat16", "no residual"),
    ]


def test_a_task_without_nvfp4_has_no_kernels(task: str, tmp_path: Path) -> None:
    found = invoke(f"{task}:inference", "--target", "sm_80", "--recipe", "bf16", "--out", str(tmp_path / "none"))
    assert found.exit_code == 0, found.output
    assert "no matmul of this task runs in NVFP4" in " ".join(found.stdout.split())
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("training", ["--target", "cpu"], "Inductor writes its code"),
        ("training", ["--target", "sm_91"], "did you mean 'sm_90'?"),
        ("training", ["--target", "auto"], "sm_80, sm_89, sm_90, sm_100, sm_103, sm_120"),
        ("trainign", ["--target", "sm_90"], "did you mean 'training'?"),
        ("training", ["--target", "sm_90", "--recipe", "nvfp5"], "nvfp4"),
        ("training", ["--target", "sm_90", "--plan", "absent.json"], "absent.json"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    task: str, tmp_path: Path, name: str, options: list[str], said: str
) -> None:
    found = invoke(f"{task}:{name}", *options, "--out", str(tmp_path / "kernels"))
    assert found.exit_code == USER_ERROR
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert said in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_files_is_left_alone(task: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt", tmp_path / "mine.txt" / "below"):
        found = invoke(f"{task}:training", "--target", "sm_90", "--out", str(out))
        assert found.exit_code == USER_ERROR
        assert "choose another" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interruption_leaves_nothing(task: str, tmp_path: Path) -> None:
    seen = []

    def interrupt(what: str, done: int, of: int) -> None:
        seen.append((what, list(tmp_path.iterdir())))
        if what != "capturing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emit_task(load_task(f"{task}:inference"), "sm_90", tmp_path / "kernels", "nvfp4-all", watch=interrupt)
    assert [what for what, _ in seen] == ["capturing", "compiling for sm_90"]
    assert all([path.name.startswith(".kernels.") for path in beside] == [True] for _, beside in seen)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    with whole_folder(tmp_path / "kernels") as folder:
        (folder / "one").write_text("1")
        assert list((tmp_path / "kernels").iterdir()) == []
    assert (tmp_path / "kernels" / "one").read_text() == "1"
    with pytest.raises(OptionError, match="not an empty folder"), whole_folder(tmp_path / "kernels"):
        pass


def test_without_triton(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = sys.modules["nvfp4c.cli.emit"]
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    found = invoke(f"{task}:training", "--target", "sm_90", "--out", str(tmp_path / "kernels"))
    assert found.exit_code == USER_ERROR
    assert "pip install triton" in found.stderr
