// The server announces, the page fetches: at most once a second, and nothing while hidden.

let source = null;
let following = null;
let timer = null;
let last = 0;
let versions = new Map();
let refresh = null;
let busy = false;
let again = false;
let pause = 1000;

// `seen`: the version of the run that is on screen already; of anything else the first word is news.
export function follow(run, call, seen = undefined) {
  refresh = call;
  versions = new Map(run && seen !== undefined ? [[run, seen]] : []);
  if (following === run && source) return;
  following = run;
  open();
}

export function unfollow() {
  refresh = null;
  following = null;
  close();
}

function open() {
  close();
  if (document.hidden || refresh === null) return;
  source = new EventSource(following ? `/api/live?run=${encodeURIComponent(following)}` : "/api/live");
  source.onmessage = (event) => {
    const news = JSON.parse(event.data);
    const before = versions.get(news.run);
    versions.set(news.run, news.version);
    if (before !== news.version) schedule();
  };
}

function close() {
  source?.close();
  source = null;
  clearTimeout(timer);
  timer = null;
}

function schedule() {
  if (busy) { again = true; return; }
  timer ??= setTimeout(run, Math.max(0, last + pause - performance.now()));
}

async function run() {
  timer = null;
  if (document.hidden || !refresh) return;
  busy = true;
  last = performance.now();
  try {
    await refresh();
  } catch (reason) {
    if (reason.name !== "AbortError") console.warn(reason.message);
  }
  // A slow machine is given four times what an update takes.
  pause = Math.max(1000, 4 * (performance.now() - last));
  busy = false;
  if (again) { again = false; schedule(); }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) close();
  else if (refresh) { open(); schedule(); }
});
addEventListener("pagehide", close);
