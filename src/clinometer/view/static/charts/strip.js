// The four numbers at the top of a run, each with its last hundred steps.

import { h, replace } from "../base/dom.js";
import { number } from "../base/number.js";
import { drawSpark, sparkline } from "./spark.js";

export function drawStrip(element, numbers) {
  replace(element, numbers.map((item) => {
    const spark = sparkline(112, 28);
    drawSpark(spark, item.spark ?? [], { ink: item.name === "alerts" && item.value ? "warning" : "accent" });
    const broken = item.not_finite_since !== null && item.not_finite_since !== undefined;
    return h("div", { class: "strip-number", "data-number": item.name },
      h("div", { class: "strip-label" }, item.label), h("div", { class: broken ? "strip-value broken" : "strip-value" },
        h("span", { class: broken ? "alarm" : item.name === "alerts" && item.value ? "warning" : null }, item.text ?? number(item.value)),
        item.unit ? h("span", { class: "quiet small" }, " ", item.unit) : null), spark);
  }));
}
