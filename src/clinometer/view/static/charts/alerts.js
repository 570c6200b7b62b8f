// Alerts: ticks on the time axis, and the sentences behind them.

import { gutter } from "./chart.js";
import { h, replace } from "../base/dom.js";
import { count } from "../base/number.js";
import { address, altered, go } from "../base/url.js";
import { say } from "../base/words.js";

const RIGHT = 24;
const TOLD = 4;   // alerts of one tick that are read at once
const NEAR = 7;   // pixels within which alerts share a tick

const SEVERITY = { fault: "page.severity_fault", warning: "page.severity_warning", explained: "page.severity_explained" };
const WORST = ["explained", "warning", "fault"];

export class AlertStrip {
  // `list`: the AlertList below, which words an alert.
  constructor(axis, list) {
    Object.assign(this, { axis, list, told: [] });
    this.alerts = [];
    this.hair = h("div", { class: "hair", hidden: true });
    this.ticks = h("div", { class: "alert-ticks" });
    this.element = h("div", { class: "alert-strip" }, h("span", { class: "alert-name" }, say("page.alerts")), this.ticks, this.hair);
    this.panel = h("div", { class: "alert-told", "aria-live": "polite", hidden: true });
    axis.members.add(this);
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.element);
  }

  show(alerts) {
    const now = JSON.stringify([alerts.map((alert) => [alert.id, alert.step, alert.until]), this.axis.range]);
    if (now === this.shown) return;   // a tick about to be clicked stays
    this.shown = now;
    this.alerts = alerts;
    this.draw();
    this.tell();
  }

  // Text and remedy of a tick's alerts, right under it.
  tell() {
    const rows = this.alerts.filter((alert) => this.told.includes(alert.id));
    const focused = this.panel.contains(document.activeElement);
    this.panel.hidden = !rows.length;
    replace(this.panel, rows.length ? [h("ol", {}, rows.slice(0, TOLD).map((alert) => this.list.row(alert))),
      rows.length > TOLD ? h("p", { class: "quiet" }, say("page.and_more", { n: rows.length - TOLD })) : null,
      h("button", { type: "button", onclick: () => this.open([]) }, say("page.close"))] : null);
    if (focused) this.panel.querySelector("li")?.focus();
  }

  open(ids) {
    this.told = ids;
    this.tell();
    this.panel.querySelector("li")?.focus({ preventScroll: true });
    this.panel.scrollIntoView({ block: "nearest" });
  }

  pixel(step) {
    const width = this.element.clientWidth - gutter() - RIGHT;
    const [a, b] = this.axis.range;
    return gutter() + ((step - a) / (b - a)) * width;
  }

  draw() {
    const [a, b] = this.axis.range;
    const shown = this.alerts.filter((alert) => alert.step <= b && (alert.until ?? this.axis.whole[1]) >= a)
      .sort((one, other) => one.step - other.step);
    const groups = [];
    const spans = [];
    for (const alert of shown) {
      const at = this.pixel(Math.max(alert.step, this.axis.first));
      const end = this.pixel(Math.min(alert.until ?? this.axis.whole[1], this.axis.last));
      if (end - at > 2 && spans.length < 300) {
        const span = h("span", { class: `alert-span ${alert.severity}` });
        span.style.left = `${at}px`;
        span.style.width = `${end - at}px`;
        spans.push(span);
      }
      const last = groups[groups.length - 1];
      if (last && at - last.at < NEAR) last.alerts.push(alert);
      else groups.push({ at, alerts: [alert] });
    }
    this.element.hidden = !this.alerts.length;
    replace(this.ticks, spans, groups.map(({ at, alerts }) => {
      const worst = WORST[Math.max(...alerts.map((alert) => WORST.indexOf(alert.severity)))];
      const text = alerts.length === 1 ? alerts[0].text
        : say("page.alerts_here", { n: alerts.length, first: count(alerts[0].step), last: count(alerts.at(-1).step) });
      const tick = h("a", { class: `alert-tick ${worst}`, href: "#alerts", title: text, "aria-label": text,
        onclick: (event) => { event.preventDefault(); this.open(alerts.map((alert) => alert.id)); } });
      tick.style.left = `${at}px`;
      return tick;
    }));
  }

  cursor(step) {
    this.hair.hidden = step === null;
    if (step !== null) this.hair.style.left = `${this.pixel(step)}px`;
  }

  leave() {
    this.watch.disconnect();
    this.axis.members.delete(this);
  }
}

export class AlertList {
  constructor(run) {
    this.run = run;
    this.most = 8;
    this.element = h("section", { class: "alert-list" });
  }

  show(alerts, known) {
    const now = JSON.stringify([alerts.map((alert) => [alert.id, alert.step, alert.until, alert.tensors.length, alert.text]), this.most]);
    if (now === this.shown) return;
    Object.assign(this, { alerts, known, shown: now });
    const order = [...alerts].sort((a, b) => b.step - a.step);
    const rows = order.slice(0, this.most).map((alert) => this.row(alert));
    replace(this.element, h("h2", {}, say("page.alerts")),
      rows.length ? h("ol", {}, rows) : h("p", { class: "quiet" }, say("page.no_alerts")),
      order.length > this.most ? h("button", { type: "button", onclick: () => { this.most += 50; this.show(alerts, known); } },
        say("page.more", { n: order.length - this.most })) : null);
  }

  row(alert) {
    const open = alert.until === null;
    const steps = open || alert.until === alert.step ? say("page.at_step", { step: count(alert.step) })
      : say("page.at_steps", { first: count(alert.step), last: count(alert.until) });
    const names = alert.tensors.slice(0, 4).map((name) => this.known.has(name)
      ? h("a", { class: "mono", href: address({ run: this.run, page: "tensor", tensor: name, step: alert.step }) }, name)
      : h("span", { class: "mono" }, name));
    const rest = alert.tensors.length - names.length;
    const zoom = h("button", { type: "button", class: "link", onclick: () => {
      const wide = Math.max(20, (alert.until ?? alert.step) - alert.step);
      go(altered({ from: Math.max(0, alert.step - wide), to: (alert.until ?? alert.step) + wide }));
    } }, steps);
    return h("li", { tabindex: "-1", class: alert.severity },
      h("span", { class: "alert-when" }, zoom, open ? h("span", { class: "quiet" }, " ", say("page.still")) : null),
      h("span", { class: `alert-severity ${alert.severity}` }, say(SEVERITY[alert.severity])),
      h("div", {}, h("p", {}, alert.text), alert.remedy && h("p", { class: "quiet" }, alert.remedy),
        names.length ? h("p", { class: "small" }, names.flatMap((name, k) => (k ? [say("page.comma"), name] : [name])),
          rest > 0 ? " " + say("page.and_more", { n: rest }) : null) : null));
  }
}
