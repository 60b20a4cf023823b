"""Pretrain the quickstart's GPT with a plan that was solved for, and with the paper's rule, under one budget.

python examples/pretrain_with_plans.py --seeds 0 1 2

A short pilot run in high precision is measured (`nvfp4c sensitivity`), and a plan is solved for. Then, for each seed,
the GPT is trained from the start in high precision, with that plan, and with the paper's rule at the same budget: first
and last blocks in BF16. The plans, and after each run the results so far, are on disk; with --resume a later call goes
on from there, with the same plans. Without a seed the plans are all there is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nvfp4c import recipe as recipes
from nvfp4c.bench.record import Record, about, save
from nvfp4c.cli.progress import progress
from nvfp4c.errors import DataError, Nvfp4Error
from nvfp4c.plan import PrecisionPlan, from_rules
from nvfp4c.quickstart import data
from nvfp4c.quickstart.model import size_named
from nvfp4c.quickstart.results import prepared, run_from_dict, run_to_dict
from nvfp4c.quickstart.train import (
    Progress,
    Run,
    Settings,
    build_model,
    choose_device,
    fit,
    loss_of,
    train,
    train_batches,
)
from nvfp4c.sensitivity.analysis import Analysis
from nvfp4c.sensitivity.analyze import Settings as AnalysisSettings
from nvfp4c.sensitivity.analyze import analyze
from nvfp4c.sensitivity.budgets import PAPER_SHARE, Budget
from nvfp4c.sensitivity.intervals import mean_and_interval
from nvfp4c.sensitivity.plans import to_plan

Runs = dict[str, dict[int, Run]]
"""Runs by what they were trained with, and by seed."""

HIGH, SOLVED, PAPER = "high precision", "solved", "paper"
PILOT_SHARE = 0.25
"""Of a run's steps: what the pilot takes, with a schedule of its own."""

BATCHES = 8
"""Of the text that the pilot was trained on, drawn anew: a plan must not see the held-out text."""


def main() -> None:
    arguments = parse()
    try:
        compare(arguments)
    except Nvfp4Error as error:
        sys.exit(f"error: {error}")


def compare(arguments: argparse.Namespace) -> None:
    """Do what the command line says; Nvfp4Error where it cannot be done."""
    device = choose_device(arguments.device)
    size = size_named(arguments.model_size or {"cpu": "small", "cuda": "medium"}[device])
    settings = Settings(size, arguments.steps or size.steps, 0, device)
    folder = prepared(arguments.out)
    corpus = data.load(arguments.data, minimum=settings.minimum_bytes)
    recipe = recipes.get(arguments.recipe)
    asked = {
        "model": asdict(size),
        "steps": settings.steps,
        "pilot_steps": pilot(settings).steps,
        "budget": arguments.budget,
        "recipe": recipe.to_dict(),
    }
    called = f"pretraining-plans-{device}-{size.name}"
    runs: Runs = {name: {} for name in (HIGH, SOLVED, PAPER)}
    if arguments.resume:
        chosen, runs = earlier(folder / f"{called}.json", asked)
        plans = {name: from_rules(plan["rules"], name, plan["provenance"]) for name, plan in chosen["plans"].items()}
    else:
        analysis = analysed(settings, corpus, recipe, arguments.budget)
        plans = {SOLVED: plan_of(analysis, "solved"), PAPER: plan_of(analysis, "paper")}
        written = {name: plan.to_dict() for name, plan in plans.items()}
        chosen = {**asked, "plans": written, "scores": analysis.to_dict()["scores"]}
    record = Record(called, about(device, f"python {' '.join(sys.argv)}", arguments.commit), chosen, {})
    save(replace(record, results=results(runs)), folder)
    for seed in arguments.seeds:
        for name in runs:
            if seed in runs[name]:
                continue
            nvfp4 = {"recipe": recipe, "plan": plans[name], "mode": arguments.mode} if name in plans else None
            backend = "nvfp4" if nvfp4 else "inductor"
            runs[name][seed] = train(replace(settings, seed=seed), corpus, backend, nvfp4, teller(name, seed))
            save(replace(record, results=results(runs)), folder)
    if seeds := set.intersection(*map(set, runs.values())):
        print(*summary({name: {seed: own[seed] for seed in seeds} for name, own in runs.items()}), sep="\n")


