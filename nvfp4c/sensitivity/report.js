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
    : size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
  return unit ? `${text} ${unit}` : text;
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

function buildCurve() {
  const kinds = Object.keys(SYMBOLS).filter(kind => candidates.some(candidate => candidate.kind === kind));
  const traces = [];
  const trace = (kind, measured) => {
    const order = kind === "solved" ? solved : candidates.map((_, index) => index).filter(index => candidates[index].kind === kind);
    const places = measured ? order.filter(index => known(candidates[index].measured)) : order;
    const value = measured ? "measured" : "predicted";
    const made = {
      x: places.map(index => 100 * candidates[index].fp4_share), y: places.map(index => candidates[index][value]), customdata: places,
      mode: kind === "solved" && !measured ? "lines+markers" : "markers", line: { color: COLOURS[kind], width: 2 },
      marker: { symbol: SYMBOLS[kind] + (measured ? "" : "-open"), size: 9, color: COLOURS[kind], line: { width: measured ? 0 : 2, color: COLOURS[kind] } },
      text: places.map(index => `${plain(candidates[index].title)}<br>${percent(candidates[index].fp4_share)} of operations in FP4<br>` +
        `${value} rise ${number(candidates[index][value], "loss units")}` + (measured && known(candidates[index].half_interval) ? ` ± ${number(candidates[index].half_interval)}` : "")),
      hovertemplate: "%{text}<extra></extra>",
    };
    if (measured) made.error_y = { type: "data", array: places.map(index => candidates[index].half_interval ?? 0), color: COLOURS[kind], thickness: 1.5, width: 4 };
    return made;
  };
  for (const kind of kinds) traces.push(trace(kind, false), trace(kind, true));
  const ring = { x: [], y: [], mode: "markers", hoverinfo: "skip", marker: { symbol: "circle-open", size: 19, color: "#1f2933", line: { width: 2.5 } } };
  const title = text => ({ title: { text, font: { size: 13 } } });
  const form = layout(380, { ...title("share of matmul operations in FP4 (%)"), ticksuffix: "%" }, title("rise of the loss (loss units)"));
  Plotly.newPlot("curve", [...traces, ring], { ...form, hovermode: "closest" }, CONFIG);
  at("curve").on("plotly_click", event => known(event.points[0].customdata) && show(event.points[0].customdata));
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

// ---- Maps: a row for each line, a column for each block, one map for each role.

const columns = Math.max(1, data.blocks.length);

function grid(role) {
  const cells = data.lines.map(() => Array(columns).fill(null));
  matmuls.forEach((matmul, place) => {
    if (matmul.role !== role) return;
    const site = sites[matmul.site], row = cells[data.lines.indexOf(site.line)];
    if (site.column === null) row.fill(place); else row[site.column] = place;
  });
  return cells;
}

function buildMap(parent, role, cells, style) {
  const holder = element("div"), plot = element("div");
  holder.append(element("h3", MEANING[role]), plot);
  parent.append(holder);
  const height = data.lines.length > 60 ? 13 : 22;
  const label = data.lines.map(line => plain(shortened(line)));
  const ticks = { showgrid: false, ticks: "" };
  const blocks = data.blocks.length ? { title: { text: "block", font: { size: 12 }, standoff: 4 }, type: "category", tickangle: 0 } : { visible: false };
  const form = layout(data.lines.length * height + 48,
    { ...ticks, ...blocks },
    { ...ticks, autorange: "reversed", tickvals: label.map((_, row) => row), ticktext: label, tickfont: { size: height > 20 ? 12 : 9 } });
  const gap = columns > 40 ? 0.5 : 2;
  const trace = { type: "heatmap", x: data.blocks.length ? data.blocks.map(String) : [""], y: label.map((_, row) => row), xgap: gap, ygap: gap,
    hovertemplate: "%{text}<extra></extra>", hoverongaps: false, showscale: false, ...style };
  Plotly.newPlot(plot, [trace], { ...form, margin: { l: 8, r: 4, t: 4, b: 40 }, plot_bgcolor: colour("none") }, CONFIG);
  plot.on("plotly_click", event => {
    const [row, column] = event.points[0].pointIndex;
    if (cells[row][column] !== null) detail(cells[row][column], true);
  });
  return plot;
}

const present = roles.filter(role => matmuls.some(matmul => matmul.role === role));
const over = (cells, value) => cells.map(row => row.map(place => place === null ? null : value(place)));
const named = place => `${plain(sites[matmuls[place].site].name)}, ${matmuls[place].role}`;

function buildPrecisionMaps() {
  const scale = [[0, colour("bf16")], [1, colour("fp4")]];
  for (const role of present) {
    const cells = grid(role);
    const values = () => ({ z: over(cells, place => precision(place) === "FP4" ? 1 : 0), text: over(cells, place => `${named(place)}: ${precision(place)}`) });
    const plot = buildMap(at("precision-maps"), role, cells, { ...values(), zmin: 0, zmax: 1, colorscale: scale });
    followers.push(() => { const { z, text } = values(); Plotly.restyle(plot, { z: [z], text: [text] }); });
  }
}

function buildHeatMaps() {
  const text = place => `${named(place)}<br>predicted rise ${number(matmuls[place].score, "loss units")}<br>SNR of the result ${number(matmuls[place].snr, "dB")}`;
  const plots = present.map(role => {
    const cells = grid(role);
    return [cells, buildMap(at("heat-maps"), role, cells, { z: over(cells, () => null), text: over(cells, text) })];
  });
  const paint = () => {
    const logarithmic = at("colour").value === "score";
    const unit = logarithmic ? "loss units" : "dB";
    const all = matmuls.map(matmul => logarithmic ? matmul.score : matmul.snr).filter(value => known(value) && (!logarithmic || value > 0));
    let low = all.reduce((least, value) => Math.min(least, value), Infinity), high = largest(all);
    if (!all.length) [low, high] = [1, 10];
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

// ---- The ranking.

const operand = (matmul, name) => matmul.operands.find(one => one.name === name);
const worst = name => matmul => largest(matmul.operands.map(one => one[name]));
const COLUMNS = [
  { title: "layer", unit: "name", value: matmul => sites[matmul.site].name, text: true },
  { title: "role", unit: "name", value: matmul => matmul.role, text: true },
  { title: "score", unit: "loss units", value: matmul => matmul.score },
  { title: "alone", unit: "loss units", value: matmul => matmul.single },
  { title: "share", unit: "%", value: matmul => matmul.share, scale: 100 },
  { title: "SNR", unit: "dB", value: matmul => matmul.snr },
  { title: "relative error", unit: "%", value: matmul => matmul.error, scale: 100 },
  { title: "bias", unit: "%", value: matmul => matmul.bias, scale: 100 },
  ...["x", "w", "dy"].map(name => ({ title: `SNR of ${name}`, unit: "dB", value: matmul => operand(matmul, name)?.snr })),
  { title: "kurtosis", unit: "ratio", value: worst("kurtosis") },
  { title: "vanished", unit: "%", value: worst("vanished"), scale: 100 },
  { title: "clipped", unit: "%", value: worst("saturated"), scale: 100 },
  { title: "in the plan", unit: "precision", value: matmul => precision(matmul.place), text: true },
].filter(column => column.title !== "alone" || matmuls.some(matmul => known(matmul.single)));
const PRECISION = COLUMNS.length - 1;

let tableRows = [];

function buildTable() {
  const head = element("tr"), body = at("ranking").tBodies[0];
  COLUMNS.forEach((column, place) => {
    const heading = element("th", "", { scope: "col" }), button = element("button", column.title, { type: "button" });
    button.append(element("small", column.unit));
    button.addEventListener("click", () => {
      const now = heading.getAttribute("aria-sort");
      sort(place, now ? now === "ascending" : !column.text);
    });
    heading.append(button);
    head.append(heading);
  });
  at("ranking").tHead.append(head);
  tableRows = matmuls.map((matmul, place) => {
    const row = element("tr");
    for (const column of COLUMNS.slice(0, PRECISION)) {
      const value = column.value(matmul);
      row.append(element("td", column.text ? value : number(known(value) ? (column.scale ?? 1) * value : null)));
    }
    const cell = element("td");
    cell.append(element("span"));
    row.append(cell);
    row.addEventListener("click", () => detail(place, true));
    return row;
  });
  followers.push(() => {
    tableRows.forEach((row, place) => {
      const label = row.cells[PRECISION].firstChild, found = precision(place);
      if (label.textContent !== found) {
        label.textContent = found;
        label.className = found.toLowerCase();
      }
    });
    filter();
  });
  body.append(...tableRows);
  at("filter").addEventListener("input", filter);
}

function sort(place, falling) {
  const { value, text } = COLUMNS[place];
  const headings = at("ranking").tHead.rows[0].cells;
  for (const heading of headings) heading.removeAttribute("aria-sort");
  headings[place].setAttribute("aria-sort", falling ? "descending" : "ascending");
  const keys = matmuls.map(value), way = falling ? -1 : 1;
  const names = new Intl.Collator("en", { numeric: true });
  const order = (a, b) => {
    if (!known(keys[a]) || !known(keys[b])) return known(keys[b]) - known(keys[a]);  // what is not known stands last
    return way * (text ? names.compare(keys[a], keys[b]) : keys[a] - keys[b]);
  };
  at("ranking").tBodies[0].append(...matmuls.map((_, index) => index).sort(order).map(index => tableRows[index]));
}

function filter() {
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  tableRows.forEach((row, place) => {
    const text = `${sites[matmuls[place].site].name} ${matmuls[place].role} ${precision(place)}`.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    count += !row.hidden;
  });
  at("count").textContent = `${count} of ${matmuls.length} matmuls`;
}

// ---- One layer in detail.

function counted(value) {
  for (const [size, word] of [[1e12, "trillion"], [1e9, "billion"], [1e6, "million"]]) if (value >= size) return `${number(value / size)} ${word}`;
  return number(value);
}

function matmulWords(matmul) {
  const sentences = [
    `A product of ${matmul.size.map(size => size.toLocaleString("en")).join(" × ")} (rows × columns × sum), ${counted(matmul.operations)} operations a batch, ${percent(matmul.share)} of all matmul operations.`,
    `In FP4 the result has an SNR of ${number(matmul.snr, "dB")}: a relative error of ${percent(matmul.error)}, of which ${percent(matmul.bias)} is bias and ${percent(matmul.scatter)} scatter.`,
    `Predicted rise of the loss: ${number(matmul.score, "loss units")}.`,
  ];
  if (known(matmul.single)) sentences.push(`Measured with this matmul alone in FP4: ${number(matmul.single, "loss units")}.`);
  if (known(matmul.first)) sentences.push(`Change of the loss to first order: ${number(matmul.first, "loss units")}.`);
  if (known(matmul.rows)) sentences.push(`To second order, from the gradients of rows: ${number(matmul.rows, "loss units")}.`);
  if (known(matmul.diagonal)) sentences.push(`Sum of squared changes by single elements: ${number(matmul.diagonal, "squared loss units")}.`);
  return sentences.join(" ");
}

const operandWords = one => `${OPERANDS[one.name] ?? one.name}: ${counted(one.elements)} elements, SNR ${number(one.snr, "dB")}, ` +
  `kurtosis ${number(one.kurtosis)} (ratio; 3 for a Gaussian), ${percent(one.vanished)} became 0, ${percent(one.saturated)} clipped, ` +
  `${percent(one.zeros)} had been 0.`;

let detailed = -1;

function detail(place, jump) {
  const site = matmuls[place].site, own = matmuls.filter(matmul => matmul.site === site);
  for (const index of detailed < 0 ? [place] : [detailed, place]) {
    tableRows[index].classList.toggle("current", index === place);
    nodes[matmuls[index].site].classList.toggle("current", matmuls[index].site === site);
  }
  detailed = place;
  at("detail-title").textContent = `One layer in detail: ${sites[site].name}`;
  const weight = element("p", `Weight: ${sites[site].weight}, ${counted(sites[site].weight_elements)} elements.`);
  const parts = own.flatMap(matmul => {
    const list = element("ul");
    list.append(...matmul.operands.map(one => element("li", operandWords(one))));
    const heading = element("h3", `${MEANING[matmul.role]} `);
    heading.append(element("span", precision(matmul.place), { class: `tag ${precision(matmul.place).toLowerCase()}`, "data-place": matmul.place }));
    return [heading, element("p", matmulWords(matmul)), list];
  });
  at("detail-words").replaceChildren(weight, ...parts);
  const choices = own.map(matmul => {
    const label = element("label"), choice = element("input", "", { type: "radio", name: "detail-role" });
    choice.checked = matmul.place === place;
    choice.addEventListener("change", () => detail(matmul.place, false));
    label.append(choice, ` ${matmul.role}`);
    return label;
  });
  at("detail-roles").replaceChildren("histograms of", ...choices);
  drawHistograms(matmuls[place]);
  if (jump) at("detail-title").scrollIntoView();
}

followers.push(() => {
  for (const tag of at("detail-words").querySelectorAll(".tag")) {
    tag.textContent = precision(Number(tag.dataset.place));
    tag.className = `tag ${tag.textContent.toLowerCase()}`;
  }
});

function drawHistograms(matmul) {
  const holders = [...at("histograms").children];
  const title = text => ({ title: { text, font: { size: 12 }, standoff: 6 } });
  const draw = (heading, traces, x, y) => {
    const holder = holders.shift() ?? element("div");
    if (!holder.parentNode) {
      holder.append(element("h3"), element("div"));
      at("histograms").append(holder);
    }
    holder.hidden = false;
    holder.firstChild.textContent = heading;
    Plotly.react(holder.lastChild, traces, { ...layout(220, x, { ...title(y), rangemode: "tozero" }), bargap: 0.15, hovermode: "x unified" }, CONFIG);
  };
  for (const one of matmul.operands) {
    const name = OPERANDS[one.name] ?? one.name;
    const used = 1 + Math.max(11, ...[one.before, one.after].map(counts => counts.findLastIndex(share => share > 0)));
    const x = Array.from({ length: used }, (_, octave) => octave);
    const shares = counts => counts.slice(0, used).map(share => 100 * share);
    draw(`${name}: magnitudes`, [
      { type: "bar", name: "before", x, y: shares(one.before), marker: { color: "#9aa5b1" }, hovertemplate: "%{y:.3g}%" },
      { name: "after", x, y: shares(one.after), mode: "lines", line: { shape: "hvh", color: COLOURS.paper, width: 2 }, hovertemplate: "%{y:.3g}%" },
    ], title("octaves below the largest"), "elements (%)");
    const labels = one.scales.map((_, index) => index ? String(index - 7) : "sub");
    draw(`${name}: block scales`, [
      { type: "bar", name: "blocks", x: labels, y: one.scales.map(share => 100 * share), marker: { color: COLOURS.solved }, hovertemplate: "%{y:.3g}%" },
    ], { ...title("exponent of the scale (power of 2)"), type: "category", tickangle: 0, tickfont: { size: 11 } }, "blocks (%)");
  }
  for (const spare of holders) spare.hidden = true;
}

// ---- The matmul graph.

const nodes = [];

function collected(items, key) {
  const found = new Map();
  for (const item of items) found.set(key(item), [...(found.get(key(item)) ?? []), item]);
  return found;
}

function buildGraph() {
  const cards = [];
  sites.forEach((site, index) => {
    if (!cards.length || sites[cards.at(-1)[0]].block !== site.block) cards.push([]);
    cards.at(-1).push(index);
  });
  const readers = collected(cards.flatMap(card => [...new Set(card.map(index => sites[index].reads))]), reads => reads);
  const far = [...readers].filter(([, uses]) => uses.length > 1).map(([reads]) => reads);
  const tied = [...collected(sites, site => site.weight)].filter(([weight, users]) => weight && users.length > 1).map(([weight]) => weight);
  for (const card of cards) {
    const block = sites[card[0]].block, holder = element("div", "", { class: "card" });
    holder.append(element("h3", block === null ? "outside the blocks" : `block ${block}`));
    for (const [reads, members] of collected(card, index => sites[index].reads)) {
      const group = element("div", "", { class: "group" });
      if (far.includes(reads)) group.append(element("small", `tensor ${1 + far.indexOf(reads)}`));
      group.append(...members.map(index => node(index, tied.indexOf(sites[index].weight))));
      holder.append(group);
    }
    at("graph").append(holder);
  }
  const notes = [];
  if (far.length) notes.push("Lines of one name, such as tensor 1, are the same tensor.");
  if (tied.length) notes.push(`Layers that share a weight: ${tied.map((weight, index) => `weight ${index + 1} is ${weight}`).join(", ")}.`);
  at("ties").textContent = notes.join(" ");
  followers.push(() => {
    for (const letter of at("graph").querySelectorAll("i[data-place]")) letter.className = precision(Number(letter.dataset.place)).toLowerCase();
  });
}

function node(index, tie) {
  const site = sites[index], own = matmuls.filter(matmul => matmul.site === index);
  const made = element("button", site.label, { class: "node", type: "button", title: site.obstacle ? `${site.name}: ${site.obstacle}` : site.name });
  if (tie >= 0) made.append(element("br"), element("small", `weight ${tie + 1}`));
  const letters = element("div");
  letters.append(...own.map(matmul => element("i", matmul.role[0], { "data-place": matmul.place })));
  if (!own.length) letters.append(element("i", "not in FP4", { class: "none" }));
  made.append(letters);
  made.disabled = !own.length;
  made.addEventListener("click", () => detail(own[0].place, true));
  nodes[index] = made;
  return made;
}

// ---- The page. A map needs more room where there are many blocks.

const room = columns > 24 ? "100%" : columns > 12 ? "480px" : "320px";
for (const maps of document.querySelectorAll(".maps")) maps.style.setProperty("--least", room);
buildPlans();
buildCurve();
buildPrecisionMaps();
buildHeatMaps();
buildTable();
buildGraph();
show(data.chosen);
sort(COLUMNS.findIndex(column => column.title === "score"), true);
if (matmuls.length) detail(tableRows.indexOf(at("ranking").tBodies[0].rows[0]), false);
