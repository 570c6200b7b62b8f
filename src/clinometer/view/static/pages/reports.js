// Check and Diagnosis: the reports a run keeps, each as it was said, with its tensors as links.

import { get, ofRun } from "../base/api.js";
import { h, replace } from "../base/dom.js";
import { count } from "../base/number.js";
import { download, saveButtons } from "../charts/save.js";
import { notice } from "../base/states.js";
import { address, altered, go } from "../base/url.js";
import { clock, say } from "../base/words.js";

export async function reportsPage({ main, state, info, signal, frame }) {
  const kind = state.page;
  const known = new Set(info.tensors.map((tensor) => tensor.name));
  const list = h("ol", { class: "report-list" });
  const body = h("article", { class: "report" });
  let reports = [];
  let drawn = false;
  frame();

  async function load() {
    const answer = await get(ofRun(info.id, "reports"), {}, signal);
    const before = reports.map((report) => report.id).join();
    if (drawn && before === answer.reports.filter((report) => report.kind === kind).map((report) => report.id).join()) return;
    drawn = true;
    reports = answer.reports.filter((report) => report.kind === kind);
    draw();
  }

  const chosen = () => reports.find((report) => String(report.id) === state.report) ?? reports[0];

  function draw() {
    if (!reports.length) {
      const title = kind === "check" ? say("page.no_checks") : say("page.no_diagnoses");
      replace(main, h("div", {}, notice(title, [say("page.no_reports_help")],
        { code: kind === "check" ? "watch.report(clinometer.check_gradients(model, closure))" : "watch.report(clinometer.diagnose(model, closure))" })));
      return;
    }
    const shown = chosen();
    replace(list, reports.map((report) => h("li", {}, h("a", { href: altered({ report: report.id }), "aria-current": report === shown ? "true" : null },
      h("strong", {}, report.title || say(kind === "check" ? "page.check_one" : "page.diagnosis_one")),
      h("span", { class: "quiet small" }, say("page.at_step", { step: count(report.step) }), " \u00b7 ", clock(report.time))))));
    const save = saveButtons({
      TXT: () => download(`${kind}-${shown.step}.txt`, shown.text, "text/plain"),
      JSON: () => download(`${kind}-${shown.step}.json`, JSON.stringify(shown.document, null, 1), "application/json"),
    });
    replace(body, h("header", {}, h("h1", {}, shown.title || say(kind === "check" ? "page.check_one" : "page.diagnosis_one")), save),
      h("p", { class: "quiet" }, say("page.at_step", { step: count(shown.step) }), " \u00b7 ", clock(shown.time)),
      h("pre", { class: "report-text" }, linked(shown.text ?? "", known, info.id, shown.step)),
      shown.document ? h("details", {}, h("summary", {}, say("page.document")), facts(shown.document)) : null);
    replace(main, h("div", { class: "page-reports" }, h("nav", { "aria-label": say("page.reports") }, h("h2", {}, kind === "check" ? say("page.checks") : say("page.diagnoses")), list), body));
  }

  await load();
  const move = (by) => {
    const at = reports.indexOf(chosen()) + by;
    if (reports[at]) go(altered({ report: reports[at].id }), { quietly: true });
  };
  return {
    async update(next) { state = next; draw(); return true; },
    refresh: load,
    keys: { j: () => move(1), k: () => move(-1), Enter: () => body.querySelector("a")?.focus() },
  };
}

// Names of the run's tensors in a text become links; everything else stays text.
function linked(text, known, run, step) {
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(/[A-Za-z_][\w.]*/g)) {
    const name = match[0].replace(/\.+$/, "");
    if (!known.has(name)) continue;
    parts.push(text.slice(from, match.index), h("a", { href: address({ run, page: "tensor", tensor: name, step }) }, name));
    from = match.index + name.length;
  }
  return [...parts, text.slice(from)];
}

// A document opened level by level: only what is unfolded is made.
function facts(value) {
  if (value === null || typeof value !== "object") return h("code", {}, String(value));
  const entries = Array.isArray(value) ? value.map((one, k) => [String(k), one]) : Object.entries(value);
  if (!entries.length) return h("code", {}, Array.isArray(value) ? "[]" : "{}");
  return h("ul", { class: "document" }, entries.slice(0, 500).map(([key, one]) => {
    if (one === null || typeof one !== "object") return h("li", {}, h("span", { class: "quiet mono" }, key, " "), facts(one));
    const more = h("details", {}, h("summary", { class: "mono" }, key, h("span", { class: "quiet" }, ` ${Array.isArray(one) ? one.length : Object.keys(one).length}`)));
    more.addEventListener("toggle", () => { if (more.open && more.children.length === 1) more.append(facts(one)); });
    return h("li", {}, more);
  }));
}
