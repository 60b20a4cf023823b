"""The report of an analysis: what it holds, and how it behaves in a browser."""

from __future__ import annotations

import html
import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from nvfp4c.errors import DataError
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity import report
from nvfp4c.sensitivity.analysis import Analysis, Candidate, Key
from nvfp4c.sensitivity.measurements import (
    OCTAVES,
    SCALE_BINS,
    Measurements,
    OperandMeasure,
    RoleMeasure,
    SiteMeasure,
)

PROJECTIONS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj")
READS = (0, 0, 0, 1, 2, 3)
"""Which tensor of the block each projection reads."""

OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
EVIL = "</script><img src=x onerror=\"document.title='broken'\"><b>$data"
TOKENS, WIDTH = 512, 256


def operand_of(name: str, elements: int, noise: float, draw: random.Random) -> OperandMeasure:
    weights = [math.exp(-((octave - 3.5) ** 2) / 6) for octave in range(OCTAVES)]
    before = [round(elements * weight / sum(weights)) for weight in weights]
    vanished = sum(before[7:])
    after = [*before[:7], *[0] * (OCTAVES - 7)]
    scales = [round(elements / 16 * weight) for weight in (0.001, *[0.02] * 6, *[0.08] * 6, 0.2, 0.15, 0.029)]
    return OperandMeasure(
        operand=name,
        elements=elements,
        signal=float(elements),
        noise=noise * elements,
        fourth=elements * draw.uniform(3, 40 if name == "x" else 6),
        vanished=vanished,
        saturated=round(elements * draw.uniform(0, 1e-3)),
        zeros=0,
        before=tuple(before),
        after=tuple(after),
        scales=tuple(scales),
    )


def role_of(role: str, m: int, n: int, k: int, scale: float, draw: random.Random) -> RoleMeasure:
    noise = 0.015 * scale * draw.uniform(0.7, 1.5)
    effect = dict(first=draw.gauss(0, 1e-4), diagonal=noise * 1e-5, rows=noise * 1e-2) if role == "fprop" else {}
    return RoleMeasure(
        role=role,
        m=m,
        n=n,
        k=k,
        operations=2.0 * m * n * k,
        signal=1e4,
        noise=noise * 1e4,
        aligned=-1e4 * noise / 10,
        operands=tuple(operand_of(name, m * k, 0.009 * scale, draw) for name in OPERANDS[role]),
        **effect,
    )


def site_of(name: str, block: int | None, projection: str, reads: int, weight: str, draw: random.Random) -> SiteMeasure:
    n, k = {"mlp.up_proj": (4 * WIDTH, WIDTH), "mlp.down_proj": (WIDTH, 4 * WIDTH)}.get(projection, (WIDTH, WIDTH))
    scale = 4.0 if projection == "mlp.down_proj" or block is None else 1.0
    sizes = {"fprop": (TOKENS, n, k), "dgrad": (TOKENS, k, n), "wgrad": (n, k, TOKENS)}
    roles = {role: role_of(role, *size, scale, draw) for role, size in sizes.items()}
    return SiteMeasure(name, block, projection, weight, n * k, reads, roles)


def analysis_of(blocks: int = 6) -> Analysis:
    """Made-up numbers of a plausible size: down projections and the head suffer most, as they do in fact."""
    draw = random.Random(0)
    sites = [
        site_of(f"layers.{block}.{name}", block, name, 4 * block + reads, f"layers.{block}.{name}.weight", draw)
        for block in range(blocks)
        for name, reads in zip(PROJECTIONS, READS, strict=True)
    ]
    sites.append(site_of("lm_head", None, "lm_head", 4 * blocks, "embed.weight", draw))
    sites.append(SiteMeasure("router", None, "router", "embed.weight", 3, 4 * blocks, {}, "K is 3, no multiple of 16"))
    scores = {
        (site.site, role): measure.noise / measure.signal * draw.uniform(0.02, 0.5) ** 2
        for site in sites
        for role, measure in site.roles.items()
    }
    provenance = {"model": "a GPT of 6 blocks", "data": "text, SHA-256 0123abcd", "versions": {"torch": "2.13.0"}}
    measurements = Measurements(tuple(sites), 3.2145, 8, provenance)
    return Analysis(measurements, scores, candidates_of(measurements, scores, draw), "solved 0.15")


