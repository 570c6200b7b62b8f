// How the map is put on its canvas: where the rows stand, cells, hatching, labels, rules between layers.

import { grouped } from "../base/groups.js";
import { count } from "../base/number.js";
import { escaped } from "./save.js";
import { colour, rgb, scale } from "../base/settings.js";
import { ticks } from "./timeaxis.js";

const NAMED = 14;      // a row with its name beside it
const ROOM = 640;      // rows get thinner rather than the map taller than this
const GAP = 5;
const FOOT = 20;

// Rows with their place: [{tensor, label, top, height}], groups with theirs, and the whole height.
export function layRows(tensors, tall) {
  const groups = grouped(tensors);
  const gaps = Math.max(0, groups.length - 1) * GAP;
  const fit = Math.floor((ROOM - gaps) / Math.max(1, tensors.length));
  const squeezed = !tall && fit < NAMED - 2;
  const thin = squeezed ? Math.max(3, fit) : NAMED;
  const rows = [];
  const heads = [];
  let top = 0;
  for (const group of groups) {
    const height = group.label ? thin : Math.max(thin, 12);
    heads.push({ label: group.label, top, height: height * group.rows.length });
    for (const { tensor, leaf } of group.rows) {
      rows.push({ tensor, leaf: group.label ? leaf : tensor.name, top, height, single: !group.label });
      top += height;
    }
    top += GAP;
  }
  return { rows, heads, height: Math.max(24, top - GAP), squeezed, thin };
}

export function paintMap(canvas, data, lay, { left, width, total, range }) {
  const density = devicePixelRatio || 1;
  const height = lay.height + FOOT;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(total * density);
  canvas.height = Math.round(height * density);
  const pen = canvas.getContext("2d");
  pen.scale(density, density);
  pen.imageSmoothingEnabled = false;
  const x = (step) => left + ((step - range[0]) / (range[1] - range[0])) * width;
  if (data.columns && lay.rows.length) cells(pen, data, lay, x, left, width);
  hatch(pen, data, lay, left, width);
  labels(pen, lay, left);
  foot(pen, lay, range, x, width);
}

function cells(pen, data, lay, x, left, width) {
  const order = lay.rows.map((row) => row.tensor.id);
  const sheet = document.createElement("canvas");
  const image = data.pixels(order, scale(), rgb(colour("panel")), rgb(colour("alarm")));
  sheet.width = image.width;
  sheet.height = image.height;
  sheet.getContext("2d").putImageData(image, 0, 0);
  const from = x(data.step[0] - 0.5);
  const to = x(data.steps(data.columns - 1)[1] + 0.5);
  pen.save();
  pen.beginPath();
  pen.rect(left, 0, width, lay.height);
  pen.clip();
  const even = data.columns < 2 || data.step.at(-1) - data.step[0] === (data.columns - 1) * data.stride;
  let row = 0;
  while (row < lay.rows.length) {       // rows that touch go in one picture
    let end = row + 1;
    const { top, height } = lay.rows[row];
    while (end < lay.rows.length && lay.rows[end].height === height
      && lay.rows[end].top === top + (end - row) * height) end++;
    const tall = (end - row) * height;
    if (even) pen.drawImage(sheet, 0, row, data.columns, end - row, from, top, to - from, tall);
    else {
      for (let c = 0; c < data.columns; c++) {
        const [a, b] = data.steps(c);
        pen.drawImage(sheet, c, row, 1, end - row, x(a - 0.5), top, Math.max(1, x(b + 0.5) - x(a - 0.5)), tall);
      }
    }
    row = end;
  }
  // One cell that is not finite among a thousand must be seen: at least four pixels wide, and a mark at the row's end.
  pen.fillStyle = colour("alarm");
  for (const { tensor, top, height } of lay.rows) {
    const alarms = data.alarms(tensor.id) ?? [];
    for (let c = 0; c < alarms.length; c++) {
      if (alarms[c]) {
        const [a, b] = data.steps(c);
        const middle = x((a + b) / 2);
        const wide = Math.max(4, x(b + 0.5) - x(a - 0.5));
        pen.fillRect(middle - wide / 2, top, wide, Math.max(3, height));
      }
    }
  }
  pen.restore();
  pen.fillStyle = colour("alarm");
  for (const { tensor, top, height } of lay.rows) {
    if (data.alarms(tensor.id)?.some(Boolean)) {
      pen.beginPath();
      pen.moveTo(left + width + 2, top + height / 2);
      pen.lineTo(left + width + 9, top + height / 2 - 4);
      pen.lineTo(left + width + 9, top + height / 2 + 4);
      pen.fill();
    }
  }
}

