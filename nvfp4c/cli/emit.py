"""`nvfp4c emit`: the kernels that a compiled model would launch on a GPU, as source and PTX."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nvfp4c.cli.progress import progress
from nvfp4c.errors import TargetError

if TYPE_CHECKING:
    from nvfp4c.emission import Emission, EmittedKernel


def emit(
    task: Annotated[
        str,
        typer.Argument(
            help="FILE.py:callable or package.module:callable. The callable returns (model, batches, loss), "
            "or (model, args) for a forward pass alone."
        ),
    ],
    target: Annotated[str, typer.Option(help="The GPU to compile for, which need not be there: sm_80, sm_90, ...")],
    out: Annotated[Path, typer.Option(help="A new folder for the sources, their PTX and summary.json.")],
    recipe: Annotated[str | None, typer.Option(help="What is quantised and how, by name.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A JSON file that says which layers stay in BF16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Write the GPU kernels that a compiled model would launch: source, PTX, registers. Needs no GPU."""
    if importlib.util.find_spec("triton") is None:
        raise TargetError("kernels for GPUs need triton, which is not installed; pip install triton")
    from nvfp4c.emission import emit_task
    from nvfp4c.tasks import load_task

    loaded = load_task(task)
    with progress() as watch:
        emission = emit_task(loaded, target, out, recipe, plan, watch)
    if as_json:
        print(emission.to_json(), end="")
        return
    console = Console()
    console.print(kernels_table(emission))
    if emission.note:
        console.print(emission.note, style="yellow", highlight=False)
    console.print(f"Written: {out}", highlight=False, soft_wrap=True)


def kernels_table(emission: Emission) -> Table:
    """A line for each kernel."""
    title = f"{emission.task}, {' and '.join(emission.graphs)}, recipe {emission.recipe}, target {emission.target}"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for name in ("uses", "registers", "shared", "spills"):
        table.add_column(name, justify="right")
    table.add_column("computes; instructions of note", overflow="fold", ratio=1)
    for kernel in emission.kernels:
        figures = (len(kernel.uses), kernel.registers, kernel.shared_bytes, kernel.spills)
        described = "; ".join([kernel.computes, *_difference(kernel, emission), *kernel.mma, *kernel.conversions])
        table.add_row(kernel.name, *map(str, figures), escape(described))
    if not emission.kernels:
        table.caption = "No kernel: no matmul of this task runs in NVFP4. nvfp4c explain says why."
    return table


def _difference(kernel: EmittedKernel, emission: Emission) -> list[str]:
    """What tells a kernel from those that compute the same."""
    alike = [set(other.specialisation) for other in emission.kernels if other.computes == kernel.computes]
    return [part for part in kernel.specialisation if not all(part in other for other in alike)]
