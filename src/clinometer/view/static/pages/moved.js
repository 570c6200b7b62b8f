// The tensors that one token of a replayed batch moved most, each a link to its page.

import { get, ofRun } from "../base/api.js";
import { h, replace } from "../base/dom.js";
import { number, percent } from "../base/number.js";
import { replayOffer } from "./replay.js";
import { address } from "../base/url.js";
import { say } from "../base/words.js";

export class Moved {
  constructor(info, step, signal) {
    Object.assign(this, { info, step, signal });
    this.element = h("aside", { class: "moved", "aria-live": "polite" }, h("p", { class: "quiet" }, say("page.moved_hint")));
  }

  async show(sequence, position) {
    this.asked = `${sequence},${position}`;
    const mine = this.asked;
    let answer;
    try {
      answer = await get(ofRun(this.info.id, "token"), { step: this.step, position: mine }, this.signal);
    } catch (reason) {
      if (reason.name === "AbortError") return;
      answer = { state: "failed", text: reason.message };
    }
    if (mine !== this.asked) return;   // another token was chosen meanwhile
    const title = h("h2", {}, say("page.moved"), " ", h("span", { class: "unit" }, say("page.moved_unit", { sequence, position })));
    if (answer.state === "failed") replace(this.element, title, h("p", { class: "alarm" }, answer.text));
    else if (answer.state === "older") {
      replace(this.element, title, h("p", {}, say("page.moved_older")), h("p", {}, say("page.moved_again")),
        replayOffer(this.info, { run: this.info.id, step: this.step, signal: this.signal, done: () => this.show(sequence, position) }));
    } else replace(this.element, title, h("p", { class: "quiet small" }, say("page.moved_line")), this.table(answer.tensors));
  }

  table(tensors) {
    const row = (one) => h("tr", {},
      h("th", { scope: "row" }, h("a", { class: "mono", href: address({ run: this.info.id, page: "tensor", tensor: one.name, step: this.step }) }, one.name)),
      h("td", { class: one.finite ? "number" : "number alarm" }, one.finite ? number(one.norm) : say("page.not_finite")),
      h("td", { class: "number quiet" }, one.share === null ? "\u2013" : percent(one.share)));
    return h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, say("page.moved_tensor")),
      h("th", { class: "number", scope: "col" }, say("page.moved_norm")), h("th", { class: "number", scope: "col" }, say("page.moved_share")))),
    h("tbody", {}, tensors.map(row)));
  }
}
