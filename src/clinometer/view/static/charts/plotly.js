// Plotly under a strict content security policy.
//
// Plotly writes style attributes with setAttribute and makes <style> elements; both are refused by
// `style-src 'self'`. The same declarations set through the object model are allowed, and its style sheet is
// served as a file (plotly.css). So, before it is loaded: attributes go through the object model, and the style
// elements it makes are inert.

let loading = null;

export function plotly() {
  loading ??= new Promise((resolve, reject) => {
    tame();
    const script = document.createElement("script");
    script.src = new URL("../plotly.min.js", import.meta.url).href;
    script.onload = () => resolve(globalThis.Plotly);
    script.onerror = () => { loading = null; script.remove(); reject(new Error("plotly.min.js")); };
    document.head.append(script);
  });
  return loading;
}

function tame() {
  const setAttribute = Element.prototype.setAttribute;
  Element.prototype.setAttribute = function (name, value) {
    if (name === "style" && this.style) this.style.cssText = value;
    else setAttribute.call(this, name, value);
  };
  const createElement = Document.prototype.createElement;
  Document.prototype.createElement = function (name, ...rest) {
    return createElement.call(this, name === "style" ? "template" : name, ...rest);
  };
}

// Numbers as the server packs them in a figure: a plain list, or {dtype, bdata}.
const TYPES = {
  f8: Float64Array, f4: Float32Array, i4: Int32Array, u4: Uint32Array, i2: Int16Array, u2: Uint16Array,
  i1: Int8Array, u1: Uint8Array,
};
export function numbers(packed) {
  if (!packed?.bdata) return packed ?? [];
  const text = atob(packed.bdata);
  const raw = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const flat = new TYPES[packed.dtype](raw.buffer);
  if (!packed.shape) return flat;
  const [rows, columns] = String(packed.shape).split(",").map(Number);
  if (columns === undefined) return flat;
  return Array.from({ length: rows }, (_, k) => flat.subarray(k * columns, (k + 1) * columns));
}