def candidates_of(measurements: Measurements, scores: dict[Key, float], draw: random.Random) -> tuple[Candidate, ...]:
    operations = {(site.site, role.role): role.operations for site in measurements.sites for role in site.roles.values()}
    total = sum(operations.values())
    ranked = {
        "solved": sorted(scores, key=lambda key: -scores[key] / operations[key]),
        "paper": [key for key in scores if key[0].startswith("layers.0.")] + list(scores)[::-1],
        "weights": sorted(scores, key=lambda key: -operations[key]),
        "random": draw.sample(list(scores), len(scores)),
    }

    def candidate(kind: str, budget: float, run: bool) -> Candidate:
        kept: list[Key] = []
        for key in dict.fromkeys(ranked[kind]):
            if sum(operations[one] for one in (*kept, key)) <= budget * total:
                kept.append(key)
        share = sum(operations[key] for key in kept) / total
        predicted = sum(scores[key] for key in scores if key not in kept)
        measured = tuple(predicted * draw.gauss(1.05, 0.12) for _ in range(8)) if run else None
        return Candidate(f"{kind} {budget:g}", kind, tuple(kept), budget, share, predicted, measured)

    curve = [candidate("solved", budget, budget in (0.05, 0.15)) for budget in (0, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1)]
    return (*curve, *(candidate(kind, 0.15, True) for kind in ("paper", "weights", "random")))


def with_evil(analysis: Analysis) -> Analysis:
    """The same with markup in every text, and with numbers that are not finite."""
    first, second, *others = analysis.measurements.sites
    renamed = replace(first, site=f"layers.0.{EVIL}", projection=EVIL, weight=EVIL)
    broken = replace(second.roles["fprop"], noise=math.nan, signal=math.inf, first=math.nan)
    second = replace(second, roles={**second.roles, "fprop": broken})
    others[-1] = replace(others[-1], obstacle=EVIL)
    measurements = replace(
        analysis.measurements, sites=(renamed, second, *others), provenance={EVIL: EVIL, "list": [EVIL, 1]}
    )
    scores = {(renamed.site if site == first.site else site, role): value for (site, role), value in analysis.scores.items()}
    scores[second.site, "fprop"] = math.nan
    candidates = [replace(one, bf16=tuple(key for key in one.bf16 if key in scores)) for one in analysis.candidates]
    candidates.append(Candidate(EVIL, "random", (), 0.15, 0.0, math.inf, (1.0, math.nan)))
    return Analysis(measurements, scores, tuple(candidates), EVIL, "speed", EVIL, {(renamed.site, "fprop"): math.inf})


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analysis_of()


def data_in(page: str) -> dict[str, Any]:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1], parse_constant=refuse)


