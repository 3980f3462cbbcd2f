// The page: what the runs are, a panel for each metric, and what else their folders hold.

// What of a run's name is its own: 10-00-00_gpt2_math_16384 and 10-00-00_gpt2_flash_16384 are math and flash.
function label(run) {
  const words = DATA.runs.map((other) => other.name.split("_"));
  const own = run.name.split("_").filter((word) => !words.every((other) => other.includes(word)));
  const short = own.join(" ");
  return DATA.runs.length > 1 && short ? short : run.name;
}

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs.map((run, i) => ({ ...run, i, colour: () => runColour(i), shown: true, label: label(run) }));
const METRICS = new Map(DATA.metrics.map((metric) => [metric.name, metric]));
const one = RUNS.length === 1;
const hasTime = RUNS.every((run) => run.clock.time.every((time) => time !== null));
const state = { x: "tokens", smooth: 0, logX: false, logY: false, marks: true, zoom: null, query: "" };
const panels = [];
const main = document.getElementById("main");

const last = (values) => values.findLast((value) => value !== null);
const value = (run, name) => (run.metrics[name] ? last(run.metrics[name].value) : undefined);
const date = (seconds) => (seconds ? new Date(1000 * seconds).toISOString().slice(0, 19).replace("T", " ") + " UTC" : "–");
const WRITTEN = { mfu: "MFU", palm: "(PaLM)", tflops: "TFLOP/s", gib: "size" };
const title = (metric) => metric.name.slice(metric.section.length + 1).split("_").filter((word, i) => !i || !["gib", "ms", "seconds"].includes(word)).map((word) => WRITTEN[word] || word).join(" ");
const secondsOf = (run) => run.facts.duration_seconds ?? last(run.clock.time);

// What the registry writes in Markdown: `code` is all there is of it.
function markdown(text) {
  return text.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part));
}

function section(name, note, ...children) {
  const node = make("section", {}, name && make("h2", {}, name, note ? make("small", {}, note) : null), ...children);
  main.append(node);
  return node;
}

function statusOf(run) {
  const status = run.facts.status || "unknown";
  return make("span", { className: `status ${status}` }, status);
}

// ---- the summary

function tile(label, text, unit = "") {
  return make("div", { className: "tile" }, make("span", {}, label), make("strong", {}, text), unit ? make("em", {}, unit) : null);
}

