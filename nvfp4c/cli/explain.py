"""`nvfp4c explain`: what becomes of every matmul of a model, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


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
    explanation = explain_model(
        loaded.model, *loaded.example(), loss=loaded.loss, recipe=recipe, plan=plan, target=target
    )
    rows = []
    if kernels:
        given = {"plan": plan} if recipe is None else {"plan": plan, "recipe": recipe}
        rows = kernel_plan(loaded, option_parsing.parse(given), kernels)
    if as_json:
        more = {"kernels": [row.to_dict() for row in rows]} if kernels else {}
        print(json.dumps({**explanation.to_json(), **more}, indent=2))
        return
    console = Console()
    console.print(sites_table(explanation.rows, every))
    graphs = "1 graph" if explanation.graphs == 1 else f"{explanation.graphs} graphs"
    console.print(f"Recipe {explanation.recipe}, target {explanation.target}, {graphs}.", highlight=False)
    console.print(totals(explanation), highlight=False)
    if kernels:
        console.print(kernels_table(rows, kernels))
