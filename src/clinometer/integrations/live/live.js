// The page's half of LiveRun: draws `shown`, which Python makes from the run file. Text is set as text, never as
// HTML: names come from a file that somebody else may have written.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 640, HEIGHT = 160, LEFT = 68, BOTTOM = 20, TOP = 8;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawn(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The loss curve; where there is no number the line has a gap. */
function curve({ step, value }, label) {
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  const there = value.filter((v) => v !== null);
  if (!there.length) return svg;
  const low = Math.min(...there), high = Math.max(...there);
  const first = step[0], last = step[step.length - 1];
  const x = (s) => LEFT + ((WIDTH - LEFT - 8) * (s - first)) / (last - first || 1);
  const y = (v) => TOP + ((HEIGHT - TOP - BOTTOM) * (high - v)) / (high - low || 1);
  let path = "", pen = "M";
  value.forEach((v, i) => {
    if (v === null) pen = "M";
    else {
      path += `${pen}${x(step[i]).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = "L";
    }
  });
  const base = HEIGHT - BOTTOM;
  svg.append(
    drawn("path", { d: `M${LEFT} ${TOP}V${base}H${WIDTH - 8}`, class: "axis" }),
    drawn("path", { d: path, class: "line" }),
    drawn("text", { x: LEFT - 6, y: TOP + 8, "text-anchor": "end" }, high.toPrecision(3)),
    drawn("text", { x: LEFT - 6, y: base, "text-anchor": "end" }, low.toPrecision(3)),
    drawn("text", { x: LEFT, y: HEIGHT - 4 }, String(first)),
    drawn("text", { x: WIDTH - 8, y: HEIGHT - 4, "text-anchor": "end" }, String(last)),
  );
  if (there.length === 1) svg.append(drawn("circle", { cx: x(step[value.indexOf(there[0])]), cy: y(there[0]), r: 3 }));
  return svg;
}

function table({ columns, rows, more }) {
  const body = make("div", "tensors");
  if (!rows.length) return body;
  const whole = make("table"), head = make("tr");
  head.append(...columns.map((column) => make("th", "", column)));
  whole.append(head);
  for (const cells of rows) {
    const row = make("tr");
    row.append(...cells.map((cell) => make("td", "", cell)));
    whole.append(row);
  }
  body.append(whole);
  if (more) body.append(make("p", "more", more));
  return body;
}

function draw(shown, root) {
  const scrolled = root.querySelector(".tensors")?.scrollTop ?? 0;
  const head = make("p", "head");
  head.append(make("strong", "", shown.title), make("span", shown.live ? "live" : "", shown.facts.join(" · ")));
  const alerts = make("ul", "alerts");
  for (const { text, open, severity } of shown.alerts) {
    alerts.append(make("li", `${open ? "open" : "past"} ${severity === "fault" ? "fault" : ""}`, text));
  }
  const tensors = table(shown.tensors);
  root.replaceChildren(head, curve(shown.loss, shown.loss_label), alerts, tensors);
  tensors.scrollTop = scrolled;
}

function render({ model, el }) {
  const root = make("div", "clinometer-live");
  el.append(root);
  const again = () => draw(model.get("shown"), root);
  model.on("change:shown", again);
  again();
  return () => model.off("change:shown", again);
}

export default { render };