function summary() {
  const headlines = DATA.metrics.filter((metric) => metric.headline && RUNS.some((run) => value(run, metric.name) !== undefined));
  if (one) {
    const [run] = RUNS;
    const restarts = run.facts.restarts;
    const tiles = [
      tile("status", statusOf(run), restarts ? `${restarts} restart${restarts > 1 ? "s" : ""}` : ""),
      tile("steps", (last(run.clock.step) ?? 0).toLocaleString("en"), `of ${Number(run.config.max_steps ?? 0) || "?"}`.replace("of ?", "")),
      tile("tokens", short(last(run.clock.tokens) ?? 0)),
      tile("time", duration(secondsOf(run))),
      ...headlines.map((metric) => tile(metric.headline, format(value(run, metric.name), metric.form))),
    ];
    section("", "", make("div", { className: "tiles" }, ...tiles));
  } else {
    const head = make("tr", {}, make("th", {}, "run"), make("th", {}, "status"), ...["tokens", "time", ...headlines.map((m) => m.headline)].map((text) => make("th", { className: "number" }, text)));
    const rows = RUNS.map((run) => {
      const box = make("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => { run.shown = box.checked; drawAll(); });
      const swatch = make("i", { className: "swatch" });
      swatch.style.background = `var(--c${run.i % 10})`;
      const cells = [short(last(run.clock.tokens) ?? 0), duration(secondsOf(run)), ...headlines.map((m) => format(value(run, m.name), m.form))];
      return make("tr", {}, make("th", { className: "run" }, make("label", { title: run.name }, box, swatch, run.label)), make("td", {}, statusOf(run)), ...cells.map((text) => make("td", { className: "number" }, text)));
    });
    section("Runs", "last values", make("div", { className: "box" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
  }
  const notes = [];
  if (RUNS.some((run) => run.is_thinned)) notes.push("Long series are thinned to what a screen shows; the smallest and the largest value of every stretch are kept. metrics.jsonl has all.");
  if (!hasTime) notes.push("A record here is of an older version, which noted no time of day: the axis of time is off.");
  const unreadable = RUNS.reduce((sum, run) => sum + run.unreadable, 0);
  if (unreadable) notes.push(`${unreadable} line${unreadable > 1 ? "s" : ""} of metrics.jsonl could not be read and ${unreadable > 1 ? "are" : "is"} not shown.`);
  if (notes.length) main.append(make("p", { className: "note" }, notes.join(" ")));
}

// ---- panels

class Panel {
  // lines(): what is drawn. words: what the search finds it by.
  constructor(grid, { name, unit, better, meaning, form, x, lines, many, words }) {
    Object.assign(this, { form, x, lines, many, words: `${words} ${name}`.toLowerCase() });
    this.readout = make("div", { className: "readout" });
    this.chart = make("div", { className: "chart" });
    const arrow = { lower: "lower is better", higher: "higher is better" }[better] || "";
    const heading = make("h3", { title: meaning.replaceAll("`", "") }, name, unit ? make("small", {}, unit) : null, make("small", {}, arrow));
    this.node = make("div", { className: "panel" }, heading, this.readout, this.chart);
    grid.append(this.node);
    panels.push(this);
    watcher.observe(this.node);
  }

  draw() {
    this.drawn?.destroy();
    this.stale = false;
    const own = this.x === "positions";
    this.drawn = new Chart(this.chart, this.lines(), {
      x: this.x || state.x, form: this.form, logX: !own && state.logX, logY: state.logY, zoom: own ? null : state.zoom || everything(),
      readout: this.readout, many: this.many, onZoom: own ? undefined : zoom, marks: own || !state.marks ? undefined : drawMarks,
    });
    this.node.dataset.drawn = String(this.drawn.lines.length);
  }
}

// Panels are drawn when they come into sight: a page of many runs opens at once.
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const panel = panels.find((other) => other.node === entry.target);
    panel.visible = entry.isIntersecting;
    if (panel.visible && (panel.stale ?? true)) panel.draw();
  }
}, { rootMargin: "300px" });
const resizer = new ResizeObserver(() => { for (const panel of panels) panel.drawn?.resize?.(panel.chart.clientWidth); });

function drawAll() {
  for (const panel of panels) {
    panel.stale = true;
    if (panel.visible) panel.draw();
  }
}

// All panels begin and end where the runs do, so that what is above each other happened together.
function everything() {
  const xs = RUNS.filter((run) => run.shown).flatMap((run) => run.clock[state.x]).filter((x) => x !== null && (!state.logX || x > 0));
  const [low, high] = xs.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
  return low < high ? [low, high] : null;
}

function zoom(range) {
  state.zoom = range;
  const to = range || everything();
  if (!to) return;
  document.getElementById("reset").hidden = !range;
  for (const panel of panels) {
    if (panel.x === "positions") continue;
    if (panel.visible && !panel.stale) panel.drawn.zoom(to);
    else panel.stale = true;
  }
}

function linesOf(run, name, colour, label) {
  const columns = run.metrics[name];
  const line = { label, short: label, colour, x: columns[state.x], y: columns.value };
  return state.smooth ? [{ ...line, faint: true }, { ...line, y: smoothed(line.y, columns.step, state.smooth) }] : [line];
}

const shown = (name) => RUNS.filter((run) => run.shown && run.metrics[name]);

function metricPanel(grid, metric) {
  new Panel(grid, {
    name: title(metric), unit: metric.unit, better: metric.better, meaning: `${metric.name}: ${metric.meaning}`, form: metric.form,
    many: !one, words: `${metric.name} ${metric.unit}`,
    lines: () => shown(metric.name).flatMap((run) => linesOf(run, metric.name, run.colour, run.label)),
  });
}

// A number for each range of tokens: as it is now, a line a run; and how it became so, a panel a run.
function rangePanels(grid, of, names) {
  const metric = METRICS.get(names[0]);
  const what = of.split("/").pop().replaceAll("_", " ");
  const about = { unit: metric.unit, better: metric.better, form: metric.form, words: `position long context ${names.join(" ")}` };
  new Panel(grid, {
    ...about, name: `${what} by position`, meaning: `At the last evaluation: ${metric.meaning}`, x: "positions", many: !one,
    lines: () => RUNS.filter((run) => run.shown).map((run) => {
      const own = names.filter((name) => run.metrics[name]);
      return { label: run.label, colour: run.colour, x: own.map((name) => DATA.ranges[name].end), y: own.map((name) => value(run, name)) };
    }),
  });
  for (const run of RUNS) {
    const own = names.filter((name) => run.metrics[name]);
    if (!own.length) continue;
    new Panel(grid, {
      ...about, name: `${what} by position, over the run`, unit: one ? metric.unit : run.label, meaning: `A line for each range of tokens, named by its end: ${metric.meaning}`, many: true,
      lines: () => (run.shown ? own.flatMap((name, i) => linesOf(run, name, () => rangeColour(i, own.length), name.split("_at_").pop())) : []),
    });
  }
}

function charts() {
  for (const name of new Set(DATA.metrics.map((metric) => metric.section))) {
    const own = DATA.metrics.filter((metric) => metric.section === name);
    const grid = make("div", { className: "panels" });
    const node = section({ train: "Training", val: "Validation" }[name] || name, "", grid);
    node.classList.add("charts");
    for (const metric of own.filter((metric) => !(metric.name in DATA.ranges))) metricPanel(grid, metric);
    const parts = own.map((metric) => metric.name).filter((name) => name in DATA.ranges).sort((a, b) => DATA.ranges[a].end - DATA.ranges[b].end);
    for (const of of new Set(parts.map((name) => DATA.ranges[name].of))) rangePanels(grid, of, parts.filter((name) => DATA.ranges[name].of === of));
  }
  resizer.observe(main);
}

// ---- checkpoints, bad steps and interruptions in every panel

// Where a step is on the axis: between the events around it.
function place(run, step) {
  const { step: steps, [state.x]: xs } = run.clock;
  if (state.x === "step") return step;
  const after = steps.findIndex((other) => other >= step);
  if (after < 0) return last(xs);
  if (after === 0 || steps[after] === step) return xs[after];
  const share = (step - steps[after - 1]) / (steps[after] - steps[after - 1]);
  return xs[after - 1] + share * (xs[after] - xs[after - 1]);
}

// [from, to] on the axis in which nothing ran: of no width but on the axis of time.
function interruptions(run) {
  return run.processes.slice(1).map((process, i) => {
    if (state.x !== "time") return [place(run, process.step), place(run, process.step)];
    const before = run.processes[i].ended ?? run.began + (run.clock.time.findLast((time) => run.began + time < process.started) ?? 0);
    return [before - run.began, process.started - run.began];
  });
}

function drawMarks(u) {
  const { ctx } = u, { left, top, width, height } = u.bbox, ratio = devicePixelRatio;
  const at = (x) => (u.scales.x.distr === 3 && x <= 0 ? left : u.valToPos(x, "x", true));
  ctx.save();
  ctx.beginPath();
  ctx.rect(left - 6 * ratio, top, width + 12 * ratio, height);
  ctx.clip();
  for (const run of RUNS.filter((run) => run.shown)) {
    const colour = one ? style("--soft") : run.colour();
    ctx.lineWidth = ratio;
    for (const [from, to] of interruptions(run)) {
      ctx.globalAlpha = 0.16;
      ctx.fillStyle = colour;
      ctx.fillRect(at(from), top, Math.max(0, at(to) - at(from)), height);
      ctx.globalAlpha = 0.8;
      ctx.strokeStyle = colour;
      ctx.setLineDash([4 * ratio, 3 * ratio]);
      vertical(ctx, at(to), top, height);
    }
    ctx.setLineDash([]);
    ctx.globalAlpha = 0.8;
    ctx.strokeStyle = style("--bad");
    for (const bad of run.bad_steps) vertical(ctx, at(place(run, bad.step)), top, height);
    ctx.fillStyle = colour;
    for (const step of run.checkpoints) triangle(ctx, at(place(run, step)), top + height, 5 * ratio);
  }
  ctx.restore();
}

function vertical(ctx, x, top, height) {
  ctx.beginPath();
  ctx.moveTo(x, top);
  ctx.lineTo(x, top + height);
  ctx.stroke();
}

function triangle(ctx, x, bottom, size) {
  ctx.beginPath();
  ctx.moveTo(x - size, bottom);
  ctx.lineTo(x + size, bottom);
  ctx.lineTo(x, bottom - 1.6 * size);
  ctx.fill();
}

function legend() {
  const there = [];
  if (RUNS.some((run) => run.checkpoints.length)) there.push("▲ a checkpoint that is kept");
  if (RUNS.some((run) => run.processes.length > 1)) there.push("┆ the run was interrupted and went on");
  if (RUNS.some((run) => run.bad_steps.length)) there.push("red line: a bad step, which no parameter took");
  there.push("drag across a panel to zoom all, double-click to zoom out");
  main.append(make("p", { className: "note", id: "legend" }, there.join("   ·   ")));
}

// ---- what else the folders hold

function table(head, rows) {
  return make("div", { className: "box" }, make("table", {}, head ? make("thead", {}, make("tr", {}, ...head.map((text) => make("th", {}, text)))) : null, make("tbody", {}, ...rows)));
}

function text(value) {
  return value === null || value === undefined ? "–" : typeof value === "number" && Number.isInteger(value) ? value.toLocaleString("en") : String(value);
}

// Keys by which runs differ, or all of them; one column a run.
function keys(name, note, field, open, only = () => true) {
  const all = [...new Set(RUNS.flatMap((run) => Object.keys(run[field])))].filter(only);
  const chosen = all.filter((key) => !open || new Set(RUNS.map((run) => JSON.stringify(run[field][key]))).size > 1);
  if (!chosen.length) return;
  const rows = chosen.map((key) => {
    const row = make("tr", {}, make("th", { scope: "row" }, make("code", {}, key)), ...RUNS.map((run) => make("td", {}, text(run[field][key]))));
    row.dataset.words = `${key} ${RUNS.map((run) => run[field][key]).join(" ")}`.toLowerCase();
    return row;
  });
  const box = table(one ? null : ["", ...RUNS.map((run) => run.label)], rows);
  box.classList.add("keys");
  if (open) section(name, note, box);
  else section("", "", make("details", { className: "box" }, make("summary", {}, make("b", {}, name), ` ${note}`), box));
}

function details() {
  if (!one) keys("Differences", "settings that are not the same in all runs", "config", true, (key) => key !== "run_dir");
  const bad = RUNS.flatMap((run) => run.bad_steps.map((step) => make("tr", {}, ...[...(one ? [] : [run.label]), step.step, step.loss, step.grad_norm, step.rows].map((cell) => make("td", {}, text(cell))))));
  const numBad = RUNS.reduce((sum, run) => sum + run.num_bad_steps, 0);
  if (bad.length) section("Bad steps", numBad > bad.length ? `the last ${bad.length} of ${numBad}` : "", table([...(one ? [] : ["run"]), "step", "loss", "gradient norm", "rows it read"], bad));
  const samples = RUNS.flatMap((run) => (one ? run.samples.toReversed() : run.samples.slice(-1)).map((sample, i) => make("details", { className: "box", open: i === 0 },
    make("summary", {}, make("b", {}, `step ${sample.step.toLocaleString("en")}`), ` ${short(sample.tokens)} tokens${one ? "" : ` · ${run.label}`}`), make("pre", {}, sample.text))));
  const numSamples = RUNS.reduce((sum, run) => sum + run.num_samples, 0);
  if (samples.length) section("Samples", numSamples > samples.length ? `what the model wrote, the last ${samples.length} of ${numSamples}` : "what the model wrote", ...samples);
  keys("Machine and facts", "facts.json", "facts", false, (key) => !["started", "ended", "duration_seconds"].includes(key));
  keys("Settings", "config.yaml", "config", false);
  const times = RUNS.map((run) => `${one ? "" : `${run.label}: `}started ${date(run.began)}, ${run.facts.ended ? `ended ${date(run.facts.ended)}` : "no end yet"}`);
  main.append(make("p", { className: "note" }, `${times.join(" · ")} · page written ${date(DATA.made)}`));
}

// ---- controls

function choice(id, current, chosen) {
  const buttons = [...document.getElementById(id).children];
  const show = (value) => buttons.forEach((button) => { button.setAttribute("role", "radio"); button.setAttribute("aria-checked", String(button.dataset.value === value)); });
  buttons.forEach((button) => button.addEventListener("click", () => { show(button.dataset.value); chosen(button.dataset.value); }));
  show(current);
}

function search(query) {
  state.query = query.trim().toLowerCase();
  const words = state.query.split(/\s+/);
  const found = (text) => words.every((word) => text.includes(word));
  for (const panel of panels) panel.node.hidden = !found(panel.words);
  for (const row of document.querySelectorAll("tr[data-words]")) row.hidden = !found(row.dataset.words);
  for (const node of document.querySelectorAll("section.charts")) node.hidden = !node.querySelector(".panel:not([hidden])");
  if (state.query) for (const box of document.querySelectorAll("details:has(tr[data-words])")) box.open = Boolean(box.querySelector("tr:not([hidden])"));
}

function controls() {
  const by = (id) => document.getElementById(id);
  choice("axis", state.x, (x) => { state.x = x; zoom(null); drawAll(); });
  if (!hasTime) Object.assign(document.querySelector('#axis [data-value="time"]'), { disabled: true, title: "this record has no time of day" });
  choice("theme", chosenTheme(), (theme) => { try { localStorage.setItem("flash-gpt-theme", theme); } catch { /* a page from a file may keep nothing */ } setTheme(theme); redraw(); });
  systemIsDark.addEventListener("change", () => { setTheme(chosenTheme()); redraw(); });
  const redraw = () => panels.forEach((panel) => panel.drawn?.redraw());
  by("smooth").addEventListener("input", (event) => { state.smooth = Number(event.target.value); event.target.nextElementSibling.textContent = event.target.value; drawAll(); });
  for (const [id, field] of [["log-x", "logX"], ["log-y", "logY"], ["marks", "marks"]])
    by(id).addEventListener("change", (event) => { state[field] = event.target.checked; drawAll(); });
  by("reset").addEventListener("click", () => zoom(null));
  by("search").addEventListener("input", (event) => search(event.target.value));
  addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement.tagName !== "INPUT") { event.preventDefault(); by("search").focus(); }
    if (event.key === "Escape") { by("search").value = ""; search(""); zoom(null); }
  });
}

summary();
legend();
charts();
profiles();
details();
controls();
