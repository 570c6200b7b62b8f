// A list of equal rows of which only those on screen are made: thousands of parameters stay quick.

import { h, oncePerFrame } from "./dom.js";

const FEW = 120;   // so many are simply made: the browser's own search finds them

export class LongList {
  // `make(item)` gives a row's element; `draw(element, item)` fills in what changes.
  constructor({ height, make, draw, role = "list", label }) {
    Object.assign(this, { height, make, draw });
    this.items = [];
    this.made = new Map();
    this.chosen = -1;
    this.element = h("div", { class: "long-list", role, "aria-label": label });
    this.soon = oncePerFrame(() => this.render());
    document.addEventListener("scroll", this.soon, { capture: true, passive: true });
    addEventListener("resize", this.soon);
  }

  set(items) {
    this.items = items;
    this.element.style.height = `${items.length * this.height}px`;
    for (const element of this.made.values()) element.remove();
    this.made.clear();
    this.chosen = Math.min(this.chosen, items.length - 1);
    this.render();
  }

  span() {
    if (this.items.length <= FEW) return [0, this.items.length];
    const box = this.element.getBoundingClientRect();
    const frame = this.element.parentElement.getBoundingClientRect();
    const top = Math.max(0, frame.top);
    const bottom = Math.min(innerHeight, frame.bottom);
    const first = Math.floor((top - box.top) / this.height) - 4;
    const last = Math.ceil((bottom - box.top) / this.height) + 4;
    return [Math.max(0, first), Math.min(this.items.length, last)];
  }

  render() {
    if (!this.element.isConnected) return;
    const [first, last] = this.span();
    for (const [at, element] of this.made) {
      if ((at < first || at >= last) && !element.contains(document.activeElement)) {
        element.remove();
        this.made.delete(at);
      }
    }
    for (let at = first; at < last; at++) this.row(at);
  }

  row(at) {
    let element = this.made.get(at);
    if (!element) {
      element = this.make(this.items[at]);
      element.classList.add("long-row");
      element.style.top = `${at * this.height}px`;
      element.setAttribute("aria-posinset", at + 1);
      element.setAttribute("aria-setsize", this.items.length);
      this.made.set(at, element);
      // In the order of the list, so that tab goes from row to row.
      const next = [...this.made.keys()].filter((k) => k > at).sort((a, b) => a - b)[0];
      this.element.insertBefore(element, next === undefined ? null : this.made.get(next));
      this.draw(element, this.items[at]);
    }
    return element;
  }

  redraw() {
    for (const [at, element] of this.made) this.draw(element, this.items[at]);
    this.render();
  }

  move(by) {
    if (!this.items.length) return;
    this.choose(Math.min(this.items.length - 1, Math.max(0, this.chosen < 0 ? (by > 0 ? 0 : this.items.length - 1) : this.chosen + by)));
  }

  choose(at) {
    this.chosen = at;
    const element = this.row(at);
    element.scrollIntoView({ block: "nearest" });
    element.focus({ preventScroll: true });
  }

  leave() {
    document.removeEventListener("scroll", this.soon, { capture: true });
    removeEventListener("resize", this.soon);
  }
}
