"""How good are the scores, and the plan? Against the measured truth on a model, over several draws of its batches.

python examples/evaluate_sensitivity.py examples/sensitivity_minilm.py:task --batches 24 --seeds 3 --out docs/results

Every batch of a pool is probed, and run with each forward matmul alone in FP4. Then, for each seed, the pool is dealt
into a half to choose by and a half to judge by: the rank correlation of scores with measured rises, on both halves; and
what the solved plan and its rivals do to the loss of the half that nothing was chosen by. Rivals are also made to leave
nothing but forward matmuls in BF16. For backward matmuls the truth is the gradient of the first batch's loss, with each
alone in FP4: how far it is from the exact one, against what the probe expects.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from rich.console import Console
from scipy.stats import spearmanr

from nvfp4c.bench.record import Record, about, save
from nvfp4c.cli.progress import progress
from nvfp4c.sensitivity.ablation import forward_matmuls
from nvfp4c.sensitivity.analysis import Candidate, Key
from nvfp4c.sensitivity.analyze import Loss, Settings, rivals, verified
from nvfp4c.sensitivity.baselines import FORWARD
from nvfp4c.sensitivity.budgets import Budget
from nvfp4c.sensitivity.intervals import mean_and_interval
from nvfp4c.sensitivity.measure import everywhere, measure
from nvfp4c.sensitivity.measurements import Measurements, load, merged
from nvfp4c.sensitivity.problem import Problem
from nvfp4c.sensitivity.runs import Runs
from nvfp4c.sensitivity.score import gradient_errors, scores, second_order
from nvfp4c.sensitivity.solve import solve
from nvfp4c.sensitivity.switched import SwitchedModel
from nvfp4c.tasks import load_task
from nvfp4c.watch import Watch

BACKWARD = ("dgrad", "wgrad")

Rises = dict[Key, tuple[float, ...]]
"""The rise of the loss of each batch of the pool, with one forward matmul in FP4."""


def main() -> None:
    arguments = parse()
    task = load_task(arguments.task)
    batches, loss = task.training()
    pool = list(islice(chain(batches, task.held_out or ()), arguments.batches))
    settings = Settings(budget=Budget(arguments.budget))
    began = time.perf_counter()
    with progress() as watch:
        with tempfile.TemporaryDirectory() as folder:
            measure(task.model, pool, loss, settings.recipe, folder=Path(folder), watch=watch)
            parts = [load(path) for path in sorted(Path(folder).iterdir())]
        probed = time.perf_counter()
        switched = SwitchedModel(task.model, everywhere(settings.recipe))
        runs = Runs(switched, pool, loss)
        everything = runs.rises(forward_matmuls(parts[0]))
        rises = single_rises(runs, parts[0], watch)
        distances = gradient_distances(switched, parts[0], pool[0], loss, watch)
        draws = [
            draw(seed, parts, rises, everything, pool, switched, settings, loss) for seed in range(arguments.seeds)
        ]
    results = {
        "loss": fmean(runs.plain),
        "rise_with_everything_in_fp4": mean_and_interval(everything),
        "seconds": {"probe": probed - began, "all": time.perf_counter() - began},
        "draws": draws,
        "gradients": gradients(parts[0], distances),
        "single": {f"{site} {role}": list(values) for (site, role), values in rises.items()},
    }
    console = Console()
    for line in summary(results):
        console.print(line, highlight=False, soft_wrap=True)
    if arguments.out is not None:
        command = f"python {' '.join(sys.argv)}"
        chosen = {"task": arguments.task, "budget": arguments.budget, "batches": len(pool), "seeds": arguments.seeds}
        device = parts[0].provenance["device"].partition(":")[0]
        record = Record(f"sensitivity-{arguments.name}", about(device, command, arguments.commit), chosen, results)
        console.print(f"Written: {save(record, arguments.out)}", highlight=False, soft_wrap=True)


def single_rises(runs: Runs, found: Measurements, watch: Watch) -> Rises:
    keys = forward_matmuls(found)
    rises = {}
    for number, key in enumerate(keys):
        watch("one matmul at a time", number, len(keys))
        rises[key] = runs.rises([key])
    return rises


def gradient_distances(
    switched: SwitchedModel, found: Measurements, batch: Any, loss: Loss, watch: Watch
) -> dict[Key, float]:
    """The squared relative error of all parameters' gradients, with one backward matmul in FP4."""
    # Of a first layer dx reaches no weight that is measured, at most an embedding's: nothing is expected of it.
    keys = [key for key, expected in gradient_errors(found).items() if expected]
    exact = switched.gradient((), batch, loss)
    distances = {}
    for number, key in enumerate(keys):
        watch("one backward matmul at a time", number, len(keys))
        error = switched.gradient([key], batch, loss) - exact
        distances[key] = float(error.square().sum() / exact.square().sum())
    return distances


