"use strict";
// All text from the data goes into the page as text, never as markup; `plain` does the same for plotly's labels.

const data = JSON.parse(document.getElementById("data").textContent);
const { sites, matmuls, candidates, roles } = data;
const CONFIG = { displayModeBar: false, responsive: true };
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const SYMBOLS = { solved: "circle", paper: "square", weights: "diamond", random: "triangle-up" };
const SIGNS = { solved: "●", paper: "■", weights: "◆", random: "▲" };
const KINDS = { solved: "solved", paper: "first and last blocks", weights: "ranked by the error of weights alone", random: "drawn at random" };
const MEANING = { fprop: "fprop, the layer's result", dgrad: "dgrad, the gradient of its input", wgrad: "wgrad, the gradient of its weight" };
const OPERANDS = { x: "x (the input)", w: "w (the weight)", dy: "dy (the gradient of the result)" };
const LONGEST_LABEL = 20;

matmuls.forEach((matmul, place) => { matmul.place = place; });

const at = id => document.getElementById(id);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const COLOURS = { solved: colour("fp4"), paper: colour("paper"), weights: colour("weights"), random: colour("random") };
const known = value => value !== null && value !== undefined;
const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const shortened = text => text.length > LONGEST_LABEL ? `…${text.slice(1 - LONGEST_LABEL)}` : text;

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  return made;
}

// Three digits, with the unit; a dash for what is not known.
function number(value, unit = "") {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  const text = value === 0 ? "0"
    : size < 1e-3 || size >= 1e6 ? value.toExponential(2)
    : size >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
  return !unit ? text : unit === "%" ? `${text}%` : `${text} ${unit}`;
}
// A name may break after its dots and underscores.
function breakable(holder) {
  holder.replaceChildren(...holder.textContent.split(/(?<=[._])/).flatMap(part => [part, element("wbr")]));
}
const percent = value => known(value) ? number(100 * value, "%") : "–";
const largest = values => values.filter(known).reduce((most, value) => most === null || value > most ? value : most, null);

function layout(height, x, y) {
  const axis = { gridcolor: "#e3e7ec", zeroline: false, automargin: true, exponentformat: "power" };
  return {
    template: "none", height, margin: { l: 56, r: 12, t: 8, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 13, color: "#1f2933" }, showlegend: false,
    xaxis: { ...axis, ...x }, yaxis: { ...axis, ...y },
  };
}

// ---- The plan shown: one index into `candidates`; whoever draws something of it registers here.

let shown = data.chosen;
const followers = [];
const inHigh = candidates.map(candidate => new Set(candidate.bf16));
const precision = place => inHigh[shown].has(place) ? "BF16" : "FP4";
const solved = candidates.map((_, index) => index).filter(index => candidates[index].kind === "solved")
  .sort((a, b) => candidates[a].fp4_share - candidates[b].fp4_share);

function show(index) {
  shown = index;
  for (const follow of followers) follow();
}

function buildPlans() {
  const slider = at("budget"), list = at("plan"), words = at("plan-words");
  slider.max = Math.max(0, solved.length - 1);
  slider.disabled = solved.length < 2;
  candidates.forEach((candidate, index) => list.append(element("option", candidate.title, { value: index })));
  slider.addEventListener("input", () => show(solved[Number(slider.value)]));
  list.addEventListener("change", () => show(Number(list.value)));
  followers.push(() => {
    if (solved.includes(shown)) slider.value = solved.indexOf(shown);
    slider.setAttribute("aria-valuetext", candidates[shown].title);
    list.value = shown;
    words.textContent = candidates[shown].words.join(" ") + (shown === data.chosen ? " This is the plan that was chosen." : "");
  });
}

const title = (text, size = 13) => ({ title: { text, font: { size }, standoff: 6 } });

