"""`nvfp4c plan`: look at plan files, compare them, and change their rules."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from nvfp4c.explanation import Row
    from nvfp4c.plan import PrecisionPlan
    from nvfp4c.plan_edit import RuleDiff
    from nvfp4c.plan_effect import PlanEffect

DIFFERENT = 1

plan = typer.Typer(no_args_is_help=True, help="Look at plan files, which say what runs in FP4; compare and edit them.")

TaskName = Annotated[
    str | None,
    typer.Argument(
        help="A model to apply it to: FILE.py:callable or package.module:callable. The callable returns "
        "(model, batches, loss), or (model, args) for a forward pass alone."
    ),
]
RecipeName = Annotated[str | None, typer.Option(help="With a model: what decides where the plan says nothing.")]
Every = Annotated[bool, typer.Option("--all", help="List every layer, instead of equal ones together.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with every layer.")]


@plan.command()
def show(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    task: TaskName = None,
    recipe: RecipeName = None,
    every: Every = False,
    as_json: AsJson = False,
) -> None:
    """Print the rules of a plan and where it comes from; with a model, also what they mean for each of its layers."""
    from nvfp4c.plan import load

    loaded = load(plan)
    found = _effects([loaded], task, recipe)
    if as_json:
        print(json.dumps({**loaded.to_dict(), **({"effect": found[0].to_dict()} if found else {})}, indent=2))
        return
    console = Console()
    console.print(rules_table(loaded, found[0].decided if found else None))
    for line in provenance_lines(loaded.provenance):
        console.print(line, highlight=False, markup=False)
    if found:
        _print_effect(console, found[0], every)


@plan.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A plan file.")],
    second: Annotated[Path, typer.Argument(help="The plan file to compare it with.")],
    task: TaskName = None,
    recipe: RecipeName = None,
    every: Every = False,
    as_json: AsJson = False,
) -> None:
    """Print how two plans differ: in their rules; with a model, also in what they mean for each of its layers.

    The exit code is 0 where they are equal, 1 where they differ, 2 for errors.
    With a model, plans are equal that mean the same for it.
    Where plans come from is not compared.
    """
    from nvfp4c.plan import load
    from nvfp4c.plan_edit import compare
    from nvfp4c.plan_effect import differences

    plans = [load(first), load(second)]
    rules = compare(*plans)
    effects = _effects(plans, task, recipe)
    rows = differences(*effects) if effects else []
    different = bool(rows) if effects else bool(rules)
    if as_json:
        print(json.dumps(_diff_json(different, rules, effects, rows), indent=2))
    else:
        _print_diff(Console(), rules, effects, rows, every)
    raise typer.Exit(DIFFERENT if different else 0)


@plan.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    task: TaskName = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="'PATTERN: bf16' or 'PATTERN: {wgrad: bf16, ...}', where the pattern names layers, * standing for "
            "any text, the roles are fprop, dgrad and wgrad, and the precisions nvfp4 and bf16. May be given "
            "several times; where two rules name a layer, the last holds.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The plan file to write.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write to the file that was read.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the new plan as JSON.")] = False,
) -> None:
    """Add or change rules of a plan. With a model, every pattern must name a layer of it."""
    from nvfp4c.plan import PrecisionPlan, load
    from nvfp4c.plan_edit import compare, edited, parse_rule

    if not rule:
        raise typer.BadParameter("give at least one, such as --rule 'layers.0.*: bf16'", param_hint="--rule")
    if (out is None) != in_place:
        raise typer.BadParameter("give either --out FILE or --in-place", param_hint="--out")
    rules = [parse_rule(text) for text in rule]
    before = load(plan)
    after = edited(before, rules)
    if task is not None:
        from nvfp4c.sites import weight_sites
        from nvfp4c.tasks import load_task

        sites = weight_sites(load_task(task).model)
        for one in rules:
            PrecisionPlan((one,)).check_sites(sites)
    written = out or plan
    _save(after, written)
    if as_json:
        print(json.dumps(after.to_dict(), indent=2))
        return
    console = Console()
    console.print(diff_table(compare(before, after)))
    console.print(f"Written: {written}", highlight=False, soft_wrap=True, markup=False)


def _effects(plans: Sequence[PrecisionPlan], task: str | None, recipe: str | None) -> list[PlanEffect]:
    """What each plan means for the task's model; nothing without a task."""
    if task is None:
        if recipe is not None:
            raise typer.BadParameter("a recipe only matters with a model to apply it to", param_hint="--recipe")
        return []
    from nvfp4c.plan_effect import effect
    from nvfp4c.tasks import load_task

    loaded = load_task(task)
    return [effect(one, loaded, recipe) for one in plans]