class Tags(HTMLParser):
    """Collects what a page would load or link to, every kind of element, and the elements left open."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.kinds: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.kinds.add(tag)
        if tag not in ("meta", "input", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("change", [lambda analysis: analysis, with_evil])
def test_the_page_is_whole_and_loads_nothing(analysis, change, tmp_path):
    report.write(change(analysis), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    own = page.replace(get_plotlyjs(), "")
    assert len(page) - len(own) == len(get_plotlyjs())
    assert not re.search(r"https?:|//cdn|@import|url\(", own)
    tags = Tags()
    tags.feed(own)
    assert tags.links == []
    assert tags.open == []
    assert "img" not in tags.kinds


def test_the_page_says_what_was_measured_and_chosen(analysis):
    page = report.render(analysis)
    for text in (
        "a GPT of 6 blocks",
        "versions, torch</dt><dd>2.13.0",
        "3.2145 loss units",
        "8 batches",
        "38 layers with a matmul, of which 37 can run in FP4",
        "<dt>router</dt><dd>K is 3, no multiple of 16.</dd>",
    ):
        assert text in page
    said = report.verdict(analysis)
    assert re.match(r"The chosen plan: 8\d\.\d% of all matmul operations run in FP4, 1\d\.\d% in high precision\. ", said)
    assert re.search(r"Predicted rise of the loss: \+\d\S* loss units \(\+\d\.\d\d% of the loss\)\. ", said)
    assert re.search(r"Measured rise: \+\d\S* ± \d\S* loss units \(mean and 95% interval, 8 held-out batches\)\.$", said)


def test_the_data_is_that_of_the_analysis(analysis):
    data = data_in(report.render(analysis))
    assert len(data["matmuls"]) == 37 * 3
    assert sum(matmul["share"] for matmul in data["matmuls"]) == pytest.approx(1, abs=1e-12)  # 111 sums in FP64
    assert data["lines"] == [*PROJECTIONS, "lm_head", "router"]
    for shown, candidate in zip(data["candidates"], analysis.candidates, strict=True):
        kept = {(data["sites"][matmul["site"]]["name"], matmul["role"]) for matmul in map(data["matmuls"].__getitem__, shown["bf16"])}
        assert kept == set(candidate.bf16)
    assert data["candidates"][data["chosen"]]["name"] == analysis.chosen
    matmul = data["matmuls"][-1]
    measure = analysis.measurements.sites[-2].roles["wgrad"]
    assert (matmul["score"], matmul["snr"]) == (analysis.scores["lm_head", "wgrad"], measure.snr_db)
    assert [one["name"] for one in matmul["operands"]] == ["dy", "x"]


def test_what_is_not_finite_is_null(analysis):
    data = data_in(report.render(with_evil(analysis)))
    broken = data["matmuls"][3]
    assert (broken["score"], broken["snr"], broken["first"]) == (None, None, None)
    assert data["candidates"][-1]["predicted"] is None
    assert data["candidates"][-1]["measured"] is None


def test_the_interval_is_students():
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / sqrt(3)) is 2 -+ 2.4841377.
    assert report.mean_and_interval((1.0, 2.0, 3.0)) == pytest.approx((2.0, 2.4841377), rel=1e-7)
    mean, half = report.mean_and_interval((1.5,))
    assert mean == 1.5
    assert math.isnan(half)
    assert all(map(math.isnan, report.mean_and_interval(())))


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (None, "This plan was not run."),
        ((0.5,), "Measured rise: +0.5 loss units (mean, 1 held-out batch)."),
        ((0.5, 0.5), "Measured rise: +0.5 ± 0 loss units (mean and 95% interval, 2 held-out batches)."),
        ((0.5, math.nan), "Run for real on 2 held-out batches, its loss was not finite."),
    ],
)
def test_what_was_run_is_said(analysis, measured, said):
    candidate = replace(analysis.candidates[0], measured=measured)
    assert report.plan_sentences(candidate, analysis)[-1] == said


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        ("operations", "at most 15.0% of the operations in high precision"),
        ("bits", "at most 0.15 bits for a weight"),
        ("speed", "at least 0.15 times the speed of high precision on sm_100"),
    ],
)
def test_a_budget_has_its_unit(analysis, unit, said):
    data = report.page_data(replace(analysis, budget_unit=unit, target="sm_100"))
    assert said in data["candidates"][data["chosen"]]["words"][0]


def test_stacks_with_the_same_projections_have_their_own_rows(analysis):
    first = analysis.measurements.sites[0]
    names = ("encoder.0.attn.q_proj", "encoder.1.attn.q_proj", "decoder.0.attn.q_proj", "decoder.1.attn.q_proj")
    sites = tuple(replace(first, site=name, block=number % 2) for number, name in enumerate(names))
    data = report.page_data(replace(analysis, measurements=replace(analysis.measurements, sites=sites), candidates=(analysis.candidates[0],), chosen="solved 0"))
    assert data["lines"] == ["encoder.*.attn.q_proj", "decoder.*.attn.q_proj"]


def test_an_analysis_without_its_plan_is_refused(analysis, tmp_path):
    with pytest.raises(DataError, match="chose the plan 'gone' but does not hold it"):
        report.write(replace(analysis, chosen="gone"), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


HOOKS = """<script>
const problems = [];
window.addEventListener("error", event => problems.push(event.message));
window.addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
for (const level of ["error", "warn"]) console[level] = (...words) => problems.push(words.join(" "));
</script>"""

EXERCISE = """<pre id="outcome"></pre><script>{
const rows = () => [...at("ranking").tBodies[0].rows].filter(row => !row.hidden);
const texts = place => rows().map(row => row.cells[place].textContent);
const fire = (id, value, kind) => { at(id).value = value; at(id).dispatchEvent(new Event(kind)); };
const column = title => [...at("ranking").tHead.rows[0].cells].findIndex(cell => cell.textContent.startsWith(title));
const click = title => at("ranking").tHead.rows[0].cells[column(title)].firstChild.click();
const inHighIn = {
  table: () => texts(column("in the plan")).filter(text => text === "BF16").length,
  maps: () => new Set([...at("precision-maps").querySelectorAll(".js-plotly-plot")].flatMap(plot => plot.data[0].text.flat())
    .filter(text => text?.endsWith(": BF16"))).size,
  graph: () => at("graph").querySelectorAll("i.bf16").length,
};
const state = () => ({
  shown: candidates[shown].name, plan: at("plan").value, words: at("plan-words").textContent,
  table: inHighIn.table(), maps: inHighIn.maps(), graph: inHighIn.graph(), ring: at("curve").data.at(-1).x[0],
});
const outcome = { start: state(), slider: [] };
for (let step = 0; step < solved.length; step++) { fire("budget", step, "input"); outcome.slider.push(state()); }
outcome.baseline = (fire("plan", candidates.length - 1, "change"), state());
outcome.ranked = texts(column("score"));
click("score"); outcome.rising = texts(column("score"));
click("layer"); outcome.byName = texts(0);
click("in the plan"); outcome.byPrecision = texts(column("in the plan"));
outcome.sorted = [...at("ranking").tHead.rows[0].cells].map(cell => cell.getAttribute("aria-sort")).filter(Boolean);
fire("filter", "  DOWN wgrad ", "input"); outcome.filtered = rows().map(row => `${row.cells[0].textContent} ${row.cells[1].textContent}`);
outcome.count = at("count").textContent;
fire("filter", "nothing like it", "input"); outcome.nothing = at("count").textContent;
fire("filter", "", "input"); outcome.everything = at("count").textContent;
outcome.units = [...at("ranking").tHead.rows[0].cells].map(cell => cell.querySelector("small").textContent);
const row = rows().find(row => row.cells[0].textContent.endsWith("2.mlp.down_proj") && row.cells[1].textContent === "dgrad");
(row ?? rows()[0]).click();
outcome.detail = { title: at("detail-title").textContent, words: at("detail-words").textContent, plots: at("histograms").querySelectorAll("div:not([hidden]) > .js-plotly-plot").length,
  role: at("detail-roles").querySelector("input:checked").parentNode.textContent.trim() };
at("detail-roles").querySelectorAll("input")[2].click();
outcome.otherRole = [...at("histograms").querySelectorAll("h3")].map(heading => heading.textContent);
at("graph").querySelector(".node").click(); outcome.fromGraph = at("detail-title").textContent;
at("heat-maps").querySelector(".js-plotly-plot").emit("plotly_click", { points: [{ pointIndex: [1, 1] }] });
outcome.fromMap = at("detail-title").textContent;
at("curve").emit("plotly_click", { points: [{ customdata: 0 }] }); outcome.fromCurve = shown;
fire("colour", "snr", "change"); outcome.ramp = [at("ramp-low").textContent, at("ramp-high").textContent];
at("curve-log").click(); outcome.axis = at("curve").layout.yaxis.type;
outcome.cards = [...at("graph").querySelectorAll(".card > h3")].map(heading => heading.textContent);
outcome.groups = [...at("graph").querySelector(".card").querySelectorAll(".group")].map(group => group.querySelectorAll(".node").length);
outcome.ties = at("ties").textContent;
outcome.images = document.images.length; outcome.title = document.title;
outcome.wide = document.documentElement.scrollWidth > innerWidth;
setTimeout(() => at("outcome").textContent = JSON.stringify({ ...outcome, problems }), 1000);  // after what plotly does later
}</script>"""

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


def exercised(analysis: Analysis, folder: Path, width: int = 1280) -> dict[str, Any]:
    """What the page did in a browser: a copy of it with a script that uses every control, and its notes read back."""
    page = report.render(analysis).replace("<head>", f"<head>{HOOKS}", 1).replace("</body>", f"{EXERCISE}</body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"]
    command = [str(BROWSER), *flags, f"--window-size={width},1000", "--dump-dom", (folder / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r'<pre id="outcome">(.*?)</pre>', shown, re.S)
    assert found is not None
    assert found[1], "the page or its exercise broke off"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def outcome(analysis, tmp_path_factory) -> dict[str, Any]:
    return exercised(analysis, tmp_path_factory.mktemp("page"))
