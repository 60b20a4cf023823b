"""The Triton kernels on a machine without a GPU: run in the interpreter, compiled ahead of time, and read.

The tests in `kernels/` compare bits. They need TRITON_INTERPRET=1 before triton is first imported, so here they run
in a process of their own; where there is a GPU, pytest collects them as well and runs them on it.

`python tests/test_kernels.py` accepts the source that is emitted now as the golden one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="no triton for this system")

from nvfp4c.codegen import chips, kernels  # noqa: E402
from nvfp4c.codegen.assembly import Assembly, assemble  # noqa: E402
from nvfp4c.codegen.emit import CONSTANTS, emit  # noqa: E402
from nvfp4c.codegen.expressions import TEMPLATES  # noqa: E402
from nvfp4c.codegen.operations import (  # noqa: E402
    INTERPRETED,
    LOAD_BYTES,
    UNPACK_TILE,
    emitted,
    tile_of,
)
from nvfp4c.formats import DEFAULT_SIGNS, TILE_BLOCK, signs_from_seed  # noqa: E402
from nvfp4c.prologue import Kind, Prologue, Step  # noqa: E402
from nvfp4c.region import Axis, Form, Layout, Output, Region  # noqa: E402

compiles = pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter does not")

FOLDER = Path(__file__).parent / "kernels"


@pytest.mark.skipif(INTERPRETED, reason="runs them in the interpreter, where this already is")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(file: str) -> None:
    # numpy warns of 1 / 0 and of overflow, on which a GPU is silent.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore::RuntimeWarning", str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=FOLDER.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


COLUMNS = Axis.COLUMNS
INPUT = Region((Output(Form.OPERAND), Output(Form.PACKED, COLUMNS, signs=DEFAULT_SIGNS, amax=1)))
"""The operand of a layer's product, and the codes that its weight gradient will need."""

NATIVE_INPUT = Region(tuple(replace(output, form=Form.PACKED, layout=Layout.NATIVE) for output in INPUT.outputs))
"""The same where products read packed operands."""

TRAINING = {
    "amaxes": Region((Output(Form.AMAX), Output(Form.AMAX, COLUMNS, signs=DEFAULT_SIGNS))),
    "amax of a weight": Region((Output(Form.AMAX),)),
    "input": INPUT,
    "gradient": Region(
        (
            Output(Form.OPERAND, rounding="stochastic"),
            Output(Form.OPERAND, COLUMNS, rounding="stochastic", signs=DEFAULT_SIGNS, amax=1, stream=1),
        )
    ),
    "weight": Region((Output(Form.OPERAND, block=TILE_BLOCK),)),
    "weight, transposed": Region((Output(Form.OPERAND, COLUMNS, TILE_BLOCK),)),
}
"""What a training step of the default recipe computes from each of its matrices."""

OTHERS = {
    "all rows": Region(
        (
            Output(Form.PACKED, block=TILE_BLOCK, rounding="stochastic"),
            Output(Form.AMAX, signs=DEFAULT_SIGNS),
            Output(Form.ROTATED, signs=DEFAULT_SIGNS),
            Output(Form.OPERAND, signs=DEFAULT_SIGNS, amax=1),
        )
    ),
    "all columns": Region(
        (
            Output(Form.PACKED, COLUMNS, TILE_BLOCK, "stochastic"),
            Output(Form.AMAX, COLUMNS, signs=DEFAULT_SIGNS),
            Output(Form.ROTATED, COLUMNS, signs=DEFAULT_SIGNS),
            Output(Form.OPERAND, COLUMNS, signs=DEFAULT_SIGNS, amax=1),
        )
    ),
}
FULL = Kind.FULL
GATED = Prologue(
    (FULL, FULL),
    (Step("sigmoid", (0,), "float32"), Step("mul", (0, 2), "bfloat16"), Step("mul", (3, 1), "bfloat16")),
    (4,),
)
GATES = Prologue(
    (FULL, FULL, FULL),
    (
        Step("sigmoid", (1,), "float32"),
        Step("mul", (1, 3), "bfloat16"),
        Step("mul", (0, 4), "bfloat16"),
        Step("sub", (0, 3), "float32"),
        Step("mul", (6, 2), "bfloat16"),
    ),
    (5, 7),
)
NORM = Prologue((FULL, Kind.ROW, Kind.COLUMN), (Step("mul", (0, 1), "float32"), Step("mul", (3, 2), "bfloat16")), (4,))
PRODUCED = (Output(Form.AMAX), Output(Form.AMAX, COLUMNS, signs=DEFAULT_SIGNS), Output(Form.VALUE))
PROLOGUES = {
    "gated": Region(PRODUCED, GATED),
    "gates, backward": Region((*PRODUCED, *(replace(output, matrix=1) for output in PRODUCED)), GATES),
    "norm": Region(INPUT.outputs, NORM),
}
"""What is computed together with what produces the matrix."""