function hatch(pen, data, lay, left, width) {
  pen.save();
  for (const { tensor, top, height } of lay.rows) {
    if (!data.dead.has(tensor.id)) continue;
    pen.save();
    pen.beginPath();
    pen.rect(left, top, width, height);
    pen.clip();
    pen.fillStyle = colour("paper");
    pen.fillRect(left, top, width, height);
    pen.strokeStyle = colour("soft");
    pen.lineWidth = 0.8;
    pen.beginPath();
    for (let at = left - height; at < left + width; at += 5) {
      pen.moveTo(at, top + height);
      pen.lineTo(at + height, top);
    }
    pen.stroke();
    pen.restore();
  }
  pen.restore();
}

function labels(pen, lay, left) {
  const body = getComputedStyle(document.body);
  const edge = left - 8;
  pen.textBaseline = "middle";
  let below = -Infinity;
  for (const head of lay.heads) {
    pen.fillStyle = colour("rule");
    if (head.top) pen.fillRect(0, head.top - Math.ceil(GAP / 2), left + 4, 1);
    if (!head.label || head.top < below) continue;
    const named = !lay.squeezed;
    if (!named && head.height < 10) continue;
    pen.font = `600 11px ${body.fontFamily}`;
    pen.fillStyle = colour("ink");
    pen.textAlign = "left";
    const middle = named ? head.top + lay.thin / 2 : head.top + Math.min(head.height / 2, 8);
    pen.fillText(cut(pen, head.label, named ? left * 0.42 : edge), 0, middle);
    below = head.top + 12;
  }
  pen.textAlign = "right";
  pen.fillStyle = colour("soft");
  pen.font = `11px ${body.fontFamily}`;
  below = -Infinity;
  for (const row of lay.rows) {
    if (lay.squeezed && !row.single) continue;
    if (row.top < below) continue;
    const first = lay.heads.find((head) => head.label && head.top === row.top);
    const room = first ? edge - Math.min(pen.measureText(first.label).width + 16, left * 0.42 + 8) : edge;
    const short = row.leaf.replace(/\.weight$/, "");
    pen.fillText(cut(pen, short, room), edge, row.top + row.height / 2);
    below = row.top + 11;
  }
}

// The end of a name tells more than its beginning.
function cut(pen, text, room) {
  if (pen.measureText(text).width <= room) return text;
  let rest = text;
  while (rest.length > 2 && pen.measureText("\u2026" + rest).width > room) rest = rest.slice(1);
  return "\u2026" + rest;
}

function foot(pen, lay, range, x, width) {
  pen.textAlign = "center";
  pen.textBaseline = "alphabetic";
  pen.fillStyle = colour("soft");
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  for (const step of ticks(range[0] + 0.5, range[1] - 0.5, Math.max(2, width / 110))) {
    if (step !== Math.round(step)) continue;
    pen.fillRect(Math.round(x(step)), lay.height + 2, 1, 3);
    pen.fillText(count(step), x(step), lay.height + 16);
  }
}

// The row under the pointer, by a frame of its own so that the cells need no new drawing.
paintMap.mark = (canvas, lay, row) => {
  const body = canvas.parentElement;
  let frame = body.querySelector(".row-mark");
  if (!frame) {
    frame = document.createElement("div");
    frame.className = "row-mark";
    body.append(frame);
  }
  frame.hidden = row === null;
  if (!row) return;
  frame.style.top = `${canvas.offsetTop + row.top - 1}px`;
  frame.style.height = `${row.height + 2}px`;
};

paintMap.svg = (canvas, lay, { left, width }, caption) => {
  const [w, h] = [canvas.clientWidth, canvas.clientHeight];
  const density = canvas.width / w;
  const part = document.createElement("canvas");
  part.width = Math.round(width * density);
  part.height = Math.round(lay.height * density);
  part.getContext("2d").drawImage(canvas, left * density, 0, part.width, part.height, 0, 0, part.width, part.height);
  const names = lay.rows.filter((row) => !lay.squeezed || row.single).map((row) =>
    `<text x="${left - 8}" y="${row.top + row.height / 2 + 4}" text-anchor="end">${escaped(row.tensor.name)}</text>`);
  const heads = lay.squeezed ? lay.heads.filter((head) => head.label && head.height >= 10).map((head) =>
    `<text x="0" y="${head.top + 11}" font-weight="600">${escaped(head.label)}</text>`) : [];
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h + 24}" viewBox="0 -24 ${w} ${h + 24}" `
    + `font-family="sans-serif" font-size="10" fill="${colour("ink")}"><rect y="-24" width="${w}" height="${h + 24}" `
    + `fill="${colour("paper")}"/><text x="0" y="-8" font-size="12">${escaped(caption)}</text>`
    + `<image x="${left}" y="0" width="${width}" height="${lay.height}" href="${part.toDataURL()}"/>${names.join("")}${heads.join("")}</svg>`;
};
