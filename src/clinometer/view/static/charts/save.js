// What is on screen, as a file: PNG, SVG, CSV.

import { h } from "../base/dom.js";
import { numbers, plotly } from "./plotly.js";
import { colour } from "../base/settings.js";
import { say } from "../base/words.js";

export function saveButtons(kinds) {
  return h("span", { class: "save" }, Object.entries(kinds).map(([name, make]) =>
    h("button", { type: "button", title: say("page.save_as", { kind: name }), onclick: () => make() }, name)));
}

export function download(name, content, type) {
  const link = h("a", { download: name });
  const address = content instanceof Blob || type
    ? URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }))
    : content;
  link.href = address;
  document.body.append(link);
  link.click();
  link.remove();
  if (address.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export async function saveFigure(figure, name, kind, { title, caption, width, height }) {
  if (kind === "CSV") return download(`${name}.csv`, csv(figure), "text/csv");
  const Plotly = await plotly();
  const layout = {
    ...figure.layout, width, height: height + 72, autosize: false,
    paper_bgcolor: colour("paper"), font: { ...figure.layout.font, color: colour("ink") },
    margin: { l: 72, r: 24, t: 56, b: 48 }, showlegend: figure.data.filter((t) => t.name).length > 1,
    title: { text: `${escaped(title)}<br><span style="font-size:11px">${escaped(caption)}</span>`, x: 0.01, font: { size: 14 } },
  };
  const address = await Plotly.toImage({ data: figure.data, layout },
    { format: kind.toLowerCase(), width, height: height + 72, scale: kind === "PNG" ? 2 : 1 });
  return download(`${name}.${kind.toLowerCase()}`, address);
}

export function escaped(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// One row a point: series, x, y and, for a map, value. Spreadsheets must not take a cell for a formula.
function csv(figure) {
  const grid = figure.data.some((trace) => trace.z);
  const lines = [grid ? "series,x,y,value" : "series,x,y"];
  for (const trace of figure.data) {
    const series = cell(trace.name ?? trace.type ?? "");
    const [x, y] = [numbers(trace.x), numbers(trace.y)];
    if (trace.z) {
      numbers(trace.z).forEach((row, r) => Array.from(row).forEach((value, c) =>
        lines.push([series, cell(x[c] ?? c), cell(y[r] ?? r), cell(value)].join(","))));
    } else {
      for (let k = 0; k < Math.max(x.length, y.length); k++) lines.push([series, cell(x[k] ?? k), cell(y[k])].join(","));
    }
  }
  return lines.join("\n") + "\n";
}

export function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+@\t\r-]/.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}
