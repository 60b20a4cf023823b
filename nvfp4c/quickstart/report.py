"""The comparison on disk: `results.json` with every number, and one HTML page that needs no network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from nvfp4c.files import write_text
from nvfp4c.grouping import Line, group, single, totals
from nvfp4c.page import facts, script_json
from nvfp4c.quickstart.compare import Comparison
from nvfp4c.quickstart.results import to_json
from nvfp4c.quickstart.train import Run

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#5f6b7a"
"""From the Okabe-Ito palette, which colour-blind readers can tell apart; the runs also differ in dash and marker."""

SMOOTHING = 0.9
"""Weight of the past in the smoothed training loss; the raw loss is drawn faintly behind it."""

SMALLEST_GAP = 5e-5
"""What would be printed as 0.00%."""

PLOT_CONFIG = {"displayModeBar": False, "responsive": True}


def save(comparison: Comparison, folder: Path, command: str) -> tuple[Path, Path]:
    """Write `results.json` and `report.html` into `folder`, each whole or not at all; returns their paths."""
    results, page = folder / "results.json", folder / "report.html"
    write_text(results, to_json({"command": command, **comparison.to_dict()}))
    write_text(page, render(comparison, command))
    return results, page


def render(comparison: Comparison, command: str) -> str:
    """The whole page as one string."""
    template = Template((resources.files("nvfp4c.quickstart") / "report.html").read_text(encoding="utf-8"))
    figures = {
        "train": train_figure(comparison),
        "validation": validation_figure(comparison),
        "gap": gap_figure(comparison),
    }
    return template.substitute(
        plotly=get_plotlyjs(),
        figures=script_json({name: json.loads(figure.to_json()) for name, figure in figures.items()}),
        config=script_json(PLOT_CONFIG),
        verdict=html.escape(verdict(comparison)),
        runs=_table(*runs_table(comparison)),
        totals=html.escape(totals(comparison.explanation)),
        grouped=_table(SITE_COLUMNS, [site_cells(line) for line in group(comparison.explanation.rows)]),
        every=_table(SITE_COLUMNS, [site_cells(line) for line in single(comparison.explanation.rows)]),
        settings=facts(_settings(comparison)),
        environment=facts(comparison.environment),
        command=html.escape(command),
    )


def verdict(comparison: Comparison) -> str:
    """The outcome in one sentence."""
    high = comparison.settings.high_precision
    steps = comparison.settings.steps
    diverged = [
        f"{name} diverged at step {run.diverged_at}"
        for name, run in ((high, comparison.baseline), ("NVFP4", comparison.nvfp4))
        if run.diverged_at is not None
    ]
    if diverged:
        return f"{' and '.join(diverged)} of {steps}."
    if abs(comparison.gap) < SMALLEST_GAP:
        return f"After {steps} steps the held-out losses of NVFP4 and {high} are equal."
    where = "above" if comparison.gap >= 0 else "below"
    return f"After {steps} steps the held-out loss of NVFP4 lies {abs(comparison.gap):.2%} {where} {high}'s."


def runs_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that sets the two runs side by side."""
    runs = (comparison.baseline, comparison.nvfp4)
    rows = [
        ["held-out loss (nats/byte)", *(_loss(run.final_validation_loss) for run in runs)],
        ["training loss (nats/byte)", *(_loss(run.final_train_loss) for run in runs)],
        ["speed (tokens/s)", *(f"{run.tokens_per_second:,.0f}" for run in runs)],
        ["training (s)", *(f"{run.train_seconds:.1f}" for run in runs)],
        ["compilation (s)", *(f"{run.compile_seconds:.1f}" for run in runs)],
    ]
    if comparison.baseline.peak_memory_bytes is not None:
        rows.append(["peak memory (GiB)", *(_gibibytes(run.peak_memory_bytes) for run in runs)])
    return ["", f"{comparison.settings.high_precision} (Inductor)", f"NVFP4 (recipe {comparison.recipe})"], rows


