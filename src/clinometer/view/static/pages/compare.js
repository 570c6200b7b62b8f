// Several runs on the same axes, and where their settings differ.

import { get, ofRun } from "../base/api.js";
import { Chart } from "../charts/chart.js";
import { h, replace } from "../base/dom.js";
import { count, size } from "../base/number.js";
import { lastLoss, notice, stateMark } from "../base/states.js";
import { TimeAxis } from "../charts/timeaxis.js";
import { address, altered, go } from "../base/url.js";
import { say } from "../base/words.js";

const MOST = 20;

export async function comparePage({ main, state, signal, frame }) {
  const ids = (state.runs ?? "").split(",").filter(Boolean).slice(0, MOST);
  frame();
  if (ids.length < 2) {
    replace(main, notice(say("page.compare_two"), [say("page.compare_two_help")]));
    return {};
  }
  const infos = (await Promise.all(ids.map((id) => get(ofRun(id), {}, signal).catch((reason) => {
    if (reason.name === "AbortError") throw reason;
    return null;
  })))).filter(Boolean);
  if (infos.length < 2) {
    replace(main, notice(say("page.compare_two"), [say("page.compare_two_help")]));
    return {};
  }
  const axis = new TimeAxis({ zoom: (from, to) => go(altered({ from, to })), open: null });
  const last = () => Math.max(1, ...infos.map((info) => info.last_step ?? 0));
  const first = () => Math.min(...infos.map((info) => info.first_step ?? 0), last() - 1);
  axis.show([first(), last()], state.from, state.to);
  const chart = (metric, title, height) => new Chart({ title, path: "/api/compare", name: `compare-${metric}`, height, axis, side: true,
    query: () => ({ ids: infos.map((info) => info.id).join(","), metric, from: state.from, to: state.to }) });
  const rows = 18 * infos.length + 40;   // each run has its line in the legend
  const tall = (height) => Math.max(height, rows);
  const charts = [chart("loss", say("page.loss"), tall(280)), chart("norm", say("page.norm"), tall(160)), chart("lr", say("page.lr"), tall(120)), chart("speed", say("page.speed"), tall(120))];
  replace(main, h("div", { class: "page-compare" }, h("h1", {}, say("page.compare_n_runs", { n: infos.length })),
    charts.map((one) => one.element), table(infos)));
  await Promise.all(charts.map((one) => one.load(signal)));
  return {
    async update(next, before) {
      if (next.runs !== before.runs) return false;
      state = next;
      axis.show([first(), last()], state.from, state.to);
      await Promise.all(charts.map((one) => one.load(signal)));
      return true;
    },
    refresh: () => Promise.all(charts.map((one) => one.load(signal))),
    leave() { for (const one of charts) one.leave(); },
    keys: { "+": () => axis.nudge("in"), "=": () => axis.nudge("in"), "-": () => axis.nudge("out"), "0": () => axis.onZoom(null, null),
      ArrowLeft: () => axis.nudge("left"), ArrowRight: () => axis.nudge("right"),
      Escape: () => { if (!axis.zoomed) return false; axis.onZoom(null, null); return true; } },
  };
}

function flat(table, prefix = "", out = {}) {
  for (const [name, value] of Object.entries(table ?? {})) {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) flat(value, `${prefix}${name}.`, out);
    else out[prefix + name] = Array.isArray(value) ? value.join(", ") : String(value);
  }
  return out;
}

function table(infos) {
  const configs = infos.map((info) => flat(info.config));
  const names = [...new Set(configs.flatMap(Object.keys))].filter((name) => new Set(configs.map((one) => one[name])).size > 1);
  const line = (label, cell) => h("tr", {}, h("th", { scope: "row" }, label), infos.map((info, k) => h("td", {}, cell(info, k))));
  return h("section", { class: "compare-table" }, h("h2", {}, say("page.differences")), h("div", { class: "scroll-x" }, h("table", {},
    h("thead", {}, h("tr", {}, h("td"), infos.map((info) => h("th", { scope: "col" }, h("a", { href: address({ run: info.id }) }, info.name))))),
    h("tbody", {}, line(say("page.state"), stateMark), line(say("page.loss"), lastLoss), line(say("page.steps"), (info) => count(info.last_step)),
      line(say("page.size"), (info) => size(info.numel)), line(say("page.alerts"), (info) => count(info.alert_count)),
      names.map((name) => line(h("span", { class: "mono" }, name), (info, k) => h("span", { class: "mono" }, configs[k][name] ?? "\u2013")))))),
  names.length ? null : h("p", { class: "quiet" }, say("page.no_differences")));
}
