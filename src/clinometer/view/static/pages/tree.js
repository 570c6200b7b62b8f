// The parameter tree: filter, groups that fold, and for each parameter its line and latest value.

import { h, oncePerFrame, replace } from "../base/dom.js";
import { grouped, matcher } from "../base/groups.js";
import { LongList } from "../base/longlist.js";
import { number, shape } from "../base/number.js";
import { drawSpark, sparkline } from "../charts/spark.js";
import { say } from "../base/words.js";

const narrow = matchMedia("(max-width: 720px)");
const close = matchMedia("(max-width: 1100px)");

export class Tree {
  constructor({ tensors, filter = "", address, filtered }) {
    Object.assign(this, { tensors, address, filtered });
    this.folded = new Set();
    this.box = h("input", { type: "search", placeholder: say("page.filter"), "aria-label": say("page.filter"), value: filter,
      spellcheck: "false", autocomplete: "off", "data-filter": "" });
    this.tell = oncePerFrame(() => this.filtered(this.box.value));
    this.box.addEventListener("input", () => { this.lay(); this.tell(); });
    this.box.addEventListener("keydown", (event) => { if (event.key === "ArrowDown") { this.list.move(1); event.preventDefault(); } });
    this.number = h("span", { class: "quiet small" });
    this.list = new LongList({ height: narrow.matches ? 40 : 24, role: "tree", label: say("page.parameters"),
      make: (item) => this.make(item), draw: (element, item) => this.draw(element, item) });
    this.list.element.addEventListener("keydown", (event) => this.keyboard(event));
    this.none = h("p", { class: "empty", hidden: true }, say("page.no_match"));
    this.element = h("aside", { class: "tree", "aria-label": say("page.parameters") },
      h("header", {}, h("h2", {}, say("page.parameters")), this.number), h("div", { class: "tree-filter" }, this.box, h("kbd", {}, "/")),
      h("div", { class: "tree-scroll" }, this.list.element, this.none));
  }

  lay() {
    const shown = matcher(this.box.value);
    const wanted = this.tensors.filter((tensor) => shown(tensor.name));
    const items = [];
    for (const group of grouped(wanted)) {
      const folded = group.label && this.folded.has(group.label) && !this.box.value;
      if (group.label) items.push({ label: group.label, folded, size: group.rows.length });
      if (!folded) for (const row of group.rows) items.push({ ...row, deep: Boolean(group.label) });
    }
    this.none.hidden = wanted.length > 0;
    replace(this.number, wanted.length === this.tensors.length ? String(wanted.length)
      : say("page.some_of", { some: wanted.length, all: this.tensors.length }));
    this.list.set(items);
  }

  make(item) {
    if (item.label !== undefined && !item.tensor) {
      return h("button", { type: "button", class: "tree-group", role: "treeitem", "aria-level": "1", "aria-expanded": String(!item.folded),
        onclick: () => this.fold(item.label) }, h("span", { class: "fold" }, item.folded ? "+" : "\u2212"), item.label);
    }
    const { tensor, leaf, deep } = item;
    const [width, height] = narrow.matches ? [Math.max(96, this.element.clientWidth - 232), 28] : [close.matches ? 36 : 64, 18];
    return h("a", { class: deep ? "tree-leaf deep" : "tree-leaf", role: "treeitem", "aria-level": deep ? "2" : "1",
      href: this.address(tensor), title: `${tensor.name}  ${shape(tensor.shape)}  ${tensor.dtype}` },
    h("span", { class: "leaf-name" }, leaf.replace(/\.weight$/, "")), sparkline(width, height), h("span", { class: "leaf-value" }));
  }

  draw(element, { tensor }) {
    if (!tensor || !this.data) return;
    const row = this.data.row(tensor.id);
    const alarms = this.data.alarms(tensor.id);
    const [canvas, value] = [element.querySelector("canvas"), element.querySelector(".leaf-value")];
    drawSpark(canvas, row ?? [], { log: this.data.log, alarm: alarms });
    const latest = this.data.latest(tensor.id);
    element.classList.toggle("dead", this.data.dead.has(tensor.id));
    element.classList.toggle("bad", Boolean(alarms?.some(Boolean)));
    replace(value, Number.isNaN(latest) ? "\u2013" : number(latest, 3));
    element.href = element.getAttribute("href") && this.address(tensor);
  }

  show(data) {
    this.data = data;
    if (this.list.items.length || !this.tensors.length) this.list.redraw();
    else this.lay();
  }

  fold(label) {
    if (this.folded.has(label)) this.folded.delete(label);
    else this.folded.add(label);
    this.lay();
    const at = this.list.items.findIndex((item) => item.label === label && !item.tensor);
    if (at >= 0) this.list.choose(at);
  }

  keyboard(event) {
    const at = [...this.list.made].find(([, element]) => element === document.activeElement)?.[0];
    if (at === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    this.list.chosen = at;
    const item = this.list.items[at];
    if (event.key === "ArrowDown") this.list.move(1);
    else if (event.key === "ArrowUp") this.list.move(-1);
    else if (event.key === "Home") this.list.choose(0);
    else if (event.key === "End") this.list.choose(this.list.items.length - 1);
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      if (item.tensor || item.folded === (event.key === "ArrowLeft")) return;
      this.fold(item.label);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  leave() {
    this.list.leave();
  }
}