SITE_COLUMNS = ["site", "role", "count", "M", "N", "K", "share", "precision", "operands, or why not", "kernel"]


def site_cells(line: Line) -> list[str]:
    """What a table says of one line of an explanation."""
    row = line.row
    how = row.reason or ", ".join(operand for operand in (row.left, row.right) if operand)
    size = [str(number) for number in (row.m, row.n, row.k)]
    return [row.site, row.role, str(line.count), *size, f"{row.share:.2%}", row.precision, how, row.kernel]


def train_figure(comparison: Comparison) -> go.Figure:
    """Training loss of both runs over the steps: raw, and smoothed on top."""
    figure = _figure("training loss (nats/byte)")
    for run, name, style in _styled(comparison):
        steps = list(range(1, len(run.train_losses) + 1))
        raw = {"color": style["color"], "width": 1}
        figure.add_scatter(x=steps, y=run.train_losses, line=raw, opacity=0.25, showlegend=False, hoverinfo="skip")
        figure.add_scatter(x=steps, y=_smoothed(run.train_losses), name=name, line={**style, "width": 2.5})
    return figure


def validation_figure(comparison: Comparison) -> go.Figure:
    """Held-out loss of both runs over the steps."""
    figure = _figure("held-out loss (nats/byte)")
    for (run, name, style), marker in zip(_styled(comparison), ("circle", "diamond"), strict=True):
        steps, losses = zip(*run.validation, strict=True)
        figure.add_scatter(
            x=steps,
            y=losses,
            name=name,
            mode="lines+markers",
            line={**style, "width": 2.5},
            marker={"symbol": marker, "size": 8},
        )
    return figure


def gap_figure(comparison: Comparison) -> go.Figure:
    """How far NVFP4's held-out loss lies above the other's, over the steps."""
    figure = _figure("gap (%)")
    points = comparison.gaps()
    figure.add_scatter(
        x=[step for step, _ in points],
        y=[100 * gap for _, gap in points],
        name=f"NVFP4 above {comparison.settings.high_precision}",
        mode="lines+markers",
        line={"color": GREY, "width": 2.5},
        marker={"size": 8},
        showlegend=True,
    )
    figure.add_hline(y=0, line={"color": GREY, "width": 1, "dash": "dot"})
    return figure


def _figure(unit: str) -> go.Figure:
    figure = go.Figure()
    axis = {"gridcolor": "#e3e7ec", "zeroline": False, "automargin": True, "exponentformat": "none"}
    figure.update_layout(
        template="none",
        height=320,
        margin={"l": 56, "r": 12, "t": 36, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hovermode="x unified",
        xaxis={**axis, "title": {"text": "training step", "font": {"size": 13}}},
        yaxis={**axis, "title": {"text": unit, "font": {"size": 13}}},
    )
    return figure


def _styled(comparison: Comparison) -> list[tuple[Run, str, dict[str, str]]]:
    high = comparison.settings.high_precision
    return [
        (comparison.baseline, high, {"color": BLUE, "dash": "solid"}),
        (comparison.nvfp4, "NVFP4", {"color": VERMILION, "dash": "dash"}),
    ]


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential mean, corrected for its start."""
    mean, weight, smooth = 0.0, 0.0, []
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth


def _settings(comparison: Comparison) -> dict[str, str]:
    settings, size, corpus = comparison.settings, comparison.settings.size, comparison.corpus
    return {
        "model": f"{size.name}: {size.layers} layers, width {size.width}, {size.heads} heads, MLP width {size.hidden}, "
        f"{comparison.parameters:,} parameters",
        "steps": f"{settings.steps} of {size.batch} samples x {size.sequence} tokens",
        "highest learning rate": f"{size.learning_rate:g}, AdamW",
        "seed": str(settings.seed),
        "recipe": comparison.recipe,
        "text": f"{corpus['source']}, {corpus['files']} files",
        "training text": f"{corpus['train_bytes']:,} bytes",
        "held-out text": f"{corpus['validation_bytes']:,} bytes: {corpus['split']}",
    }


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def _gibibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
