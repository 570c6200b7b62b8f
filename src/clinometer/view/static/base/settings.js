// Language and theme: the address decides, then what was chosen last, then the server's and the system's.

import { get } from "./api.js";

const languages = document.documentElement.dataset.languages.split(" ");
const served = document.documentElement.lang;
const dark = matchMedia("(prefers-color-scheme: dark)");
let colours = null;

function remembered(name) {
  try {
    return localStorage.getItem(`clinometer.${name}`);
  } catch {
    return null;  // storage can be forbidden; then nothing is remembered
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`clinometer.${name}`, value);
  } catch {
    // as above
  }
}

export function chosenLanguage(state) {
  const asked = state.lang ?? remembered("lang") ?? served;
  return languages.includes(asked) ? asked : served;
}

export function chosenTheme(state) {
  const asked = state.theme ?? remembered("theme");
  if (asked === "light" || asked === "dark") return asked;
  return dark.matches ? "dark" : "light";
}

export function wear(theme) {
  document.documentElement.dataset.theme = theme;
}

export function theme() {
  return document.documentElement.dataset.theme;
}

export function onSystemTheme(call) {
  dark.addEventListener("change", call);
}

export async function loadColours() {
  colours ??= await get("/api/theme");
}

export function colour(name) {
  return colours[theme()][name];
}

// The map's scale as 256 RGB triples.
const tables = new Map();
export function scale() {
  const now = theme();
  if (!tables.has(now)) tables.set(now, table(colours.scale[now]));
  return tables.get(now);
}

function table(stops) {
  const parsed = stops.map(([at, hex]) => [at, rgb(hex)]);
  const out = new Uint8ClampedArray(256 * 3);
  let k = 0;
  for (let n = 0; n < 256; n++) {
    const at = n / 255;
    while (k < parsed.length - 2 && at > parsed[k + 1][0]) k++;
    const [[a, from], [b, to]] = [parsed[k], parsed[k + 1]];
    const t = b > a ? (at - a) / (b - a) : 0;
    for (let c = 0; c < 3; c++) out[n * 3 + c] = from[c] + (to[c] - from[c]) * t;
  }
  return out;
}

// The scale as one line of pixels, low to high.
export function drawScale(canvas) {
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(canvas.width, 1);
  const now = scale();
  for (let k = 0; k < canvas.width; k++) {
    const n = Math.round((k / (canvas.width - 1)) * 255) * 3;
    image.data.set([now[n], now[n + 1], now[n + 2], 255], k * 4);
  }
  pen.putImageData(image, 0, 0);
}

export function rgb(hex) {
  return [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
}

// A colour laid thinly over the paper, for tinted text.
export function tint(name, share) {
  const [over, under] = [rgb(colour(name)), rgb(colour("paper"))];
  return `rgb(${over.map((v, k) => Math.round(under[k] + (v - under[k]) * share)).join(" ")})`;
}
