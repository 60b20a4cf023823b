"""`nvfp4c quickstart`: see NVFP4 train a real model on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from nvfp4c.quickstart.compare import Comparison
    from nvfp4c.quickstart.train import Progress as Step

DEFAULT_SIZE = {"cpu": "small", "cuda": "large"}


def quickstart(
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each run. [default: the size's]")] = None,
    model_size: Annotated[
        str | None, typer.Option(help="tiny, small, medium or large. [default: small on a CPU, large on a GPU]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder of text to learn from. [default: the Python standard library's source]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes the first weights, the batches and the rounding.")] = 0,
    out: Annotated[Path, typer.Option(help="Where report.html and results.json go.")] = Path("nvfp4c-quickstart"),
    recipe: Annotated[str, typer.Option(help="What is quantised and how, by name.")] = "nvfp4",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train a small GPT twice, in high precision and in NVFP4, and compare the two."""
    from nvfp4c import recipe as recipes
    from nvfp4c.quickstart import data as texts
    from nvfp4c.quickstart import report
    from nvfp4c.quickstart.compare import compare
    from nvfp4c.quickstart.model import size_named
    from nvfp4c.quickstart.results import prepared
    from nvfp4c.quickstart.train import Settings, choose_device

    device = choose_device(device)
    size = size_named(model_size or DEFAULT_SIZE[device])
    settings = Settings(size, steps or size.steps, seed, device)
    recipes.get(recipe)
    prepared(out)
    corpus = texts.load(data, minimum=settings.minimum_bytes)
    with progress_bars(settings.steps, settings.high_precision) as watch:
        comparison = compare(settings, corpus, recipe, watch)
    results, page = report.save(comparison, out, shlex.join(["nvfp4c", *sys.argv[1:]]))
    if as_json:
        print(results.read_text(encoding="utf-8"), end="")
    else:
        show(comparison, page)


@contextmanager
def progress_bars(steps: int, high_precision: str) -> Iterator[Callable[[str, Step], None]]:
    """A bar for each of the two runs, on standard error; yields the function that moves them.

    Where standard error is no terminal, the bars become a line at each validation.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bars:
        names = {"inductor": f"{high_precision}, Inductor", "nvfp4": "NVFP4"}
        tasks = {key: bars.add_task(name, total=steps, state="", start=False) for key, name in names.items()}

        def watch(backend: str, step: Step) -> None:
            if step.stage == "train" and not bars.tasks[tasks[backend]].started:
                bars.start_task(tasks[backend])
            loss = f"loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s"
            state = "compiling" if step.stage == "compile" else loss
            bars.update(tasks[backend], completed=step.step, state=state)
            if not console.is_terminal and step.stage != "train":
                console.print(f"{names[backend]}: step {step.step}/{steps}, {state}", highlight=False, soft_wrap=True)

        yield watch


def show(comparison: Comparison, page: Path) -> None:
    """Print both runs, what became of the matmuls, and where the report is."""
    from nvfp4c.cli.tables import sites_table
    from nvfp4c.grouping import totals
    from nvfp4c.quickstart.report import runs_table, verdict

    console = Console()
    console.print(sites_table(comparison.explanation.rows, every=False))
    console.print(totals(comparison.explanation), highlight=False)
    header, rows = runs_table(comparison)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(verdict(comparison), style="bold", highlight=False)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
