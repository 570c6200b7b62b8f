// The help overlay: the keys, and how to read the page.

import { h } from "../base/dom.js";
import { say } from "../base/words.js";

export function openHelp() {
  const layer = document.getElementById("layer");
  if (layer.querySelector("dialog[open]")) return;
  const key = (...names) => h("dt", {}, names.flatMap((name, k) => (k ? [" ", h("kbd", {}, name)] : [h("kbd", {}, name)])));
  const line = (keys, text) => [key(...keys), h("dd", {}, text)];
  const dialog = h("dialog", { "aria-label": say("page.help") },
    h("h1", {}, say("page.help")),
    h("dl", { class: "help-grid" },
      line(["/"], say("page.help_filter")), line(["j", "k"], say("page.help_move")), line(["enter"], say("page.help_in")),
      line(["esc"], say("page.help_out")), line(["+", "\u2212"], say("page.help_zoom")), line(["\u2190", "\u2192"], say("page.help_pan")),
      line(["0"], say("page.help_whole")), line(["l"], say("page.switch_language")), line(["d"], say("page.switch_theme")),
      line(["?"], say("page.help_help"))),
    h("h2", {}, say("page.reading")),
    h("ul", { class: "reading" }, h("li", {}, say("page.reading_map")), h("li", {}, say("page.reading_dead")),
      h("li", {}, say("page.reading_alarm")), h("li", {}, say("page.reading_tokens")), h("li", {}, say("page.reading_zoom")),
      h("li", {}, say("page.reading_address"))),
    h("p", {}, h("button", { type: "button", class: "main", autofocus: true, onclick: () => dialog.close() }, say("page.close"))));
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  layer.append(dialog);
  dialog.showModal();
}