def earlier(path: Path, asked: Mapping[str, Any]) -> tuple[dict[str, Any], Runs]:
    """The settings and the runs in a file that an earlier call has left. Raises DataError where there is none, or where
    it is of something else than was asked for."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings, runs = found["settings"], found["results"]["runs"]
        known = {name: {int(seed): run_from_dict(run) for seed, run in own.items()} for name, own in runs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no results to go on from ({error}); leave out --resume to begin anew") from error
    for key, value in json.loads(json.dumps(asked)).items():
        if settings.get(key) != value:
            raise DataError(f"{path} is of another {key}; leave out --resume to begin anew, or give another --out")
    return settings, known


def pilot(settings: Settings) -> Settings:
    """Of the run that is measured: shorter, and with a seed that no other run has."""
    return replace(settings, steps=max(1, round(PILOT_SHARE * settings.steps)), seed=-1)


def analysed(settings: Settings, corpus: data.Corpus, recipe: recipes.Recipe, budget: float) -> Analysis:
    """What FP4 costs the pilot, and the plans under the budget."""
    short = pilot(settings)
    model = build_model(short)
    fit(model, short, corpus, "inductor", None, teller("pilot", short.seed))
    fresh = replace(short, steps=BATCHES, seed=short.seed - 1)
    batches = list(train_batches(corpus, fresh))
    with progress() as watch:
        return analyze(
            model, batches, loss_of, settings=AnalysisSettings(recipe, Budget(budget), random=0), watch=watch
        )


def plan_of(analysis: Analysis, kind: str) -> PrecisionPlan:
    """The plan of this kind under the budget that was asked for."""
    budget = analysis.plan.budget
    (found,) = (one for one in analysis.candidates if one.kind == kind and one.budget == budget)
    return to_plan(analysis.measurements, found.bf16, {"kind": kind, "budget": budget, "share_in_bf16": found.share})


def gaps(runs: Mapping[str, Mapping[int, Run]], name: str) -> list[float]:
    """The held-out loss over that in high precision with the same seed, less one, of seeds that have both."""
    own, high = runs[name], runs[HIGH]
    return [own[seed].final_validation_loss / high[seed].final_validation_loss - 1 for seed in own if seed in high]


def results(runs: Mapping[str, Mapping[int, Run]]) -> dict[str, Any]:
    """Every run so far, and the gaps with their means and 95% intervals over seeds."""
    found = {name: gaps(runs, name) for name in (SOLVED, PAPER)}
    return {
        "runs": {name: {str(seed): run_to_dict(run) for seed, run in own.items()} for name, own in runs.items()},
        "gaps": {
            name: {"seeds": values, "mean_and_half_interval": mean_and_interval(values)}
            for name, values in found.items()
        },
    }


def summary(runs: Mapping[str, Mapping[int, Run]]) -> list[str]:
    """The gaps in words, and how often the solved plan was ahead."""
    lines = []
    for name in (SOLVED, PAPER):
        mean, half = mean_and_interval(gaps(runs, name))
        each = ", ".join(f"{gap:+.2%}" for gap in gaps(runs, name))
        lines.append(f"{name}: held-out loss {mean:+.2%} +- {half:.2%} against high precision ({each})")
    differences = [one - other for one, other in zip(gaps(runs, SOLVED), gaps(runs, PAPER), strict=True)]
    ahead = sum(difference < 0 for difference in differences)
    mean = statistics.fmean(differences)
    return [*lines, f"the solved plan was ahead with {ahead} of {len(differences)} seeds, by {-mean:+.2%} on average"]


def teller(name: str, seed: int) -> Any:
    """Prints a line before it compiles and at each validation, with the seconds since it began."""
    began = time.perf_counter()

    def tell(progress: Progress) -> None:
        seconds = time.perf_counter() - began
        if progress.stage == "compile":
            print(f"{name}, seed {seed}: compiling", flush=True)
        elif progress.stage == "validate":
            step, loss = progress.step, progress.loss
            print(f"{name}, seed {seed}: {seconds:.0f} s, step {step}, training loss {loss:.4f}", flush=True)

    return tell


def parse() -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of each run; the size's by default")
    parser.add_argument("--model-size", help="tiny, small, medium or large")
    parser.add_argument("--budget", type=float, default=PAPER_SHARE, help="share of operations in BF16 (%(default)s)")
    parser.add_argument("--recipe", default="nvfp4-all", help="how FP4 is done (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="a folder of text; the Python standard library by default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--mode", default="default", help="of NVFP4 runs; reduce-overhead suits small models")
    parser.add_argument("--resume", action="store_true", help="go on from what an earlier call has left in --out")
    parser.add_argument("--commit", help="what to record where this is no git checkout")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
