// Runs: which there are, how they are, and which to compare.

import { get } from "./api.js";
import { h, replace } from "./dom.js";
import { matcher } from "./groups.js";
import { count, number, size } from "./number.js";
import { drawSpark, sparkline } from "./spark.js";
import { notice, stateMark } from "./states.js";
import { address, altered, go } from "./url.js";
import { ago, clock, say } from "./words.js";

export async function runsPage({ main, state, signal }) {
  let answer = await get("/api/runs", {}, signal);
  const picked = new Set((state.runs ?? "").split(",").filter(Boolean));
  let chosen = -1;

  const box = h("input", { type: "search", placeholder: say("page.filter_runs"), "aria-label": say("page.filter_runs"), "data-filter": "",
    value: state.filter ?? "", spellcheck: "false", oninput: () => { go(altered({ filter: box.value }), { quietly: true }); draw(); } });
  const compare = h("button", { type: "button", class: "main", onclick: () => go(address({ page: "compare", runs: [...picked].join(",") })) });
  const body = h("tbody");
  const table = h("table", { class: "runs" }, h("thead", {}, h("tr", {},
    h("th", {}, h("span", { class: "unseen" }, say("page.pick"))), h("th", {}, say("page.run")), h("th", {}, say("page.state")),
    h("th", { class: "number" }, say("page.steps")), h("th", { class: "number" }, say("page.loss")), h("th", {}, say("page.loss_line")),
    h("th", { class: "number" }, say("page.speed")), h("th", { class: "number" }, say("page.alerts")),
    h("th", { class: "number" }, say("page.size")), h("th", {}, say("page.changed")))), body);
  const broken = h("div");
  const bar = h("div", { class: "runs-bar" }, h("h1", {}, say("page.runs")), h("span", { class: "tree-filter" }, box, h("kbd", {}, "/")), compare);
  const frame = h("div", { class: "page-runs" }, bar, table, broken);

  function draw() {
    const shown = matcher(state.filter === undefined && !box.value ? "" : box.value);
    const runs = answer.runs.filter((run) => shown(`${run.name} ${run.folder} ${run.model} ${run.state}`));
    table.hidden = !answer.runs.length;
    bar.hidden = !answer.runs.length;
    replace(body, runs.map(row), !runs.length && answer.runs.length
      ? h("tr", {}, h("td", { colspan: "10", class: "quiet" }, say("page.no_match"))) : null);
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
    const spark = sparkline(120, 24);
    drawSpark(spark, run.spark ?? []);
    const pick = h("input", { type: "checkbox", checked: picked.has(run.id), "aria-label": say("page.pick_run", { name: run.name }),
      onchange: () => { if (pick.checked) picked.add(run.id); else picked.delete(run.id); offer();
        go(altered({ runs: [...picked].join(",") }), { quietly: true }); } });
    const speed = run.speed ?? run.steps_per_second;
    return h("tr", { "data-run": run.id },
      h("td", { class: "pick" }, pick),
      h("th", { scope: "row" }, h("a", { href: address({ run: run.id }), class: "run-name" }, run.name),
        run.folder && run.folder !== run.name && run.folder !== "." ? h("span", { class: "quiet small folder" }, run.folder) : null),
      h("td", { class: "state-cell" }, stateMark(run)),
      h("td", { class: "number", "data-label": say("page.steps") }, run.state === "empty" ? "\u2013" : count(run.last_step)),
      h("td", { class: "number", "data-label": say("page.loss") }, number(run.loss)),
      h("td", { class: "spark-cell" }, spark),
      h("td", { class: "number", "data-label": say("page.speed") }, speed === null || speed === undefined ? "\u2013"
        : `${number(speed)} ${run.speed ? say("page.tokens_s") : say("page.steps_s")}`),
      h("td", { class: run.alert_count ? "number warning" : "number", "data-label": say("page.alerts") }, count(run.alert_count)),
      h("td", { class: "number", "data-label": say("page.size") }, size(run.numel)),
      h("td", { class: "nowrap quiet changed", title: clock(run.updated) }, ago(run.updated)));
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
      const focused = document.activeElement?.closest?.("tr[data-run]")?.dataset.run;
      const on = document.activeElement?.tagName;
      draw();
      if (focused) body.querySelector(`tr[data-run="${CSS.escape(focused)}"] ${on === "INPUT" ? "input" : "a"}`)?.focus({ preventScroll: true });
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
