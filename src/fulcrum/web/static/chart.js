// Losses by step as an SVG: a thin line for what was measured, a strong one for its running mean, rings for dev losses.

import { h } from "./dom.js";

export const SERIES = [
  ["task_loss", "task rows", "task"], ["general_loss", "general rows", "general"], ["dev_nll", "dev rows", "dev"],
];
const WIDE = { width: 860, height: 340 };
const NARROW = { width: 360, height: 300 };
const PAD = { left: 44, right: 14, top: 14, bottom: 38 };

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function smooth(points) {
  const weight = Math.min(0.9, 1 - 6 / Math.max(points.length, 7));
  let mean = 0, mass = 0;
  return points.map(([x, y]) => {
    mean = weight * mean + (1 - weight) * y;
    mass = weight * mass + (1 - weight);
    return [x, mean / mass];
  });
}

function draw(points, steps, { width, height }, name) {
  const known = SERIES.map(([key, label, kind]) => ({ label, kind, points: points.filter((p) => p[key] !== null && p[key] !== undefined).map((p) => [p.step, p[key]]) })).filter((one) => one.points.length);
  const values = known.flatMap((one) => one.points.map((p) => p[1]));
  const sorted = [...values].sort((a, b) => a - b);
  const top = sorted[Math.floor(0.99 * (sorted.length - 1))] || 1;
  const low = Math.min(sorted[0], top);
  const room = (top - low) * 0.08 || top * 0.1 || 0.1;
  const [y0, y1] = [Math.max(0, low - room), top + room];
  const x = (step) => PAD.left + (width - PAD.left - PAD.right) * (step - 0) / Math.max(steps, 1);
  const y = (loss) => height - PAD.bottom - (height - PAD.top - PAD.bottom) * (Math.min(loss, y1) - y0) / (y1 - y0);
  const path = (list) => list.map(([a, b], k) => `${k ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
  const newest = known.map((one) => `${one.label} ${one.points.at(-1)[1].toFixed(3)}`).join(", ");
  return h("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Loss of ${name} by step; newest: ${newest}` },
    ticks(y0, y1, 4).map((value) => [
      h("svg:line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value) }),
      h("svg:text", { class: "tick", x: PAD.left - 7, y: y(value) + 4, "text-anchor": "end" }, String(value)),
    ]),
    ticks(0, steps, width > 500 ? 7 : 4).filter(Number.isInteger).map((value) => h("svg:text", { class: "tick", x: x(value), y: height - PAD.bottom + 18, "text-anchor": "middle" }, String(value))),
    h("svg:line", { class: "axis", x1: PAD.left, x2: width - PAD.right, y1: height - PAD.bottom, y2: height - PAD.bottom }),
    h("svg:text", { class: "title", x: width - PAD.right, y: height - 4, "text-anchor": "end" }, "optimizer step"),
    known.map((one) => h("svg:g", { class: one.kind },
      one.kind === "dev" ? null : h("svg:path", { class: "raw", d: path(one.points) }),
      h("svg:path", { class: "curve", d: path(one.kind === "dev" ? one.points : smooth(one.points)) }),
      one.kind === "dev" ? one.points.map(([a, b]) => h("svg:circle", { class: "mark", cx: x(a), cy: y(b), r: 4 })) : null)));
}

export function losses(points, steps, name) {
  const shown = SERIES.filter(([key]) => points.some((p) => p[key] !== null && p[key] !== undefined));
  const newest = (key) => points.findLast((p) => p[key] !== null && p[key] !== undefined)[key];
  return [
    h("ul", { class: "legend keys" }, shown.map(([key, label, kind]) => h("li", { class: kind },
      h("svg:svg", { viewBox: "0 0 34 14", "aria-hidden": "true" }, h("svg:path", { class: "curve", d: "M1 7h32" }), kind === "dev" ? h("svg:circle", { class: "mark", cx: 17, cy: 7, r: 4 }) : null),
      h("span", {}, `${label} `, h("b", {}, newest(key).toFixed(3)))))),
    h("div", { class: "chart wide" }, draw(points, steps, WIDE, name)),
    h("div", { class: "chart narrow" }, draw(points, steps, NARROW, name)),
    h("p", { class: "quiet" }, "Nats per supervised token. Thin: single steps; strong: their running mean; rings: dev rows."),
  ];
}
