"use strict";
// Text of the user's tables only ever goes through textContent or attributes, never through HTML.
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { patients, model } = data;
const CLASSES = ["reactive", "tumoral"];
const sigmoid = x => 1 / (1 + Math.exp(-x));
const classOf = p => p.label === null ? "u" : String(p.label);
const nameOf = label => label === null ? "unknown" : CLASSES[label];
const fixed = (x, digits = 2) => x === null || Number.isNaN(x) ? "–" : x.toFixed(digits).replace("-", "−");
const signed = (x, digits = 2) => (x > 0 ? "+" : "") + fixed(x, digits);
const score = x => x === null ? "–" : x < .005 ? "< 0.01" : x > .995 ? "> 0.99" : fixed(x);
const percent = x => `${(100 * x).toFixed(x < .1 ? 1 : 0)}\u00a0%`;

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "circle", "line", "text", "rect", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return node;
}

// --- one patient's images, read when first needed ----------------------------------------------

const read = new Map();
function imagesOf(index) {
  if (!read.has(index)) {
    const block = JSON.parse($(`p${index}`).textContent);
    const bytes = Uint8Array.from(atob(block.maps), c => c.charCodeAt(0));
    const values = new DataView(bytes.buffer);
    const area = model.grid * model.grid;
    block.cells = block.names.map((name, i) => ({
      name, patient: index, i, logit: block.logit[i], weight: block.weight[i], contribution: block.contribution[i],
      distance: block.distance && block.distance[i], unlike: block.unlike[i], mark: block.mark[i], rank: block.rank[i],
      map: Float32Array.from({ length: area }, (_, k) => values.getInt16(2 * (i * area + k), true) / 100),
    }));
    block.cells.sort((a, b) => a.rank - b.rank);
    if (read.size > 12) read.delete(read.keys().next().value);
    read.set(index, block);
  }
  return read.get(index);
}

// --- pictures: small ones side by side on sheets, some sheets per patient --------------------------

const sheets = new Map();
function sheetsOf(patient) {
  if (!sheets.has(patient)) {
    if (sheets.size > 12) sheets.delete(sheets.keys().next().value);
    sheets.set(patient, JSON.parse($(`s${patient}`).textContent).map(sheet => Object.assign(new Image(), { src: sheet ? "data:image/webp;base64," + sheet : "" })));
  }
  return sheets.get(patient);
}
function hasPicture({ patient, i }) { return !(data.pictures.missing[patient] ?? []).includes(i); }
function drawPicture(canvas, { patient, i }) {  // at once where its sheet has been decoded, so that nothing flickers
  const { side, columns, sheet: length } = data.pictures, sheet = sheetsOf(patient)[Math.floor(i / length)], at = i % length;
  const draw = () => { canvas.getContext("2d").drawImage(sheet, at % columns * side, Math.floor(at / columns) * side, side, side, 0, 0, side, side); canvas.dataset.drawn = "yes"; };
  canvas.width = canvas.height = side;
  if (sheet.naturalWidth) draw(); else sheet.addEventListener("load", draw);
}

// --- score maps -------------------------------------------------------------------------------

