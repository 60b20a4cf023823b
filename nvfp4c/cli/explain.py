"""`nvfp4c explain`: what becomes of every matmul of a model, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nvfp4c.cli.progress import progress

if TYPE_CHECKING:
    import torch
    from torch import fx

    from nvfp4c.bench.step_regions import Measured
    from nvfp4c.dialect import KernelTable
    from nvfp4c.kernel_plan import KernelRow
    from nvfp4c.tasks import Task


def explain(
    task: Annotated[
        str,
        typer.Argument(
            help="FILE.py:callable or package.module:callable. The callable returns (model, batches, loss), "
            "or (model, args) for a forward pass alone."
        ),
    ],
    recipe: Annotated[str | None, typer.Option(help="What is quantised and how, by name.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A JSON file that says which layers stay in BF16.")] = None,
    target: Annotated[str, typer.Option(help="The device to compile for: auto, cpu, sm_90, ...")] = "auto",
    kernels: Annotated[
        str | None,
        typer.Option(
            help="Also say what the kernels for this GPU compute together, and why: sm_80, sm_90, ... "
            "The GPU need not be there."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also time each kind of region of those kernels on the GPU that the model is on, "
            "against the bytes that it is predicted to move.",
        ),
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="List every layer, instead of equal ones together.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every layer.")] = False,
) -> None:
    """Say which matmuls of a model run in NVFP4, in what way, and why the others do not."""
    from nvfp4c import options as option_parsing
    from nvfp4c.cli.tables import kernels_table, sites_table
    from nvfp4c.explanation import explain as explain_model
    from nvfp4c.grouping import totals
    from nvfp4c.kernel_plan import kernel_plan
    from nvfp4c.tasks import load_task

    loaded = load_task(task)
    table = _kernels_at_hand(loaded, kernels or target) if measure else None
    kernels = table.target if table else kernels
    explanation = explain_model(
        loaded.model, *loaded.example(), loss=loaded.loss, recipe=recipe, plan=plan, target=target
    )
    planned: Mapping[fx.Node, KernelRow] = {}
    if kernels:
        given = {"plan": plan} if recipe is None else {"plan": plan, "recipe": recipe}
        planned = kernel_plan(loaded, option_parsing.parse(given), kernels)
    measured = _measured(loaded, planned, table) if table else {}
    if as_json:
        rows = [{**row.to_dict(), **(_figures(measured.get(node)) if table else {})} for node, row in planned.items()]
        print(json.dumps({**explanation.to_json(), **({"kernels": rows} if kernels else {})}, indent=2))
        return
    console = Console()
    console.print(sites_table(explanation.rows, every))
    graphs = "1 graph" if explanation.graphs == 1 else f"{explanation.graphs} graphs"
    console.print(f"Recipe {explanation.recipe}, target {explanation.target}, {graphs}.", highlight=False)
    console.print(totals(explanation), highlight=False)
    if kernels:
        pairs = [(row, measured.get(node)) for node, row in planned.items()]
        console.print(kernels_table(pairs, kernels, measure))


def _device(task: Task) -> torch.device:
    """Where a task runs: where its model or its batch is."""
    from torch.utils._pytree import tree_leaves

    from nvfp4c.backend import device_of

    return device_of([*task.model.parameters(), *tree_leaves(task.example())])


def _kernels_at_hand(task: Task, name: str) -> KernelTable:
    from nvfp4c.bench.step_regions import kernels_at_hand

    return kernels_at_hand(name, _device(task))


def _measured(task: Task, planned: Mapping[fx.Node, KernelRow], table: KernelTable) -> dict[fx.Node, Measured]:
    """The measurement of each region of a plan, by its node, on the kind of device that the task runs on."""
    from nvfp4c.bench import step_regions

    device = _device(task).type
    with progress() as watch:
        found = step_regions.measure(planned, table, device, step_regions.ROUNDS[device], watch)
    return {node: one for one in found for node in one.nodes}


def _figures(one: Measured | None) -> dict[str, float | None]:
    """What JSON says beside a prediction; None for what is no region, which is not timed."""
    if one is None:
        return {"measured_bytes": None, "measured_over_predicted": None, "median_seconds": None}
    return {**one.figures(), "median_seconds": one.samples.median}
