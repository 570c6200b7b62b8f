// One chart: title, its one line, the plot, and what it is worth at the cursor. The figure comes from the server.

import { get } from "../base/api.js";
import { h, replace } from "../base/dom.js";
import { number, percent } from "../base/number.js";
import { numbers, plotly } from "./plotly.js";
import { saveButtons, saveFigure } from "./save.js";
import { colour, drawScale, theme } from "../base/settings.js";
import { timePointer } from "./timeaxis.js";
import { say } from "../base/words.js";

const RIGHT = 24;

export function gutter() {
  return parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--gutter"));
}

export class Chart {
  // `axis`: a TimeAxis it shares, or null. `side`: values stand in the left gutter (else above the plot).
  constructor({ title, path, query = () => ({}), axis = null, height = 160, side = false, name, click = null }) {
    Object.assign(this, { title, path, query, axis, height, side, name, click });
    this.caption = h("p", { class: "caption" });
    this.unit = h("span", { class: "unit" });
    this.legend = h("div", { class: "legend" });
    this.plot = h("div", { class: "plot", role: "img", "aria-label": title });
    this.hair = h("div", { class: "hair", hidden: true });
    this.band = h("div", { class: "band", hidden: true });
    this.foot = axis && h("span", { class: "axis-name" }, say("page.step"));
    this.body = h("div", { class: "chart-body" }, this.legend, this.plot, this.hair, this.band, this.foot);
    const save = (kind) => this.figure && saveFigure(this.figure, name, kind, {
      title, caption: this.caption.textContent, width: Math.max(480, this.plot.clientWidth), height: this.height,
    });
    this.element = h("section", { class: side ? "chart side" : "chart", "data-chart": name },
      h("header", {}, h("h2", {}, title, " ", this.unit), this.caption,
        saveButtons({ PNG: () => save("PNG"), SVG: () => save("SVG"), CSV: () => save("CSV") })),
      this.body);
    this.skeleton = h("div", { class: "skeleton" });
    this.skeleton.style.height = this.plot.style.height = `${height}px`;
    this.plot.append(this.skeleton);
    if (axis) {
      axis.members.add(this);
      timePointer(this.body, axis, () => this.geometry(), { select: (a, b) => this.select(a, b) });
    }
    this.watch = new ResizeObserver(() => this.fit());
    this.watch.observe(this.plot);
  }

  get left() {
    return this.side ? gutter() : 56;
  }

  geometry() {
    return { left: this.left, width: this.plot.clientWidth - this.left - RIGHT };
  }

  async load(signal) {
    const answer = await get(this.path, { theme: theme(), ...this.query() }, signal);
    replace(this.caption, answer.caption ?? "");
    this.caption.title = answer.caption ?? "";
    if (!answer.figure) {
      this.clear();
      replace(this.plot, h("p", { class: "empty" }, answer.empty ?? say("page.nothing")));
      return;
    }
    this.figure = answer.figure;
    await this.draw();
    if (signal?.aborted) this.clear();
  }

  async draw() {
    const Plotly = await plotly();
    if (!this.plot.isConnected) return;
    if (!this.drawn) this.plot.replaceChildren();
    const { data, layout } = this.dressed();
    await Plotly.react(this.plot, data, layout, { displayModeBar: false, responsive: false, doubleClick: false });
    if (!this.drawn && this.click) {
      this.plot.on("plotly_click", (event) => this.click(event.points[0]));
    }
    this.drawn = true;
    this.width = this.plot.clientWidth;
    this.legendRows();
  }

