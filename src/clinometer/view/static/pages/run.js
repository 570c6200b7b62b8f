// Run: four numbers, the curves, the gradient map, the alerts, and the parameters at the side.

import { get, ofRun } from "../base/api.js";
import { AlertList, AlertStrip } from "../charts/alerts.js";
import { Chart, gutter } from "../charts/chart.js";
import { h, replace } from "../base/dom.js";
import { GradientMap, statisticChoice } from "../charts/gradmap.js";
import { matcher } from "../base/groups.js";
import { MapData } from "../charts/mapdata.js";
import { count, size } from "../base/number.js";
import { died, notice, stateMark } from "../base/states.js";
import { drawStrip } from "../charts/strip.js";
import { TimeAxis } from "../charts/timeaxis.js";
import { Tree } from "./tree.js";
import { address, altered, go } from "../base/url.js";
import { clock, say } from "../base/words.js";

export async function runPage({ main, state, info, signal, frame, told, again }) {
  const api = (what) => ofRun(info.id, what);
  const known = new Set(info.tensors.map((tensor) => tensor.name));
  const axis = new TimeAxis({
    zoom: (from, to) => go(altered({ from, to }), { quietly: false }),
    open: (step) => go(address({ run: info.id, page: "batch", step })),
  });
  const range = () => ({ from: state.from, to: state.to });
  const whole = () => [info.first_step ?? 0, Math.max(info.last_step ?? 0, (info.first_step ?? 0) + 1)];
  const empty = () => info.last_step === null || info.last_step === undefined;
  const statistic = () => state.stat ?? "grad_norm";
  axis.show(whole(), state.from, state.to);

  const curve = (name, title, height) => new Chart({ title, path: api(`figure/${name}`), name, height, axis, side: true, query: range });
  const loss = curve("loss", say("page.loss"), 200);
  const small = [curve("lr", say("page.lr"), 104), curve("norm", say("page.norm"), 128), curve("speed", say("page.speed"), 104)];
  const noise = info.scalar_names.includes("noise_scale") ? [curve("noise", say("page.noise"), 104)] : [];
  const charts = [loss, ...small, ...noise];
  const choice = h("span", { class: "map-choice" });
  const map = new GradientMap({ axis, choices: choice, name: `map-${info.name}`,
    open: (tensor, step) => go(tensorAddress(tensor, step)) });
  const strip = h("div", { class: "strip" });
  const heading = h("div", { class: "run-head" });
  const end = h("div");
  const zoomed = h("div", { class: "zoomed", "aria-live": "polite" });
  const alertList = new AlertList(info.id);
  const alertStrip = new AlertStrip(axis, alertList);
  const tensorAddress = (tensor, step = undefined) => address({ run: info.id, page: "tensor", tensor: tensor.name, step, stat: state.stat });
  const tree = new Tree({ tensors: info.tensors, filter: state.filter ?? "", address: (tensor) => tensorAddress(tensor),
    filtered: (text) => {
      map.filter(matcher(text));
      go(altered({ filter: text }), { quietly: true });
    } });

  function head() {
    replace(heading, h("h1", {}, info.name), stateMark(info),
      h("span", { class: "quiet" }, [
        info.state === "live" ? null : clock(info.updated),
        info.model, say("page.parameters_n", { n: size(info.numel) }), say("page.tensors_n", { n: count(info.tensor_count) }),
        info.last_step === null ? null : say("page.steps_n", { n: count(info.last_step) }),
        (info.optimizers ?? []).join(", "),
      ].filter(Boolean).join(" \u00b7 ")));
    replace(end, died(info));
    if (choice.dataset.stat !== statistic()) {   // an open list must not close because news came
      choice.dataset.stat = statistic();
      replace(choice, statisticChoice(info, statistic()));
    }
    replace(zoomed, axis.zoomed ? [say("page.zoomed", { first: count(axis.first), last: count(axis.last), of: count(info.last_step ?? 0) }), " ",
      h("button", { type: "button", onclick: () => axis.onZoom(null, null) }, say("page.whole_run")), " ", h("kbd", {}, "0")] : null);
    alertList.show(info.alerts, known);
    alertStrip.show(info.alerts);
  }

  async function loadMap() {
    const columns = Math.max(64, Math.min(1280, Math.round((map.body.clientWidth || 900) - gutter() - 24)));
    const answer = await get(api("map"), { stat: statistic(), ...range(), columns }, signal);
    const data = new MapData(answer);
    map.show(data, info.tensors, matcher(tree.box.value));
    tree.show(data);
  }

  async function load({ map: withMap = true } = {}) {
    const numbers = get(api("strip"), {}, signal).then((answer) => drawStrip(strip, answer.numbers));
    const picture = withMap ? loadMap() : null;
    await Promise.all([numbers, picture, ...charts.map((chart) => chart.load(signal))]);
  }

  frame();
  if (empty()) {
    replace(main, h("div", { class: "page-run" }, heading, end, notice(say("page.empty_run"), [say("page.empty_run_help")])));
  } else {
    replace(main, h("div", { class: "page-run" }, heading, end, strip, zoomed,
      h("div", { class: "run-columns" },
        h("div", { class: "run-main" }, loss.element, map.element, alertStrip.element, alertStrip.panel, ...[...small, ...noise].map((chart) => chart.element),
          alertList.element, about(info)),
        tree.element)));
    tree.lay();
  }
  head();
  if (!empty()) {
    drawStrip(strip, ["loss", "norm", "speed", "alerts"].map((name) => ({ name, label: "\u00a0", text: "\u00a0" })));
    await load();
  }

  return {
    async update(next, before) {
      state = next;
      if (next.from === before.from && next.to === before.to && next.stat === before.stat) return true;
      axis.show(whole(), state.from, state.to);
      head();
      const jobs = [loadMap()];
      if (next.from !== before.from || next.to !== before.to) {
        for (const chart of charts) jobs.push(chart.load(signal));
      }
      await Promise.all(jobs);
      return true;
    },
    async refresh() {
      const before = info;
      info = await get(ofRun(info.id), {}, signal);
      told(info);
      if (empty()) return head();
      if (before.last_step === null || before.tensors.length !== info.tensors.length) {
        await again();
        return;
      }
      axis.show(whole(), state.from, state.to);
      head();
      await load();
    },
    leave() {
      for (const part of [...charts, map, alertStrip, tree]) part.leave();
    },
    keys: {
      j: () => tree.list.move(1), k: () => tree.list.move(-1),
      Enter: () => { const item = tree.list.items[tree.list.chosen]; if (item?.tensor) go(tensorAddress(item.tensor)); else tree.list.move(1); },
      "+": () => axis.nudge("in"), "=": () => axis.nudge("in"), "-": () => axis.nudge("out"), "0": () => axis.onZoom(null, null),
      ArrowLeft: () => axis.nudge("left"), ArrowRight: () => axis.nudge("right"),
      Escape: () => { if (!axis.zoomed) return false; axis.onZoom(null, null); return true; },
    },
  };
}

// What the run was made with, folded away.
function about(info) {
  const rows = (table, prefix = "") => Object.entries(table ?? {}).flatMap(([name, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? rows(value, `${prefix}${name}.`)
      : [h("dt", { class: "mono" }, prefix + name), h("dd", { class: "mono" }, Array.isArray(value) ? value.join(", ") : String(value))]);
  const part = (title, table) => {
    const lines = rows(table);
    return lines.length ? h("details", {}, h("summary", {}, title), h("dl", { class: "facts" }, lines)) : null;
  };
  return h("section", { class: "about" }, part(say("page.config"), info.config), part(say("page.environment"), info.environment));
}