// Marks of some candidates, open for predictions and filled for what was measured. They stand at their share of FP4, or
// with `lines` at their place in it, and their rise runs along x.
function marks(kind, value, places, lines) {
  const measured = value === "measured", rises = places.map(index => candidates[index][value]);
  const others = places.map(index => lines ? lines.indexOf(index) : 100 * candidates[index].fp4_share);
  const spread = index => known(candidates[index].half_interval) ? ` ± ${number(candidates[index].half_interval)}` : "";
  const bars = { type: "data", array: places.map(index => candidates[index].half_interval ?? 0), color: COLOURS[kind], thickness: 1.5, width: 4 };
  return {
    ...(lines ? { x: rises, y: others } : { x: others, y: rises }), customdata: places, mode: "markers",
    marker: { symbol: SYMBOLS[kind] + (measured ? "" : "-open"), size: 9, color: COLOURS[kind], line: { width: measured ? 0 : 2, color: COLOURS[kind] } },
    text: places.map(index => `${plain(candidates[index].title)}<br>${percent(candidates[index].fp4_share)} of operations in FP4<br>` +
      `${value} rise ${number(candidates[index][value])}${measured ? spread(index) : ""} loss units`),
    hovertemplate: "%{text}<extra></extra>", ...(measured ? { [lines ? "error_x" : "error_y"]: bars } : {}),
  };
}

const ofKind = kind => kind === "solved" ? solved : candidates.map((_, index) => index).filter(index => candidates[index].kind === kind);
const wasRun = index => known(candidates[index].measured);
const showClicked = event => known(event.points[0].customdata) && show(event.points[0].customdata);

function buildCurve() {
  const kinds = Object.keys(SYMBOLS).filter(kind => ofKind(kind).length);
  const traces = kinds.flatMap(kind => [marks(kind, "predicted", ofKind(kind)), marks(kind, "measured", ofKind(kind).filter(wasRun))]);
  if (kinds[0] === "solved") Object.assign(traces[0], { mode: "lines+markers", line: { color: COLOURS.solved, width: 2 } });
  const ring = { x: [], y: [], mode: "markers", hoverinfo: "skip", marker: { symbol: "circle-open", size: 19, color: "#1f2933", line: { width: 2.5 } } };
  const form = layout(380, { ...title("share of matmul operations in FP4 (%)"), ticksuffix: "%" }, title("rise of the loss (loss units)"));
  Plotly.newPlot("curve", [...traces, ring], { ...form, hovermode: "closest" }, CONFIG);
  at("curve").on("plotly_click", showClicked);
  at("curve-log").addEventListener("change", event => Plotly.relayout("curve", { "yaxis.type": event.target.checked ? "log" : "linear", "yaxis.autorange": true }));
  for (const kind of kinds) {
    const item = element("span", KINDS[kind]);
    item.prepend(element("b", SIGNS[kind], { style: `color: ${COLOURS[kind]}` }));
    at("curve-legend").append(item);
  }
  followers.push(() => {
    const candidate = candidates[shown];
    Plotly.restyle("curve", { x: [[100 * candidate.fp4_share]], y: [[candidate.predicted]] }, [traces.length]);
  });
}

// The plans that were run, one a line: on the curve those of one budget stand on top of each other.
function buildComparison() {
  const kinds = Object.keys(SYMBOLS).filter(kind => ofKind(kind).some(wasRun));
  at("comparison").parentNode.hidden = !kinds.length;
  if (!kinds.length) return;
  const run = kind => ofKind(kind).filter(wasRun);
  const lines = kinds.flatMap(run);
  const traces = kinds.flatMap(kind => ["predicted", "measured"].map(value => marks(kind, value, run(kind), lines)));
  const form = layout(lines.length * 26 + 60, title("rise of the loss (loss units)"),
    { autorange: "reversed", tickvals: lines.map((_, line) => line), ticktext: lines.map(index => plain(shortened(candidates[index].name))), tickfont: { size: 12 } });
  Plotly.newPlot("comparison", traces, { ...form, hovermode: "closest" }, CONFIG);
  at("comparison").on("plotly_click", showClicked);
}

// ---- Maps: a row for each line, a column for each block, one map for each role.

const columns = Math.max(1, data.blocks.length);
const present = roles.filter(role => matmuls.some(matmul => matmul.role === role));

function grid(role) {
  const cells = data.lines.map(() => Array(columns).fill(null));
  matmuls.forEach((matmul, place) => {
    if (matmul.role !== role) return;
    const site = sites[matmul.site], row = cells[data.lines.indexOf(site.line)];
    if (site.column === null) row.fill(place); else row[site.column] = place;
  });
  return cells;
}

// Places for the maps, all before the first is drawn: a plot takes the width that its place has then.
function places(parent) {
  return present.map(role => {
    const holder = element("div"), plot = element("div");
    holder.append(element("h3", MEANING[role]), plot);
    parent.append(holder);
    return [role, plot];
  });
}

