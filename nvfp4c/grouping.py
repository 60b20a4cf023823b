"""An explanation in short: rows that say the same of many sites as one line, and totals.

``layers.{0..11}.attn.{q,k,v}_proj`` stands for 36 sites that agree in everything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nvfp4c.explanation import Explanation, Row
from nvfp4c.recipe import ROLES


@dataclass(frozen=True)
class Line:
    """One row, or several that agree in everything but their site and share.

    row: has the pattern as its site and the summed share. count: how many rows it stands for.
    """

    row: Row
    count: int


def single(rows: Sequence[Row]) -> list[Line]:
    """Each row as a line of its own, the roles of a site together; sites keep the order of their first rows."""
    places: dict[str, int] = {}
    for row in rows:
        places.setdefault(row.site, len(places))
    return [Line(row, 1) for row in sorted(rows, key=lambda row: (places[row.site], ROLES.index(row.role)))]


def group(rows: Sequence[Row]) -> list[Line]:
    """As `single`, with equal sites merged.

    Names are merged one place at a time, the innermost first; so a pattern with two sets of names stands for every
    combination of them, never for some.
    """
    lines = single(rows)
    for place in reversed(range(max((row.site.count(".") + 1 for row in rows), default=0))):
        lines = _merge(lines, place)
    return lines


def totals(explanation: Explanation) -> str:
    """How much of the work runs in NVFP4, in one sentence."""
    forward = f"{explanation.forward_share:.1%} of the forward"
    if explanation.backward_share is None:
        return f"NVFP4 does {forward} matmul operations."
    return f"NVFP4 does {forward} and {explanation.backward_share:.1%} of the backward matmul operations."


def _merge(lines: Sequence[Line], place: int) -> list[Line]:
    """Merge the lines whose dotted names differ in the part at `place` alone; later parts may be patterns by now."""
    groups: dict[object, list[Line]] = defaultdict(list)
    for position, line in enumerate(lines):
        parts = line.row.site.split(".", place + 1)
        if place < len(parts):
            rest = (*parts[:place], parts[place].isdecimal(), *parts[place + 1 :])
            groups[rest, replace(line.row, site="", share=0.0), line.count].append(line)
        else:
            groups[position].append(line)
    return [_line(members, place) for members in groups.values()]


def _line(lines: list[Line], place: int) -> Line:
    first = lines[0]
    if len(lines) == 1:
        return first
    parts = first.row.site.split(".", place + 1)
    parts[place] = _pattern(list(dict.fromkeys(line.row.site.split(".", place + 1)[place] for line in lines)))
    share = sum(line.row.share for line in lines)
    return Line(replace(first.row, site=".".join(parts), share=share), sum(line.count for line in lines))


def _pattern(names: list[str]) -> str:
    """["0", "1", "2", "5"] as "{0..2,5}", ["q_proj", "k_proj"] as "{q,k}_proj", one name as itself."""
    if len(names) == 1:
        return names[0]
    if names[0].isdecimal():
        return f"{{{_ranges(sorted(map(int, names)))}}}"
    stem, mark, last = names[0].rpartition("_")
    ending = mark + last if stem and all(len(n) > len(last) + 1 and n.endswith(mark + last) for n in names) else ""
    return f"{{{','.join(name.removesuffix(ending) for name in names)}}}{ending}"


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0..2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}..{high}" for low, high in runs)
