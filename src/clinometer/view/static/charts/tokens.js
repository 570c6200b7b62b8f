// A batch's text, each token tinted by a number. Blanks that matter are made visible.

import { h, oncePerFrame } from "../base/dom.js";
import { tint } from "../base/settings.js";
import { say } from "../base/words.js";

export function visible(piece) {
  return piece.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t") || "∅";
}

// In a line of a table a token stands alone: its blanks too.
export function quoted(piece) {
  return `“${piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣")}”`;
}

// `value(b, s)` → number; `paint(value)` → [colour name, share 0 … 1] or null; `told(b, s)` on hover and focus; `open(b, s)` on a click.
export class TokenText {
  constructor({ pieces, first = 0, paint, told, open, label }) {
    Object.assign(this, { paint, told, open });
    this.spans = new Map();
    this.element = h("div", { class: "tokens", role: "list", "aria-label": label, tabindex: "0" }, pieces.map((row, k) => {
      const b = first + k;
      return h("div", { class: "sequence", role: "listitem" }, h("span", { class: "sequence-number quiet", title: say("page.sequence", { n: b }) }, b),
        h("p", {}, row.map((piece, s) => {
          const span = h("span", { class: "token", "data-at": `${b}:${s}` }, visible(piece));
          this.spans.set(`${b}:${s}`, span);
          return span;
        })));
    }));
    const at = (event) => event.target.closest?.(".token")?.dataset.at.split(":").map(Number);
    const tell = oncePerFrame((place) => this.told(...place));
    this.element.addEventListener("pointerover", (event) => { const place = at(event); if (place) tell(place); });
    this.element.addEventListener("click", (event) => { const place = at(event); if (place) this.choose(...place, true); });
    this.element.addEventListener("keydown", (event) => this.keyboard(event));
    this.order = [...this.spans.keys()];
    this.colour();
  }

  colour() {
    for (const [place, span] of this.spans) {
      const [b, s] = place.split(":").map(Number);
      const [name, share] = this.paint(b, s) ?? [];
      // At most half covered: the text keeps its contrast.
      span.style.backgroundColor = name && share > 0.01 ? tint(name, 0.06 + 0.44 * Math.min(1, share)) : "";
      span.classList.toggle("alarm", name === "alarm");
    }
  }

  choose(b, s, opened = false) {
    this.element.querySelector(".token.chosen")?.classList.remove("chosen");
    const span = this.spans.get(`${b}:${s}`);
    if (!span) return;
    this.at = `${b}:${s}`;
    span.classList.add("chosen");
    span.scrollIntoView({ block: "nearest" });
    this.told(b, s);
    if (opened) this.open?.(b, s);
  }

  keyboard(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (by) {
      const next = this.at === undefined ? 0 : this.order.indexOf(this.at) + by;
      if (next >= 0 && next < this.order.length) this.choose(...this.order[next].split(":").map(Number));
    } else if (event.key === "Enter" && this.at !== undefined) this.open?.(...this.at.split(":").map(Number));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

// Sequences are shown eight at a time.
export function pager({ row, rows, sequences, turn }) {
  if (sequences <= rows) return null;
  return h("div", { class: "pager" },
    h("button", { type: "button", disabled: row <= 0, onclick: () => turn(Math.max(0, row - rows)) }, "\u2190"),
    h("span", { class: "quiet" }, say("page.sequences", { first: row, last: Math.min(sequences, row + rows) - 1, of: sequences })),
    h("button", { type: "button", disabled: row + rows >= sequences, onclick: () => turn(row + rows) }, "\u2192"));
}
