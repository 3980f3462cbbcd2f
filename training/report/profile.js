// The section "Profile" of runs with profile=true: bars of a step's time by kind, and memory over the profiled steps.

const GROUP_COLOURS = { weights: "--c0", optimizer: "--c2", "forward pass": "--c1", "gradients and rest": "--c5" };

function bars(rows) {
  return rows.map(([name, share, text, colour = "--accent"]) => {
    const bar = make("i", { className: "share" });
    bar.style.width = `${100 * share}%`;
    bar.style.background = `var(${colour})`;
    return make("tr", {}, make("th", { scope: "row" }, name), make("td", { className: "bar" }, bar), make("td", { className: "number" }, format(share, ".1%")), make("td", { className: "number" }, text));
  });
}

function shareTable(profile) {
  const step = profile.span / (profile.steps[1] - profile.steps[0] + 1);
  const rows = bars(Object.entries(profile.shares).map(([kind, share]) => [kind, share, `${format(1000 * share * step, ",.1f")} ms`]));
  const { memory } = profile;
  if (memory) {
    const total = Object.values(memory.peak).reduce((sum, gib) => sum + gib, 0);
    rows.push(make("tr", {}, make("th", { colSpan: 4, className: "between" }, `memory at the peak, ${format(total, ".2f")} GiB`)));
    rows.push(...bars(Object.entries(memory.peak).map(([group, gib]) => [group, gib / total, `${format(gib, ".3f")} GiB`, GROUP_COLOURS[group]])));
  }
  return table(null, rows);
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// The groups stacked, each an area between two lines that step from value to value.
function timelinePanel({ ms, gib }) {
  const [width, height] = [1000, 210];
  const totals = ms.map((_, i) => Object.values(gib).reduce((sum, column) => sum + column[i], 0));
  const top = 1.05 * Math.max(...totals) || 1, span = ms[ms.length - 1] || 1;
  const below = new Array(ms.length).fill(0);
  const areas = Object.entries(gib).map(([group, column]) => {
    const edge = (values) => values.flatMap((value, i) => {
      const y = (height * (1 - value / top)).toFixed(1), x = (at) => ((width * ms[at]) / span).toFixed(1);
      return i ? [`${x(i)},${(height * (1 - values[i - 1] / top)).toFixed(1)}`, `${x(i)},${y}`] : [`${x(i)},${y}`];
    });
    const bottom = edge([...below]);
    column.forEach((value, i) => { below[i] += value; });
    const area = svg("polygon", { points: [...edge([...below]), ...bottom.reverse()].join(" "), fill: `var(${GROUP_COLOURS[group] || "--soft"})`, "fill-opacity": 0.75 });
    area.append(svg("title", {}, group));
    return area;
  });
  const legend = Object.keys(gib).reverse().map((group) => {
    const swatch = make("i", { className: "swatch" });
    swatch.style.background = `var(${GROUP_COLOURS[group] || "--soft"})`;
    return make("span", {}, swatch, group);
  });
  const readout = make("div", { className: "readout" }, ...legend, make("span", {}, `${format(Math.max(...totals), ".2f")} GiB at most`));
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "timeline" }, ...areas);
  const said = make("div", { className: "readout" }, `0 to ${format(span, ",.1f")} ms`);
  picture.addEventListener("mousemove", (event) => {
    const box = picture.getBoundingClientRect(), time = (span * (event.clientX - box.left)) / box.width;
    const i = Math.max(0, ms.findLastIndex((other) => other <= time));
    said.textContent = [`${format(ms[i], ",.1f")} ms`, `${format(totals[i], ".3f")} GiB`, ...Object.entries(gib).map(([group, column]) => `${group} ${format(column[i], ".3f")}`)].join("   ·   ");
  });
  return make("div", { className: "panel" }, make("h3", {}, "memory over the profiled steps", make("small", {}, "GiB, by who holds or allocated it")), readout, picture, said);
}

function profiles() {
  for (const run of RUNS.filter((run) => run.profile)) {
    const { profile } = run, [first, last] = profile.steps, { memory } = profile;
    const steps = first === last ? `step ${first}` : `steps ${first} to ${last}`;
    const note = `${one ? "" : `${run.label}, `}${steps}: share of a step on the ${profile.device === "cuda" ? "GPU, by kernel" : "CPU, by operator"}; profile/trace.json.gz has all`;
    const longest = profile.longest.map(([name, kind, seconds, calls]) => make("tr", {}, ...[kind, name, calls.toLocaleString("en"), `${format(1000 * seconds, ",.1f")} ms`].map((cell) => make("td", { className: "text" }, cell))));
    const parts = [shareTable(profile)];
    if (memory) parts.push(timelinePanel(memory));
    parts.push(make("details", { className: "box" }, make("summary", {}, make("b", {}, "What took longest"), ` in ${steps}`), table(["kind", "name", "calls", "time"], longest)));
    if (memory) {
      const blocks = memory.largest.map((block) => make("tr", {}, ...[`${format(block.gib, ".3f")} GiB`, block.group, block.frames.join("  ←  ")].map((cell) => make("td", { className: "text" }, cell))));
      parts.push(make("details", { className: "box" }, make("summary", {}, make("b", {}, "Largest blocks"), " at the peak, and what allocated them; without frames: before the profile, or in PyTorch's own thread of the backward pass"), table(["size", "group", "frames"], blocks)));
    }
    const node = section("Profile", note, ...parts);
    node.classList.add("profile");
  }
}
