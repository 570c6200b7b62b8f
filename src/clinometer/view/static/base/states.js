// What a page shows when it has nothing to show yet, nothing at all, or something broken.

import { h } from "./dom.js";
import { count, number } from "./number.js";
import { ago, clock, say } from "./words.js";

export function skeleton(...frames) {
  return h("div", { "aria-busy": "true", "aria-label": say("page.loading") },
    frames.map((frame) => h("div", { class: `skeleton frame-${frame}` })));
}

export function notice(title, lines = [], { alarm = false, code = null } = {}) {
  return h("div", { class: alarm ? "notice alarm" : "notice", role: alarm ? "alert" : null },
    h("p", {}, h("strong", {}, title)),
    lines.map((line) => h("p", {}, line)),
    code && h("pre", {}, code));
}

export function broken(reason, retry = null) {
  const box = notice(say("page.broken"), [reason.message], { alarm: true });
  if (retry) box.append(h("p", {}, h("button", { class: "main", type: "button", onclick: retry }, say("page.retry"))));
  return box;
}

const STATES = {
  live: "page.state_live", done: "page.state_done", stopped: "page.state_stopped", failed: "page.state_failed",
  crashed: "page.state_crashed", empty: "page.state_empty",
};

export function stateMark(info) {
  return h("span", { class: `state ${info.state}`, title: info.since ? clock(info.since) : null },
    say(STATES[info.state]));
}

// A run's last loss; one that is not finite with the step where that began.
export function lastLoss(run) {
  const since = run.not_finite_since;
  if (since === null || since === undefined) return number(run.loss);
  return h("span", { class: "alarm" }, say("page.not_finite_at", { step: count(since) }));
}

// A run that has died says since when, and what to do.
export function died(info) {
  if (info.state !== "crashed" && info.state !== "failed") return null;
  const title = info.state === "crashed" ? say("page.crashed") : say("page.failed");
  const when = { when: clock(info.since), ago: ago(info.since), step: info.last_step ?? 0 };
  const line = info.state === "crashed" ? say("page.crashed_since", when) : say("page.failed_since", when);
  return notice(title, [line], { alarm: true });
}
