// Tensor: its matrix at a replayed step, its statistics over time, its histograms.

import { ofRun } from "../base/api.js";
import { Chart } from "../charts/chart.js";
import { h, replace } from "../base/dom.js";
import { statisticChoice } from "../charts/gradmap.js";
import { MatrixView } from "../charts/matrix.js";
import { count, shape } from "../base/number.js";
import { replayOffer, stepChooser } from "./replay.js";
import { broken, notice } from "../base/states.js";
import { TimeAxis } from "../charts/timeaxis.js";
import { address, altered, go } from "../base/url.js";
import { say } from "../base/words.js";

const KINDS = ["grad", "weight", "update", "exp_avg", "exp_avg_sq"];
const RIDGES = ["grad", "weight", "update"];

export async function tensorPage({ main, state, info, signal, frame }) {
  const at = info.tensors.findIndex((tensor) => tensor.name === state.tensor);
  frame();
  if (at < 0) {
    replace(main, notice(say("page.no_tensor"), [say("page.no_tensor_help", { name: state.tensor ?? "", n: info.tensors.length })]));
    return {};
  }
  const tensor = info.tensors[at];
  const kind = () => (KINDS.includes(state.kind) ? state.kind : "grad");
  const names = { grad: say("page.kind_grad"), weight: say("page.kind_weight"), update: say("page.kind_update"),
    exp_avg: say("page.kind_exp_avg"), exp_avg_sq: say("page.kind_exp_avg_sq") };
  const pair = (text) => (/^\d+,\d+$/.test(text ?? "") ? text.split(",").map(Number) : null);
  const step = () => state.step ?? info.replays.at(-1) ?? info.last_step;
  const weight = (index) => go(address({ run: info.id, page: "weight", tensor: tensor.name, index: index.join(","), step: step() }));

  const axis = new TimeAxis({ zoom: (from, to) => go(altered({ from, to })),
    open: (one) => go(altered({ step: one })) });
  const whole = () => [info.first_step ?? 0, Math.max(info.last_step ?? 0, (info.first_step ?? 0) + 1)];
  axis.show(whole(), state.from, state.to);
  const range = () => ({ tensor: tensor.name, from: state.from, to: state.to });
  const ridgeKind = () => (RIDGES.includes(kind()) ? kind() : "grad");
  const over = new Chart({ title: say("page.over_time"), path: ofRun(info.id, "figure/tensor"), name: `tensor-${tensor.name}`, height: 200, axis,
    query: () => ({ ...range(), stat: state.stat ?? "grad_norm" }) });
  const ridge = new Chart({ title: say("page.ridge"), path: ofRun(info.id, "figure/ridge"), name: `ridge-${tensor.name}`, height: 320, axis,
    query: () => ({ ...range(), kind: ridgeKind() }) });

  const neighbour = (by) => {
    const next = info.tensors[at + by];
    if (next) go(address({ run: info.id, page: "tensor", tensor: next.name, step: state.step, stat: state.stat, kind: state.kind, from: state.from, to: state.to }));
  };
  const fact = (label, value) => h("div", {}, h("dt", {}, label), h("dd", {}, value));
  const head = h("div", { class: "tensor-head" }, h("h1", { class: "mono" }, tensor.name), h("dl", { class: "fact-line" },
    fact(say("page.shape"), shape(tensor.shape)), fact(say("page.dtype"), tensor.dtype.replace("torch.", "")),
    fact(say("page.entries"), count(tensor.numel)),
    tensor.layer === null || tensor.layer === undefined ? null : fact(say("page.layer"), count(tensor.layer)),
    tensor.group === null || tensor.group === undefined ? fact(say("page.group"), say("page.group_none")) : fact(say("page.group"), count(tensor.group)),
    fact(say("page.place"), say("page.place_of", { n: count(at + 1), of: count(info.tensors.length) }))),
  h("nav", { class: "neighbours", "aria-label": say("page.neighbours") },
    h("button", { type: "button", disabled: at === 0, onclick: () => neighbour(-1) }, "\u2191 ", say("page.previous")),
    h("button", { type: "button", disabled: at === info.tensors.length - 1, onclick: () => neighbour(1) }, "\u2193 ", say("page.next"))));

  let view = null;
  const left = h("section", { class: "tensor-matrix" });
  const choice = h("span");

  function kinds() {
    const hasMoments = !(info.optimizers ?? []).every((name) => /^sgd$/i.test(name));
    return h("div", { class: "choice", role: "group", "aria-label": say("page.kind") }, KINDS.filter((one) => hasMoments || !one.startsWith("exp_avg"))
      .map((one) => h("button", { type: "button", "data-kind": one, "aria-pressed": String(one === kind()), onclick: () => go(altered({ kind: one }), { quietly: true }) }, names[one])));
  }

  function indexBox() {
    const box = h("input", { type: "text", class: "index-box", inputmode: "numeric", placeholder: tensor.shape.map(() => "0").join(", "),
      "aria-label": say("page.index") });
    return tensor.shape.length ? h("form", { onsubmit: (event) => {
      event.preventDefault();
      const index = box.value.replace(/[[\]\s]/g, "").split(/[,，]/).map(Number);
      const fits = index.length === tensor.shape.length && index.every((n, k) => Number.isInteger(n) && n >= 0 && n < tensor.shape[k]);
      box.setCustomValidity(fits ? "" : say("page.index_wrong", { shape: shape(tensor.shape) }));
      if (box.reportValidity() && fits) weight(index);
    }, oninput: () => box.setCustomValidity("") }, h("label", {}, say("page.index"), " ", box)) : null;
  }

  async function matrix() {
    view?.leave();
    view = null;
    const bar = h("div", { class: "matrix-bar" }, stepChooser(info, step(), (one) => go(altered({ step: one }))), indexBox());
    const shell = [h("h2", {}, say("page.matrix"), " ", h("span", { class: "unit" }, say("page.matrix_unit"))), kinds(), bar];
    if (!info.replays.includes(step())) {
      replace(left, shell, replayOffer(info, { run: info.id, step: step(), signal, done: async () => { info.replays = [...info.replays, step()].sort((a, b) => a - b); await matrix(); } }));
      return;
    }
    view = new MatrixView({ run: info.id, tensor, step: step(), kind: kind(), rows: pair(state.rows), cols: pair(state.cols), signal,
      name: `${tensor.name}-${kind()}-${step()}`, opened: weight,
      zoomed: (rows, cols) => go(altered({ rows: rows?.join(","), cols: cols?.join(",") })) });
    replace(left, shell, view.element);
    try {
      await view.load();
    } catch (reason) {
      if (reason.name === "AbortError") throw reason;
      replace(left, shell, broken(reason, () => matrix()));
    }
  }

  replace(choice, statisticChoice(info, state.stat ?? "grad_norm", say("page.statistic")));
  replace(main, h("div", { class: "page-tensor" }, head, h("div", { class: "tensor-columns" }, left,
    h("div", { class: "tensor-time" }, choice, over.element, ridge.element))));
  await Promise.all([matrix(), over.load(signal), ridge.load(signal)]);

  return {
    async update(next, before) {
      if (next.tensor !== before.tensor) return false;
      state = next;
      const moved = next.from !== before.from || next.to !== before.to;
      axis.show(whole(), state.from, state.to);
      const jobs = [];
      if (["kind", "rows", "cols", "step"].some((name) => next[name] !== before[name])) jobs.push(matrix());
      if (moved || next.stat !== before.stat) jobs.push(over.load(signal));
      if (moved || next.kind !== before.kind) jobs.push(ridge.load(signal));
      await Promise.all(jobs);
      return true;
    },
    async refresh() {
      await Promise.all([over.load(signal), ridge.load(signal)]);
    },
    leave() {
      view?.leave();
      over.leave();
      ridge.leave();
    },
    keys: {
      j: () => neighbour(1), k: () => neighbour(-1),
      Enter: () => { const largest = view?.data?.largest; if (largest && tensor.shape.length) weight(largest.index); },
      "+": () => view?.zoom(0.5), "=": () => view?.zoom(0.5), "-": () => view?.zoom(2), "0": () => go(altered({ rows: null, cols: null, from: null, to: null })),
      ArrowLeft: () => axis.nudge("left"), ArrowRight: () => axis.nudge("right"),
      Escape: () => {
        if (!state.rows && !state.cols && !axis.zoomed) return false;
        go(altered({ rows: null, cols: null, from: null, to: null }));
        return true;
      },
    },
  };
}
