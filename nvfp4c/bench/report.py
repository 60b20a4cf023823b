"""docs/performance.md from the results of `nvfp4c bench`: every figure there stands in a file beside it.

python -m nvfp4c.bench.report docs/results > docs/performance.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvfp4c.kernel_plan import described

OPENING = """# Performance

Written by `python -m nvfp4c.bench.report docs/results > docs/performance.md` from the files in
[results](results), which hold every sample, the machine, the versions, the commit and the command. Each table is one
run: what is compared took turns, and figures are medians. Ratios carry over to other machines of a kind; times do not.

A step is a forward and a backward pass of Llama blocks, all linear layers in NVFP4 with random Hadamard transforms,
stochastic rounding of gradients and 16x16 weight blocks. A sample is some steps in a row, as in training: a GPU that is
always busy runs as fast as its power limit lets it, and products of numbers with few digits take less power.

Of the kernels that quantise, a step on an H100 or A100 asks for two kinds: a layer's input (its row operand, and its
rotated columns packed for the backward) and a gradient (both operands). Both forms packed is what a GPU with FP4 tensor
cores asks for; elsewhere it is timed as the case with the most arithmetic a byte, and is the farthest from a copy.
"""


def report(folder: Path) -> str:
    """The page for all results in a folder."""
    parts = [OPENING]
    for path in sorted(folder.glob("bench-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        tables = {"train": _train, "kernels": _kernels, "regions": _regions, "probe": _probe}[path.stem.split("-")[1]](
            data
        )
        about = data["about"]
        versions = f"torch {about['torch']}" + (f", Triton {about['triton']}" if about.get("triton") else "")
        parts.append(f"## {_title(path.stem, data)}\n\n{about['device']}; {versions}; commit {about['commit'][:7]};")
        parts[-1] += f"\n[{path.name}](results/{path.name}), by `{about['command'].partition(' --out')[0]}`\n"
        parts += tables
    return "\n".join(parts)


def _title(stem: str, data: dict[str, Any]) -> str:
    if stem.startswith("bench-kernels"):
        return "Kernels"
    if stem.startswith("bench-regions"):
        return f"Regions of a training step, {data['settings']['size']['name']}: predicted and measured bytes"
    if stem.startswith("bench-probe"):
        return f"A pass of the sensitivity probe: {data['settings']['model']}"
    size, settings = data["settings"]["size"], data["settings"]
    steps = settings.get("steps_in_a_row", 1)
    shape = f"{size['blocks']} blocks, width {size['width']}, MLP {size['hidden']}, {settings['tokens']} tokens"
    return f"Training step: {shape}, {steps} {'step' if steps == 1 else 'steps'} a sample"


def _train(data: dict[str, Any]) -> Iterator[str]:
    rows = [("step", "ms", "speed", "peak memory", "cold compile")]
    for name, found in data["results"].items():
        memory = f"{found['memory_ratio']:.3f}x" if found["memory_ratio"] else ""
        compiling = f"{found['compile_ratio']:.2f}x" if found["compile_ratio"] else ""
        milliseconds = f"{found['step']['median_seconds'] * 1e3:,.1f}"
        rows.append((f"{name}: {found['description']}", milliseconds, f"{found['speed']:.3f}x", memory, compiling))
    yield _table(rows)
    for name, found in data["results"].items():
        if found.get("profile"):
            total = sum(kernel["microseconds"] / kernel["share"] for kernel in found["profile"][:1])
            longest = [(f"{name}, {total / 1e3:.1f} ms of kernels", "launches", "ms", "share")]
            longest += [
                (f"`{k['name'][:70]}`", f"{k['launches']:.0f}", f"{k['microseconds'] / 1e3:.2f}", f"{k['share']:.1%}")
                for k in found["profile"][:10]
            ]
            yield _table(longest)


def _kernels(data: dict[str, Any]) -> Iterator[str]:
    for shape in data["results"]:
        rows = [(f"{shape['rows']} x {shape['columns']}", "us", "of its ceiling")]
        rows += [
            (case["name"], f"{case['median_seconds'] * 1e6:,.1f}", f"{case['ratio']:.2f} {case['ceiling']}")
            for case in shape["cases"]
        ]
        yield _table(rows)


def _regions(data: dict[str, Any]) -> Iterator[str]:
    rows = [("region", "launches", "us", "predicted MB", "measured MB", "measured / predicted")]
    for one in data["results"]:
        predicted, measured = one["bytes"] / 1e6, one["measured_bytes"] / 1e6
        rows.append(
            (
                described(one["computes"], one["operations"], one["decision"], one["reads"]),
                str(one["launches"]),
                f"{one['median_seconds'] * 1e6:,.1f}",
                f"{predicted:,.1f}",
                f"{measured:,.1f}",
                f"{one['measured_over_predicted']:.2f}",
            )
        )
    yield _table(rows)
    yield "Measured: what a copy moves in the same time. Predicted: each input once and each output once.\n"


def _probe(data: dict[str, Any]) -> Iterator[str]:
    rows = [("pass or step", "ms", "probe / this", "peak MiB", "probe / this")]
    for name, found in data["results"].items():
        ratios = [f"{found[key]:.2f}x" if key in found else "" for key in ("probe_time_ratio", "probe_memory_ratio")]
        milliseconds, peak = f"{found['time']['median_seconds'] * 1e3:,.1f}", f"{found['memory']['peak'] / 2**20:,.1f}"
        rows.append((f"{name}: {found['description']}", milliseconds, ratios[0], peak, ratios[1]))
    yield _table(rows)
    yield "Peak memory includes parameters, states of the optimizer and gradients.\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1])), end="")
