"""`nvfp4c sensitivity`: measure what FP4 costs at every matmul, and solve for a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nvfp4c.cli.progress import progress
from nvfp4c.errors import OptionError

if TYPE_CHECKING:
    from nvfp4c.sensitivity.analysis import Analysis
    from nvfp4c.tasks import Task

SHOWN = 12
"""Lines of the ranking that a terminal gets."""


def sensitivity(
    task: Annotated[
        str | None,
        typer.Argument(
            help="FILE.py:callable or package.module:callable, which returns (model, batches, loss). "
            "Left out with --hf."
        ),
    ] = None,
    hf: Annotated[
        Path | None, typer.Option(help="A folder with a language model as transformers writes it, instead of a task.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="With --hf: a text file or a folder of them. May be given several times.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="With --hf: sequences a batch; for an encoder, pairs. [default: 8]")
    ] = None,
    length: Annotated[int | None, typer.Option(help="With --hf: tokens of a sequence. [default: 128]")] = None,
    device: Annotated[
        str | None, typer.Option(help="With --hf: auto, cpu or cuda. [default: auto, a GPU where there is one]")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="How much may stay in BF16, in the unit below. 0.15 is 15% of operations.")
    ] = None,
    unit: Annotated[
        str,
        typer.Option(
            help="operations: share of matmul operations in BF16. bits: mean bits of a weight. "
            "speed: of a step's matmuls over BF16's, on --target."
        ),
    ] = "operations",
    target: Annotated[str, typer.Option(help="The GPU that a budget of speed is for: sm_90, sm_100, ...")] = "",
    method: Annotated[
        str,
        typer.Option(
            help="probe: one forward and backward pass a batch. ablate: also run each forward matmul alone in FP4."
        ),
    ] = "probe",
    recipe: Annotated[str, typer.Option(help="What is quantised and how, by name.")] = "nvfp4",
    batches: Annotated[int, typer.Option(min=1, help="Batches to measure on, and as many to check plans with.")] = 8,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Layers that stay in BF16 whatever it costs: a pattern of names, such as 'lm_head'."),
    ] = None,
    shared_input: Annotated[
        bool, typer.Option("--shared-input", help="Layers that read the same tensor are decided together.")
    ] = False,
    whole_blocks: Annotated[
        bool, typer.Option("--whole-blocks", help="All layers of a block are decided together.")
    ] = False,
    pairs: Annotated[
        bool,
        typer.Option(help="Run blocks whole to see whether scores add up, and pairs of layers where they do not."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of stochastic rounding and of random plans.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for plan.json, sensitivity.json and report.html. A run that was interrupted goes on there."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
) -> None:
    """Measure which matmuls can stand FP4 on your model, data and loss, and solve for a plan."""
    from nvfp4c import plan as plans
    from nvfp4c import recipe as recipes
    from nvfp4c.sensitivity.analyze import Settings, analyze_task
    from nvfp4c.sensitivity.budgets import PAPER_SHARE, Budget
    from nvfp4c.sensitivity.constraints import Constraints

    if budget is None and unit != "operations":
        raise OptionError(f"a budget of {unit} has no default; say how much with --budget")
    must = plans.from_rules(dict.fromkeys(keep or (), "bf16"), "--keep")
    settings = Settings(
        recipe=recipes.get(recipe),
        budget=Budget(PAPER_SHARE if budget is None else budget, unit, target),
        constraints=Constraints(must, shared_input, whole_blocks),
        method=method,
        seed=seed,
        pairs=pairs,
    )
    beside_hf = {"text": text, "batch-size": batch_size, "length": length, "device": device}
    loaded = _task(task, hf, beside_hf, batches, seed)
    try:
        with progress() as watch:
            analysis = analyze_task(loaded, settings, batches, out, watch)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(going_on(out)) from None
    if as_json:
        print(json.dumps(analysis.to_dict()))
        return
    console = Console()
    console.print(ranking(analysis))
    console.print(plans_table(analysis))
    for line in summary(analysis):
        console.print(line, highlight=False)
    if out is not None:
        console.print(f"Written: {out}/plan.json, sensitivity.json, report.html", highlight=False, soft_wrap=True)


def going_on(out: Path | None) -> str:
    """What to do after an interruption."""
    if out is None:
        return "nothing was kept; with --out FOLDER the same command goes on where it was interrupted"
    return f"what was measured is kept in {out / 'parts'}; the same command goes on from there"


def _task(task: str | None, hf: Path | None, beside_hf: Mapping[str, Any], batches: int, seed: int) -> Task:
    """beside_hf: options that only a model's folder needs, by name; None for those that were not given."""
    from nvfp4c.quickstart.train import choose_device
    from nvfp4c.sensitivity import huggingface
    from nvfp4c.tasks import load_task

    if (task is None) == (hf is None):
        raise OptionError("give either a task, as FILE.py:callable, or --hf with a model's folder")
    if task is not None:
        for name, value in beside_hf.items():
            if value:
                raise OptionError(f"--{name} goes with --hf; a task brings its own model and batches")
        return load_task(task)
    assert hf is not None
    given = {name: value for name, value in beside_hf.items() if value is not None}
    if not given.get("text"):
        raise OptionError("--hf needs text to run the model on: --text FILE, or a folder of text files")
    return huggingface.load(
        hf,
        given["text"],
        batches=batches,
        held_out=batches,
        batch_size=given.get("batch-size", huggingface.BATCH_SIZE),
        sequence_length=given.get("length", huggingface.LENGTH),
        seed=seed,
        device=choose_device(given.get("device", "auto")),
    )


