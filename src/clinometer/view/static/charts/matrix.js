// One tensor at one step as a picture: block means from afar, single entries with their numbers near by.

import { floats, get, ofRun } from "../base/api.js";
import { h, oncePerFrame, replace } from "../base/dom.js";
import { count, number, percent, signed } from "../base/number.js";
import { cell, download, saveButtons } from "./save.js";
import { colour, drawScale, rgb, scale } from "../base/settings.js";
import { say } from "../base/words.js";

const WIDE = 66;   // a cell this wide and
const HIGH = 17;   // this high has room for its number

// The index in the tensor's own shape of (row, column) in the picture's two axes.
export function fullIndex(row, column, shape) {
  if (!shape.length) return [];
  const rest = shape.slice(1);
  const out = [];
  for (let k = rest.length - 1; k >= 0; k--) {
    out.unshift(column % rest[k]);
    column = Math.floor(column / rest[k]);
  }
  return [row, ...out];
}

export class MatrixView {
  constructor({ run, tensor, step, kind, rows, cols, signal, zoomed, opened, name }) {
    Object.assign(this, { run, tensor, step, kind, rows, cols, signal, zoomed, opened, name });
    this.canvas = h("canvas", { class: "matrix-canvas", tabindex: "0", role: "application", "aria-label": say("page.matrix_label") });
    this.band = h("div", { class: "band box", hidden: true });
    this.here = h("div", { class: "cell-mark", hidden: true });
    this.read = h("p", { class: "matrix-read mono", "aria-live": "polite" }, "\u00a0");
    this.facts = h("p", { class: "small quiet" });
    this.body = h("div", { class: "matrix-body" }, this.canvas, this.band, this.here);
    this.key = h("div", { class: "map-key" });
    this.element = h("div", { class: "matrix" }, this.key, this.body, this.read, this.facts,
      saveButtons({ PNG: () => this.canvas.toBlob((blob) => download(`${name}.png`, blob)), CSV: () => this.csv() }));
    this.paintSoon = oncePerFrame(() => this.paint());
    this.watch = new ResizeObserver(() => { if (this.body.clientWidth !== this.width) this.paintSoon(); });
    this.watch.observe(this.body);
    this.pointer();
    this.canvas.addEventListener("keydown", (event) => this.keyboard(event));
  }

  async load() {
    const wide = Math.min(512, Math.max(64, this.body.clientWidth || 512));
    const answer = await get(ofRun(this.run, "matrix"), { step: this.step, tensor: this.tensor.name, kind: this.kind,
      rows: this.rows?.join(","), cols: this.cols?.join(","), height: 384, width: wide }, this.signal);
    this.data = { ...answer, values: floats(answer.values) };
    this.at = null;
    this.paint();
    this.describe();
  }

  paint() {
    if (!this.data || !this.body.clientWidth) return;
    const { width: columns, height: lines } = this.data;
    this.width = this.body.clientWidth;
    const w = Math.min(this.width, columns < 8 ? Math.max(160, columns * 80) : this.width);
    const ratio = (this.data.rows[1] - this.data.rows[0]) / Math.max(1, this.data.cols[1] - this.data.cols[0]);
    const ht = Math.round(Math.min(480, Math.max(lines * (this.single ? HIGH : 1), Math.min(w * ratio, 480), 96)));
    const density = devicePixelRatio || 1;
    this.canvas.style.width = `${w}px`;
    this.canvas.style.height = `${ht}px`;
    this.canvas.width = Math.round(w * density);
    this.canvas.height = Math.round(ht * density);
    this.cellWidth = w / columns;
    this.cellHeight = ht / lines;
    const pen = this.canvas.getContext("2d");
    pen.scale(density, density);
    pen.imageSmoothingEnabled = false;
    const sheet = h("canvas", { width: columns, height: lines });
    sheet.getContext("2d").putImageData(this.picture(), 0, 0);
    pen.drawImage(sheet, 0, 0, w, ht);
    if (this.single && this.cellWidth >= WIDE && this.cellHeight >= HIGH - 1) this.numbers(pen);
    this.drawKey();
    this.mark();
  }

  get single() {
    return this.data.block[0] === 1 && this.data.block[1] === 1;
  }

