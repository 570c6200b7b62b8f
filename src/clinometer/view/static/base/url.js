// The address is the view: what is in it can be shared, and going back goes back.

const KNOWN = ["run", "runs", "page", "tensor", "index", "step", "stat", "kind", "rows", "cols", "from", "to",
  "report", "token", "filter", "lang", "theme"];
const listeners = new Set();

export function here() {
  const query = new URLSearchParams(location.search);
  const state = {};
  for (const name of KNOWN) if (query.has(name) && query.get(name) !== "") state[name] = query.get(name);
  for (const name of ["step", "from", "to"]) {
    if (name in state) {
      state[name] = Number(state[name]);
      if (!Number.isSafeInteger(state[name]) || state[name] < 0) delete state[name];
    }
  }
  state.page ??= state.run ? "run" : "runs";
  return state;
}

// What stays when somebody goes to another page: the language, the theme, and what is asked for.
export function address(changes, { keep = [] } = {}) {
  const now = here();
  const next = {};
  for (const name of ["lang", "theme", ...keep]) if (name in now) next[name] = now[name];
  Object.assign(next, changes);
  const query = new URLSearchParams();
  for (const name of KNOWN) {
    const value = next[name];
    if (value === undefined || value === null || value === "") continue;
    if (name === "page" && value === (next.run ? "run" : "runs")) continue;
    query.set(name, String(value));
  }
  const text = query.toString().replace(/%2C/g, ",").replace(/%5B/g, "[").replace(/%5D/g, "]");
  return text ? `/?${text}` : "/";
}

// The same view with something changed.
export function altered(changes) {
  return address(changes, { keep: KNOWN });
}

export function go(target, { quietly = false } = {}) {
  if (target === location.pathname + location.search) return;
  history[quietly ? "replaceState" : "pushState"](null, "", target);
  for (const call of listeners) call(here());
}

export function onMove(call) {
  listeners.add(call);
}

addEventListener("popstate", () => { for (const call of listeners) call(here()); });

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href^='/?'], a[href='/']");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) {
    return;
  }
  if (link.target || link.hasAttribute("download")) return;
  event.preventDefault();
  go(link.getAttribute("href"));
});
