"""Tables that several commands print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nvfp4c.explanation import Row
from nvfp4c.grouping import Line, group, single
from nvfp4c.kernel_plan import KernelRow

if TYPE_CHECKING:
    from nvfp4c.bench.step_regions import Measured

COLOURS = {"nvfp4": "green", "bf16": "yellow"}


def sites_table(rows: Sequence[Row], every: bool) -> Group:
    """A heading for each site and a line for each of its roles; equal sites share one, unless `every` is asked for."""
    lines = single(rows) if every else group(rows)
    size_width = max((len(_size(line)) for line in lines), default=0)
    parts: list[RenderableType] = []
    for site, members in groupby(lines, key=lambda line: line.row.site):
        parts += [Text(site, style="bold"), _roles(list(members), size_width)]
    return Group(*parts)


def kernels_table(rows: Sequence[tuple[KernelRow, Measured | None]], target: str, measured: bool = False) -> Table:
    """A line for each region, equal ones together: what it computes, the bytes it moves, and why it is as it is.

    measured: whether regions were timed, each with what was found; other kernels never are.
    """
    table = Table(
        title=f"Kernels for {target}, with the bytes that they are predicted to move",
        caption="measured MB: what a copy moves in the time of a region" if measured else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    figures = ("MB", "measured MB", "ratio") if measured else ("MB",)
    for name in ("graph", "computes", "from", *figures, ""):
        table.add_column(name, justify="right" if name in figures else "left")
    counts = Counter((replace(row, sites=()), one) for row, one in rows)
    for (row, one), count in counts.items():
        times = f"{count} x " if count > 1 else ""
        found = (f"{one.worth / 1e6:.1f}", f"{one.ratio:.2f}") if one else ("", "")
        cells = (f"{row.bytes / 1e6:.1f}", *found)[: len(figures)]
        table.add_row(row.graph, times + row.computes, "\n".join(row.reads), *cells, _decided(row))
    return table


def _decided(row: KernelRow) -> str:
    """`silu, mul: kept; apart 12.6 MB, kept 10.5 MB`."""
    if not row.decision:
        return ""
    ways = ", ".join(f"{one.way} {one.bytes / 1e6:.1f} MB" for one in row.ways)
    return f"{', '.join(row.operations)}: {row.decision} ({ways})"


def _roles(lines: Sequence[Line], size_width: int) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, expand=True)
    table.add_column(width=5)
    table.add_column(width=size_width, justify="right", no_wrap=True)
    table.add_column(width=6, justify="right")
    table.add_column(width=5)
    table.add_column(ratio=1, overflow="fold")
    for line in lines:
        row = line.row
        how = row.reason or f"{', '.join(filter(None, (row.left, row.right)))}; {row.kernel}"
        precision = Text(row.precision, style=COLOURS.get(row.precision, ""))
        table.add_row(row.role, _size(line), f"{row.share:.1%}", precision, escape(how))
    return Padding(table, (0, 0, 0, 2))


def _size(line: Line) -> str:
    """M x N x K of the product, and how many there are."""
    size = f"{line.row.m} x {line.row.n} x {line.row.k}"
    return size if line.count == 1 else f"{line.count} of {size}"
