"use strict";
// Line charts as SVG. Each <figure data-chart="NAME"> is drawn from data.charts[NAME]:
//   axes:   [{name, label, integer}]   what x can be; a menu where there are several
//   y:      label of the y axis
//   log:    whether a switch for a logarithmic x axis is shown
//   cut:    whether values far above the others are cut off by the frame
//   series: [{label, run, kind, x: {NAME: [...]}, y: [...]}]
// kind is "thin", "thick" (with a mark at each point) or "level" (y is one number, a
// line across). Values that are null are gaps. Everything is drawn again when the width
// changes, so that text keeps its size.

const data = JSON.parse(document.getElementById("data").textContent);
const SHAPES = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z", "M-3.6,-3.6H3.6V3.6H-3.6Z", "M0,-5L4.6,3.5H-4.6Z",
  "M0,-5.2L5.2,0L0,5.2L-5.2,0Z", "M0,5L4.6,-3.5H-4.6Z", "M-5,-2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z",
];
const COLOURS = 6;
const NEAR = 12; // pixels from the cursor within which a point is read out

// Runs of the same colour have different marks.
function shape(run) {
  return SHAPES[(run + Math.floor(run / COLOURS)) % SHAPES.length];
}

function svg(name, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
}

function html(name, attributes, parent, text) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

// 1, 2 or 5 times a power of ten, about `count` of them from low to high.
function linearTicks(low, high, count, integer) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].find((unit) => unit * power >= raw) * power;
  if (integer) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const unit of [1, 2, 5]) {
      const tick = unit * 10 ** power;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks.length > 8 ? ticks.filter((t) => String(t / 10 ** Math.floor(Math.log10(t) + 1e-9))[0] === "1") : ticks;
}

// The bulk of the values: the first losses of a run may lie far above the rest.
function frame(values, cut) {
  const sorted = values.slice().sort((a, b) => a - b);
  const low = sorted[0];
  const middle = sorted[Math.floor(sorted.length / 2)];
  const most = sorted[sorted.length - 1];
  const high = cut && middle > low ? Math.min(most, middle + 5 * (middle - low)) : most;
  const margin = 0.06 * (high - low) || Math.abs(high) * 0.05 || 1;
  return [low - margin, high + margin];
}

function points(series, axis) {
  return series.x[axis].map((x, i) => [x, series.y[i]]).filter(([x]) => x !== null);
}

