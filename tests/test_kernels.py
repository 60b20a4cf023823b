"""The Triton kernels on a machine without a GPU: run in the interpreter, and compiled ahead of time.

The tests in `kernels/` compare bits. They need TRITON_INTERPRET=1 before triton is first imported, so here they run
in a process of their own; where there is a GPU, pytest collects them as well and runs them on it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="no triton for this system")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nvfp4c.codegen import kernels  # noqa: E402
from nvfp4c.codegen.operations import COLUMN_TILE, INTERPRETED, ROW_TILE, Tile  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter does not")

FOLDER = Path(__file__).parent / "kernels"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(file: str) -> None:
    # numpy warns of 1 / 0 and of overflow, on which a GPU is silent.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore::RuntimeWarning", str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=FOLDER.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


ARGUMENT_TYPES = {
    "amax": "*fp32",
    "amax_bits": "*i32",
    "seed": "*i64",
    "words": "*i32",
    "scales": "*u8",
    "rotated": "*bf16",
    "values": "*bf16",
}
"""Pointers that are always of one type; x is given by a test, all others are int32."""

QUANTIZE_KINDS = [  # tile, x, rotated, tiled, stochastic
    (ROW_TILE, "bf16", False, False, False),
    (ROW_TILE, "bf16", False, True, True),
    (ROW_TILE, "bf16", True, False, True),
    (ROW_TILE, "bf16", True, True, False),
    (ROW_TILE, "fp32", False, False, False),
    (ROW_TILE, "fp16", True, False, True),
    (COLUMN_TILE, "bf16", True, False, True),
    (COLUMN_TILE, "bf16", False, True, False),
]
WIDTHS = {"bf16": 8, "fp16": 8, "fp32": 4}


def compiled(kernel: Any, capability: int, tile: Tile, x: str = "bf16", **constants: Any) -> Any:
    """A kernel compiled for a GPU that need not be there, for an x with a contiguous axis and sizes divisible by 16."""
    along_rows = tile == ROW_TILE
    given: Mapping[str, Any] = {
        "ROWS": tile.rows,
        "BLOCKS": tile.blocks,
        "WIDTH": WIDTHS[x] if along_rows else 1,
        "column_stride" if along_rows else "row_stride": 1,
        **constants,
    }
    types = {**ARGUMENT_TYPES, "x": f"*{x}"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in given else types.get(name, "i32") for name in names}
    values = {(place,): given[name] for place, name in enumerate(names) if name in given}
    unspecialized = ("signs", "stream", *given)
    aligned = {(p,): [["tt.divisibility", 16]] for p, name in enumerate(names) if name not in unspecialized}
    return triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "enable_fp_fusion": False},
    )


def check_assembly(binary: Any, tmp_path: Path) -> None:
    """Nothing in it would change a result's bits, and no register is spilled."""
    assembly = binary.asm["ptx"]
    fused, flushed, approximate = (
        re.findall(rf"\S*{word}\S*", assembly) for word in ("fma", r"\.ftz", r"approx|\.full")
    )
    assert not fused, "rounds once where the reference rounds twice"
    assert not flushed, "loses subnormals"
    assert not approximate, "is not correctly rounded"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage, f"registers are spilled to the stack: {usage}"


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("tile, x, rotated, tiled, stochastic", QUANTIZE_KINDS)
def test_quantize_compiles(
    capability: int, tile: Tile, x: str, rotated: bool, tiled: bool, stochastic: bool, tmp_path: Path
) -> None:
    constants: dict[str, Any] = {"ROTATED": rotated, "TILED": tiled, "STOCHASTIC": stochastic}
    if not stochastic:
        constants["seed"] = None
    check_assembly(compiled(kernels.quantize_kernel, capability, tile, x, **constants), tmp_path)


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("tile", [ROW_TILE, COLUMN_TILE], ids=["rows", "columns"])
def test_amax_and_hadamard_compile(capability: int, tile: Tile, tmp_path: Path) -> None:
    for rotated in (False, True):
        check_assembly(compiled(kernels.amax_kernel, capability, tile, ROTATED=rotated), tmp_path)
    check_assembly(compiled(kernels.hadamard_kernel, capability, tile), tmp_path)


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_dequantize_compiles(capability: int, tmp_path: Path) -> None:
    check_assembly(compiled(kernels.dequantize_kernel, capability, ROW_TILE), tmp_path)


@pytest.mark.parametrize("one", ["rows", "columns", "batch_stride"])
def test_a_size_of_one_compiles(one: str, tmp_path: Path) -> None:
    """Triton makes a constant of every int that is 1, and constants lack a tensor's methods."""
    kind: dict[str, Any] = {"ROTATED": True, "TILED": True, "STOCHASTIC": True, one: 1}
    check_assembly(compiled(kernels.quantize_kernel, 80, ROW_TILE, **kind), tmp_path)
    if one != "batch_stride":
        check_assembly(compiled(kernels.dequantize_kernel, 80, ROW_TILE, **{one: 1}), tmp_path)


@pytest.mark.parametrize("tile", [ROW_TILE, COLUMN_TILE], ids=["rows", "columns"])
def test_threads_hold_whole_blocks(tile: Tile) -> None:
    """Rotation and random bytes of a block need no exchange between threads, and loads are as wide as they can be."""
    binary = compiled(kernels.quantize_kernel, 90, tile, ROTATED=True, TILED=False, STOCHASTIC=True)
    assembly = binary.asm["ptx"]
    assert "shfl" not in assembly
    loads = re.findall(r"ld\.global(?:\.\w+)*?\.(v\d\.b32|b32|b16)\b", assembly)
    assert ("v4.b32" if tile == ROW_TILE else "b32") in loads and "b16" not in loads
