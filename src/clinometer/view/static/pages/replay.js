// "Replay step N": starts it, shows how far it is, cancels it.

import { get, ofRun, send } from "../base/api.js";
import { h, replace } from "../base/dom.js";
import { count } from "../base/number.js";
import { notice } from "../base/states.js";
import { say } from "../base/words.js";

const EVERY = 500;

export class ReplayButton {
  constructor({ run, step, tensor = null, index = null, done, signal }) {
    Object.assign(this, { run, step, tensor, index, done, signal });
    this.element = h("div", { class: "replay-box" });
    this.offer();
    signal.addEventListener("abort", () => clearTimeout(this.timer));
    this.join();
  }

  // A replay of this very step that already runs (another tab, or before a reload) is shown, not started twice.
  async join() {
    try {
      const { jobs } = await get("/api/jobs", {}, this.signal);
      const job = jobs.find((one) => one.state === "running" && one.run === this.run && one.step === this.step);
      if (job) this.follow(job);
    } catch {
      // then the button is there
    }
  }

  offer(problem = null) {
    const text = this.tensor ? say("page.replay_weight", { step: count(this.step) }) : say("page.replay_step", { step: count(this.step) });
    replace(this.element, problem && notice(say("page.replay_failed"), [problem], { alarm: true }),
      h("div", { class: "replay" }, h("button", { type: "button", class: "main", "data-replay": "", onclick: () => this.start() }, text),
        h("span", { class: "quiet" }, say("page.replay_what"))));
  }

  async start() {
    try {
      const { job } = await send(ofRun(this.run, "replay"), "POST", { step: this.step, tensor: this.tensor, index: this.index });
      await this.follow(job);
    } catch (reason) {
      if (reason.name === "AbortError") return;
      if (reason.status === 409 && reason.body?.job) this.busy(reason.body.job, reason.message);
      else this.offer(reason.message);
    }
  }

  busy(job, text) {
    replace(this.element, notice(text, [say("page.replay_other", { step: count(job.step) })]),
      h("div", { class: "replay" }, h("button", { type: "button", class: "main", onclick: () => this.start() }, say("page.retry")),
        h("button", { type: "button", onclick: async () => { await send(`/api/jobs/${job.id}`, "DELETE").catch(() => {}); this.offer(); } }, say("page.cancel_that"))));
  }

  async follow(job) {
    const bar = h("progress", { "aria-label": say("page.replaying") });
    const text = h("span", { class: "quiet", role: "status" });
    const cancel = h("button", { type: "button", "data-cancel": "", onclick: async () => {
      cancel.disabled = true;
      await send(`/api/jobs/${job.id}`, "DELETE").catch(() => {});
    } }, say("page.cancel"));
    replace(this.element, h("div", { class: "replay" }, bar, text, cancel));
    for (;;) {
      if (job.total) { bar.max = job.total; bar.value = job.progress; } else bar.removeAttribute("value");
      replace(text, `${job.stage_text}${job.total ? ` ${count(job.progress)} / ${count(job.total)}` : ""} \u00b7 ${say("page.seconds", { n: Math.round(job.seconds ?? 0) })}`);
      if (job.state !== "running") break;
      await new Promise((wake) => { this.timer = setTimeout(wake, EVERY); });
      if (this.signal.aborted) return;
      ({ job } = await get(`/api/jobs/${job.id}`, {}, this.signal));
    }
    if (job.state === "done") this.done();
    else this.offer(job.state === "failed" ? job.error?.text ?? say("page.replay_failed") : null);
  }
}

// What stands where a replayed step would be shown.
export function replayOffer(info, options) {
  if (!info.replayable) return notice(say("page.not_replayable"), [say("page.not_replayable_help")]);
  return new ReplayButton(options).element;
}

// The step shown: those replayed already one click away, any other by its number.
export function stepChooser(info, step, choose) {
  const box = h("input", { type: "number", class: "step-box", min: info.first_step ?? 0, max: info.last_step ?? 0, value: step ?? "",
    "aria-label": say("page.step") });
  const form = h("form", { class: "step-chooser", onsubmit: (event) => {
    event.preventDefault();
    const wanted = Number(box.value);
    if (box.value !== "" && Number.isInteger(wanted)) choose(Math.min(info.last_step, Math.max(info.first_step ?? 0, wanted)));
  } }, h("label", {}, say("page.step"), " ", box),
  info.replays.length ? h("span", { class: "quiet" }, say("page.replayed"), " ", info.replays.flatMap((one, k) => [k ? say("page.comma") : "",
    one === step ? h("strong", {}, count(one)) : h("button", { type: "button", onclick: () => choose(one) }, count(one))])) : null);
  return form;
}