  // The page's type and margins over the server's figure; the y title stands beside the chart's title.
  dressed() {
    const layout = structuredClone(this.figure.layout);
    const font = getComputedStyle(document.body).fontFamily;
    delete layout.uirevision;
    delete layout.width;
    replace(this.unit, unitOf(layout));
    Object.assign(layout, {
      height: this.height, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, family: font, size: 11, color: colour("soft") },
    });
    for (const name of Object.keys(layout).filter((key) => /^yaxis\d*$/.test(key))) {
      Object.assign(layout[name], { title: { text: "" }, fixedrange: true, automargin: !this.axis });
      if (layout[name].type === "log") logTicks(layout[name], this.figure.data, name.replace("axis", ""));
    }
    for (const note of layout.annotations ?? []) Object.assign(note, { bgcolor: colour("paper"), opacity: 0.9, borderpad: 1 });
    if (!this.axis) {
      layout.xaxis = { ...layout.xaxis, fixedrange: true };
      layout.margin = { l: 56, r: 16, t: 8, b: 40, ...(this.margin ?? {}) };
      layout.dragmode = false;
      // Plotly shrinks a bar's number to the bar's width; on a phone that leaves dots.
      const narrow = this.plot.clientWidth < 480;
      const data = this.figure.data.map((trace) => (narrow && trace.type === "waterfall"
        ? { ...trace, constraintext: "none", textfont: { size: 9 } } : trace));
      return { data, layout };
    }
    layout.margin = { l: this.left, r: RIGHT, t: 8, b: 22 };
    layout.xaxis = { ...layout.xaxis, title: { text: "" }, range: this.axis.range, autorange: false, fixedrange: true, automargin: false,
      nticks: Math.max(3, Math.round(this.plot.clientWidth / 120)) };
    layout.hovermode = false;
    layout.showlegend = false;
    layout.dragmode = false;
    return { data: this.figure.data.map((trace) => (trace.z ? { ...trace, showscale: false } : trace)), layout };
  }

  legendRows() {
    this.rows = [];
    if (!this.axis) return;
    const named = this.figure.data.filter((trace) => trace.name && trace.showlegend !== false && trace.y);
    for (const trace of named) {
      const mark = h("span", { class: (trace.line?.dash ?? "solid") === "solid" ? "mark" : "mark dashed" });
      mark.style.setProperty("--mark", trace.line?.color ?? trace.marker?.color ?? colour("ink"));
      const value = h("span", { class: "value" });
      const label = String(trace.name).replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
      this.rows.push({ x: numbers(trace.x), y: numbers(trace.y), value,
        row: h("div", { class: "legend-row", title: label }, mark, h("span", { class: "label" }, label), value) });
    }
    replace(this.legend, this.rows.map((row) => row.row), this.figure.data.filter((trace) => trace.z).map(heatKey));
    this.read(null);
  }

  read(step) {
    for (const { x, y, value } of this.rows ?? []) {
      const at = step === null ? y.length - 1 : nearest(x, step);
      value.textContent = at < 0 ? "\u2013" : number(y[at]);
    }
  }

  cursor(step) {
    this.hair.hidden = step === null;
    if (step !== null) this.hair.style.left = `${this.pixel(step)}px`;
    this.read(step);
  }

  pixel(step) {
    const { left, width } = this.geometry();
    const [a, b] = this.axis.range;
    return left + ((step - a) / (b - a)) * width;
  }

  select(a, b) {
    this.band.hidden = a === null;
    if (a === null) return;
    const [from, to] = [this.pixel(Math.min(a, b)), this.pixel(Math.max(a, b))];
    this.band.style.left = `${from}px`;
    this.band.style.width = `${to - from}px`;
  }

  async fit() {
    if (!this.drawn || !this.plot.isConnected || this.plot.clientWidth === this.width || !this.plot.clientWidth) return;
    await this.draw();
  }

  clear() {
    if (this.drawn) globalThis.Plotly.purge(this.plot);
    this.drawn = false;
    this.figure = null;
    replace(this.legend);
    this.rows = [];
  }

  leave() {
    this.watch.disconnect();
    this.axis?.members.delete(this);
    this.clear();
  }
}

// Of one axis, what stands in brackets at the end of its title, as the title itself would repeat the chart's.
function unitOf(layout) {
  const titles = Object.keys(layout).filter((key) => /^yaxis\d*$/.test(key) && layout[key].visible !== false)
    .map((key) => (layout[key].title?.text ?? "").replace(/<[^>]*>/g, "")).filter(Boolean);
  if (titles.length !== 1) return titles.join(" \u00b7 ");
  const unit = /[(（]([^()（）]*)[)）]\s*$/.exec(titles[0]);
  return unit ? `(${unit[1]})` : titles[0];
}

// On a log axis a label at every decade; where there are hardly two of them to see, at 1, 2 and 5 between, or
// closer still. Plotly's own labels between decades are digits without their power of ten: "5" for 0.5.
const BETWEEN = [[1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7], Array.from({ length: 90 }, (_, i) => 1 + i / 10)];

function logTicks(axis, data, id) {
  let [low, high] = [Infinity, -Infinity];
  for (const trace of data) {
    if ((trace.yaxis ?? "y") !== id) continue;
    for (const value of numbers(trace.y)) {
      if (value > 0 && value < low) low = value;
      if (value > high && Number.isFinite(value)) high = value;
    }
  }
  if (axis.range) [low, high] = axis.range.map((power) => 10 ** power);
  const decades = high > 0 ? Math.log10(high / low) : 4;
  axis.exponentformat = "e";
  if (!(decades < 1.8)) {
    axis.dtick = Math.ceil(decades / 4);
    return;
  }
  const powers = [-1, 0, 1, 2].map((more) => Math.floor(Math.log10(low)) + more);
  const between = (digits) => powers.flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`)))
    .filter((value) => value >= low * 0.98 && value <= high * 1.02);
  let ticks = [];
  for (const digits of BETWEEN) if (ticks.length < 2) ticks = between(digits);
  axis.tickvals = ticks;
  axis.ticktext = ticks.map((value) => (value >= 1e-3 && value < 1e4 ? String(value) : value.toExponential()));
}

function heatKey(trace) {
  const bar = h("canvas", { class: "key-bar", width: 128, height: 1, "aria-hidden": "true" });
  drawScale(bar);
  const share = (value, fallback) => percent(value ?? fallback);
  return h("div", { class: "map-key" }, trace.colorbar?.title?.text ?? "", h("span", {}, share(trace.zmin, 0)), bar, h("span", {}, share(trace.zmax, 1)));
}

// The last point at or before `step` (the points stand in order), else the first.
function nearest(x, step) {
  let [low, high] = [0, x.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (x[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return high;
}
