// One time axis for everything on a page that has steps: the same range, the same cursor, the same zoom.

export class TimeAxis {
  constructor({ zoom, open = null }) {
    this.members = new Set();
    this.first = 0;
    this.last = 1;
    this.whole = [0, 1];
    this.onZoom = zoom;
    this.onOpen = open;
  }

  // Each step is a cell from step − ½ to step + ½, so that curves and map cells stand under each other.
  get range() {
    return [this.first - 0.5, this.last + 0.5];
  }

  show(whole, from, to) {
    this.whole = whole;
    this.first = from ?? whole[0];
    this.last = Math.max(this.first, to ?? whole[1]);
  }

  get zoomed() {
    return this.first !== this.whole[0] || this.last !== this.whole[1];
  }

  hover(step) {
    for (const member of this.members) member.cursor(step);
  }

  zoom(a, b) {
    let [from, to] = [Math.round(Math.min(a, b)), Math.round(Math.max(a, b))];
    from = Math.max(from, this.whole[0]);
    to = Math.min(to, this.whole[1]);
    if (to - from < 2) {
      const middle = Math.round((from + to) / 2);
      from = Math.max(this.whole[0], middle - 1);
      to = Math.min(this.whole[1], middle + 1);
    }
    if (from <= this.whole[0] && to >= this.whole[1]) this.onZoom(null, null);
    else this.onZoom(from, to);
  }

  // By keyboard: in and out around the middle, left and right by a quarter.
  nudge(what) {
    const width = this.last - this.first;
    const [a, b] = { in: [0.25, -0.25], out: [-0.5, 0.5], left: [-0.25, -0.25], right: [0.25, 0.25] }[what];
    const from = this.first + a * width;
    const to = this.last + b * width;
    if (what === "left" && from < this.whole[0]) this.zoom(this.whole[0], this.whole[0] + width);
    else if (what === "right" && to > this.whole[1]) this.zoom(this.whole[1] - width, this.whole[1]);
    else this.zoom(from, to);
  }
}

// Pointer on something with a time axis: moves the cursor, drags a zoom, clicks a step.
// `geometry()` gives {left, width} of the axis inside `element`, in pixels.
export function timePointer(element, axis, geometry, { select, moved = null, clicked = null }) {
  let start = null;
  const stepAt = (event) => {
    const { left, width } = geometry();
    const x = event.clientX - element.getBoundingClientRect().left - left;
    if (x < 0 || x > width) return null;
    const [a, b] = axis.range;
    return Math.min(axis.last, Math.max(axis.first, Math.round(a + (x / width) * (b - a))));
  };
  element.addEventListener("pointermove", (event) => {
    const step = stepAt(event);
    axis.hover(step);
    moved?.(step, event);
    if (start && step !== null && Math.abs(event.clientX - start.x) > 4) select(start.step, step);
  });
  element.addEventListener("pointerleave", (event) => {
    axis.hover(null);
    moved?.(null, event);
  });
  element.addEventListener("pointerdown", (event) => {
    const step = stepAt(event);
    if (event.button || step === null || event.pointerType === "touch") return;
    event.preventDefault();  // no text selection while a zoom is drawn
    element.focus?.({ preventScroll: true });
    start = { x: event.clientX, step };
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointerup", (event) => {
    if (!start) return;
    const from = start;
    start = null;
    select(null, null);
    const step = stepAt(event) ?? (event.clientX > from.x ? axis.last : axis.first);
    if (Math.abs(event.clientX - from.x) > 4) axis.zoom(from.step, step);
    else if (clicked) clicked(step, event);
    else axis.onOpen?.(step);
  });
  element.addEventListener("pointercancel", () => { start = null; select(null, null); });
  element.addEventListener("click", (event) => {
    if (event.pointerType !== "touch") return;
    const step = stepAt(event);
    if (step !== null) { axis.hover(step); moved?.(step, event); }
  });
  element.addEventListener("dblclick", () => axis.onZoom(null, null));
}

// Round numbers for an axis, about `wanted` of them.
export function ticks(a, b, wanted) {
  const rough = (b - a) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1e-300)));
  const width = power * ([1, 2, 5, 10].find((m) => m * power >= rough) ?? 10);
  const out = [];
  for (let at = Math.ceil(a / width) * width; at <= b + width * 1e-9; at += width) out.push(at);
  return out;
}