  place(value) {
    const { low, high } = this.data;
    return Math.min(1, Math.max(0, (Math.log10(Math.abs(value)) - low) / (high - low || 1)));
  }

  picture() {
    const { values, width, height } = this.data;
    const image = new ImageData(Math.max(1, width), Math.max(1, height));
    const [table, none, alarm] = [scale(), rgb(colour("panel")), rgb(colour("alarm"))];
    for (let k = 0; k < values.length; k++) {
      image.data[k * 4 + 3] = 255;
      if (!Number.isFinite(values[k])) image.data.set(alarm, k * 4);
      else if (values[k] === 0) image.data.set(none, k * 4);
      else {
        const n = Math.round(this.place(values[k]) * 255) * 3;
        image.data.set(table.subarray(n, n + 3), k * 4);
      }
    }
    return image;
  }

  numbers(pen) {
    const { values, width } = this.data;
    pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (let k = 0; k < values.length; k++) {
      const bare = !Number.isFinite(values[k]) || values[k] === 0;
      // Black on the scale's bright half, white on its dark one.
      pen.fillStyle = bare ? colour(values[k] === 0 ? "soft" : "paper") : this.place(values[k]) > 0.5 ? "#000" : "#fff";
      pen.fillText(signed(values[k], 3), ((k % width) + 0.5) * this.cellWidth, (Math.floor(k / width) + 0.5) * this.cellHeight);
    }
  }

  drawKey() {
    const { low, high } = this.data;
    const bar = h("canvas", { class: "key-bar", width: 128, height: 1, "aria-hidden": "true" });
    drawScale(bar);
    replace(this.key, h("span", {}, number(10 ** low, 2)), bar, h("span", {}, number(10 ** high, 2)),
      h("span", { class: "swatch none" }), say("page.key_zero"), h("span", { class: "swatch alarm" }), say("page.key_alarm"));
  }

  describe() {
    const { rows, cols, block, zeros, largest } = this.data;
    const parts = [
      say("page.matrix_rows", { first: count(rows[0]), last: count(rows[1] - 1), of: count(this.data.shape[0]) }),
      say("page.matrix_cols", { first: count(cols[0]), last: count(cols[1] - 1), of: count(this.data.shape[1]) }),
      this.single ? say("page.matrix_single") : say("page.matrix_block", { rows: count(block[0]), cols: count(block[1]) }),
      zeros ? say("page.matrix_zeros", { share: percent(zeros) }) : null,
    ].filter(Boolean);
    const big = largest && this.tensor.shape.length ? h("button", { type: "button", class: "link", onclick: () => this.opened(largest.index) },
      say("page.matrix_largest", { index: largest.index.join(", "), value: number(largest.value) })) : null;
    replace(this.facts, parts.join(" \u00b7 "), big && [" \u00b7 ", big], this.whole ? null : [" \u00b7 ",
      h("button", { type: "button", onclick: () => this.zoomed(null, null) }, say("page.matrix_whole"))]);
  }

  get whole() {
    const { rows, cols, shape } = this.data;
    return rows[1] - rows[0] === shape[0] && cols[1] - cols[0] === shape[1];
  }

  // The entries a cell stands for: [[row, row end], [column, column end]].
  entries(line, column) {
    const { rows, cols, block } = this.data;
    const r = rows[0] + line * block[0];
    const c = cols[0] + column * block[1];
    return [[r, Math.min(rows[1], r + block[0])], [c, Math.min(cols[1], c + block[1])]];
  }