DATA = Path(__file__).parent / "data"
GOLDEN = {
    "region_operand_packed": INPUT,
    "region_amaxes": TRAINING["amaxes"],
    "region_gradient": TRAINING["gradient"],
    "region_prologue": PROLOGUES["gates, backward"],
    "region_weight": TRAINING["weight"],
    "region_native": NATIVE_INPUT,
}
"""The regions whose source stands in a file: one of each family."""

ARGUMENT_TYPES = {
    "seed": "*i64",
    "operand": "*bf16",
    "value": "*bf16",
    "values": "*bf16",
    "rotated": "*bf16",
    "codes": "*u8",
    "scales": "*u8",
    "amax": "*fp32",
    "a": "*fp32",
}
"""Pointers, by their names without a number; inputs' types are given by a test, all others are int32."""

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SIZES = ("rows", "columns")


def assembled(region: Region, target: str, x: str = "bf16", even: bool = True, **constants: Any) -> Assembly:
    """A region's kernel compiled for a GPU that need not be there, as the operation launches it.

    x: of all inputs. even: sizes are multiples of the tile. constants: arguments that a launch would make constant.
    """
    kernel, tile = emitted(region), tile_of(region)
    values = (tile.groups, tile.columns, LOAD_BYTES // BYTES[x], even, chips.TARGETS[target].conversions)
    given = dict(zip(CONSTANTS, values, strict=True)) | constants
    if not any(output.stochastic for output in region.outputs):
        given["seed"] = None
    types = {name: ARGUMENT_TYPES.get(name.rstrip("0123456789"), "i32") for name in kernel.arg_names}
    inputs = {f"i{place}": f"*{x}" for place in range(len(region.prologue.inputs))}
    sizes = (*SIZES, *(name for name in kernel.arg_names if name.endswith(("_batch", "_row"))))
    aligned = [size for size in sizes if size not in given]
    return assemble(kernel, target, types | inputs, given, aligned=aligned, num_warps=tile.warps)


EXACT_FACTORS = {"0f40000000", "0f3F000000", "0f4AC00000", "0fCAC00000"}
"""2, 0.5 and, of a power of two, 1.5 * 2^22 and its negative: such products are exact, so a sum with them is rounded
once, as after a product of its own."""

TINY, ZERO = "0f00800000", "0f00000000"
"""2^-126 and 0."""


def check(found: Assembly) -> None:
    """Nothing in a kernel would change a result's bits, and no register is spilled."""
    flushed, approximate = (re.findall(rf"\S*{word}\S*", found.ptx) for word in (r"\.ftz", r"approx|\.full"))
    assert not flushed, "loses subnormals"
    assert not approximate, "is not correctly rounded"
    fused = re.findall(r"\bfma\.rn\.f32\s+\S+ \S+ (\S+), (\S+);", found.ptx)
    assert len(fused) == len(re.findall(r"\bfma\.", found.ptx))
    added = {factor: {term for other, term in fused if other == factor} for factor, _ in fused}
    assert added.pop(TINY, {ZERO}) == {ZERO}, "nothing else is added to what the product may have rounded"
    assert set(added) <= EXACT_FACTORS, "rounds once where the reference rounds twice"
    assert found.spills == 0, f"{found.spills} bytes of registers are spilled"


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("region", TRAINING.values(), ids=TRAINING)
def test_the_regions_of_training(region: Region, target: str) -> None:
    check(assembled(region, target))


@compiles
@pytest.mark.parametrize("region", [*TRAINING.values(), *OTHERS.values()], ids=[*TRAINING, *OTHERS])
def test_sizes_that_do_not_fit(region: Region) -> None:
    check(assembled(region, "sm_90", even=False))


@compiles
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("region", PROLOGUES.values(), ids=PROLOGUES)
def test_prologues(region: Region, target: str, even: bool) -> None:
    assert assembled(region, target, even=even).spills == 0


@compiles
def test_a_number_for_the_one_row_of_a_tile() -> None:
    """Its conversion to and from bfloat16 has no neighbour to go with, where rows are gone through one by one."""
    weighted = Prologue((FULL, Kind.ROW), (Step("square", (1,), "bfloat16"), Step("mul", (0, 2), "bfloat16")), (3,))
    region = Region((Output(Form.OPERAND, COLUMNS),), weighted)
    check(assembled(region, "sm_90", even=False, GROUPS=1))


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_operation_of_a_prologue_compiles(target: str) -> None:
    """One after the other in one kernel, each of the last result and of the input."""
    steps: list[Step] = []
    last = 0
    for operation, template in TEMPLATES.items():
        compares = operation in ("eq", "ge", "gt", "le", "lt")
        if operation == "where":
            continue
        given = (last, 0)[: 1 + ("{}, {}" in template or template.count("{}") == 2)]
        steps.append(Step(operation, given, "bool" if compares else "float32"))
        if compares:
            steps.append(Step("where", (len(steps), last, 0.5), "bfloat16"))
        last = len(steps)
    assert {step.operation for step in steps} == set(TEMPLATES)
    region = Region((Output(Form.VALUE),), Prologue((FULL,), (*steps, Step("to", (last,), "bfloat16")), (last + 1,)))
    assert assembled(region, target).spills == 0


@compiles
@pytest.mark.parametrize("x", ["fp32", "fp16"])
def test_other_types(x: str) -> None:
    check(assembled(INPUT, "sm_80", x))


@compiles
@pytest.mark.parametrize("one", [*SIZES, "i0_batch", "i0_row"])
def test_a_size_of_one(one: str) -> None:
    """Triton makes a constant of every int that is 1, and constants lack a tensor's methods."""
    check(assembled(TRAINING["gradient"], "sm_80", even=False, **{one: 1}))


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", [kernels.unpack_rows, kernels.unpack_columns], ids=["rows", "columns"])
def test_unpacking(kernel: Any, target: str) -> None:
    types = {name: ARGUMENT_TYPES.get(name, "i32") for name in kernel.arg_names}
    for sizes in ({}, {"rows": 1}, {"columns": 1}):
        given = {"GROUPS": UNPACK_TILE.groups, "COLUMNS": UNPACK_TILE.columns, **sizes}
        check(assemble(kernel, target, types, given, num_warps=UNPACK_TILE.warps))


@compiles
@pytest.mark.parametrize("form", [Form.PACKED, Form.OPERAND])
def test_threads_hold_whole_blocks_of_columns(form: Form) -> None:
    """Rotating and quantising them needs no exchange between threads, and no thread loads or stores single elements."""
    found = assembled(Region((Output(form, COLUMNS, signs=DEFAULT_SIGNS),)), "sm_90")
    assert "shfl" not in found.ptx and found.shared_bytes == 0
    moved = re.findall(r"(ld|st)\.global(?:\.\w+)*?\.(v\d\.b32|b32|b16|b8)\b", found.ptx)
    assert {width for kind, width in moved if kind == "ld"} == {"b32"}
    assert {width for kind, width in moved if kind == "st"} == {"b16" if form is Form.PACKED else "b32"}


@compiles
@pytest.mark.parametrize("form", [Form.PACKED, Form.OPERAND])
def test_threads_draw_the_random_bits_of_their_own_columns(form: Form) -> None:
    """Nothing is passed between them: each would wait for all others, for every row of a block."""
    output = Output(form, COLUMNS, rounding="stochastic", signs=DEFAULT_SIGNS)
    assert "bar.sync" not in assembled(Region((output,)), "sm_90").ptx


@compiles
def test_threads_load_rows_as_widely_as_they_can() -> None:
    found = assembled(Region((Output(Form.OPERAND),)), "sm_90")
    assert set(re.findall(r"ld\.global(?:\.\w+)*?\.(v\d\.b32|b16)\b", found.ptx)) == {"v4.b32"}


# ---- the emitted text


def golden(name: str) -> Path:
    return DATA / f"{name}.py.txt"


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_source(name: str) -> None:
    """What is emitted is what somebody has read; see above for how to accept another."""
    assert emit(GOLDEN[name]).source == golden(name).read_text(encoding="utf-8")


def test_equal_regions_give_equal_kernels() -> None:
    """Whatever their streams; anything else makes another kernel of another name."""
    other = {
        "stream": Output(Form.PACKED, rounding="stochastic", stream=3),
        "rounding": Output(Form.PACKED),
        "axis": Output(Form.PACKED, COLUMNS, rounding="stochastic"),
        "block": Output(Form.PACKED, block=TILE_BLOCK, rounding="stochastic"),
        "signs": Output(Form.PACKED, rounding="stochastic", signs=DEFAULT_SIGNS),
        "other signs": Output(Form.PACKED, rounding="stochastic", signs=signs_from_seed(2)),
        "amax": Output(Form.PACKED, rounding="stochastic", amax=1),
        "form": Output(Form.OPERAND, rounding="stochastic"),
    }
    emitted_now = {name: emit(Region((output,))) for name, output in other.items()}
    assert emit(Region((Output(Form.PACKED, rounding="stochastic"),))) == emitted_now["stream"]
    assert len({kernel.name for kernel in emitted_now.values()}) == len(other)
    assert len({kernel.source for kernel in emitted_now.values()}) == len(other)


def test_buffers_are_named_after_their_outputs() -> None:
    outputs = (Output(Form.AMAX), Output(Form.PACKED), Output(Form.OPERAND), Output(Form.ROTATED, signs=DEFAULT_SIGNS))
    kernel = emit(Region(outputs))
    assert kernel.buffers == ("amax0", "codes1", "scales1", "operand2", "rotated3")
    assert all(f"    {buffer},\n" in kernel.source for buffer in kernel.buffers)


if __name__ == "__main__":
    for _name, _region in GOLDEN.items():
        golden(_name).write_text(emit(_region).source, encoding="utf-8")