const LOW = [0, 96, 176], HIGH = [224, 106, 0];  // blue and orange: colour-blind readers can distinguish them
function mapColour(logit) {  // colour of a logit, and how much of it covers the cell
  const strength = Math.min(1, Math.abs(logit) / model.limit);
  return [...(logit < 0 ? LOW : HIGH), strength];
}
function drawMap(canvas, map, mode) {
  const n = model.grid, sides = mode === "smooth" ? 96 : n;
  canvas.width = canvas.height = sides;
  const context = canvas.getContext("2d"), pixels = context.createImageData(sides, sides);
  for (let y = 0; y < sides; y++) for (let x = 0; x < sides; x++) {
    const value = mode === "smooth" ? between(map, n, (x + .5) * n / sides - .5, (y + .5) * n / sides - .5) : map[y * n + x];
    const at = 4 * (y * sides + x);
    if (mode === "raw") pixels.data.set([...Array(3).fill(Math.round(255 * sigmoid(value))), 255], at);
    else { const [r, g, b, a] = mapColour(value); pixels.data.set([r, g, b, Math.round(150 * a)], at); }
  }
  context.putImageData(pixels, 0, 0);
  canvas.style.imageRendering = mode === "raw" ? "pixelated" : "auto";
}
function between(map, n, x, y) {  // smooth between the middles of the grid's fields
  const clamp = v => Math.max(0, Math.min(n - 1, v)), ease = t => t * t * (3 - 2 * t);
  x = clamp(x); y = clamp(y);
  const x0 = Math.floor(x), y0 = Math.floor(y), x1 = clamp(x0 + 1), y1 = clamp(y0 + 1);
  const u = ease(x - x0), v = ease(y - y0);
  return (map[y0 * n + x0] * (1 - u) + map[y0 * n + x1] * u) * (1 - v) + (map[y1 * n + x0] * (1 - u) + map[y1 * n + x1] * u) * v;
}
let mapMode = "off";  // remains so where the head has no maps
const MODES = { off: "Cells", smooth: "Score map", raw: "Raw grid" };
function modeSwitch(name, onchange) {
  return !model.maps ? null : el("fieldset", { id: name }, el("legend", {}, "Show"), el("div", { class: "seg" }, Object.entries(MODES).map(([mode, title]) =>
    el("label", {}, el("input", { type: "radio", name, value: mode, checked: mode === mapMode, onchange: () => { mapMode = mode; onchange(); } }), el("span", {}, title)))));
}
function legend() {
  const canvas = el("canvas", { width: 120, height: 1, "aria-hidden": "true" }), context = canvas.getContext("2d");
  const raw = mapMode === "raw";
  for (let x = 0; x < 120; x++) {
    const value = model.limit * (x / 59.5 - 1), grey = Math.round(255 * x / 119);
    const [r, g, b, a] = mapColour(value);
    context.fillStyle = raw ? `rgb(${grey},${grey},${grey})` : `rgba(${r},${g},${b},${a})`;
    context.fillRect(x, 0, 1, 1);
  }
  return el("span", { class: "legend" }, raw ? "score 0" : `logit −${model.limit}, reactive`, canvas, raw ? "1" : `+${model.limit}, tumoral`);
}
function picture(cell, mode = mapMode) {
  const named = `cell ${cell.name} of ${patients[cell.patient].id}, score ${fixed(sigmoid(cell.logit))}`;
  const box = el("span", { class: "pic" + (cell.mark > 0 ? " up" : cell.mark < 0 ? " down" : "") },
    hasPicture(cell) ? el("canvas", { class: "cell", role: "img", "aria-label": named }) : el("span", { class: "none" }, "no picture"));
  if (box.firstChild.tagName === "CANVAS") drawPicture(box.firstChild, cell);
  if (mode !== "off" && cell.map) { const canvas = el("canvas", { class: "map", "aria-hidden": "true" }); drawMap(canvas, cell.map, mode); box.append(canvas); }
  if (cell.mark) box.append(el("span", { class: "mark", title: cell.mark > 0 ? "among the highest" : "among the lowest" }, cell.mark > 0 ? "▲" : "▼"));
  return box;
}

// --- charts -----------------------------------------------------------------------------------

