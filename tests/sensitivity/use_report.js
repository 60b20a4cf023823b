// Uses every control of a report and notes in `outcome` what came of it.

const rows = () => [...at("ranking").tBodies[0].rows].filter(row => !row.hidden);
const headings = () => [...at("ranking").tHead.rows[0].cells];
const place = title => headings().findIndex(cell => cell.textContent.startsWith(title));
const texts = title => rows().map(row => row.cells[place(title)].textContent);
const click = title => headings()[place(title)].firstChild.click();
const enter = (id, value, kind) => {
  at(id).value = value;
  at(id).dispatchEvent(new Event(kind));
};
const plots = id => [...at(id).querySelectorAll("div:not([hidden]) > .js-plotly-plot")];
const textsInMaps = () => plots("precision-maps").flatMap(plot => plot.data[0].text.flat());

// Which plan is shown, and how many matmuls of it are BF16 in each of the places that show it.
const state = () => ({
  shown: candidates[shown].name,
  words: at("plan-words").textContent,
  ring: at("curve").data.at(-1).x[0],
  table: texts("in the plan").filter(text => text === "BF16").length,
  maps: new Set(textsInMaps().filter(text => text?.endsWith(": BF16"))).size,
  graph: at("graph").querySelectorAll("i.bf16").length,
});

outcome.start = state();
outcome.slider = solved.map((_, step) => {
  enter("budget", step, "input");
  return state();
});
enter("plan", candidates.length - 1, "change");
outcome.baseline = state();

outcome.ranked = texts("score");
click("score");
outcome.rising = texts("score");
click("layer");
outcome.byName = texts("layer");
click("in the plan");
outcome.byPrecision = texts("in the plan");
outcome.sorted = headings().map(cell => cell.getAttribute("aria-sort")).filter(Boolean);
outcome.units = headings().map(cell => cell.querySelector("small").textContent);

enter("filter", "  DOWN wgrad ", "input");
outcome.filtered = rows().map(row => `${row.cells[0].textContent} ${row.cells[1].textContent}`);
outcome.count = at("count").textContent;
enter("filter", "nothing like it", "input");
outcome.nothing = at("count").textContent;
enter("filter", "", "input");
outcome.everything = at("count").textContent;

rows().find(row => /2\.mlp\.down_projdgrad/.test(row.textContent)).click();
outcome.detail = {
  title: at("detail-title").textContent,
  words: at("detail-words").textContent,
  role: at("detail-roles").querySelector("input:checked").parentNode.textContent.trim(),
  plots: plots("histograms").length,
};
at("detail-roles").querySelectorAll("input")[2].click();
outcome.otherRole = [...at("histograms").querySelectorAll("h3")].map(heading => heading.textContent);
at("graph").querySelector(".node").click();
outcome.fromGraph = at("detail-title").textContent;
plots("heat-maps")[0].emit("plotly_click", { points: [{ pointIndex: [1, 1] }] });
outcome.fromMap = at("detail-title").textContent;
at("curve").emit("plotly_click", { points: [{ customdata: 0 }] });
outcome.fromCurve = shown;

enter("colour", "snr", "change");
outcome.ramp = [at("ramp-low").textContent, at("ramp-high").textContent];
at("curve-log").click();
outcome.axis = at("curve").layout.yaxis.type;
outcome.cards = [...at("graph").querySelectorAll(".card > h3")].map(heading => heading.textContent);
const groups = [...at("graph").querySelector(".card").querySelectorAll(".group")];
outcome.groups = groups.map(group => group.querySelectorAll(".node").length);
outcome.ties = at("ties").textContent;
