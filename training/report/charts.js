"use strict";
// Panels: uPlot with our axes, colours, marks and one zoom and one cursor for all.

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runColour = (i) => style(`--c${i % 10}`);
// From dark to bright along one hue after the other: ranges of positions have an order.
const rangeColour = (i, n) => `hsl(${260 - (215 * i) / Math.max(1, n - 1)} ${dark() ? 75 : 65}% ${dark() ? 66 : 44}%)`;
const dark = () => document.documentElement.dataset.theme === "dark";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ---- numbers

// Python's formats, as training/metrics.py writes them: .4f  ,.0f  .2e  .1%  .4g
function format(value, form) {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return String(value);
  const [, comma, digits, kind] = /^(,?)\.(\d+)([fge%])$/.exec(form) || [null, "", 4, "g"];
  if (kind === "%") return `${(100 * value).toFixed(digits)}%`;
  if (kind === "e") return value.toExponential(digits);
  if (kind === "g") return String(Number(value.toPrecision(digits)));
  return comma ? value.toLocaleString("en", { minimumFractionDigits: +digits, maximumFractionDigits: +digits }) : value.toFixed(digits);
}

function short(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(4))}${unit}`;
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(6)));
}

const binary = (count) => (count >= 2 ** 20 ? `${count / 2 ** 20}M` : count >= 1024 ? `${count / 1024}k` : String(count));

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  if (s < 60) return `${Number(seconds.toFixed(1))} s`;
  if (s < 86400) return `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`;
  return `${Math.floor(s / 86400)} d ${two(Math.floor(s / 3600) % 24)}:${two(Math.floor(s / 60) % 60)}`;
}

// Mean of the values so far, with weights that fall by `weight` every thousandth of the run: a curve of few points stays
// as it is, and so does one that was thinned.
function smoothed(values, steps, weight) {
  const thousandth = (steps[steps.length - 1] - steps[0]) / 1000 || 1;
  let sum = 0, total = 0, before = steps[0];
  return values.map((value, i) => {
    if (value === null) return null;
    const kept = weight ** ((steps[i] - before) / thousandth);
    before = steps[i];
    sum = kept * sum + value;
    total = kept * total + 1;
    return sum / total;
  });
}

// ---- one panel

const TIME_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];
const cursors = uPlot.sync("cursor");

// lines: [{label, colour(), x: [], y: [], faint}]; where x differs from line to line, one axis holds all of them.
function aligned(lines) {
  const xs = [...new Set(lines.flatMap((line) => line.x))].filter((x) => x !== null).sort((a, b) => a - b);
  const place = new Map(xs.map((x, i) => [x, i]));
  return [xs, ...lines.map((line) => {
    const column = new Array(xs.length); // undefined: this line has no point there. null: it has one that is no number.
    line.x.forEach((x, i) => { if (x !== null) column[place.get(x)] = line.y[i]; });
    return column;
  })];
}

function positive(lines, onX, onY) {
  return lines.map((line) => {
    const keep = line.x.map((x, i) => (!onX || x > 0) && (!onY || line.y[i] === null || line.y[i] > 0));
    return { ...line, x: line.x.filter((_, i) => keep[i]), y: line.y.filter((_, i) => keep[i]) };
  });
}

class Chart {
  // options: {x: "tokens"|"step"|"time"|"positions", form, logX, logY, marks(u), zoom, onZoom, readout: node}
  constructor(node, lines, options) {
    this.options = options;
    this.lines = positive(lines, options.logX, options.logY).filter((line) => line.x.length);
    if (!this.lines.length) {
      node.replaceChildren(make("p", { className: "note" }, options.logX || options.logY ? "nothing above 0 to show on a logarithmic axis" : "no values"));
      return;
    }
    node.replaceChildren();
    this.plot = new uPlot(this.uplotOptions(node), aligned(this.lines), node);
    this.say(null);
  }

  uplotOptions(node) {
    const { x, form, logX, logY, zoom } = this.options;
    const axis = (more) => ({
      stroke: () => style("--soft"), grid: { stroke: () => style("--line"), width: 1 }, ticks: { show: false },
      font: "11px system-ui, sans-serif", ...more,
    });
    const percent = form.endsWith("%");
    const xText = { time: duration, positions: binary }[x] || short;
    const sparse = (text) => (u, values) => values.map((value) => (value === null ? null : text(value)));
    return {
      width: node.clientWidth || 400, height: 210, padding: [8, 10, 0, 0], legend: { show: false },
      scales: {
        x: { time: false, distr: logX || x === "positions" ? 3 : 1, log: x === "positions" ? 2 : 10, ...(zoom ? { min: zoom[0], max: zoom[1], auto: false } : {}) },
        y: { distr: logY ? 3 : 1, range: logY ? undefined : this.range },
      },
      axes: [
        axis({ size: 26, gap: 4, space: 66, values: sparse(xText), ...(x === "time" && !logX ? { incrs: TIME_STEPS } : {}) }),
        axis({ size: 56, gap: 5, space: 34, values: sparse((value) => (percent ? `${short(100 * value)}%` : short(value))) }),
      ],
      series: [{}, ...this.lines.map((line) => ({
        label: line.label, stroke: line.colour, width: line.faint ? 1 : 1.7, alpha: line.faint ? 0.28 : 1,
        points: { show: line.x.length < 30 && !line.faint, size: 5, fill: line.colour },
      }))],
      cursor: {
        sync: x === "positions" ? undefined : { key: cursors.key, scales: ["x", null] },
        points: { size: 7, show: true }, y: false,
        drag: { x: this.options.onZoom !== undefined, y: false, setScale: false },
        dataIdx: (u, series, hovered) => nearest(u.data[series], hovered),
        bind: { dblclick: () => () => { this.options.onZoom?.(null); return null; } },
      },
      hooks: {
        setCursor: [(u) => this.say(u.cursor.left >= 0 ? u.cursor.idxs : null)],
        setSelect: [(u) => {
          if (u.select.width > 4) this.options.onZoom?.([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
        drawAxes: [(u) => this.options.marks?.(u)],
      },
    };
  }

  // A margin, and no axis that makes a hair look like a mountain.
  range(u, low, high) {
    if (low === null || high === null) return [0, 1];
    if (low === high) return low === 0 ? [0, 1] : [Math.min(0.9 * low, 1.1 * low), Math.max(0.9 * low, 1.1 * low)];
    const span = high - low;
    const bottom = low - 0.08 * span;
    return [low >= 0 && bottom < 0 ? 0 : bottom, high + 0.08 * span];
  }

  // The values under the cursor; without one the last of each line.
  say(places) {
    const { readout, form, x, many } = this.options;
    if (!readout || !this.plot) return;
    const parts = this.lines.map((line, i) => [line, i]).filter(([line]) => !line.faint).map(([line, i]) => {
      const column = this.plot.data[i + 1];
      const place = places ? places[i + 1] : nearest(column, column.length - 1);
      const swatch = make("i", { className: "swatch" });
      swatch.style.background = line.colour();
      return make("span", { title: line.label }, swatch, many ? line.short || line.label : null, make("b", {}, format(place === null ? null : column[place], form)));
    });
    if (places && places[0] !== null && places[0] !== undefined) {
      const at = this.plot.data[0][places[0]];
      parts.unshift(make("span", {}, x === "time" ? duration(at) : x === "positions" ? `${at.toLocaleString("en")} tokens` : `${x === "step" ? "step " : ""}${at.toLocaleString("en")}${x === "tokens" ? " tokens" : ""}`));
    }
    readout.replaceChildren(...parts);
  }

  zoom([min, max]) { this.plot?.setScale("x", { min, max }); }

  resize(width) { if (this.plot && width > 0) this.plot.setSize({ width, height: 210 }); }
  redraw() { if (this.plot) { this.plot.redraw(false, true); this.say(null); } }
  destroy() { this.plot?.destroy(); }
}

// The place nearest to `place` at which a line has a point, be it one that is no number.
function nearest(column, place) {
  if (place === null || place === undefined) return null;
  for (let away = 0; away < column.length; away++) {
    if (column[place - away] !== undefined) return place - away;
    if (column[place + away] !== undefined) return place + away;
  }
  return null;
}