const W = 360, H = 240, L = 52, B = 36, T = 10, R = 10;
function frame({ x, y, yticks = ticks(y), xlabel, ylabel, logX = false, title }) {
  const f = logX ? Math.log10 : v => v;
  const sx = v => L + (W - L - R) * (f(v) - f(x[0])) / (f(x[1]) - f(x[0]) || 1);
  const sy = v => H - B - (H - B - T) * (v - y[0]) / (y[1] - y[0] || 1);
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  for (const v of yticks) svg.append(el("line", { class: "axis", x1: L, x2: W - R, y1: sy(v), y2: sy(v) }), el("text", { x: L - 6, y: sy(v) + 4, "text-anchor": "end" }, short(v)));
  for (const v of logX ? decades(x) : ticks(x)) svg.append(el("line", { class: "axis", x1: sx(v), x2: sx(v), y1: H - B, y2: H - B + 4 }), el("text", { x: sx(v), y: H - B + 16, "text-anchor": "middle" }, short(v)));
  svg.append(el("text", { x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle" }, xlabel), el("text", { transform: `translate(11 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, ylabel));
  return { svg, sx, sy };
}
const short = v => String(+v.toPrecision(3)).replace("-", "−");
function ticks([low, high]) {
  const raw = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw), found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return found;
}
function decades([low, high]) {
  const all = [1, 2, 5].flatMap(m => Array.from({ length: 12 }, (_, k) => m * 10 ** (k - 5))).sort((a, b) => a - b);
  const inside = all.filter(v => v >= low && v <= high), whole = inside.filter(v => Number.isInteger(Math.log10(v)));
  return inside.length > 6 && whole.length > 1 ? whole : inside;
}
const line = (points, sx, sy) => points.map(([x, y], i) => `${i ? "L" : "M"}${sx(x).toFixed(1)} ${sy(y).toFixed(1)}`).join("");
const chart = (title, svg, caption) => el("figure", { class: "card" }, el("h3", {}, title), svg, el("figcaption", {}, caption));
function dot(x, y, kind, open) {
  const shape = kind === "1" ? el("path", { d: `M${x} ${y - 5}L${x + 4.8} ${y + 3.6}L${x - 4.8} ${y + 3.6}Z` }) : el("circle", { cx: x, cy: y, r: 4 });
  shape.setAttribute("class", `dot f${kind}`);
  if (open) { shape.setAttribute("role", "link"); shape.addEventListener("click", () => { location.hash = `patient=${open.index}`; }); shape.append(el("title", {}, `${open.id}: ${nameOf(open.label)}, ${fixed(open.p)}`)); }
  return shape;
}
function scatter(title, valueOf, xlabel, note) {
  const known = patients.filter(p => typeof valueOf(p) === "number" && Number.isFinite(valueOf(p)));
  if (known.length < 2) return null;
  const values = known.map(valueOf), low = Math.min(...values), high = Math.max(...values);
  const logX = low > 0 && high / low > 20, pad = logX ? 1 : (high - low || 1) * .04;
  const { svg, sx, sy } = frame({ x: logX ? [low / 1.15, high * 1.15] : [low - pad, high + pad], y: [0, 1], logX, xlabel, ylabel: "probability", title });
  svg.append(el("line", { class: "guide", x1: L, x2: W - R, y1: sy(model.threshold), y2: sy(model.threshold) }));
  for (const p of known) svg.append(dot(sx(valueOf(p)), sy(p.p), classOf(p), p));
  return chart(title, svg, note);
}

// --- cohort -----------------------------------------------------------------------------------

function byLabel() {
  const rows = ["1", "0", "u"].filter(kind => patients.some(p => classOf(p) === kind)), title = "Probability by label";
  const { svg, sx, sy } = frame({ x: [0, 1], y: [0, rows.length], yticks: [], xlabel: "probability", ylabel: "", title });
  svg.append(el("line", { class: "guide", x1: sx(model.threshold), x2: sx(model.threshold), y1: T, y2: H - B }));
  rows.forEach((kind, row) => {
    const stacked = {}, middle = rows.length - row - .5;
    svg.append(el("text", { x: L - 6, y: sy(middle) + 4, "text-anchor": "end" }, kind === "u" ? "unknown" : CLASSES[+kind]));
    for (const p of patients.filter(q => classOf(q) === kind)) {
      const column = Math.round(p.p * 40), n = stacked[column] = (stacked[column] ?? -1) + 1;
      const limit = .42, step = Math.min(.16, limit / (patients.length / rows.length / 6));
      svg.append(dot(sx(p.p), sy(middle + Math.max(-limit, Math.min(limit, (n % 2 ? 1 : -1) * Math.ceil(n / 2) * step))), kind, p));
    }
  });
  return chart(title, svg, "One mark per patient; the dotted line is the threshold. Click a mark to open its patient.");
}
const ROLE = { train: "trained on", validation: "validation", new: "new" };
const verdict = p => p.error === null ? "" : p.error ? "error" : "right";
const DIGITS = Object.fromEntries(data.attributes.map(name => {
  const values = patients.map(p => p.attributes[name]).filter(v => typeof v === "number");
  return [name, values.every(Number.isInteger) ? 0 : Math.max(...values.map(Math.abs)) < 20 ? 2 : 1];
}));
const COLUMNS = [
  ["id", "Patient", p => p.index, p => el("a", { href: `#patient=${p.index}` }, p.id)],
  ["label", "Label", p => p.label ?? -1, p => el("span", { class: `chip c${classOf(p)}` }, nameOf(p.label)), "text"],
  ["p", "Probability", p => p.p, p => el("span", {}, fixed(p.p), el("span", { class: "gauge", "aria-hidden": "true" }, el("i", { style: `width:${100 * p.p}%` }), el("b", { style: `left:${100 * model.threshold}%` })))],
  ["margin", "p − threshold", p => p.p - model.threshold, p => signed(p.p - model.threshold)],
  ["called", "Called", p => p.called, p => CLASSES[p.called], "text"],
  ["error", "Verdict", p => p.error ? 2 : p.error === null ? 0 : 1, p => el("span", { class: p.error ? "verdict-error" : "" }, p.error === null ? "–" : p.error ? "✗ error" : "✓ correct"), "text"],
  ["n", "Images", p => p.n, p => String(p.n)],
  ["role", "Role", p => p.role, p => ROLE[p.role], "text"],
  ...data.attributes.map(name => [`a-${name}`, name, p => p.attributes[name], p => { const v = p.attributes[name]; return v === null ? "–" : typeof v === "number" ? v.toFixed(DIGITS[name]) : v; }]),
];
let sorting = { key: "error", down: true };
function sorted(rows) {
  const column = COLUMNS.find(c => c[0] === sorting.key), way = sorting.down ? -1 : 1;
  const wrong = p => Math.abs(p.p - (p.label ?? p.p));  // errors first, the worst of them at the top
  return [...rows].sort((a, b) => {
    const x = column[2](a), y = column[2](b);
    if ((x === null) !== (y === null)) return x === null ? 1 : -1;  // missing values last, either way
    return (x < y ? -way : x > y ? way : 0) || wrong(b) - wrong(a) || a.index - b.index;
  });
}
function shown() {
  const find = $("find").value.trim().toLowerCase(), label = $("by-label").value, called = $("by-called").value, role = $("by-role").value;
  return patients.filter(p =>
    (!label || classOf(p) === label) && (!role || p.role === role) &&
    (!called || (called === "error" || called === "right" ? verdict(p) === called : String(p.called) === called)) &&
    (!find || [p.id, ...Object.values(p.attributes)].some(v => v !== null && String(v).toLowerCase().includes(find))));
}
function fillTable() {
  const rows = sorted(shown());
  $("count").textContent = `${rows.length} of ${patients.length} patients`;
  $("patients").tHead.replaceChildren(el("tr", {}, COLUMNS.map(([key, title, , , kind]) => el("th", { scope: "col", class: kind, "aria-sort": sorting.key === key ? (sorting.down ? "descending" : "ascending") : null },
    el("button", { type: "button", "data-key": key, onclick: () => { sorting = { key, down: sorting.key === key ? !sorting.down : key !== "id" }; fillTable(); $("patients").querySelector(`[data-key="${CSS.escape(key)}"]`).focus(); } }, title)))));
  $("patients").tBodies[0].replaceChildren(...rows.map(p => el("tr", { class: p.error ? "error" : null, "data-id": p.id, onclick: event => { if (event.target.tagName !== "A") location.hash = `patient=${p.index}`; } },
    COLUMNS.map(([, , , show, kind]) => el("td", { class: kind }, show(p))))));
}
function showGroups() {
  if (!data.groups.length) return;
  const columns = [["auc", "AUC"], ["ba", "Balanced accuracy"], ["sensitivity", "Sensitivity"], ["specificity", "Specificity"], ["brier", "Brier score"]];
  const names = { train: "trained on (how well the model fits, not how well it predicts)", validation: "validation", new: "new to the model" };
  $("groups").append(el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Labelled patients"), el("th", { scope: "col" }, "Patients"), columns.map(c => el("th", { scope: "col" }, c[1])))),
    el("tbody", {}, data.groups.map(([name, m]) => el("tr", {}, el("td", {}, names[name]), el("td", {}, String(m.patients)), columns.map(([key]) => el("td", {}, fixed(m[key] ?? null)))))))));
}
const STYLE = { train: "su", validation: "s0", new: "s1" };
function showCharts() {
  const charts = [];
  if (data.roc.length) {
    const { svg, sx, sy } = frame({ x: [0, 1], y: [0, 1], xlabel: "1 − specificity", ylabel: "sensitivity", title: "ROC curves" });
    svg.append(el("path", { class: "guide", d: line([[0, 0], [1, 1]], sx, sy) }));
    data.roc.forEach(([name, points, auc], i) => svg.append(el("path", { class: `line ${STYLE[name]}`, d: line(points, sx, sy), "stroke-dasharray": name === "train" ? "5 3" : null }),
      el("text", { x: sx(.98), y: sy(.06 + .09 * (data.roc.length - 1 - i)), "text-anchor": "end" }, `${name === "train" ? "┄" : "—"} ${ROLE[name]}: AUC ${fixed(auc)}`)));
    charts.push(chart("ROC", svg, "One curve per group. The curve of training patients shows only how well the model fits."));
  }
  if (data.calibration) {
    const { svg, sx, sy } = frame({ x: [0, 1], y: [0, 1], xlabel: "mean probability", ylabel: "share tumoral", title: "Calibration" });
    svg.append(el("path", { class: "guide", d: line([[0, 0], [1, 1]], sx, sy) }));
    for (const [x, share, n, low, high] of data.calibration.rows) svg.append(el("line", { class: "su", x1: sx(x), x2: sx(x), y1: sy(low), y2: sy(high) }), el("circle", { class: "dot fu", cx: sx(x), cy: sy(share), r: 3 + Math.sqrt(n) / 2 }, el("title", {}, `${n} patients`)));
    charts.push(chart("Calibration", svg, `${data.calibration.patients} patients (${data.calibration.role}) in groups of equal size, with 95 % intervals. On the dotted line probabilities are perfectly calibrated.`));
  }
  const key = "▲ tumoral, ● reactive or (grey) unknown. ";
  charts.push(scatter("Score against bag size", p => p.n, "images of the patient", key + "A slope within a class is a shortcut."));
  for (const name of [...data.scatter].sort((a, b) => /lymph/i.test(b) - /lymph/i.test(a))) charts.push(scatter(`Score against ${name}`, p => p.attributes[name], name, key + (model.uses.includes(name) ? "The model reads this attribute." : "The model does not use this attribute.")));
  charts.splice(2, 0, byLabel());
  $("charts").append(...charts.filter(Boolean));
}
function showExtremes() {
  for (const { label, ends } of data.extremes) for (const [end, cells] of ends) $("extremes").append(el("div", { class: "card", "data-strip": `${label}-${end}` },
    el("h3", {}, el("span", { class: `chip c${label}` }, `${CLASSES[label]} patients: ${end}-scored cells`)),
    el("div", { class: "strip" }, cells.map(([patient, i, name, logit]) => el("button", { type: "button", class: "tile", onclick: () => openCell(patient, name) },
      picture({ patient, i, name, logit, mark: 0 }, "off"), el("span", { class: "t" }, el("b", {}, score(sigmoid(logit))), el("span", { class: "who" }, patients[patient].id)))))));
}

