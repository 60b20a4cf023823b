"""Train the quickstart's GPT under several recipes and seeds, and write one JSON file and one Markdown table.

python examples/ablate_recipe.py --seeds 0 1

Started again with the same settings at the same commit, it goes on where it was stopped. Several may run at a time
into one folder, each with other --variants.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock  # comes with torch

from nvfp4c import recipe
from nvfp4c.files import write_text
from nvfp4c.quickstart import data, environment
from nvfp4c.quickstart.model import size_named
from nvfp4c.quickstart.results import prepared, run_from_dict, run_to_dict, to_json
from nvfp4c.quickstart.train import Progress, Run, Settings, choose_device, train

BASE = "bf16"
NVFP4 = recipe.get("nvfp4")
VARIANTS: dict[str, recipe.Recipe | None] = {
    BASE: None,
    "nvfp4": NVFP4,
    "nvfp4-all": recipe.get("nvfp4-all"),
    "no RHT": replace(NVFP4, rotate=()),
    "no SR": replace(NVFP4, gradient_rounding="nearest"),
    "1D weights": replace(NVFP4, weight_block=(1, 16)),
}
"""None is Inductor alone: BF16 autocast on a GPU, FP32 on a CPU."""


SHARED = "mean nothing: other work shared the device"


def main() -> None:
    """Run every variant with every seed; results so far are on disk after each run."""
    arguments = parse()
    device = choose_device(arguments.device)
    size = size_named(arguments.model_size or {"cpu": "small", "cuda": "large"}[device])
    settings = Settings(size, arguments.steps or size.steps, 0, device)
    folder = prepared(arguments.out)
    corpus = data.load(arguments.data, minimum=settings.minimum_bytes)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": arguments.commit or environment.commit(),
        "speeds": SHARED if arguments.shared else "each run had the device for itself",
        **environment.describe(device),
        "text": f"{corpus.source}, {corpus.files} files, {len(corpus.train):,} + {len(corpus.validation):,} bytes",
    }
    runs: dict[str, dict[int, Run]] = {name: {} for name in VARIANTS} | finished(folder, settings, about)
    for seed in arguments.seeds:
        for name in arguments.variants:
            if seed in runs[name]:
                continue
            chosen = VARIANTS[name]
            backend, options = ("inductor", None) if chosen is None else ("nvfp4", {"recipe": chosen})
            runs[name][seed] = train(replace(settings, seed=seed), corpus, backend, options, watcher(name, seed))
            runs = save(folder, settings, about, runs)


def file_name(settings: Settings) -> str:
    """Of both files, without the ending."""
    return f"recipe-ablation-{settings.device}-{settings.size.name}"


def finished(folder: Path, settings: Settings, about: Mapping[str, str]) -> dict[str, dict[int, Run]]:
    """Runs that other starts with the same settings have left, by variant and seed."""
    path = folder / f"{file_name(settings)}.json"
    if not path.exists():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    same = {key: results["about"].get(key) == value for key, value in about.items() if key != "command"}
    if not all(same.values()) or results["settings"]["steps"] != settings.steps:
        return {}
    return {
        name: {int(seed): run_from_dict(run) for seed, run in seeds.items()} for name, seeds in results["runs"].items()
    }


def parse() -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, help="training steps of each run; the size's by default")
    parser.add_argument("--model-size", help="tiny, small, medium or large")
    parser.add_argument("--data", type=Path, help="a folder of text; the Python standard library by default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--shared", action="store_true", help="leave speeds out: other work shares the device")
    parser.add_argument("--commit", help="what to record where this is no git checkout")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser.parse_args()


def watcher(name: str, seed: int) -> Any:
    """Prints a line at each validation."""

    def watch(progress: Progress) -> None:
        if progress.stage != "train":
            speed = f"{progress.tokens_per_second:,.0f} tokens/s"
            print(f"{name}, seed {seed}: {progress.stage}, step {progress.step}, loss {progress.loss:.4f}, {speed}")

    return watch


def save(
    folder: Path, settings: Settings, about: dict[str, str], runs: Mapping[str, Mapping[int, Run]]
) -> dict[str, dict[int, Run]]:
    """Write everything known so far, as JSON with every number and as a table for people.

    Returns the runs given and those that others have left in the folder.
    """
    name = file_name(settings)
    with FileLock(folder / f".{name}.lock"):
        others = finished(folder, settings, about)
        known = {name: {**others.get(name, {}), **own} for name, own in runs.items()}
        results = {
            "about": about,
            "settings": {key: value for key, value in asdict(settings).items() if key != "seed"},
            "recipes": {name: chosen.to_dict() for name, chosen in VARIANTS.items() if chosen and known[name]},
            "runs": {name: {str(seed): run_to_dict(run) for seed, run in own.items()} for name, own in known.items()},
        }
        write_text(folder / f"{name}.json", to_json(results))
        write_text(folder / f"{name}.md", markdown(settings, about, known))
    return known


def markdown(settings: Settings, about: dict[str, str], runs: Mapping[str, Mapping[int, Run]]) -> str:
    """The table, under the facts that are needed to make it again."""
    size = settings.size
    seeds = sorted({seed for of_seed in runs.values() for seed in of_seed})
    columns = [
        "variant",
        *(f"held-out loss, seed {seed}" for seed in seeds),
        "mean gap",
        "tokens/s",
        "peak memory (GiB)",
    ]
    lines = [
        f"# Recipes compared: {size.name} GPT, {settings.steps} steps",
        "",
        f"{size.layers} layers, width {size.width}, {size.batch} x {size.sequence} tokens a step. Losses are in nats a "
        f"byte; the gap is relative to {BASE} ({settings.high_precision}) of the same seed. Tokens/s leave compilation "
        "and validation out.",
        "",
        f"| {' | '.join(columns)} |",
        f"| --- {'| ---: ' * (len(columns) - 1)}|",
        *(f"| {' | '.join(cells(name, seeds, runs, about['speeds'] != SHARED))} |" for name in runs if runs[name]),
        "",
        *(f"- {key}: `{value}`" for key, value in about.items()),
    ]
    return "\n".join(lines) + "\n"


def cells(name: str, seeds: list[int], runs: Mapping[str, Mapping[int, Run]], timed: bool) -> list[str]:
    """One line of the table."""
    own, base = runs[name], runs.get(BASE, {})
    gaps = [own[seed].final_validation_loss / base[seed].final_validation_loss - 1 for seed in own if seed in base]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    speeds = statistics.fmean(run.tokens_per_second for run in own.values())
    memory = max((run.peak_memory_bytes or 0) for run in own.values())
    losses = [loss_text(own[seed]) if seed in own else "" for seed in seeds]
    mean_gap = f"{statistics.fmean(gaps):+.2%}" if gaps and name != BASE else ""
    return [name, *losses, mean_gap, f"{speeds:,.0f}" if timed else "", f"{memory / 2**30:.2f}" if memory else ""]


def loss_text(run: Run) -> str:
    """The held-out loss, or where the run diverged."""
    return f"{run.final_validation_loss:.4f}" if run.diverged_at is None else f"diverged at step {run.diverged_at}"


if __name__ == "__main__":
    main()