function buildMap(plot, cells, style) {
  const height = data.lines.length > 60 ? 13 : 22;
  const label = data.lines.map(line => plain(shortened(line)));
  const ticks = { showgrid: false, ticks: "" };
  const step = [1, 2, 5, 10, 20, 50].find(step => columns / step <= 14) ?? 100;
  const numbered = data.blocks.map((_, column) => column).filter(column => column % step === 0);
  const blocks = { ...title("block", 12), tickangle: 0, tickvals: numbered, ticktext: numbered.map(column => String(data.blocks[column])), visible: numbered.length > 0 };
  const form = layout(data.lines.length * height + 48,
    { ...ticks, ...blocks },
    { ...ticks, autorange: "reversed", tickvals: label.map((_, row) => row), ticktext: label, tickfont: { size: height > 20 ? 12 : 9 } });
  const gap = columns > 40 ? 0.5 : 2;
  const trace = { type: "heatmap", x: [...Array(columns).keys()], y: label.map((_, row) => row), xgap: gap, ygap: gap,
    hovertemplate: "%{text}<extra></extra>", hoverongaps: false, showscale: false, ...style };
  Plotly.newPlot(plot, [trace], { ...form, margin: { l: 8, r: 4, t: 4, b: 40 }, plot_bgcolor: colour("none") }, CONFIG);
  plot.on("plotly_click", event => {
    const [row, column] = event.points[0].pointIndex;
    if (cells[row][column] !== null) detail(cells[row][column], true);
  });
}

const over = (cells, value) => cells.map(row => row.map(place => place === null ? null : value(place)));
const named = place => `${plain(sites[matmuls[place].site].name)}, ${matmuls[place].role}`;

function buildPrecisionMaps() {
  const scale = [[0, colour("bf16")], [1, colour("fp4")]];
  for (const [role, plot] of places(at("precision-maps"))) {
    const cells = grid(role);
    const values = () => ({ z: over(cells, place => precision(place) === "FP4" ? 1 : 0), text: over(cells, place => `${named(place)}: ${precision(place)}`) });
    buildMap(plot, cells, { ...values(), zmin: 0, zmax: 1, colorscale: scale });
    followers.push(() => { const { z, text } = values(); Plotly.restyle(plot, { z: [z], text: [text] }); });
  }
}

function buildHeatMaps() {
  const text = place => `${named(place)}<br>predicted rise ${number(matmuls[place].score, "loss units")}<br>SNR of the result ${number(matmuls[place].snr, "dB")}`;
  const plots = places(at("heat-maps")).map(([role, plot]) => {
    const cells = grid(role);
    buildMap(plot, cells, { z: over(cells, () => null), text: over(cells, text) });
    return [cells, plot];
  });
  const paint = () => {
    const logarithmic = at("colour").value === "score";
    const unit = logarithmic ? "loss units" : "dB";
    const all = matmuls.map(matmul => logarithmic ? matmul.score : matmul.snr).filter(value => known(value) && (!logarithmic || value > 0));
    let low = all.reduce((least, value) => Math.min(least, value), Infinity), high = largest(all);
    if (!all.length) [low, high] = [1, 10];
    if (logarithmic) low = Math.max(low, high * 1e-4);  // four decades: one tiny score takes no colours from the others
    const level = value => logarithmic ? Math.log10(Math.max(value, low)) : value;
    const value = place => {
      const found = logarithmic ? matmuls[place].score : matmuls[place].snr;
      return known(found) ? level(found) : null;
    };
    // Brighter is worse: a high score, or a low ratio of signal to noise.
    const stops = logarithmic ? VIRIDIS : [...VIRIDIS].reverse();
    const scale = stops.map((stop, index) => [index / (stops.length - 1), stop]);
    const least = level(low), most = level(high) > least ? level(high) : least + 1;
    for (const [cells, plot] of plots) Plotly.restyle(plot, { z: [over(cells, value)], zmin: least, zmax: most, colorscale: [scale] });
    at("ramp").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    at("ramp-low").textContent = all.length ? (logarithmic ? "up to " : "") + number(low, unit) : "nothing measured";
    at("ramp-high").textContent = all.length ? number(high, unit) : "";
  };
  at("colour").addEventListener("change", paint);
  paint();
}
