// Weight: what one step did to it and why, its history, and the tokens that pushed it.

import { get, ofRun } from "../base/api.js";
import { Chart } from "../charts/chart.js";
import { h, replace } from "../base/dom.js";
import { number, percent, shape, signed } from "../base/number.js";
import { replayOffer, stepChooser } from "./replay.js";
import { notice } from "../base/states.js";
import { TimeAxis } from "../charts/timeaxis.js";
import { TokenText, pager, quoted } from "../charts/tokens.js";
import { address, altered, go } from "../base/url.js";
import { say } from "../base/words.js";

export async function weightPage({ main, state, info, signal, frame }) {
  const tensor = info.tensors.find((one) => one.name === state.tensor);
  const index = (state.index ?? "").split(",").filter(Boolean).map(Number);
  const fits = tensor && index.length === tensor.shape.length && index.every((n, k) => Number.isInteger(n) && n >= 0 && n < tensor.shape[k]);
  frame();
  if (!fits) {
    replace(main, notice(say("page.no_weight"), [say("page.no_weight_help", { index: state.index ?? "", name: state.tensor ?? "",
      shape: tensor ? shape(tensor.shape) : "\u2013" })]));
    return {};
  }
  const pinned = info.pinned.some((one) => one.name === tensor.name && one.index.join() === index.join());
  const step = state.step ?? info.replays.at(-1) ?? info.last_step;
  const which = { tensor: tensor.name, index: index.join(",") };
  const title = `${tensor.name}[${index.join(", ")}]`;
  const axis = new TimeAxis({ zoom: (from, to) => go(altered({ from, to })), open: (one) => go(altered({ step: one })) });
  const whole = () => [info.first_step ?? 0, Math.max(info.last_step ?? 0, (info.first_step ?? 0) + 1)];
  axis.show(whole(), state.from, state.to);
  const name = `${tensor.name}-${index.join("-")}`;
  const waterfall = new Chart({ title: say("page.waterfall"), path: ofRun(info.id, "figure/waterfall"), name: `step-${step}-${name}`, height: 264,
    query: () => ({ ...which, step }) });
  waterfall.margin = { b: 28, l: 84 };
  const history = pinned ? new Chart({ title: say("page.history"), path: ofRun(info.id, "figure/weight-history"), name: `history-${name}`, height: 264, axis,
    query: () => ({ ...which, from: state.from, to: state.to }) }) : null;
  const text = h("section", { class: "weight-text" });
  const anatomy = h("div", { class: "anatomy" });
  const offer = h("div");
  const entry = h("dl", { class: "fact-line" });
  let row = 0;

  async function load() {
    const answer = await get(ofRun(info.id, "weight"), { ...which, step, row, rows: 8 }, signal);
    const values = answer.entry ?? answer.recorded ?? {};
    const labels = { before: say("page.theta_before"), after: say("page.theta_after"), grad: say("page.kind_grad"),
      exp_avg: say("page.kind_exp_avg"), exp_avg_before: say("page.kind_exp_avg"), exp_avg_sq: say("page.v"), exp_avg_sq_before: say("page.v") };
    replace(entry, Object.entries(labels).filter(([key]) => values[key] !== undefined && values[key] !== null)
      .map(([key, label]) => h("div", { "data-entry": key }, h("dt", {}, label), h("dd", {}, signed(values[key])))));
    replace(anatomy, answer.anatomy_text ? h("pre", {}, answer.anatomy_text.split("\n").map((line) => h("span", { class: "line" }, line || " "))) : null);
    if (answer.state === "ready") replace(offer);
    else {
      replace(offer, replayOffer(info, { run: info.id, step, tensor: tensor.name, index, signal, done: async () => {
        if (!info.replays.includes(step)) info.replays = [...info.replays, step].sort((a, b) => a - b);
        await Promise.all([load(), waterfall.load(signal)]);
      } }));
    }
    tokens(answer);
  }

  function tokens(answer) {
    if (!answer.tokens || !answer.pieces) { replace(text); return; }
    const pushes = answer.attribution?.top ?? [];
    let largest = Math.max(0, ...pushes.map((push) => Math.abs(push.value)));
    for (const line of answer.tokens) for (const share of line) if (Math.abs(share) > largest) largest = Math.abs(share);
    const share = (b, s) => answer.tokens[b - answer.row]?.[s] ?? null;
    const read = h("p", { class: "token-read mono", "aria-live": "polite" }, say("page.token_hint"));
    const shown = new TokenText({ pieces: answer.pieces, first: answer.row, label: say("page.batch_text"),
      paint: (b, s) => {
        const value = share(b, s);
        return value === null ? ["alarm", 0] : [value > 0 ? "raise" : "lower", Math.sqrt(Math.abs(value) / (largest || 1))];
      },
      told: (b, s) => replace(read, quoted(answer.pieces[b - answer.row]?.[s] ?? ""), ` ${b}:${s}  ${share(b, s) === null ? say("page.not_finite") : signed(share(b, s))}  `,
        share(b, s) > 0 ? say("page.raises") : share(b, s) < 0 ? say("page.lowers") : ""),
      open: (b, s) => go(address({ run: info.id, page: "batch", step, token: `${b}:${s}` })) });
    const total = answer.attribution?.gradient;
    replace(text, h("h2", {}, say("page.who_pushed"), " ", h("span", { class: "unit" }, say("page.who_pushed_unit"))),
      h("div", { class: "map-key" }, h("span", { class: "swatch lower" }), say("page.lowers"), h("span", { class: "swatch raise" }), say("page.raises"),
        total === undefined || total === null ? null : h("span", { class: "quiet" }, say("page.gradient_is", { value: signed(total) }))),
      h("div", { class: "text-columns" },
        h("div", {}, read, shown.element, pager({ row: answer.row, rows: answer.rows, sequences: answer.sequences, turn: (next) => { row = next; load(); } })),
        pushes.length ? h("div", { class: "strongest" }, h("h3", {}, say("page.strongest")), h("table", {}, h("tbody", {}, pushes.slice(0, 10).map((push) =>
          h("tr", {}, h("td", { class: push.value > 0 ? "raise" : "lower" }, push.value > 0 ? "\u25b2" : "\u25bc"),
            h("td", {}, h("a", { href: address({ run: info.id, page: "batch", step, token: push.position.join(":") }), class: "mono" }, quoted(push.text ?? ""))),
            h("td", { class: "number quiet" }, push.position.join(":")), h("td", { class: "number" }, signed(push.value, 3)),
            h("td", { class: "number quiet" }, percent(push.share))))))) : null));
  }

  replace(main, h("div", { class: "page-weight" },
    h("div", { class: "tensor-head" }, h("h1", { class: "mono" }, title), entry,
      stepChooser(info, step, (one) => go(altered({ step: one })))),
    offer, h("div", { class: "weight-columns" }, waterfall.element, anatomy), history?.element ?? h("p", { class: "quiet small" },
      say("page.not_pinned", { name: tensor.name, index: index.join(", ") })), text));
  await Promise.all([load(), waterfall.load(signal), history?.load(signal)]);

  const near = (by) => {
    const all = info.replays;
    const next = by > 0 ? all.find((one) => one > step) : all.findLast((one) => one < step);
    if (next !== undefined) go(altered({ step: next }));
  };
  return {
    async update(next, before) {
      if (next.step !== before.step || next.index !== before.index || next.tensor !== before.tensor) return false;
      state = next;
      axis.show(whole(), state.from, state.to);
      await history?.load(signal);
      return true;
    },
    refresh: history ? () => history.load(signal) : async () => {},
    leave() {
      waterfall.leave();
      history?.leave();
    },
    keys: {
      j: () => near(1), k: () => near(-1),
      Enter: () => document.querySelector("[data-replay]")?.click(),
      ArrowLeft: () => axis.nudge("left"), ArrowRight: () => axis.nudge("right"), "0": () => axis.onZoom(null, null),
      "+": () => axis.nudge("in"), "=": () => axis.nudge("in"), "-": () => axis.nudge("out"),
      Escape: () => { if (!axis.zoomed) return false; axis.onZoom(null, null); return true; },
    },
  };
}