// --- one patient ------------------------------------------------------------------------------

const CELL_ORDERS = { score: (a, b) => a.rank - b.rank, [model.weight]: (a, b) => b.weight - a.weight || a.rank - b.rank, contribution: (a, b) => Math.abs(b.contribution) - Math.abs(a.contribution) || a.rank - b.rank, "file name": (a, b) => a.i - b.i };
if (model.distances) CELL_ORDERS["distance from the average cell"] = (a, b) => b.distance - a.distance || a.rank - b.rank;
let cellOrder = "score";
function showPatient(index) {
  const p = patients[index], block = imagesOf(index), view = $("view-patient");
  const order = sorted(shown()).map(q => q.index), at = order.indexOf(index);
  const go = step => order[at + step] === undefined || at < 0 ? null : `#patient=${order[at + step]}`;
  const pager = (title, to) => el("button", { type: "button", disabled: !to, onclick: () => { location.hash = to; } }, title);
  const plate = el("div", { class: "plate", id: "plate" }), scale = el("span");
  const draw = () => { scale.replaceChildren(...(mapMode === "off" ? [] : [legend()])); plate.replaceChildren(...[...block.cells].sort(CELL_ORDERS[cellOrder]).map(tile)); };
  view.replaceChildren(...[
    el("div", { class: `patient-head c${classOf(p)}` }, el("h1", {}, p.id), el("span", { class: `chip c${classOf(p)}` }, p.label === null ? "label unknown" : `label: ${nameOf(p.label)}`),
      el("span", { class: p.error ? "verdict-error" : "" }, `called ${CLASSES[p.called]}${p.error === null ? "" : p.error ? " ✗ error" : " ✓ correct"}`),
      el("div", { class: "pager" }, pager("← Previous", go(-1)), pager("Next →", go(1)), pager("All patients", "#cohort"))),
    el("div", { class: "panels" }, decisionPanel(p), contributionsPanel(p, block), distributionPanel(p, block)),
    partsPanel(p), findingsPanel(p, block), attentive(p, block), differences(p, block),
    el("h2", {}, `Plate: ${p.n} cells`),
    el("div", { class: "controls" }, modeSwitch("plate-mode", draw),
      el("label", {}, "ordered by", el("select", { id: "order", onchange: event => { cellOrder = event.target.value; draw(); } }, Object.keys(CELL_ORDERS).map(name => el("option", { selected: name === cellOrder }, name)))), scale),
    el("p", { class: "note" }, model.marks), plate,
  ].flat().filter(Boolean));
  draw();
}
const most = cells => Math.max(...cells.map(c => c.weight), 1e-9);
function tile(cell, _, all) {
  const heaviest = most(all);
  return el("button", { type: "button", class: "tile", "data-name": cell.name, onclick: () => openCell(cell.patient, cell.name) }, picture(cell),
    el("span", { class: "weight", "aria-hidden": "true" }, el("i", { style: `width:${100 * cell.weight / heaviest}%` })),
    el("span", { class: "t" }, el("b", {}, score(sigmoid(cell.logit))), el("span", {}, percent(cell.weight))));
}
function decisionPanel(p) {
  const drop = p.without === null ? "only one image" : `${score(p.p_explained)} → ${score(p.without)}`;
  const rows = [...(p.calibrated === null || Math.abs(p.calibrated - p.p) < 1e-5 ? [] : [["Calibrated", score(p.calibrated)]]), ...(p.spread === null ? [] : [["Members differ by", `± ${fixed(p.spread)}`]]), ["Role", ROLE[p.role]], ["Images", String(p.n)], ["Without its highest-scored cell", drop], ...p.alone, ...(model.uses.length ? [] : [["Clinical attributes", "not used by this model"]]), ...data.attributes.map(name => [name, p.attributes[name] === null ? "missing" : typeof p.attributes[name] === "number" ? p.attributes[name].toFixed(DIGITS[name]) : p.attributes[name]])];
  return el("div", { class: "card" }, el("h3", {}, "Probability of tumoral"), el("div", { class: "big" }, score(p.p)),
    el("div", { class: "scale", role: "img", "aria-label": `probability ${fixed(p.p)}, threshold ${fixed(model.threshold)}` }, el("span", { class: "at", style: `left:${100 * p.p}%` }), el("span", { class: "cut", style: `left:${100 * model.threshold}%` }, `threshold ${fixed(model.threshold)}`)),
    el("dl", {}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}
function contributionsPanel(p, block) {
  const top = [...block.cells].sort(CELL_ORDERS.contribution).filter(c => c.contribution !== 0).slice(0, 8), inTop = new Set(top);
  const others = block.cells.filter(c => !inTop.has(c)), sum = others.reduce((s, c) => s + c.contribution, 0);
  const rows = top.map(c => [el("button", { type: "button", onclick: () => openCell(c.patient, c.name) }, `cell ${c.rank}`), c.contribution]);
  if (others.length) rows.push([`${others.length} other cell${others.length > 1 ? "s" : ""}`, sum]);
  if (model.uses.length) rows.push(["clinical attributes", p.parts.slice(1).reduce((s, part) => s + part[1], 0)]);
  if (Math.abs(p.rest) > 1e-4) rows.push([model.rest, p.rest]);
  return el("div", { class: "card" }, el("h3", {}, "How the result is computed"), sumTable(rows, resultOf(p)), el("p", { class: "note" }, model.contributions));
}
function resultOf(p) {  // what a sum makes, with so many digits
  if (model.end) return digits => `${model.additive} ${fixed(p.total, digits)} (${model.end}: ${fixed(p.p_explained, digits)})`;
  return digits => model.additive === "logit" ? `logit ${fixed(p.total)} → probability ${fixed(p.p_explained, digits)}` : `probability ${fixed(p.total, digits)}`;
}
function partsPanel(p) {  // what images and attributes speak for, in words and as bars
  if (!p.parts.length) return null;
  const notes = p.notes ? [el("p", {}, `Note: ${p.notes}.`)] : [];
  return el("div", { class: "card findings", id: "parts" }, el("div", {}, el("h3", {}, "What speaks for and against"), p.speaks.map(told => el("p", {}, told)), notes,
    el("p", { class: "note" }, "Parts of the calibrated logit: above 0 they speak for tumoral, below 0 for reactive. +0.7 doubles the odds of tumoral, −0.7 halves them.")),
    sumTable([...p.parts, [model.rest, p.rest]], resultOf(p)));
}
function sumTable(rows, end) {  // rows of a name and a signed value, with bars, and what they add up to
  const scale = Math.max(...rows.map(r => Math.abs(r[1])), 1e-9), digits = scale < .002 ? 5 : scale < .1 ? 4 : 2;
  const bar = value => el("td", { class: "bar", "aria-hidden": "true" }, el("div", {}, el("i", { style: `background:var(--${value < 0 ? "reactive" : "tumoral"});${value < 0 ? "right" : "left"}:50%;width:${50 * Math.abs(value) / scale}%` })));
  return el("table", { class: "contributions" }, el("tbody", {}, rows.map(([name, value]) => el("tr", {}, el("td", {}, name), bar(value), el("td", {}, signed(value, digits)))),
    el("tr", { class: "sum" }, el("td", {}, "sum"), el("td", { colspan: 2 }, end(digits)))));
}
function findingsPanel(p, block) {
  if (!block.findings.length) return null;
  const rows = [["the average training patient", model.intercept], ...block.findings.map(([about, value]) => [about, value])];
  return el("div", { class: "card findings" }, el("div", {}, el("h3", {}, "What the head found"), el("p", { class: "note" }, model.found), block.findings.map(([, , told]) => el("p", {}, told))),
    sumTable(rows, () => `logit ${fixed(p.found)}${model.final || model.end ? " of the head" : ""}`));
}
function strip(title, cells, caption, wide = false) {
  return el("div", { class: "card", "data-strip": title }, el("h3", {}, title), el("div", { class: wide ? "strip wide" : "strip" }, cells.map(cell =>
    el("button", { type: "button", class: "tile", onclick: () => openCell(cell.patient, cell.name) }, picture(cell, "off"), el("span", { class: "t" }, el("b", {}, caption(cell)), el("span", { class: "who" }, `cell ${cell.rank}`))))));
}
function attentive(p, block) {  // the cells that attention weighs most
  if (!model.attention || p.n < 2) return null;
  const cells = [...block.cells].sort(CELL_ORDERS[model.weight]).slice(0, data.strip), told = cells.reduce((sum, cell) => sum + cell.weight, 0);
  return [el("h2", {}, "Attention"), el("p", { class: "note" }, model.attention),
    strip(`Cells with the highest attention: together ${percent(told)}`, cells, cell => percent(cell.weight), true)];
}
function differences(p, block) {  // the cells farthest from the patient's average cell, and the nearest
  const n = Math.min(data.strip, Math.floor(p.n / 2));
  if (!model.distances || n < 2) return null;
  const cells = [...block.cells].sort((a, b) => b.distance - a.distance || a.rank - b.rank);
  const far = cell => `${fixed(cell.distance, 1)}\u00a0×`;
  return [el("h2", {}, "How the cells differ"), el("p", { class: "note" }, model.differing),
    el("div", { class: "extremes" }, strip("Most different cells", cells.slice(0, n), far), strip("Most typical cells", cells.slice(-n).reverse(), far))];
}
function distributionPanel(p, block) {
  const { edges, weight, instances } = data.distribution, counts = block.counts, total = counts.reduce((a, b) => a + b, 0);
  const high = Math.max(...counts) / total * 1.08, title = weight ? "Normalised logits and their weights" : "Logits";
  const { svg, sx, sy } = frame({ x: [edges[0], edges[edges.length - 1]], y: [0, high], xlabel: weight ? "normalised logit" : "logit", ylabel: `share of ${instances}`, title });
  counts.forEach((n, i) => svg.append(el("rect", { class: "f0", opacity: .75, x: sx(edges[i]) + .5, width: Math.max(.5, sx(edges[i + 1]) - sx(edges[i]) - 1), y: sy(n / total), height: sy(0) - sy(n / total) })));
  if (weight) svg.append(el("path", { class: "line s1", d: line(weight.map((w, i) => [(edges[i] + edges[i + 1]) / 2, w * high / 1.08]), sx, sy) }), el("text", { x: W - R, y: sy(high / 1.08) - 3, "text-anchor": "end" }, "weight 1"));
  return el("div", { class: "card" }, el("h3", {}, title), svg, el("p", { class: "note" }, weight ? `Bars: this patient's ${instances}. Curve: the weight the model gives a logit (0 to 1), before division by the patient's sum of weights.` : `Bars: the logits of this patient's ${instances}; values above 0 are evidence for tumoral.`));
}

// --- one cell ---------------------------------------------------------------------------------

function openCell(patient, name) {
  const cells = imagesOf(patient).cells, at = cells.findIndex(c => c.name === name), cell = cells[at], dialog = $("cell");
  const side = el("div"), put = () => side.replaceChildren(picture(cell), mapMode === "off" ? "" : legend());
  const step = (title, to) => el("button", { type: "button", disabled: !cells[to], onclick: () => { openCell(patient, cells[to].name); } }, title);
  put();
  const rows = [["Score (probability)", fixed(sigmoid(cell.logit), 3)], ["Logit", fixed(cell.logit, 3)], ["Rank within the patient", `${cell.rank} of ${cells.length}`], [model.attention ? "Attention" : "Weight in the decision", percent(cell.weight)], [`Contribution to the patient's ${model.additive}`, signed(cell.contribution, 3)], ["Used", cell.mark > 0 ? "among the highest" : cell.mark < 0 ? "among the lowest" : model.unmarked]];
  if (model.distances) rows.push(["Distance from the patient's average cell", `${fixed(cell.distance)} × the mean`]);
  if (cell.unlike) rows.push(["Unlike the training cells", cell.unlike]);
  const n = model.grid, grid = el("table", { class: "grid", "aria-label": "score of each field of the map" }, el("tbody", {}, Array.from({ length: n }, (_, y) => el("tr", {}, Array.from({ length: n }, (_, x) => {
    const score = sigmoid(cell.map[y * n + x]), grey = Math.round(255 * score);
    return el("td", { style: `background:rgb(${grey},${grey},${grey});color:${grey > 130 ? "#000" : "#fff"}` }, n > 8 ? "" : score.toFixed(2));
  })))));
  dialog.replaceChildren(el("header", {}, el("h2", { id: "cell-title" }, `${patients[patient].id} · ${cell.name}`), step("←", at - 1), step("→", at + 1), el("button", { type: "button", onclick: () => dialog.close() }, "Close")),
    el("div", { class: "two" }, el("div", {}, side, el("p", {}, modeSwitch("cell-mode", put))), el("div", {}, el("dl", {}, rows.map(([a, b]) => [el("dt", {}, a), el("dd", {}, b)])),
      model.maps ? [el("h3", { style: "margin-top:16px" }, `Raw ${n} × ${n} scores`), grid, el("p", { class: "note" }, "White is 1, black is 0. A field's score depends on pixels far beyond its borders: the map shows roughly where the model looks, never which organelle.")] : null,
      el("a", { href: `#patient=${patient}`, onclick: () => dialog.close() }, `All cells of ${patients[patient].id}`))));
  if (!dialog.open) dialog.showModal();
}
$("cell").addEventListener("close", () => { if (location.hash.startsWith("#patient=")) route(); });
$("cell").addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT") return;
  const way = { ArrowLeft: 0, ArrowRight: 1 }[event.key];
  if (way !== undefined) $("cell").querySelectorAll("header button")[way].click();
});

