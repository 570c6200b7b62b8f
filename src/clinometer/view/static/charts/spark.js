// A line the size of a word. Gaps stay gaps; what is not finite is a mark in the alarming colour.

import { h } from "../base/dom.js";
import { colour } from "../base/settings.js";

export function sparkline(width, height) {
  const canvas = h("canvas", { class: "spark", "aria-hidden": "true" });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.size = [width, height];
  return canvas;
}

// `log`: draw log₁₀ of the value. `range`: [low, high] in what is drawn, to compare lines with each other.
export function drawSpark(canvas, values, { log = false, range = null, ink = "accent", alarm = null } = {}) {
  const [width, height] = canvas.size;
  const density = devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  const pen = canvas.getContext("2d");
  pen.scale(density, density);
  const points = binned(values, Math.max(2, Math.floor(width / 1.5)), log);
  let [low, high] = range ?? [Infinity, -Infinity];
  if (!range) {
    for (const value of points) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return nothing(pen, width, height);
  const flat = high - low < 1e-12 * Math.max(1, Math.abs(high));
  const y = (value) => (flat ? height / 2 : height - 1.5 - ((value - low) / (high - low)) * (height - 3));
  const x = (k) => 1 + (points.length < 2 ? 0 : (k / (points.length - 1)) * (width - 2));
  pen.strokeStyle = colour(ink);
  pen.lineWidth = 1.2;
  pen.lineJoin = "round";
  pen.beginPath();
  let drawing = false;
  points.forEach((value, k) => {
    if (Number.isNaN(value)) { drawing = false; return; }
    if (drawing) pen.lineTo(x(k), y(value));
    else { pen.moveTo(x(k), y(value)); pen.lineTo(x(k) + 0.5, y(value)); }
    drawing = true;
  });
  pen.stroke();
  if (alarm) {
    pen.fillStyle = colour("alarm");
    for (let k = 0; k < alarm.length; k++) {
      if (alarm[k]) pen.fillRect(1 + (k / Math.max(1, alarm.length - 1)) * (width - 3), 0, 2, height);
    }
  }
}

// Means over equal stretches; zeros on a log scale and what is not finite are left out.
function binned(values, most, log) {
  const number = Math.min(most, values.length);
  const out = new Float64Array(number).fill(NaN);
  for (let k = 0; k < number; k++) {
    let [sum, n] = [0, 0];
    const end = Math.floor(((k + 1) * values.length) / number);
    for (let i = Math.floor((k * values.length) / number); i < end; i++) {
      const value = log ? (values[i] > 0 ? Math.log10(values[i]) : NaN) : values[i];
      if (value !== null && Number.isFinite(value)) { sum += value; n++; }
    }
    if (n) out[k] = sum / n;
  }
  return out;
}

function nothing(pen, width, height) {
  pen.strokeStyle = colour("rule");
  pen.setLineDash([2, 3]);
  pen.beginPath();
  pen.moveTo(1, height / 2);
  pen.lineTo(width - 1, height / 2);
  pen.stroke();
}
