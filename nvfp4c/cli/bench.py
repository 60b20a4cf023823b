"""`nvfp4c bench`: how fast kernels and training steps are on this machine, against what it can do at best."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from nvfp4c.cli.progress import progress
from nvfp4c.errors import OptionError

if TYPE_CHECKING:
    from nvfp4c.bench.kernels import ShapeResult, Timed
    from nvfp4c.bench.probe import ProbeResult
    from nvfp4c.bench.record import Record
    from nvfp4c.bench.step_regions import Measured
    from nvfp4c.bench.train import TrainResult

DEFAULT_SIZE = {"cpu": "small", "cuda": "large"}

bench = typer.Typer(no_args_is_help=True, help="Measure kernels and training steps on this machine.")

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Samples of each. [default: more on a GPU than on a CPU]")]
Commit = Annotated[str | None, typer.Option(help="What to record where this is no git checkout.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, with every sample.")]
Out = Annotated[Path | None, typer.Option(help="A folder to write that JSON to as well.")]


@bench.command()
def kernels(
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the input. [default: two typical shapes]")] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Columns of the input.")] = None,
    rounds: Rounds = None,
    device: Device = "auto",
    commit: Commit = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Time each kernel against a copy, a reduction and a matrix product on the same device."""
    from nvfp4c.bench import kernels as measurement
    from nvfp4c.bench.record import Record, about
    from nvfp4c.quickstart.results import prepared
    from nvfp4c.quickstart.train import choose_device

    device = choose_device(device)
    shapes = measurement.shapes(device, rows, columns)
    rounds = rounds or measurement.ROUNDS[device]
    if out:
        prepared(out)
    with progress() as watch:
        results = [measurement.measure(device, *shape, rounds, watch) for shape in shapes]
    record = Record(
        f"bench-kernels-{device}",
        about(device, _command(), commit),
        {"rounds": rounds, "calls_per_sample": measurement.REPEATS[device]},
        [result.to_dict() for result in results],
    )
    _tell(record, [kernel_table(result) for result in results], as_json, out)


@bench.command()
def train(
    size: Annotated[
        str | None, typer.Option(help="tiny, small, medium or large. [default: small on a CPU, large on a GPU]")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Time only this beside Inductor; may be given several times.")
    ] = None,
    rounds: Rounds = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps in a row that make one sample, as in training. [default: 10 on a GPU, else 1]"),
    ] = None,
    micro_batches: Annotated[
        int, typer.Option(min=1, help="Forward and backward passes in a step, whose gradients add up.")
    ] = 1,
    device: Device = "auto",
    compiles: Annotated[
        int, typer.Option(min=0, help="How often each is compiled with empty caches. One takes a minute on a CPU.")
    ] = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Add the longest kernels of a step to the JSON.")] = False,
    commit: Commit = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Time a training step of a few Llama blocks in NVFP4, in high precision, and in fake quantisation."""
    from dataclasses import asdict

    from nvfp4c.bench import train as measurement
    from nvfp4c.bench.llama import size_named
    from nvfp4c.bench.record import Record, about
    from nvfp4c.bench.variants import RECIPE, variants
    from nvfp4c.quickstart.results import prepared
    from nvfp4c.quickstart.train import choose_device

    device = choose_device(device)
    sized = size_named(size or DEFAULT_SIZE[device])
    chosen = variants(device, variant or ())
    rounds, steps = rounds or measurement.ROUNDS[device], steps or measurement.STEPS[device]
    if out:
        prepared(out)
    with progress() as watch:
        result = measurement.measure(
            chosen,
            sized,
            device,
            rounds,
            steps,
            micro_batches=micro_batches,
            compiles=compiles,
            with_profile=profile,
            watch=watch,
        )
    record = Record(
        f"bench-train-{device}-{sized.name}" + (f"-{micro_batches}-micro-batches" if micro_batches > 1 else ""),
        about(device, _command(), commit),
        {
            "size": asdict(sized),
            "tokens": sized.tokens,
            "recipe": RECIPE,
            "rounds": rounds,
            "steps_in_a_row": steps,
            "micro_batches": micro_batches,
        },
        result.to_dict(),
    )
    title = f"{sized.name}: {sized.blocks} blocks, width {sized.width}, MLP {sized.hidden}, {sized.tokens} tokens"
    title += f", {micro_batches} times" if micro_batches > 1 else ""
    _tell(record, [train_table(result, title)], as_json, out)


@bench.command()
def regions(
    size: Annotated[str, typer.Option(help="tiny, small, medium or large.")] = "large",
    rounds: Rounds = None,
    device: Device = "auto",
    commit: Commit = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Time what a training step reduces and quantises, kernel by kernel, against the bytes that were predicted."""
    from dataclasses import asdict

    from nvfp4c.bench import step_regions as measurement
    from nvfp4c.bench.kernel_cases import INPUT_DTYPE
    from nvfp4c.bench.llama import size_named
    from nvfp4c.bench.record import Record, about
    from nvfp4c.quickstart.results import prepared
    from nvfp4c.quickstart.train import choose_device

    device, sized = choose_device(device), size_named(size)
    rounds = rounds or measurement.ROUNDS[device]
    if out:
        prepared(out)
    with progress() as watch:
        found = measurement.measure_llama(sized, device, INPUT_DTYPE[device], rounds, watch)
    record = Record(
        f"bench-regions-{device}-{sized.name}",
        about(device, _command(), commit),
        {"size": asdict(sized), "rounds": rounds},
        [one.to_dict() for one in found],
    )
    _tell(record, [regions_table(found, sized.name)], as_json, out)


