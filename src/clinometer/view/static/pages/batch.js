// Batch: the text of a step, by loss and by gradient norm of each token.

import { get, ofRun } from "../base/api.js";
import { Chart } from "../charts/chart.js";
import { h, replace } from "../base/dom.js";
import { number } from "../base/number.js";
import { Moved } from "./moved.js";
import { replayOffer, stepChooser } from "./replay.js";
import { notice } from "../base/states.js";
import { TokenText, pager, quoted } from "../charts/tokens.js";
import { altered, go } from "../base/url.js";
import { say } from "../base/words.js";

const ROWS = 8;

export async function batchPage({ main, state, info, signal, frame }) {
  const step = state.step ?? info.replays.at(-1) ?? info.last_step;
  const chosen = () => (/^\d+:\d+$/.test(state.token ?? "") ? state.token.split(":").map(Number) : null);
  const asked = chosen();
  let row = asked ? Math.floor(asked[0] / ROWS) * ROWS : 0;
  let batch = null;
  let text = null;
  const by = () => (state.kind === "grad" ? "grad" : "loss");
  const content = h("div");
  frame();
  if (info.last_step === null || info.last_step === undefined) {
    replace(main, notice(say("page.empty_run"), [say("page.empty_run_help")]));
    return {};
  }
  const chart = new Chart({ title: say("page.loss_by_position"), path: ofRun(info.id, "figure/batch-loss"), name: `batch-${step}`, height: 184, query: () => ({ step }) });
  replace(main, h("div", { class: "page-batch" }, h("div", { class: "tensor-head" }, h("h1", {}, say("page.batch_at", { step })),
    stepChooser(info, step, (one) => go(altered({ step: one, token: null })))), content));

  const moved = new Moved(info, step, signal);

  async function load() {
    batch = await get(ofRun(info.id, "batch"), { step, row, rows: ROWS }, signal);
    if (batch.state !== "ready") {
      replace(content, replayOffer(info, { run: info.id, step, signal, done: async () => { info.replays = [...info.replays, step].sort((a, b) => a - b); await load(); } }));
      return;
    }
    draw();
    await Promise.all([chart.load(signal), chosen() && moved.show(...chosen())]);
  }

  function draw() {
    const read = h("p", { class: "token-read mono", "aria-live": "polite" }, say("page.token_hint"));
    const value = (b, s) => (by() === "grad" ? batch.grad_norm : batch.loss_per_token)[b - batch.row]?.[s] ?? null;
    const place = (v) => {
      if (by() === "loss") { const [low, high] = batch.loss_range; return (v - low) / (high - low || 1); }
      const [low, high] = batch.grad_range.map((n) => Math.log10(Math.max(n, 1e-30)));
      return v > 0 ? (Math.log10(v) - low) / (high - low || 1) : 0;
    };
    const bad = { loss: new Set(batch.loss_not_finite.map((place) => place.join(":"))), grad: new Set(batch.grad_not_finite.map((place) => place.join(":"))) };
    const tell = (b, s) => {
      const at = b - batch.row;
      const loss = batch.loss_per_token[at]?.[s] ?? null;
      const shown = (number_, of) => bad[of].has(`${b}:${s}`) ? say("page.not_finite") : number(number_);
      replace(read, quoted(batch.pieces[at][s]), ` ${b}:${s} `, say("page.then"), " ", quoted(batch.target_pieces?.[at]?.[s] ?? ""), "  ",
        loss === null && !bad.loss.has(`${b}:${s}`) ? say("page.token_ignored") : say("page.token_loss", { value: shown(loss, "loss") }), "  ",
        say("page.token_grad", { value: shown(batch.grad_norm?.[at]?.[s] ?? null, "grad") }));
    };
    text = new TokenText({ pieces: batch.pieces, first: batch.row, label: say("page.batch_text"),
      paint: (b, s) => { const v = value(b, s); return bad[by()].has(`${b}:${s}`) ? ["alarm", 0] : v === null ? null : [by() === "grad" ? "accent" : "raise", place(v)]; },
      told: tell, open: (b, s) => { go(altered({ token: `${b}:${s}` }), { quietly: true }); moved.show(b, s); } });
    const finite = (value_) => (value_ === null ? h("span", { class: "alarm" }, say("page.not_finite")) : number(value_));
    const fact = (label, text_) => h("div", {}, h("dt", {}, label), h("dd", {}, text_));
    replace(content,
      h("dl", { class: "fact-line" }, fact(say("page.loss"), finite(batch.loss)),
        fact(say("page.recorded"), h("span", {}, finite(batch.recorded_loss), " ", batch.exact ? h("span", { class: "good" }, say("page.exact"))
          : h("span", { class: "warning" }, say("page.inexact")))),
        fact(say("page.norm"), finite(batch.total_norm)),
        batch.clip === null || batch.clip === undefined ? null : fact(say("page.clip"), `× ${number(batch.clip)}`),
        fact(say("page.lr"), number(batch.lr)), fact(say("page.sequences_n"), `${batch.sequences} × ${batch.length}`)),
      chart.element,
      h("div", { class: "choice", role: "group", "aria-label": say("page.coloured_by") }, [["loss", say("page.by_loss")], ["grad", say("page.by_grad")]].map(([key, label]) =>
        h("button", { type: "button", "data-kind": key, "aria-pressed": String(key === by()), onclick: () => go(altered({ kind: key }), { quietly: true }) }, label))),
      h("p", { class: "caption" }, by() === "grad" ? say("page.by_grad_line") : say("page.by_loss_line")),
      h("div", { class: "text-columns" },
        h("div", {}, read, text.element, pager({ row: batch.row, rows: ROWS, sequences: batch.sequences, turn: (next) => { row = next; load(); } })),
        moved.element));
    const at = chosen();
    if (at && at[0] >= batch.row && at[0] < batch.row + ROWS) text.choose(...at);
  }

  await load();
  const near = (by_) => {
    const next = by_ > 0 ? info.replays.find((one) => one > step) : info.replays.findLast((one) => one < step);
    if (next !== undefined) go(altered({ step: next, token: null }));
  };
  return {
    async update(next, before) {
      if (next.step !== before.step) return false;
      state = next;
      if (next.kind !== before.kind && batch?.state === "ready") { draw(); await chart.draw(); }
      return true;
    },
    async refresh() {},
    leave: () => chart.leave(),
    keys: { j: () => near(1), k: () => near(-1), Enter: () => document.querySelector("[data-replay]")?.click() },
  };
}
