"""An analysis as one HTML page that needs no network: which matmuls can stand FP4, and what each plan costs.

This file brings the numbers into the form the page needs; `report.html` says how the page reads, the scripts
beside it what it does.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from nvfp4c.files import write_text
from nvfp4c.page import facts, script_json
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.analysis import Analysis, Candidate, Key
from nvfp4c.sensitivity.intervals import CONFIDENCE, mean_and_interval
from nvfp4c.sensitivity.measurements import OperandMeasure, RoleMeasure, SiteMeasure

SCRIPTS = ("report.js", "report_layers.js")

TOGETHER = (
    "A plan is worth the sum of the scores of what it runs in FP4. These blocks were run with all their forward "
    "matmuls in FP4, on the batches that the scores are of: the mean, with its 95% interval. In the worst of those "
    "whose rise is not the sum, every two matmuls were run together, and the plan counts what they do beyond either."
)

KIND_WORDS = {
    "solved": "solved for its budget",
    "paper": "first and last blocks",
    "weights": "ranked by the error of weights alone",
    "random": "drawn at random",
}


def write(analysis: Analysis, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises DataError for an analysis without the plan it chose."""
    write_text(path, render(analysis))


def render(analysis: Analysis) -> str:
    """The whole page as one string."""
    folder = resources.files("nvfp4c.sensitivity")
    template = Template((folder / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        plotly=get_plotlyjs(),
        script="".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS),
        data=script_json(page_data(analysis)),
        verdict=html.escape(verdict(analysis)),
        head=facts(_head(analysis)),
        provenance=facts(_flat(analysis.measurements.provenance)),
        obstacles=_obstacles(analysis.measurements.sites),
        together=_together(analysis),
    )


def page_data(analysis: Analysis) -> dict[str, Any]:
    """Everything the page's script reads. `bf16` of a candidate are places in `matmuls`; shares are of 1."""
    sites = analysis.measurements.sites
    keys = [(site.site, role) for site in sites for role in ROLES if role in site.roles]
    places = {key: place for place, key in enumerate(keys)}
    total = sum(role.operations for site in sites for role in site.roles.values())
    blocks = sorted({site.block for site in sites if site.block is not None})
    lines = _lines(sites)
    return {
        "roles": ROLES,
        "blocks": blocks,
        "lines": list(dict.fromkeys(lines)),
        "sites": [_site(site, line, blocks) for site, line in zip(sites, lines, strict=True)],
        "matmuls": [
            _matmul(place, site.roles[role], analysis, (site.site, role), total)
            for place, site in enumerate(sites)
            for role in ROLES
            if role in site.roles
        ],
        "candidates": [_candidate(candidate, analysis, places) for candidate in analysis.candidates],
        "chosen": analysis.candidates.index(analysis.plan),
    }


def verdict(analysis: Analysis) -> str:
    """The plan that was chosen, in plain sentences."""
    return "The chosen plan: " + " ".join(plan_sentences(analysis.plan, analysis))


def plan_sentences(candidate: Candidate, analysis: Analysis) -> list[str]:
    """What a plan does, what it was predicted to cost, and what it really cost."""
    loss, mean, half = analysis.measurements.loss, *mean_and_interval(candidate.measured or ())
    if math.isfinite(candidate.predicted):
        part = f" ({candidate.predicted / loss:+.2%} of the loss)" if loss else ""
        predicted = f"Predicted rise of the loss: {candidate.predicted:+.3g} loss units{part}."
    else:
        predicted = "The predicted rise of the loss is not finite."
    low, high = f"{1 - candidate.share:.1%}", f"{candidate.share:.1%}"
    sentences = [f"{low} of the matmul operations measured run in FP4, {high} in high precision.", predicted]
    count = len(candidate.measured or ())
    if not count:
        sentences.append("This plan was not run.")
    elif not math.isfinite(mean):
        sentences.append(f"Run for real on {_counted(count, 'held-out batch')}, its loss was not finite.")
    else:
        spread = _spread(half)
        known = f"mean and {CONFIDENCE:.0%} interval" if spread else "mean"
        sentences.append(
            f"Measured rise: {mean:+.3g}{spread} loss units ({known}, {_counted(count, 'held-out batch')})."
        )
    return sentences


def _spread(half: float) -> str:
    """Half of an interval, as it follows a mean; nothing where it is not known."""
    return f" ± {half:.2g}" if math.isfinite(half) else ""


def _lines(sites: Sequence[SiteMeasure]) -> list[str]:
    """The row of each site in a map: its projection, or its name where it stands outside the blocks.

    Two stacks of blocks can have the same projections; then the row is the name with a star for the block.
    """
    patterns = [
        site.site if site.block is None else re.sub(rf"(^|\.){site.block}(?=\.|$)", r"\1*", site.site, count=1)
        for site in sites
    ]
    uses = Counter(projection for projection, _ in {(s.projection, p) for s, p in zip(sites, patterns, strict=True)})
    return [
        pattern if site.block is None or uses[site.projection] > 1 else site.projection
        for site, pattern in zip(sites, patterns, strict=True)
    ]


def _site(site: SiteMeasure, line: str, blocks: Sequence[int]) -> dict[str, Any]:
    return {
        "name": site.site,
        "block": site.block,
        "label": site.site if site.block is None else site.projection,
        "line": line,
        "column": None if site.block is None else blocks.index(site.block),
        "weight": site.weight,
        "weight_elements": site.weight_elements,
        "reads": site.reads,
        "obstacle": site.obstacle,
    }


