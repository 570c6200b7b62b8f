// The gradient map: parameters in the order of the forward × steps, the newest at the right.

import { gutter } from "./chart.js";
import { h, oncePerFrame, replace } from "../base/dom.js";
import { layRows, paintMap } from "./mappaint.js";
import { count, number } from "../base/number.js";
import { download, cell, saveButtons } from "./save.js";
import { colour, drawScale } from "../base/settings.js";
import { timePointer } from "./timeaxis.js";
import { altered, go } from "../base/url.js";
import { say } from "../base/words.js";

const RIGHT = 24;

export class GradientMap {
  constructor({ axis, choices, open, name }) {
    Object.assign(this, { axis, open, name });
    this.tall = false;
    this.shown = () => true;
    this.caption = h("p", { class: "caption" });
    this.unit = h("span", { class: "unit" });
    this.key = h("div", { class: "map-key" });
    this.canvas = h("canvas", { class: "map-canvas", tabindex: "0", role: "application", "aria-label": say("page.map_label") });
    this.hair = h("div", { class: "hair", hidden: true });
    this.band = h("div", { class: "band", hidden: true });
    this.tip = h("div", { class: "tip", hidden: true });
    this.body = h("div", { class: "chart-body map-body" }, this.canvas, this.hair, this.band, this.tip,
      h("span", { class: "axis-name" }, say("page.step")));
    this.size = h("button", { type: "button", onclick: () => { this.tall = !this.tall; this.paint(); } });
    this.element = h("section", { class: "chart map", "data-chart": "map" },
      h("header", {}, h("h2", {}, say("page.map"), " ", this.unit), this.caption,
        saveButtons({ PNG: () => this.png(), SVG: () => this.vector(), CSV: () => this.csv() })),
      h("div", { class: "map-bar" }, choices, this.key, this.size), this.body);
    this.skeleton = h("div", { class: "skeleton frame-map" });
    this.body.prepend(this.skeleton);
    this.canvas.hidden = true;
    axis.members.add(this);
    timePointer(this.canvas, axis, () => this.geometry(), {
      select: (a, b) => this.select(a, b), moved: (step, event) => this.point(step, event),
      clicked: (step, event) => { const row = this.under(event); if (row) this.open(row.tensor, step); },
    });
    this.canvas.addEventListener("keydown", (event) => this.keyboard(event));
    this.canvas.addEventListener("blur", () => { this.at = null; this.hideTip(); });
    this.paintSoon = oncePerFrame(() => this.paint());
    this.watch = new ResizeObserver(() => { if (this.body.clientWidth !== this.width) this.paintSoon(); });
    this.watch.observe(this.body);
  }

  geometry() {
    return { left: gutter(), width: this.body.clientWidth - gutter() - RIGHT };
  }

  show(data, tensors, shown = this.shown) {
    Object.assign(this, { data, tensors, shown });
    replace(this.caption, data.caption ?? "");
    this.caption.title = data.caption ?? "";
    replace(this.unit, [data.label, data.unit].filter(Boolean).join(" · "));
    this.skeleton.remove();
    this.paint();
  }

  filter(shown) {
    this.shown = shown;
    this.paint();
  }

  paint() {
    if (!this.data || !this.body.isConnected || !this.body.clientWidth) return;
    this.canvas.hidden = false;
    this.width = this.body.clientWidth;
    this.lay = layRows(this.tensors.filter((tensor) => this.shown(tensor.name)), this.tall);
    this.size.hidden = !this.lay.squeezed && !this.tall;
    replace(this.size, this.tall ? say("page.map_fit") : say("page.map_names"));
    paintMap(this.canvas, this.data, this.lay, { ...this.geometry(), total: this.width, range: this.axis.range });
    this.drawKey();
  }

  drawKey() {
    const { data } = this;
    const bar = h("canvas", { class: "key-bar", width: 128, height: 1, "aria-hidden": "true" });
    drawScale(bar);
    const end = (at) => number(data.log ? 10 ** at : at, 2);
    replace(this.key, h("span", {}, end(data.low)), bar, h("span", {}, end(data.high)),
      h("span", { class: "swatch hatch" }), say("page.key_dead"), h("span", { class: "swatch alarm" }), say("page.key_alarm"));
  }

  under(event) {
    const y = event.clientY - this.canvas.getBoundingClientRect().top;
    return this.lay?.rows.find((row) => y >= row.top && y < row.top + row.height) ?? null;
  }

