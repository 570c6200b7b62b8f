// One way to ask the server. An error is always an ApiError with a sentence for the reader.

import { language, say } from "./words.js";

export class ApiError extends Error {
  constructor(key, text, status, body = null) {
    super(text);
    this.key = key;
    this.status = status;
    this.body = body;
  }
}

export async function get(path, query = {}, signal = undefined) {
  const asked = new URLSearchParams();
  for (const [name, value] of Object.entries({ lang: language(), ...query })) {
    if (value !== undefined && value !== null && value !== "") asked.set(name, String(value));
  }
  return answer(path, `${path}?${asked}`, { signal });
}

export function send(path, method, body = undefined) {
  const headers = { "X-Clinometer": "1" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  return answer(path, `${path}?lang=${language()}`, { method, headers, body: body && JSON.stringify(body) });
}

async function answer(path, address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (reason) {
    if (reason.name === "AbortError") throw reason;
    throw new ApiError("page.offline", say("page.offline"), 0);
  }
  let body = null;
  try {
    body = await response.json();
  } catch (reason) {
    if (reason.name === "AbortError") throw reason;
  }
  if (response.ok && body !== null) return body;
  if (response.status === 401) throw new ApiError("page.token", say("page.token"), 401);
  const error = body?.error;
  throw new ApiError(error?.key ?? "page.unreadable",
    error?.text ?? say("page.unreadable", { path, status: response.status }), response.status, body);
}

export function ofRun(run, what = "") {
  return `/api/runs/${encodeURIComponent(run)}${what && `/${what}`}`;
}

// Little-endian float32 or bytes, as the server packs large arrays.
export function floats(base64) {
  return new Float32Array(bytes(base64).buffer);
}

export function bytes(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const out = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) out[k] = text.charCodeAt(k);
  return out;
}