def ranking(analysis: Analysis) -> Table:
    """The matmuls that raise the loss most in FP4."""
    ranked = sorted(analysis.scores.items(), key=lambda item: -item[1])
    measured = {(site.site, name): role for site in analysis.measurements.sites for name, role in site.roles.items()}
    total = sum(role.operations for role in measured.values())
    table = Table(
        title=f"The {min(SHOWN, len(ranked))} of {len(ranked)} matmuls that FP4 costs most: predicted rise of the loss,"
        " signal-to-noise of the result, share of the matmul operations measured",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("matmul", overflow="fold", ratio=1)
    table.add_column("role")
    for name in ("rise", "SNR dB", "share", "plan"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, score in ranked[:SHOWN]:
        role = measured[key]
        table.add_row(
            escape(key[0]),
            key[1],
            f"{score:+.2e}",
            f"{role.snr_db:.1f}",
            f"{role.operations / total:.2%}",
            "bf16" if key in analysis.plan.bf16 else "nvfp4",
        )
    return table


def plans_table(analysis: Analysis) -> Table:
    """The chosen plan and its rivals, predicted and measured."""
    from nvfp4c.sensitivity.intervals import mean_and_interval

    table = Table(
        title="Plans, and what they do to the loss", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("plan")
    for name in ("in BF16", "predicted rise", "measured rise", "95%"):
        table.add_column(name, justify="right")
    for plan in analysis.candidates:
        if plan.measured is None and plan.name != analysis.chosen:
            continue
        mean, interval = mean_and_interval(plan.measured) if plan.measured else (None, None)
        table.add_row(
            escape(plan.name),
            f"{plan.share:.1%}",
            f"{plan.predicted:+.2e}",
            "" if mean is None else f"{mean:+.2e}",
            "" if interval is None else f"+-{interval:.1e}",
            style="bold" if plan.name == analysis.chosen else None,
        )
    return table


def summary(analysis: Analysis) -> list[str]:
    """What was measured, and what was left out."""
    found = analysis.measurements
    lines = [f"Loss in high precision {found.loss:.4g}, mean of {found.batches} batches."]
    everything = found.provenance["rise_with_everything_in_fp4"]
    lines.append(f"With every forward matmul in FP4 it rises by {everything:+.2e} on the same batches.")
    if analysis.together:
        apart = [f"{one.name} ({one.excess:+.1e})" for one in analysis.together if not one.adds_up]
        lines.append(
            f"Of {len(analysis.together)} blocks run whole, the rise is the sum of scores, within its 95% interval, in "
            f"{len(analysis.together) - len(apart)}{': not in ' + ', '.join(apart) if apart else ''}."
        )
    if analysis.pairs:
        lines.append(
            f"There {len(analysis.pairs)} pairs of matmuls were measured; the plan counts what they do together."
        )
    left = [site.site for site in found.sites if site.obstacle]
    if left:
        lines.append(f"Not measured, so left in BF16: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}.")
    if found.unmeasured_share:
        lines.append(
            f"Shares leave out {found.unmeasured_share:.1%} of the operations: not measured, they stay in BF16."
        )
    return lines
