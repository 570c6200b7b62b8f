// Breadcrumb, the pages beside it, language and theme.

import { h, replace } from "../base/dom.js";
import { count } from "../base/number.js";
import { remember, theme } from "../base/settings.js";
import { address, altered, go } from "../base/url.js";
import { nextLanguage, say } from "../base/words.js";

export function drawHeader(state, run, help) {
  const crumbs = [[h("span", { class: "brand" }, say("page.runs")), address({})]];
  if (state.page === "compare") crumbs.push([say("page.compare"), null]);
  if (state.run) {
    crumbs.push([run?.name ?? state.run, address({ run: state.run })]);
    if (state.tensor && (state.page === "tensor" || state.page === "weight")) {
      crumbs.push([state.tensor, address({ run: state.run, page: "tensor", tensor: state.tensor, step: state.step })]);
    }
    if (state.page === "weight") {
      crumbs.push([`[${(state.index ?? "").split(",").join(", ")}]${state.step === undefined ? "" : ` ${say("page.at_step", { step: count(state.step) })}`}`, null]);
    }
    if (state.page === "batch") crumbs.push([state.step === undefined ? say("page.batch") : say("page.batch_at", { step: count(state.step) }), null]);
    if (state.page === "check") crumbs.push([say("page.checks"), null]);
    if (state.page === "diagnosis") crumbs.push([say("page.diagnoses"), null]);
  }
  const list = h("ol", { class: "crumbs" }, crumbs.map(([text, link], k) => h("li", {},
    k === crumbs.length - 1 ? h("span", { class: "here", "aria-current": "page", title: typeof text === "string" ? text : null }, text)
      : h("a", { href: link, title: typeof text === "string" ? text : null }, text))));
  const beside = state.run ? h("nav", { class: "subpages", "aria-label": say("page.pages") },
    [["run", say("page.run"), {}], ["batch", say("page.batch"), { step: state.step }], ["check", say("page.checks"), {}],
      ["diagnosis", say("page.diagnoses"), {}]].map(([page, text, more]) => h("a", {
      href: address({ run: state.run, page, ...more }), "aria-current": state.page === page ? "page" : null }, text))) : null;
  const [other, name] = nextLanguage();
  const opposite = theme() === "dark" ? "light" : "dark";
  const tools = h("div", { class: "tools" },
    h("button", { type: "button", "data-tool": "language", lang: other, title: say("page.switch_language"), onclick: switchLanguage },
      name),
    h("button", { type: "button", "data-tool": "theme", title: say("page.switch_theme"), onclick: switchTheme },
      opposite === "dark" ? say("page.dark") : say("page.light")),
    h("button", { type: "button", "data-tool": "help", title: say("page.help"), "aria-label": say("page.help"), onclick: help }, "?"));
  replace(document.getElementById("header"), h("nav", { class: "crumb-nav", "aria-label": say("page.you_are_here") }, list), beside, tools);
  replace(document.getElementById("skip"), say("page.skip"));
  const last = crumbs.at(-1)[0];
  document.title = state.run || state.page === "compare" ? `${typeof last === "string" ? last : ""} \u00b7 Clinometer` : "Clinometer";
}

export function switchLanguage() {
  const [next] = nextLanguage();
  remember("lang", next);
  go(altered({ lang: next }), { quietly: true });
}

export function switchTheme() {
  const next = theme() === "dark" ? "light" : "dark";
  remember("theme", next);
  go(altered({ theme: next }), { quietly: true });
}