def gradients(found: Measurements, distances: Mapping[Key, float]) -> dict[str, Any]:
    """The expected and the real squared relative errors of gradients, and how they go together, by role and in all."""
    expected = gradient_errors(found)

    def correlation(*roles: str) -> float:
        keys = [key for key in distances if key[1] in roles]
        return float(spearmanr([expected[key] for key in keys], [distances[key] for key in keys]).statistic)

    return {
        "spearman": {"dgrad": correlation("dgrad"), "wgrad": correlation("wgrad"), "both": correlation(*BACKWARD)},
        "real over expected, geometric mean": {
            role: geometric_mean(distances[key] / expected[key] for key in distances if key[1] == role)
            for role in BACKWARD
        },
        "expected": {" ".join(key): value for key, value in expected.items()},
        "real": {" ".join(key): value for key, value in distances.items()},
    }


def draw(
    seed: int,
    parts: Sequence[Measurements],
    rises: Rises,
    everything: Sequence[float],
    pool: Sequence[Any],
    switched: SwitchedModel,
    settings: Settings,
    loss: Loss,
) -> dict[str, Any]:
    """One way to deal the pool: the correlations, and the plans on the held-out half."""
    order = random.Random(seed).sample(range(len(pool)), len(pool))
    chosen, held_out = order[: len(pool) // 2], order[len(pool) // 2 :]
    found = merged([parts[number] for number in chosen])
    score = scores(found, fmean(everything[number] for number in chosen))
    problem = Problem(found, score, settings.budget)
    keys = list(rises)
    predicted = [score[key] for key in keys]

    def correlation(batches: Sequence[int], against: Sequence[float]) -> float:
        return float(spearmanr(against, [fmean(rises[key][number] for number in batches) for key in keys]).statistic)

    # Judged by forward passes: rivals that spend all of the budget there show what the choice of layers is worth.
    plans = (solve(problem), *rivals(problem, settings), *rivals(problem, settings, FORWARD))
    judged = [pool[number] for number in held_out]
    noise = [role.noise / role.signal for role in (site.roles["fprop"] for site in found.sites)]
    diagonal = [site.roles["fprop"].diagonal or 0.0 for site in found.sites]
    return {
        "seed": seed,
        "second_order": asdict(second_order(found, fmean(everything[number] for number in chosen))),
        "spearman": {
            "same batches": correlation(chosen, predicted),
            "held-out batches": correlation(held_out, predicted),
            "diagonal alone, same batches": correlation(chosen, diagonal),
            "relative error alone, same batches": correlation(chosen, noise),
            # What no score can beat: the measured rises themselves, from the half to choose by.
            "measured on one half, against the other": correlation(
                held_out, [fmean(rises[key][number] for number in chosen) for key in keys]
            ),
        },
        "plans": [shown(plan) for plan in verified(Runs(switched, judged, loss), problem, plans)],
    }


def shown(plan: Candidate) -> dict[str, Any]:
    mean, interval = mean_and_interval(plan.measured or ())
    return {**asdict(plan), "mean": mean, "interval": interval}


def summary(result: dict[str, Any]) -> list[str]:
    mean, interval = result["rise_with_everything_in_fp4"]
    lines = [f"Loss {result['loss']:.4g}; with every forward matmul in FP4 {mean:+.2e} +- {interval:.1e}."]
    for name in result["draws"][0]["spearman"]:
        values = ", ".join(f"{draw['spearman'][name]:.3f}" for draw in result["draws"])
        lines.append(f"Spearman, {name}: {values}")
    for name, value in result["gradients"]["spearman"].items():
        lines.append(f"Spearman of the error of gradients, {name}: {value:.3f}")
    for place, plan in enumerate(result["draws"][0]["plans"]):
        values = [draw["plans"][place] for draw in result["draws"]]
        shown = ", ".join(f"{value['mean']:+.2e} +- {value['interval']:.1e}" for value in values)
        lines.append(f"{plan['name']}: measured rise {shown} (in BF16 {plan['share']:.1%})")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="FILE.py:callable, which returns (model, batches, loss)")
    parser.add_argument("--batches", type=int, default=24, help="of the pool, dealt into two halves")
    parser.add_argument("--seeds", type=int, default=3, help="how often it is dealt")
    parser.add_argument("--budget", type=float, default=0.15, help="share of matmul operations left in BF16")
    parser.add_argument("--name", default="model", help="what the result's file is called after")
    parser.add_argument("--commit", help="what to record where this is no git checkout")
    parser.add_argument("--out", type=Path, help="a folder to write the result to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