def _save(plan: PrecisionPlan, path: Path) -> None:
    from nvfp4c.errors import PlanError

    try:
        plan.save(path)
    except OSError as error:
        raise PlanError(f"cannot write the plan {path}: {error.strerror}") from error


def rules_table(plan: PrecisionPlan, decided: Mapping[str, int] | None) -> Table:
    """A line for each rule, in their order. decided: how many sites and roles each decides, where a model is known."""
    from nvfp4c.recipe import ROLES

    title = "Rules; the last that matches wins" if plan.rules else "No rules: the recipe decides everything"
    table = _table(title, ("layers", *ROLES))
    if decided is not None:
        table.add_column("decides", justify="right")
    for rule in plan.rules:
        count = () if decided is None else (str(decided[rule.pattern]),)
        table.add_row(escape(rule.pattern), *(_coloured(rule.precision.get(role, "")) for role in ROLES), *count)
    return table


def provenance_lines(provenance: Mapping[str, object]) -> list[str]:
    """Where a plan comes from: `key: value` lines, with what is not text as JSON, the values in a column."""
    width = max(map(len, provenance), default=0) + 2
    return [
        f"{f'{key}:':{width}}{value if isinstance(value, str) else json.dumps(value)}"
        for key, value in provenance.items()
    ]


def diff_table(rules: RuleDiff) -> Table:
    """A line for each pattern that two plans do not treat alike."""
    from nvfp4c.plan_edit import precision_text

    table = _table("Rules", ("layers", "before", "after"))
    for change in rules.changes:
        both = ("-" if one is None else escape(precision_text(one)) for one in (change.before, change.after))
        table.add_row(escape(change.pattern), *both)
    return table


def effect_table(rows: Sequence[tuple[Row, Row]], every: bool) -> Table:
    """A line for each site and role whose precision differs; equal sites share one, unless `every` is asked for."""
    from nvfp4c.grouping import group, single

    table = _table("Layers of the model", ("layers", "role", "operations", "before", "after", "decided by"))
    joined = [
        replace(
            new,
            precision=f"{old.precision} {new.precision}",
            reason=" -> ".join(dict.fromkeys((old.reason, new.reason))),
            m=0,
            n=0,
            k=0,
            left="",
            right="",
            kernel="",
        )
        for old, new in rows
    ]
    for line in single(joined) if every else group(joined):
        before, after = line.row.precision.split()
        share = f"{line.row.share:.1%}"
        table.add_row(
            escape(line.row.site), line.row.role, share, _coloured(before), _coloured(after), escape(line.row.reason)
        )
    return table


def _print_effect(console: Console, found: PlanEffect, every: bool) -> None:
    from nvfp4c.cli.tables import sites_table

    console.print()
    console.print(sites_table(found.explanation.rows, every))
    console.print(f"Recipe {found.explanation.recipe}.", highlight=False)
    console.print(_share(found), highlight=False)
    _warn(found.warnings)


def _print_diff(
    console: Console, rules: RuleDiff, effects: Sequence[PlanEffect], rows: Sequence[tuple[Row, Row]], every: bool
) -> None:
    if rules.changes:
        console.print(diff_table(rules))
    if rules.reordered:
        console.print("Rules of both stand in another order, and the last that matches wins.", highlight=False)
    if not rules:
        console.print("The rules are equal.", highlight=False)
    if not effects:
        return
    if rows:
        console.print(effect_table(rows, every))
    else:
        console.print("For this model both plans mean the same.", highlight=False)
    for name, found in zip(("First plan", "Second plan"), effects, strict=True):
        console.print(f"{name}: {_share(found)}", highlight=False)
        _warn(tuple(f"{name}: {warning}" for warning in found.warnings))


def _share(found: PlanEffect) -> str:
    from nvfp4c.grouping import totals

    return f"{totals(found.explanation)} That is {found.share:.1%} of all."


def _warn(warnings: Sequence[str]) -> None:
    """On standard error, one line each, as other things to be noticed."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _diff_json(
    different: bool, rules: RuleDiff, effects: Sequence[PlanEffect], rows: Sequence[tuple[Row, Row]]
) -> dict[str, object]:
    found: dict[str, object] = {"different": different, "rules": rules.to_dict()}
    if effects:
        found["shares"] = [one.share for one in effects]
        found["warnings"] = [list(one.warnings) for one in effects]
        found["sites"] = [
            {
                "site": old.site,
                "role": old.role,
                "share": old.share,
                "before": {"precision": old.precision, "decided_by": old.reason},
                "after": {"precision": new.precision, "decided_by": new.reason},
            }
            for old, new in rows
        ]
    return found


def _coloured(precision: str) -> str:
    from nvfp4c.cli.tables import COLOURS

    return f"[{COLOURS[precision]}]{precision}[/]" if precision in COLOURS else precision


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
