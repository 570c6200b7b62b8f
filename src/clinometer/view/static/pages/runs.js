// Runs: which there are, how they are, and which to compare.

import { get } from "../base/api.js";
import { h, replace } from "../base/dom.js";
import { matcher } from "../base/groups.js";
import { count, number, size } from "../base/number.js";
import { drawSpark, sparkline } from "../charts/spark.js";
import { lastLoss, notice, stateMark } from "../base/states.js";
import { address, altered, go } from "../base/url.js";
import { ago, clock, say } from "../base/words.js";

export async function runsPage({ main, state, signal }) {
  let answer = await get("/api/runs", {}, signal);
  const picked = new Set((state.runs ?? "").split(",").filter(Boolean));
  const rows = new Map();
  let chosen = -1;

  const box = h("input", { type: "search", placeholder: say("page.filter_runs"), "aria-label": say("page.filter_runs"), "data-filter": "",
    value: state.filter ?? "", spellcheck: "false", oninput: () => { go(altered({ filter: box.value }), { quietly: true }); draw(); } });
  const compare = h("button", { type: "button", class: "main", onclick: () => go(address({ page: "compare", runs: [...picked].join(",") })) });
  const body = h("tbody");
  const table = h("table", { class: "runs" }, h("thead", {}, h("tr", {},
    h("th", {}, h("span", { class: "unseen" }, say("page.pick"))), h("th", {}, say("page.run_name")), h("th", {}, say("page.state")),
    h("th", { class: "number" }, say("page.steps")), h("th", { class: "number" }, say("page.loss")), h("th", {}, say("page.loss_line")),
    h("th", { class: "number" }, say("page.speed")), h("th", { class: "number" }, say("page.alerts")),
    h("th", { class: "number" }, say("page.size")), h("th", {}, say("page.changed")))), body);
  const broken = h("div");
  const bar = h("div", { class: "runs-bar" }, h("h1", {}, say("page.runs")), h("span", { class: "tree-filter" }, box, h("kbd", {}, "/")), compare);
  const frame = h("div", { class: "page-runs" }, bar, table, broken);

  function draw() {
    const shown = matcher(box.value);
    const runs = answer.runs.filter((run) => shown(`${run.name} ${run.folder} ${run.model} ${run.state}`));
    table.hidden = !answer.runs.length;
    bar.hidden = !answer.runs.length;
    const wanted = runs.map(row);
    // What is under a finger that is about to click must not be taken away by news: rows stay, their cells change.
    if (!runs.length) replace(body, h("tr", {}, h("td", { colspan: "10", class: "quiet" }, say("page.no_match"))));
    else if (wanted.length !== body.children.length || wanted.some((one, k) => one !== body.children[k])) replace(body, wanted);
    replace(broken, answer.runs.length ? null : empty(answer.root), (answer.broken ?? []).map((run) =>
      notice(say("page.broken_run", { folder: run.folder }), [run.text], { alarm: true })));
    offer();
  }

  function offer() {
    compare.hidden = answer.runs.length < 2;
    compare.disabled = picked.size < 2;
    replace(compare, picked.size < 2 ? say("page.compare_hint") : say("page.compare_n", { n: picked.size }));
  }

  function row(run) {
    if (!rows.has(run.id)) rows.set(run.id, newRow(run));
    const { element, spark, cells } = rows.get(run.id);
    drawSpark(spark, run.spark ?? []);
    const speed = run.speed ?? run.steps_per_second;
    replace(cells.state, stateMark(run));
    replace(cells.steps, run.state === "empty" ? "\u2013" : count(run.last_step));
    replace(cells.loss, lastLoss(run));
    replace(cells.speed, speed === null || speed === undefined ? "\u2013"
      : `${number(speed)} ${run.speed ? say("page.tokens_s") : say("page.steps_s")}`);
    replace(cells.alerts, count(run.alert_count));
    cells.alerts.classList.toggle("warning", run.alert_count > 0);
    replace(cells.size, size(run.numel));
    replace(cells.changed, ago(run.updated));
    cells.changed.title = clock(run.updated);
    element.querySelector("input").checked = picked.has(run.id);
    return element;
  }

  function newRow(run) {
    const spark = sparkline(120, 24);
    const pick = h("input", { type: "checkbox", checked: picked.has(run.id), "aria-label": say("page.pick_run", { name: run.name }),
      onchange: () => { if (pick.checked) picked.add(run.id); else picked.delete(run.id); offer();
        go(altered({ runs: [...picked].join(",") }), { quietly: true }); } });
    const cell = (key, name) => h("td", { class: "number", "data-label": say(key), "data-cell": name });
    const cells = {
      state: h("td", { class: "state-cell" }), steps: cell("page.steps", "steps"), loss: cell("page.loss", "loss"),
      speed: cell("page.speed", "speed"), alerts: cell("page.alerts", "alerts"), size: cell("page.size", "size"),
      changed: h("td", { class: "nowrap quiet changed" }),
    };
    const element = h("tr", { "data-run": run.id }, h("td", { class: "pick" }, pick),
      h("th", { scope: "row" }, h("a", { href: address({ run: run.id }), class: "run-name" }, run.name),
        run.folder && run.folder !== run.name && run.folder !== "." ? h("span", { class: "quiet small folder" }, run.folder) : null),
      cells.state, cells.steps, cells.loss, h("td", { class: "spark-cell" }, spark), cells.speed, cells.alerts, cells.size, cells.changed);
    return { element, spark, cells };
  }

  function move(by) {
    const links = [...body.querySelectorAll("a.run-name")];
    if (!links.length) return;
    const at = links.indexOf(document.activeElement);
    chosen = Math.min(links.length - 1, Math.max(0, at >= 0 ? at + by : Math.max(0, chosen)));
    links[chosen].focus();
  }

  replace(main, frame);
  draw();

  return {
    update(next) {
      state = next;
      return true;
    },
    async refresh() {
      answer = await get("/api/runs", {}, signal);
      draw();
    },
    keys: {
      j: () => move(1), k: () => move(-1),
      Enter: () => { const first = body.querySelector("a.run-name"); if (first) go(first.getAttribute("href")); },
      Escape: () => { if (!picked.size) return true; picked.clear(); go(altered({ runs: null }), { quietly: true }); draw(); return true; },
    },
  };
}

function empty(root) {
  return h("div", { class: "first-steps" }, h("h1", {}, say("page.no_runs")),
    h("p", { class: "quiet" }, say("page.no_runs_where", { root })),
    h("h2", {}, say("page.no_runs_train")), h("pre", {}, "clinometer train --run runs/first"),
    h("h2", {}, say("page.no_runs_watch")),
    h("pre", {}, 'import clinometer\nwatch = clinometer.watch(model, optimizer, to="runs/first")'),
    h("p", { class: "quiet" }, say("page.no_runs_then")));
}