// --- faithfulness -----------------------------------------------------------------------------

function showTrust() {
  const d = data.deletion;
  if (d) {
    const { svg, sx, sy } = frame({ x: [0, d.k[d.k.length - 1]], y: [0, Math.max(...d.highest, ...d.random_high) * 1.08], xlabel: "images deleted", ylabel: "mean change in probability", title: "Deletion" });
    const zero = values => [[0, 0], ...values.map((v, i) => [d.k[i], v])];
    svg.append(el("path", { class: "band", d: line([...zero(d.random_low), ...zero(d.random_high).reverse()], sx, sy) + "Z" }), el("path", { class: "line su", "stroke-dasharray": "5 3", d: line(zero(d.random), sx, sy) }), el("path", { class: "line s1", d: line(zero(d.highest), sx, sy) }));
    const last = d.k.length - 1;
    svg.append(el("text", { x: sx(d.k[last]), y: sy(d.highest[last]) - 6, "text-anchor": "end" }, "— highest-scored"), el("text", { x: sx(d.k[last]), y: sy(d.random[last]) + 18, "text-anchor": "end" }, "┄ random"));
    $("trust").append(chart("Deleting cells", svg, d.told));
  }
  for (const [title, value, told] of data.truth) $("trust").append(el("div", { class: "card" }, el("h3", {}, title), el("div", { class: "big" }, value), el("p", { class: "note" }, told)));
}

