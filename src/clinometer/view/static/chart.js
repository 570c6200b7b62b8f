// One chart: title, its one line, the plot, and what it is worth at the cursor. The figure comes from the server.

import { get } from "./api.js";
import { h, replace } from "./dom.js";
import { number } from "./number.js";
import { numbers, plotly } from "./plotly.js";
import { saveButtons, saveFigure } from "./save.js";
import { colour, theme } from "./settings.js";
import { timePointer } from "./timeaxis.js";
import { say } from "./words.js";

const RIGHT = 40;

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
    replace(this.unit, layout.yaxis?.title?.text?.replace(/<[^>]*>/g, "") ?? "");
    Object.assign(layout, {
      height: this.height, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, family: font, size: 11, color: colour("soft") },
    });
    if (layout.yaxis) {
      layout.yaxis = { ...layout.yaxis, title: { text: "" }, fixedrange: true, automargin: !this.axis };
    }
    if (!this.axis) {
      layout.xaxis = { ...layout.xaxis, fixedrange: true };
      layout.margin = { l: 56, r: 16, t: 8, b: 40, ...(this.margin ?? {}) };
      layout.dragmode = false;
      return { data: this.figure.data, layout };
    }
    layout.margin = { l: this.left, r: RIGHT, t: 8, b: 22 };
    layout.xaxis = { ...layout.xaxis, title: { text: "" }, range: this.axis.range, autorange: false, fixedrange: true,
      nticks: Math.max(3, Math.round(this.plot.clientWidth / 120)) };
    layout.hovermode = false;
    layout.showlegend = false;
    layout.dragmode = false;
    return { data: this.figure.data, layout };
  }

  legendRows() {
    this.rows = [];
    if (!this.axis) return;
    const named = this.figure.data.filter((trace) => trace.name && trace.showlegend !== false && trace.y);
    for (const trace of named) {
      const mark = h("span", { class: "mark" });
      mark.style.background = trace.line?.color ?? trace.marker?.color ?? colour("ink");
      const value = h("span", { class: "value" });
      const label = String(trace.name).replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
      this.rows.push({ x: numbers(trace.x), y: numbers(trace.y), value,
        row: h("div", { class: "legend-row", title: label }, mark, h("span", { class: "label" }, label), value) });
    }
    replace(this.legend, this.rows.map((row) => row.row));
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
