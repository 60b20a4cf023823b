"""The report of an analysis: what it holds, and how it behaves in a browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up import EVIL, PROJECTIONS, analysis_of, with_evil
from plotly.offline import get_plotlyjs

from nvfp4c.cli.sensitivity import summary
from nvfp4c.errors import DataError
from nvfp4c.sensitivity import report
from nvfp4c.sensitivity.analysis import Analysis, Together
from nvfp4c.sensitivity.intervals import mean_and_interval


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
    assert re.match(
        r"The chosen plan: 8\d\.\d% of the matmul operations measured run in FP4, 1\d\.\d% in high precision\. ", said
    )
    assert re.search(r"Predicted rise of the loss: \+\d\S* loss units \(\+\d\.\d\d% of the loss\)\. ", said)
    assert re.search(
        r"Measured rise: \+\d\S* ± \d\S* loss units \(mean and 95% interval, 8 held-out batches\)\.$", said
    )


def test_what_shares_leave_out_is_said(analysis):
    measured = replace(analysis.measurements, provenance={"rise_with_everything_in_fp4": 0.1})
    analysis = replace(analysis, measurements=measured)
    assert "left out of shares" not in report.render(analysis)
    assert not any("leave out" in line for line in summary(analysis))
    first, *others = measured.sites
    counted = sum(role.operations for site in measured.sites for role in site.roles.values())
    part = replace(measured, sites=(replace(first, unmeasured=counted / 3), *others))
    analysis = replace(analysis, measurements=part)
    assert "<dt>left out of shares</dt><dd>25.0% of the operations, not measured" in report.render(analysis)
    assert any("leave out 25.0% of the operations" in line for line in summary(analysis))


def test_the_data_is_that_of_the_analysis(analysis):
    data = data_in(report.render(analysis))
    assert len(data["matmuls"]) == 37 * 3
    assert sum(matmul["share"] for matmul in data["matmuls"]) == pytest.approx(1, abs=1e-12)  # 111 sums in FP64
    assert data["lines"] == [*PROJECTIONS, "lm_head", "router"]
    for shown, candidate in zip(data["candidates"], analysis.candidates, strict=True):
        matmuls = [data["matmuls"][place] for place in shown["bf16"]]
        kept = {(data["sites"][matmul["site"]]["name"], matmul["role"]) for matmul in matmuls}
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
    assert mean_and_interval((1.0, 2.0, 3.0)) == pytest.approx((2.0, 2.4841377), rel=1e-7)
    mean, half = mean_and_interval((1.5,))
    assert mean == 1.5
    assert math.isnan(half)
    assert all(map(math.isnan, mean_and_interval(())))


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
    one_plan = replace(analysis, candidates=analysis.candidates[:1], chosen=analysis.candidates[0].name)
    data = report.page_data(replace(one_plan, measurements=replace(analysis.measurements, sites=sites)))
    assert data["lines"] == ["encoder.*.attn.q_proj", "decoder.*.attn.q_proj"]


def test_an_analysis_without_its_plan_is_refused(analysis, tmp_path):
    with pytest.raises(DataError, match="chose the plan 'gone' but does not hold it"):
        report.write(replace(analysis, chosen="gone"), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_what_an_ablation_measured(analysis):
    """Nothing of it where there was none; a gradient that points the other way turned by 180 degrees."""
    keys = list(analysis.scores)
    everything = {"rise_with_everything_in_fp4": 0.5, "cosine_with_everything_in_fp4": 0.0}
    provenance = {**analysis.measurements.provenance, **everything}
    ablated = replace(
        analysis,
        measurements=replace(analysis.measurements, provenance=provenance),
        all_but={keys[0]: 0.375},
        cosine={keys[0]: 0.5, keys[1]: 1.0 + 1e-7, keys[2]: -1.0, keys[3]: math.nan},
        cosine_all_but={keys[0]: 0.5, keys[1]: -0.5},
    )
    found = report.page_data(ablated)["matmuls"]
    assert [one["saves"] for one in found[:2]] == [0.125, None]
    assert [one["angle"] for one in found[:4]] == [pytest.approx(60), 0, 180, None]
    assert [one["angle_saved"] for one in found[:3]] == [pytest.approx(30), pytest.approx(-30), None]
    names = ("saves", "angle", "angle_saved")
    assert all(one[name] is None for one in report.page_data(analysis)["matmuls"] for name in names)


def test_json_has_null_for_what_is_not_finite(analysis):
    found = json.loads(json.dumps(with_evil(analysis).to_dict(), allow_nan=False))
    assert found["candidates"][-1]["measured"] == [1.0, None]


def test_blocks_that_were_run_whole(analysis):
    first, second = list(analysis.scores)[:2]
    blocks = (
        Together("layers.0.", (first, second), 0.5, (0.4, 0.5, 0.6)),
        Together("layers.1.", (first, second), 0.1, (0.4, 0.5, 0.6)),
    )
    page = report.render(replace(analysis, together=blocks, pairs={(first, second): 0.25}))
    table = "<tr><td>layers.{}</td><td>{}</td><td>+0.5 ± 0.25</td><td>{}</td></tr>"
    assert table.format(0, "+0.5", "yes") in page
    assert table.format(1, "+0.1", "no, +0.4 beyond it") in page
    assert f"<tr><td>{first[0]}</td><td>{second[0]}</td><td>+0.25</td></tr>" in page
    assert "Do the scores add up?" not in report.render(analysis)


HOOKS = """<script>
const problems = [];
window.addEventListener("error", event => problems.push(event.message));
window.addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
for (const level of ["error", "warn"]) console[level] = (...words) => problems.push(words.join(" "));
</script>"""

EXERCISE = Path(__file__).with_name("use_report.js").read_text(encoding="utf-8")
LOOK = Path(__file__).with_name("look_at_report.js").read_text(encoding="utf-8")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


def exercised(analysis: Analysis, folder: Path, width: int = 1200, script: str = EXERCISE) -> dict[str, Any]:
    """What the page did in a browser: a copy of it with a script that uses every control, and its notes read back."""
    notes = f'<pre id="outcome"></pre><script>{{ const outcome = {{}}; {script} {LOOK} }}</script></body>'
    opening = f"<head>{HOOKS}<style>html {{ width: {width}px }}</style>"
    page = report.render(analysis).replace("<head>", opening, 1).replace("</body>", notes)
    (folder / "page.html").write_text(page, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=10000",
        f"--window-size={width},1000",
    ]
    command = [str(BROWSER), *flags, f"--user-data-dir={folder}", "--dump-dom", (folder / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r'<pre id="outcome">(.*?)</pre>', shown, re.S)
    assert found is not None
    assert found[1], "the page or its exercise broke off"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def outcome(analysis, tmp_path_factory) -> dict[str, Any]:
    return exercised(analysis, tmp_path_factory.mktemp("page"))


@needs_browser
def test_it_renders_without_an_error(outcome):
    assert outcome["problems"] == []
    assert outcome["sticksOut"] == []
    assert outcome["cutLabels"] == []


@needs_browser
def test_the_chosen_plan_is_shown_first(outcome, analysis):
    start = outcome["start"]
    assert start["shown"] == analysis.chosen
    assert start["words"].endswith("This is the plan that was chosen.")
    kept = sum(len(one.bf16) for one in analysis.candidates if one.name == analysis.chosen)
    assert (start["table"], start["maps"], start["graph"]) == (kept, kept, kept)


@needs_browser
def test_the_slider_changes_the_plan_everywhere(outcome, analysis):
    solved = sorted((one for one in analysis.candidates if one.kind == "solved"), key=lambda one: -one.share)
    assert len(outcome["slider"]) == len(solved) == 8
    for shown, candidate in zip(outcome["slider"], solved, strict=True):
        kept = len(candidate.bf16)
        assert shown["shown"] == candidate.name
        assert (shown["table"], shown["maps"], shown["graph"]) == (kept, kept, kept)
        assert shown["ring"] == pytest.approx(100 * (1 - candidate.share), abs=1e-9)  # one FP64 subtraction
        assert f"{1 - candidate.share:.1%} of the matmul operations measured run in FP4" in shown["words"]


@needs_browser
def test_a_baseline_can_be_shown(outcome, analysis):
    assert outcome["baseline"]["shown"] == analysis.candidates[-1].name
    assert outcome["baseline"]["table"] == len(analysis.candidates[-1].bf16)
    assert outcome["fromCurve"] == 0


@needs_browser
def test_columns_sort(outcome, analysis):
    ranked = list(map(float, outcome["ranked"]))
    assert ranked == sorted(ranked, reverse=True)
    assert len(ranked) == len(analysis.scores)
    assert list(map(float, outcome["rising"])) == ranked[::-1]
    assert outcome["byName"] == sorted(outcome["byName"])
    assert outcome["byPrecision"] == sorted(outcome["byPrecision"])
    assert outcome["sorted"] == ["ascending"]
    assert all(outcome["units"])


@needs_browser
def test_the_filter_takes_all_of_its_words(outcome):
    assert sorted(outcome["filtered"]) == [f"layers.{block}.mlp.down_proj wgrad" for block in range(6)]
    assert outcome["count"] == "6 of 111 matmuls"
    assert outcome["nothing"] == "0 of 111 matmuls"
    assert outcome["everything"] == "111 of 111 matmuls"


@needs_browser
def test_a_click_shows_a_layer_in_detail(outcome):
    detail = outcome["detail"]
    assert detail["title"] == "One layer in detail: layers.2.mlp.down_proj"
    assert (detail["role"], detail["plots"]) == ("dgrad", 4)
    assert "268 million operations a batch" in detail["words"]
    assert "first order: 2.00e-4 ± 3.00e-5 loss units (mean and its standard error)." in detail["words"]
    assert outcome["otherRole"] == ["dy: magnitudes", "dy: block scales", "x: magnitudes", "x: block scales"]
    assert outcome["fromGraph"].endswith(": layers.0.attn.q_proj")
    assert outcome["fromMap"].endswith(": layers.1.attn.k_proj")


@needs_browser
def test_the_scales_can_be_changed(outcome, analysis):
    ratios = [role.snr_db for site in analysis.measurements.sites for role in site.roles.values()]
    assert outcome["ramp"] == [f"{min(ratios):.1f} dB", f"{max(ratios):.1f} dB"]
    assert outcome["axis"] == "log"


@needs_browser
def test_the_graph_has_blocks_in_order_and_joins_what_reads_one_tensor(outcome):
    assert outcome["cards"] == [*(f"block {number}" for number in range(6)), "outside the blocks"]
    assert outcome["groups"] == [3, 1, 1, 1]
    assert "share a weight: weight 1 is embed.weight" in outcome["ties"]


@needs_browser
def test_no_text_becomes_markup_and_what_is_not_finite_stands_last(analysis, tmp_path):
    found = exercised(with_evil(analysis), tmp_path, width=400)
    assert found["problems"] == []
    assert found["images"] == 0
    assert found["title"] == "nvfp4c sensitivity"
    assert found["start"]["shown"] == EVIL
    assert found["fromGraph"] == f"One layer in detail: layers.0.{EVIL}"
    assert found["ranked"][-1] == found["rising"][-1] == "\N{EN DASH}"
    assert found["sticksOut"] == []
    assert found["cutLabels"] == []


@needs_browser
def test_a_large_model(tmp_path):
    large = exercised(analysis_of(blocks=66), tmp_path, width=400)
    assert large["problems"] == large["sticksOut"] == large["cutLabels"] == []
    assert large["everything"] == "1191 of 1191 matmuls"


@needs_browser
def test_a_small_model_without_blocks_scores_or_a_plan_that_was_run(analysis, tmp_path):
    first, plan = analysis.measurements.sites[0], analysis.candidates[0]
    alone = replace(first, block=None, roles={"fprop": first.roles["fprop"]})
    measurements = replace(analysis.measurements, sites=(alone, replace(alone, site="other")))
    small = Analysis(measurements, {}, (replace(plan, bf16=()),), plan.name)
    assert exercised(small, tmp_path, width=400, script="") == {
        "images": 0,
        "title": "nvfp4c sensitivity",
        "sticksOut": [],
        "cutLabels": [],
        "problems": [],
    }