function showSubgroups() {  // a table whose cells draw the figure with its interval, from 0 to 1
  const found = data.subgroups;
  if (!found) return;
  const figures = Object.entries(found.figures), all = found.rows[0];
  const cell = (row, name) => {
    const value = row[name], low = row[`${name}_low`], high = row[`${name}_high`];
    if (value === null) return el("td", { class: "forest", title: "too few patients" }, "–");
    return el("td", { class: "forest" }, el("span", { class: "line", "aria-hidden": "true" }, el("s", { style: `left:${100 * (all[name] ?? value)}%` }), el("i", { style: `left:${100 * low}%;width:${100 * (high - low)}%` }), el("b", { style: `left:${100 * value}%` })), `${fixed(value)} (${fixed(low)}–${fixed(high)})`);
  };
  $("subgroups").append(el("h2", { id: "subgroups-title" }, "Results by subgroup"), ...found.told.map(told => el("p", { class: "note" }, told)),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": "subgroups-title" }, el("table", {}, el("thead", {}, el("tr", {}, ["Patients", "", "Reactive", "Tumoral", ...figures.map(f => f[1])].map((title, i) => el("th", { scope: "col", class: i < 2 ? "text" : i > 3 ? "forest" : null }, title)))),
      el("tbody", {}, found.rows.map((row, i) => el("tr", {}, el("td", {}, row.by === found.rows[i - 1]?.by ? "" : row.by), el("td", { class: "text" }, row.group), el("td", {}, String(row.reactive)), el("td", {}, String(row.tumoral)), figures.map(([name]) => cell(row, name))))))),
    el("p", { class: "note" }, "Dots are figures, bars their intervals, on a scale from 0 to 1; the dotted line is the figure of all patients."));
}