@bench.command()
def probe(
    task: Annotated[
        str | None,
        typer.Argument(
            help="FILE.py:callable or package.module:callable, which returns (model, batches, loss). "
            "[default: the quickstart's GPT]"
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of that GPT: tiny, small, medium or large. [default: small on a CPU, large on a GPU]"),
    ] = None,
    rounds: Rounds = None,
    passes: Annotated[
        int | None,
        typer.Option(min=1, help="Passes or steps in a row that make one sample. [default: 5 on a GPU, else 1]"),
    ] = None,
    device: Device = "auto",
    commit: Commit = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Time a pass of the sensitivity probe against a plain training step, and compare their peak memory."""
    from nvfp4c.bench import probe as measurement
    from nvfp4c.bench.record import Record, about
    from nvfp4c.quickstart.model import parameter_count, size_named
    from nvfp4c.quickstart.results import prepared
    from nvfp4c.quickstart.train import choose_device
    from nvfp4c.recipe import DEFAULT_RECIPE
    from nvfp4c.tasks import load_task

    name = "task"
    if task is None:
        device = choose_device(device)
        name = size or DEFAULT_SIZE[device]
        loaded = measurement.quickstart_task(size_named(name), device)
    elif size is not None or device != "auto":
        raise OptionError("--size and --device are for the quickstart's GPT; a task brings its own model and device")
    else:
        loaded = load_task(task)
        device = measurement.device_of(loaded)
    rounds, passes = rounds or measurement.ROUNDS[device], passes or measurement.PASSES[device]
    if out:
        prepared(out)
    with progress() as watch:
        result = measurement.measure(loaded, rounds, passes, watch)
    record = Record(
        f"bench-probe-{device}-{name}",
        about(device, _command(), commit),
        {
            "model": loaded.name,
            "parameters": parameter_count(loaded.model),
            "recipe": DEFAULT_RECIPE,
            "rounds": rounds,
            "passes_in_a_row": passes,
        },
        result.to_dict(),
    )
    _tell(record, [probe_table(result, loaded.name)], as_json, out)


def kernel_table(result: ShapeResult) -> Table:
    """Rates of all cases on one shape, as shares of the ceilings."""
    title = f"{result.rows} x {result.columns}"
    table = _table(title, ("case", "us", "+-", "rate", "of ceiling"))
    for timed in result.timed:
        name = timed.case.name
        microseconds = f"{timed.samples.median * 1e6:,.1f}"
        share = f"{timed.ratio:.2f} {timed.case.ceiling.value}"
        style = "dim" if timed.case.reference else None
        table.add_row(name, microseconds, f"{timed.samples.spread:.0%}", _rate(timed), share, style=style)
    return table


def regions_table(found: Sequence[Measured], title: str) -> Table:
    """A line for each kind of region: bytes that were predicted, and bytes that a copy moves in the time it took."""
    table = _table(f"{title}: regions of a step", ("computes", "launches", "us", "+-", "predicted MB", "measured MB"))
    for one in found:
        table.add_row(
            str(one.row),
            str(one.launches),
            f"{one.samples.median * 1e6:,.1f}",
            f"{one.samples.spread:.0%}",
            f"{one.row.bytes / 1e6:,.1f}",
            f"{one.worth / 1e6:,.1f}",
        )
    return table


def train_table(result: TrainResult, title: str) -> Table:
    """A line for each variant, each figure followed by its ratio to the first one's."""
    table = _table(title, ("step", "ms", "+-", "speed", "peak GiB", "ratio", "cold compile s", "ratio"))
    table.caption = "\n".join(f"{found.variant.name}: {found.variant.description}" for found in result.measured)
    for found in result.measured:
        table.add_row(
            found.variant.name,
            f"{found.step.median * 1e3:,.2f}",
            f"{found.step.spread:.0%}",
            f"{result.speed(found):.2f}x",
            f"{found.memory.peak / 2**30:.2f}" if found.memory else "",
            _times(result.memory_ratio(found)),
            f"{found.compile_seconds:.1f}" if found.compile_seconds else "",
            _times(result.compile_ratio(found)),
        )
    return table


def probe_table(result: ProbeResult, title: str) -> Table:
    """A line for the probe, and one for each plain step, each figure followed by the probe's over it."""
    from nvfp4c.bench.probe import DESCRIPTIONS

    table = _table(title, ("pass or step", "ms", "+-", "probe / this", "peak MiB", "probe / this"))
    table.caption = "\n".join(f"{name}: {description}" for name, description in DESCRIPTIONS.items())
    for cost in (result.probe, *result.steps):
        plain = cost is not result.probe
        table.add_row(
            cost.name,
            f"{cost.time.median * 1e3:,.2f}",
            f"{cost.time.spread:.0%}",
            _times(result.time_ratio(cost) if plain else None),
            f"{cost.memory.peak / 2**20:,.1f}",
            _times(result.memory_ratio(cost) if plain else None),
        )
    return table


def _rate(timed: Timed) -> str:
    unit = "FLOP" if timed.case.ceiling.value == "product" else "B"
    tera = timed.rate / 1e12
    return f"{tera:.2f} T{unit}/s" if tera >= 0.1 else f"{tera * 1e3:.1f} G{unit}/s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    return table


def _command() -> str:
    return shlex.join(["nvfp4c", *sys.argv[1:]])


def _tell(record: Record, tables: Sequence[Table], as_json: bool, out: Path | None) -> None:
    """Print a result in the form asked for, and write it where asked to."""
    from nvfp4c.bench.record import save

    path = save(record, out) if out else None
    if as_json:
        print(record.text, end="")
        return
    console = Console()
    for table in tables:
        console.print(table)
    console.print("+-: distance between the quartiles.", style="dim", highlight=False)
    if path:
        console.print(f"Written: {path}", highlight=False, soft_wrap=True)