  point(step, event) {
    const row = event.type === "pointerleave" ? null : this.under(event);
    if (step === null || !row || !this.data.step.length) return this.hideTip();
    this.canvas.style.cursor = "pointer";
    this.describe(row, this.data.column(step), event.offsetX, row.top + row.height);
  }

  describe(row, column, x, y) {
    const { data } = this;
    const [first, last] = data.steps(column);
    const value = data.value(row.tensor.id, column);
    const bad = data.alarms(row.tensor.id)?.[column];
    const where = first === last ? say("page.at_step", { step: count(first) })
      : say("page.at_steps", { first: count(first), last: count(last) });
    const rank = data.rank(row.tensor.id, column);
    replace(this.tip, h("b", { class: "mono" }, row.tensor.name), h("br"), where, " \u00b7 ",
      bad ? h("span", { class: "alarm" }, say("page.cell_alarm")) : Number.isNaN(value) ? say("page.cell_none")
        : `${data.label} ${number(value)}`,
      rank && !bad ? h("span", { class: "quiet" }, " \u00b7 ", say("page.rank", { rank, of: data.rows })) : null);
    this.tip.hidden = false;
    const room = this.body.clientWidth - this.tip.offsetWidth - 8;
    this.tip.style.left = `${Math.max(0, Math.min(room, x + 12))}px`;
    this.tip.style.top = `${y + 8}px`;
    paintMap.mark(this.canvas, this.lay, row);
  }

  hideTip() {
    this.tip.hidden = true;
    if (this.lay) paintMap.mark(this.canvas, this.lay, null);
  }

  keyboard(event) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!this.lay?.rows.length || !this.data.step.length || event.ctrlKey || event.metaKey || event.altKey) return;
    if (move) {
      this.at ??= { row: 0, column: this.data.columns - 1 };
      const far = event.shiftKey ? 10 : 1;
      this.at.row = Math.min(this.lay.rows.length - 1, Math.max(0, this.at.row + move[0] * far));
      this.at.column = Math.min(this.data.columns - 1, Math.max(0, this.at.column + move[1] * far));
      const row = this.lay.rows[this.at.row];
      const step = this.data.step[this.at.column];
      this.axis.hover(step);
      this.describe(row, this.at.column, this.pixel(step), row.top + row.height);
      this.canvas.setAttribute("aria-description", this.tip.textContent);
    } else if (event.key === "Enter" && this.at) {
      this.open(this.lay.rows[this.at.row].tensor, this.data.step[this.at.column]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  pixel(step) {
    const { left, width } = this.geometry();
    const [a, b] = this.axis.range;
    return left + ((step - a) / (b - a)) * width;
  }

  cursor(step) {
    this.hair.hidden = step === null;
    if (step !== null) this.hair.style.left = `${this.pixel(step)}px`;
  }

  select(a, b) {
    this.band.hidden = a === null;
    if (a === null) return;
    const [from, to] = [this.pixel(Math.min(a, b)), this.pixel(Math.max(a, b))];
    this.band.style.left = `${from}px`;
    this.band.style.width = `${to - from}px`;
  }

  png() {
    const copy = h("canvas", { width: this.canvas.width, height: this.canvas.height });
    const pen = copy.getContext("2d");
    pen.fillStyle = colour("paper");
    pen.fillRect(0, 0, copy.width, copy.height);
    pen.drawImage(this.canvas, 0, 0);
    copy.toBlob((blob) => download(`${this.name}.png`, blob));
  }

  // The cells as an embedded image, the names as text.
  vector() {
    download(`${this.name}.svg`, paintMap.svg(this.canvas, this.lay, this.geometry(), this.caption.textContent), "image/svg+xml");
  }

  csv() {
    const { data } = this;
    const lines = [["parameter", ...data.step].join(",")];
    for (const { tensor } of this.lay.rows) {
      lines.push([cell(tensor.name), ...Array.from(data.row(tensor.id) ?? [], (v) => (Number.isNaN(v) ? "" : v))].join(","));
    }
    download(`${this.name}.csv`, lines.join("\n") + "\n", "text/csv");
  }

  leave() {
    this.watch.disconnect();
    this.axis.members.delete(this);
  }
}

// What colours the map: the statistics, the chosen one in the address.
export function statisticChoice(info, chosen, title = say("page.coloured_by")) {
  const select = h("select", { "aria-label": say("page.statistic"), onchange: () => go(altered({ stat: select.value })) },
    info.choices.map(({ name, label }) => h("option", { value: name, selected: name === chosen }, label)));
  return h("label", {}, h("span", { class: "quiet" }, title, " "), select);
}