  tell(line, column) {
    const value = this.data.values[line * this.data.width + column];
    const [[r, rEnd], [c, cEnd]] = this.entries(line, column);
    const place = this.single ? `[${fullIndex(r, c, this.tensor.shape).join(", ")}]` : `[${r}:${rEnd}, ${c}:${cEnd}]`;
    replace(this.read, place, "  ", Number.isFinite(value) ? (this.single ? signed(value) : number(value))
      : h("span", { class: "alarm" }, say("page.entry_alarm", { value: number(value) })));
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / this.cellWidth);
    const line = Math.floor((event.clientY - box.top) / this.cellHeight);
    return [Math.min(this.data.height - 1, Math.max(0, line)), Math.min(this.data.width - 1, Math.max(0, column))];
  }

  pointer() {
    let start = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button || !this.data) return;
      start = { cell: this.cellAt(event), x: event.clientX, y: event.clientY };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!this.data) return;
      const now = this.cellAt(event);
      this.tell(...now);
      if (start) this.box(start.cell, now, Math.hypot(event.clientX - start.x, event.clientY - start.y) > 5);
    });
    this.canvas.addEventListener("pointerup", (event) => {
      if (!start) return;
      const { cell: from, x, y } = start;
      start = null;
      this.band.hidden = true;
      if (Math.hypot(event.clientX - x, event.clientY - y) > 5) this.zoomTo(from, this.cellAt(event));
      else this.enter(...from);
    });
    this.canvas.addEventListener("pointercancel", () => { start = null; this.band.hidden = true; });
  }

  box(a, b, shown) {
    this.band.hidden = !shown;
    const [l0, l1] = [Math.min(a[0], b[0]), Math.max(a[0], b[0]) + 1];
    const [c0, c1] = [Math.min(a[1], b[1]), Math.max(a[1], b[1]) + 1];
    Object.assign(this.band.style, { left: `${c0 * this.cellWidth}px`, width: `${(c1 - c0) * this.cellWidth}px`,
      top: `${l0 * this.cellHeight}px`, height: `${(l1 - l0) * this.cellHeight}px` });
  }

  zoomTo(a, b) {
    const [[r0], [c0]] = this.entries(Math.min(a[0], b[0]), Math.min(a[1], b[1]));
    const [[, r1], [, c1]] = this.entries(Math.max(a[0], b[0]), Math.max(a[1], b[1]));
    this.zoomed([r0, r1], [c0, c1]);
  }

  // Into a cell: to its weight if it is one entry, else to where it is eight times as near.
  enter(line, column) {
    const [[r, rEnd], [c, cEnd]] = this.entries(line, column);
    if (this.single) {
      if (this.tensor.shape.length) this.opened(fullIndex(r, c, this.tensor.shape));
      return;
    }
    this.zoomed(...this.around((r + rEnd) / 2, (c + cEnd) / 2, 1 / 8));
  }

  around(row, column, factor) {
    const part = ([a, b], middle, all) => {
      const size = Math.min(all, Math.max(Math.min(all, 8), Math.ceil((b - a) * factor)));
      const from = Math.min(all - size, Math.max(0, Math.round(middle - size / 2)));
      return [from, from + size];
    };
    return [part(this.data.rows, row, this.data.shape[0]), part(this.data.cols, column, this.data.shape[1])];
  }

  zoom(factor) {
    const [[r, rEnd], [c, cEnd]] = this.at ? this.entries(...this.at) : [this.data.rows, this.data.cols];
    const [rows, cols] = this.around((r + rEnd) / 2, (c + cEnd) / 2, factor);
    const all = rows[1] - rows[0] === this.data.shape[0] && cols[1] - cols[0] === this.data.shape[1];
    this.zoomed(all ? null : rows, all ? null : cols);
  }

  keyboard(event) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!this.data || event.ctrlKey || event.metaKey || event.altKey) return;
    if (move) {
      const by = event.shiftKey ? 10 : 1;
      this.at ??= [0, 0];
      this.at = [Math.min(this.data.height - 1, Math.max(0, this.at[0] + move[0] * by)),
        Math.min(this.data.width - 1, Math.max(0, this.at[1] + move[1] * by))];
      this.tell(...this.at);
      this.mark();
    } else if (event.key === "Enter" && this.at) this.enter(...this.at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  mark() {
    this.here.hidden = !this.at;
    if (!this.at) return;
    Object.assign(this.here.style, { left: `${this.at[1] * this.cellWidth}px`, top: `${this.at[0] * this.cellHeight}px`,
      width: `${Math.max(4, this.cellWidth)}px`, height: `${Math.max(4, this.cellHeight)}px` });
  }

  csv() {
    const { values, width, height } = this.data;
    const lines = [`${cell(this.tensor.name)},${this.kind},${say("page.step")} ${this.step}`];
    for (let r = 0; r < height; r++) lines.push(Array.from(values.subarray(r * width, (r + 1) * width)).join(","));
    download(`${this.name}.csv`, lines.join("\n") + "\n", "text/csv");
  }

  leave() {
    this.watch.disconnect();
  }
}