// --- navigation -----------------------------------------------------------------------------

let lastPatient = null;
function route() {
  const [view, value] = (location.hash.slice(1) || "cohort").split("=");
  const known = ["cohort", "patient", "trust", "about"].includes(view) ? view : "cohort";
  for (const name of ["cohort", "patient", "trust", "about"]) $(`view-${name}`).hidden = name !== known;
  for (const link of document.querySelectorAll(".top nav a")) { if (link.dataset.view === known) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current"); }
  if (known === "patient") {
    const index = value === undefined ? lastPatient ?? sorted(patients)[0].index : +value;
    if (patients[index]) { lastPatient = index; showPatient(index); }
  }
  document.title = `${known === "patient" && lastPatient !== null ? patients[lastPatient].id : known} · ${data.title} · lymphfeat`;
}
function flipTheme() {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}
patients.forEach((p, index) => { p.index = index; });
for (const id of ["find", "by-label", "by-called", "by-role"]) $(id).addEventListener("input", fillTable);
$("theme").addEventListener("click", flipTheme);
addEventListener("hashchange", () => { route(); scrollTo(0, 0); $("main").focus({ preventScroll: true }); });
showGroups(); fillTable(); showCharts(); showExtremes(); showTrust(); showSubgroups(); route();
document.documentElement.dataset.ready = "yes";