def _matmul(place: int, role: RoleMeasure, analysis: Analysis, key: Key, total: float) -> dict[str, Any]:
    return {
        "site": place,
        "role": role.role,
        "size": [role.m, role.n, role.k],
        "operations": role.operations,
        "share": _share(role.operations, total),
        "score": analysis.scores.get(key),
        "single": analysis.single.get(key),
        "saves": _saves(analysis, key),
        "angle": _angle(analysis.cosine.get(key)),
        "angle_saved": _angle_saved(analysis, key),
        "snr": role.snr_db,
        "error": role.relative_error,
        "bias": role.bias,
        "scatter": math.sqrt(role.variance),
        "first": role.first,
        "first_error": role.first_error,
        "diagonal": role.diagonal,
        "rows": role.rows,
        "samples": role.samples,
        "operands": [_operand(operand) for operand in role.operands],
    }


def _saves(analysis: Analysis, key: Key) -> float | None:
    """How much less the loss rises with everything in FP4 but this matmul, than with everything."""
    everything = analysis.measurements.provenance.get("rise_with_everything_in_fp4")
    return everything - analysis.all_but[key] if key in analysis.all_but and everything is not None else None


def _angle_saved(analysis: Analysis, key: Key) -> float | None:
    """How much less the gradient turns with everything in FP4 but this matmul, than with everything. In degrees."""
    everything = _angle(analysis.measurements.provenance.get("cosine_with_everything_in_fp4"))
    but_it = _angle(analysis.cosine_all_but.get(key))
    return None if everything is None or but_it is None else everything - but_it


def _angle(cosine: float | None) -> float | None:
    """In degrees. Sums of equal numbers may give a cosine just above 1."""
    return None if cosine is None or math.isnan(cosine) else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def _operand(operand: OperandMeasure) -> dict[str, Any]:
    return {
        "name": operand.operand,
        "elements": operand.elements,
        "snr": operand.snr_db,
        "kurtosis": operand.kurtosis,
        "vanished": _share(operand.vanished, operand.elements),
        "saturated": _share(operand.saturated, operand.elements),
        "zeros": _share(operand.zeros, operand.elements),
        "before": [_share(count, operand.elements) for count in operand.before],
        "after": [_share(count, operand.elements) for count in operand.after],
        "scales": [_share(count, sum(operand.scales)) for count in operand.scales],
    }


def _candidate(candidate: Candidate, analysis: Analysis, places: Mapping[Key, int]) -> dict[str, Any]:
    mean, half = mean_and_interval(candidate.measured or ())
    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "words": [_budget(candidate, analysis), *plan_sentences(candidate, analysis)],
        "title": f"{candidate.name} ({KIND_WORDS.get(candidate.kind, candidate.kind)})",
        "bf16": sorted(places[key] for key in candidate.bf16 if key in places),
        "fp4_share": 1 - candidate.share,
        "predicted": candidate.predicted,
        "measured": mean,
        "half_interval": half,
    }


def _budget(candidate: Candidate, analysis: Analysis) -> str:
    if analysis.budget_unit == "operations":
        return f"Budget: at most {candidate.budget:.1%} of the operations in high precision."
    if analysis.budget_unit == "bits":
        return f"Budget: at most {candidate.budget:.3g} bits for a weight, on average."
    return f"Budget: at least {candidate.budget:.3g} times the speed of high precision on {analysis.target}."


def _head(analysis: Analysis) -> dict[str, str]:
    measured = analysis.measurements
    runnable = sum(bool(site.roles) for site in measured.sites)
    share = measured.unmeasured_share
    head = {
        "loss in high precision": f"{measured.loss:.6g} loss units",
        "measured on": _counted(measured.batches, "batch"),
        "layers": f"{_counted(len(measured.sites), 'layer')} with a matmul, of which {runnable} can run in FP4",
    }
    if share:
        head["left out of shares"] = f"{share:.1%} of the operations, not measured: they stay in high precision"
    return head


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as one list: {"versions": {"torch": "2.13"}} as {"versions, torch": "2.13"}."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{name}, "))
        elif isinstance(value, (list, tuple)):
            found[f"{prefix}{name}"] = ", ".join(map(str, value))
        else:
            found[f"{prefix}{name}"] = str(value)
    return found


def _obstacles(sites: Sequence[SiteMeasure]) -> str:
    named = {site.site: f"{site.obstacle.rstrip('.')}." for site in sites if site.obstacle}
    if not named:
        return ""
    opening = f"<p>{_counted(len(named), 'layer')} cannot run in FP4 whatever the plan:</p>"
    return f"{opening}<dl>{facts(named)}</dl>"


def _together(analysis: Analysis) -> str:
    """Blocks run whole against the sums of scores, and the pairs that were measured; nothing where none was."""
    if not analysis.together:
        return ""
    rows = []
    for one in analysis.together:
        mean, half = mean_and_interval(one.measured)
        verdict = "yes" if one.adds_up else f"no, {one.excess:+.2g} beyond it"
        rows.append((one.name, f"{one.predicted:+.3g}", f"{mean:+.3g}{_spread(half)}", verdict))
    table = _table(("block", "sum of scores, loss units", "measured rise, loss units", "adds up"), rows)
    page = f"<h2>Do the scores add up?</h2><p>{TOGETHER}</p>{table}"
    if analysis.pairs:
        pairs = sorted(analysis.pairs.items(), key=lambda item: -abs(item[1]))
        named = [(first[0], second[0], f"{rise:+.3g}") for (first, second), rise in pairs]
        table = _table(("fprop of", "and of", "beyond the sum, loss units"), named)
        page += f"<p>What two forward matmuls do together beyond each alone:</p>{table}"
    return page


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="still"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _counted(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
