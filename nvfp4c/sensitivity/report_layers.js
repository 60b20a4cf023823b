// The layers: their ranking, one of them in detail, and all in the order in which they run. Then the page is built.

// ---- The ranking.

const operand = (matmul, name) => matmul.operands.find(one => one.name === name);
const worst = name => matmul => largest(matmul.operands.map(one => one[name]));
const COLUMNS = [
  { title: "layer", unit: "name", value: matmul => sites[matmul.site].name, text: true },
  { title: "role", unit: "name", value: matmul => matmul.role, text: true },
  { title: "in the plan", unit: "precision", value: matmul => precision(matmul.place), text: true },
  { title: "score", unit: "loss units", value: matmul => matmul.score },
  { title: "alone", unit: "loss units", value: matmul => matmul.single, ablation: true },
  { title: "saves", unit: "loss units", value: matmul => matmul.saves, ablation: true },
  { title: "angle", unit: "degrees", value: matmul => matmul.angle, ablation: true },
  { title: "saves angle", unit: "degrees", value: matmul => matmul.angle_saved, ablation: true },
  { title: "share", unit: "%", value: matmul => matmul.share, scale: 100 },
  { title: "SNR", unit: "dB", value: matmul => matmul.snr },
  { title: "relative error", unit: "%", value: matmul => matmul.error, scale: 100 },
  { title: "bias", unit: "%", value: matmul => matmul.bias, scale: 100 },
  ...["x", "w", "dy"].map(name => ({ title: `SNR of ${name}`, unit: "dB", value: matmul => operand(matmul, name)?.snr })),
  { title: "kurtosis", unit: "ratio", value: worst("kurtosis") },
  { title: "vanished", unit: "%", value: worst("vanished"), scale: 100 },
  { title: "clipped", unit: "%", value: worst("saturated"), scale: 100 },
].filter(column => !column.ablation || matmuls.some(matmul => known(column.value(matmul))));
const PRECISION = 2;

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
    COLUMNS.forEach((column, index) => {
      const value = index === PRECISION ? "" : column.value(matmul);
      row.append(element("td", column.text ? value : number(known(value) ? (column.scale ?? 1) * value : null)));
    });
    breakable(row.cells[0]);
    row.cells[PRECISION].append(element("span"));
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
  return value.toLocaleString("en");
}

function matmulWords(matmul) {
  const sentences = [
    `A product of ${matmul.size.map(size => size.toLocaleString("en")).join(" × ")} (rows × columns × sum), ${counted(matmul.operations)} operations a batch, ${percent(matmul.share)} of the matmul operations measured.`,
    `In FP4 the result has an SNR of ${number(matmul.snr, "dB")}: a relative error of ${percent(matmul.error)}, of which ${percent(matmul.bias)} is bias and ${percent(matmul.scatter)} scatter.`,
    `Predicted rise of the loss: ${number(matmul.score, "loss units")}.`,
  ];
  if (known(matmul.single)) sentences.push(`Measured with this matmul alone in FP4: ${number(matmul.single, "loss units")}.`);
  if (known(matmul.saves)) sentences.push(`With everything in FP4 but this matmul the loss rises by ${number(matmul.saves, "loss units")} less than with everything.`);
  if (known(matmul.angle)) sentences.push(`With this matmul alone in FP4 the gradient of all parameters turns by ${number(matmul.angle, "degrees")}.`);
  if (known(matmul.angle_saved)) sentences.push(`With everything in FP4 but this matmul it turns by ${number(matmul.angle_saved, "degrees")} less than with everything.`);
  if (known(matmul.first)) {
    const error = known(matmul.first_error) ? ` ± ${number(matmul.first_error)}` : "";
    sentences.push(`Change of the loss to first order: ${number(matmul.first)}${error} loss units${error && " (mean and its standard error)"}.`);
  }
  if (known(matmul.rows)) sentences.push(`To second order, from the gradients of rows: ${number(matmul.rows, "loss units")}.`);
  if (known(matmul.samples)) sentences.push(`To second order, from the gradients of samples: ${number(matmul.samples, "loss units")}.`);
  if (known(matmul.diagonal)) sentences.push(`Sum of squared changes by single elements: ${number(matmul.diagonal, "squared loss units")}.`);
  return sentences.join(" ");
}

const operandWords = one => `${OPERANDS[one.name] ?? one.name}: ${counted(one.elements)} elements in all batches, SNR ${number(one.snr, "dB")}, ` +
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
  at("detail-weight").textContent = `Weight: ${sites[site].weight}, ${counted(sites[site].weight_elements)} elements.`;
  const parts = own.map(matmul => {
    const part = element("div"), list = element("ul");
    list.append(...matmul.operands.map(one => element("li", operandWords(one))));
    const heading = element("h3", `${MEANING[matmul.role]} `);
    heading.append(element("span", precision(matmul.place), { class: `tag ${precision(matmul.place).toLowerCase()}`, "data-place": matmul.place }));
    part.append(heading, element("p", matmulWords(matmul)), list);
    return part;
  });
  at("detail-words").replaceChildren(...parts);
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
  const parent = at("histograms");
  while (parent.children.length < 2 * matmul.operands.length) {
    const holder = element("div");
    holder.append(element("h3"), element("div"));
    parent.append(holder);
  }
  [...parent.children].forEach((holder, index) => { holder.hidden = index >= 2 * matmul.operands.length; });
  const draw = (index, heading, traces, x, y) => {
    const [head, plot] = parent.children[index].children;
    head.textContent = heading;
    Plotly.react(plot, traces, { ...layout(220, x, { ...title(y, 12), rangemode: "tozero" }), bargap: 0.15, hovermode: "x unified" }, CONFIG);
  };
  matmul.operands.forEach((one, index) => {
    const used = 1 + Math.max(11, ...[one.before, one.after].map(counts => counts.findLastIndex(share => share > 0)));
    const x = Array.from({ length: used }, (_, octave) => octave);
    const shares = counts => counts.slice(0, used).map(share => 100 * share);
    draw(2 * index, `${one.name}: magnitudes`, [
      { type: "bar", name: "before", x, y: shares(one.before), marker: { color: "#9aa5b1" }, hovertemplate: "%{y:.3g}%" },
      { name: "after", x, y: shares(one.after), mode: "lines", line: { shape: "hvh", color: COLOURS.paper, width: 2 }, hovertemplate: "%{y:.3g}%" },
    ], title("octaves below the largest", 12), "elements (%)");
    const labels = one.scales.map((_, exponent) => exponent ? String(exponent - 7) : "sub");
    draw(2 * index + 1, `${one.name}: block scales`, [
      { type: "bar", name: "blocks", x: labels, y: one.scales.map(share => 100 * share), marker: { color: COLOURS.solved }, hovertemplate: "%{y:.3g}%" },
    ], { ...title("exponent of the scale (power of 2)", 12), type: "category", tickangle: 0, tickfont: { size: 11 } }, "blocks (%)");
  });
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
  breakable(made);
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
buildComparison();
buildPrecisionMaps();
buildHeatMaps();
buildTable();
buildGraph();
show(data.chosen);
sort(COLUMNS.findIndex(column => column.title === "score"), true);
if (matmuls.length) detail(tableRows.indexOf(at("ranking").tBodies[0].rows[0]), false);