function drawChart(figure) {
  const spec = data.charts[figure.dataset.chart];
  const hidden = new Set();
  const state = { axis: spec.axes[0].name, log: false, cursor: null };
  const bar = figure.querySelector(".controls");
  const legend = figure.querySelector(".legend");
  const plot = figure.querySelector(".plot");
  const readout = figure.querySelector(".readout");

  if (spec.axes.length > 1) {
    const label = html("label", {}, bar, "against ");
    const menu = html("select", {}, label);
    for (const axis of spec.axes) html("option", { value: axis.name }, menu, axis.label);
    menu.addEventListener("change", () => { state.axis = menu.value; state.cursor = null; draw(); });
  }
  if (spec.log) {
    const label = html("label", {}, bar);
    const box = html("input", { type: "checkbox" }, label);
    label.append(" logarithmic x");
    box.addEventListener("change", () => { state.log = box.checked; draw(); });
  }
  spec.series.forEach((series, i) => {
    const button = html("button", { type: "button", "aria-pressed": "true", class: `run-${series.run % COLOURS}` }, legend);
    const sample = svg("svg", { viewBox: "0 0 28 12", "aria-hidden": "true" }, button);
    svg("path", { d: "M1,6H27", class: `curve ${series.kind}` }, sample);
    if (series.kind === "thick") svg("path", { d: shape(series.run), transform: "translate(14,6)", class: "mark" }, sample);
    button.append(series.label);
    button.addEventListener("click", () => {
      if (hidden.has(i)) hidden.delete(i); else hidden.add(i);
      button.setAttribute("aria-pressed", String(!hidden.has(i)));
      draw();
    });
  });

  let scale = null; // of the last drawing: pixels and values
  function draw() {
    plot.replaceChildren();
    readout.textContent = "";
    const shown = spec.series.filter((_, i) => !hidden.has(i));
    const curves = shown.filter((s) => s.kind !== "level");
    const axis = spec.axes.find((a) => a.name === state.axis);
    const xs = curves.flatMap((s) => points(s, state.axis).map(([x]) => x)).filter((x) => !state.log || x > 0);
    const ys = shown.flatMap((s) => (s.kind === "level" ? [s.y] : points(s, state.axis).map(([, y]) => y))).filter((y) => y !== null);
    scale = null;
    if (!xs.length || !ys.length) {
      html("p", { class: "faint" }, plot, "Nothing to draw.");
      return;
    }
    let x0 = Math.min(...xs), x1 = Math.max(...xs);
    if (x0 === x1) { x0 -= state.log ? x0 / 2 : 0.5; x1 += 0.5; }
    const [y0, y1] = frame(ys, spec.cut);
    const width = Math.max(260, plot.clientWidth), height = width < 480 ? 230 : 300;
    const box = { left: 52, right: width - 12, top: 8, bottom: height - 38 };
    const map = state.log ? Math.log10 : (x) => x;
    const px = (x) => box.left + ((map(x) - map(x0)) / (map(x1) - map(x0))) * (box.right - box.left);
    const py = (y) => box.bottom - ((y - y0) / (y1 - y0)) * (box.bottom - box.top);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, plot);
    const clip = `clip-${figure.dataset.chart}`;
    const cut = svg("clipPath", { id: clip }, root);
    svg("rect", { x: box.left - 5, y: box.top, width: box.right - box.left + 10, height: box.bottom - box.top }, cut);
    for (const y of linearTicks(y0, y1, 5, false)) {
      svg("path", { d: `M${box.left},${py(y)}H${box.right}`, class: "grid" }, root);
      svg("text", { x: box.left - 6, y: py(y) + 4, "text-anchor": "end" }, root).textContent = short(y);
    }
    const xTicks = state.log ? logTicks(x0, x1) : linearTicks(x0, x1, Math.max(2, Math.floor(width / 95)), axis.integer);
    for (const x of xTicks) {
      svg("path", { d: `M${px(x)},${box.bottom}v4`, class: "axis" }, root);
      svg("text", { x: px(x), y: box.bottom + 17, "text-anchor": "middle" }, root).textContent = short(x);
    }
    svg("path", { d: `M${box.left},${box.bottom}H${box.right}`, class: "axis" }, root);
    svg("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, root).textContent = axis.label;
    svg("text", { transform: `translate(11,${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, root).textContent = spec.y;
    const inside = svg("g", { "clip-path": `url(#${clip})` }, root);
    for (const series of shown) {
      const group = svg("g", { class: `run-${series.run % COLOURS}` }, inside);
      if (series.kind === "level") {
        svg("path", { d: `M${box.left},${py(series.y)}H${box.right}`, class: "curve level" }, group);
        continue;
      }
      let pen = "M", path = "";
      for (const [x, y] of points(series, state.axis)) {
        if (y === null || (state.log && x <= 0)) { pen = "M"; continue; }
        path += `${pen}${px(x).toFixed(1)},${py(y).toFixed(1)}`;
        pen = "L";
      }
      svg("path", { d: path || "M0,0", class: `curve ${series.kind}` }, group);
      if (series.kind !== "thick") continue;
      for (const [x, y] of points(series, state.axis)) {
        if (y === null || (state.log && x <= 0)) continue;
        svg("path", { d: shape(series.run), transform: `translate(${px(x).toFixed(1)},${py(y).toFixed(1)})`, class: "mark" }, group);
      }
    }
    const cross = svg("path", { d: "", class: "cross" }, root);
    const stops = [...new Set(xs)].sort((a, b) => a - b);
    scale = { px, box, width, root, cross, stops, shown, axis };
    if (state.cursor !== null) point(state.cursor);
  }

  // Shows the values at the stop that is nearest to x.
  function point(x) {
    if (!scale) return;
    const stop = nearest(scale.stops, x);
    state.cursor = stop;
    scale.cross.setAttribute("d", `M${scale.px(stop)},${scale.box.top}V${scale.box.bottom}`);
    const values = scale.shown.flatMap((series) => {
      if (series.kind === "level") return [`${series.label}: ${short(series.y)}`];
      const known = points(series, state.axis);
      const at = nearest(known.map(([x]) => x), stop);
      if (!known.length || Math.abs(scale.px(at) - scale.px(stop)) > NEAR) return [];
      return [`${series.label}: ${short(known.find(([x]) => x === at)[1])}`];
    });
    readout.textContent = `${scale.axis.label} ${short(stop)} – ${values.join(", ")}`;
  }

  function follow(event) {
    if (!scale) return;
    const frame = scale.root.getBoundingClientRect();
    const at = ((event.clientX - frame.left) / frame.width) * scale.width;
    point(scale.stops.reduce((a, b) => (Math.abs(scale.px(b) - at) < Math.abs(scale.px(a) - at) ? b : a)));
  }
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("keydown", (event) => {
    if (!scale || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const { stops } = scale, last = stops.length - 1;
    const now = state.cursor === null ? -1 : stops.indexOf(state.cursor);
    const next = { ArrowLeft: Math.max(0, now - 1), ArrowRight: Math.min(last, now + 1), Home: 0, End: last }[event.key];
    point(stops[next]);
  });
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth === width) return;
    width = plot.clientWidth;
    draw();
  }).observe(plot);
}

function nearest(values, x) {
  return values.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a), values[0]);
}

document.querySelectorAll("figure[data-chart]").forEach(drawChart);
