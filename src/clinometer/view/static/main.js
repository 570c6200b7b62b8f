// From the address to a page, and back: which page is open, its keys, its live updates.

import { get, ofRun } from "./base/api.js";
import { replace } from "./base/dom.js";
import { drawHeader, switchLanguage, switchTheme } from "./pages/header.js";
import { openHelp } from "./pages/help.js";
import { setKeys } from "./base/keys.js";
import { follow, unfollow } from "./base/live.js";
import { batchPage } from "./pages/batch.js";
import { comparePage } from "./pages/compare.js";
import { reportsPage } from "./pages/reports.js";
import { runPage } from "./pages/run.js";
import { runsPage } from "./pages/runs.js";
import { tensorPage } from "./pages/tensor.js";
import { weightPage } from "./pages/weight.js";
import { plotly } from "./charts/plotly.js";
import { chosenLanguage, chosenTheme, loadColours, onSystemTheme, theme, wear } from "./base/settings.js";
import { broken, notice, skeleton } from "./base/states.js";
import { address, go, here, onMove } from "./base/url.js";
import { language, loadWords, say } from "./base/words.js";

const PAGES = {
  runs: runsPage, run: runPage, tensor: tensorPage, weight: weightPage, batch: batchPage, check: reportsPage,
  diagnosis: reportsPage, compare: comparePage,
};
const DRAWN = new Set(["run", "tensor", "weight", "batch", "compare"]);
const FRAMES = { runs: ["short", "line", "line", "line"], run: ["line", "chart", "map"], tensor: ["line", "map"] };

const main = document.getElementById("main");
let open = null;       // {page, state, leave, update?, refresh?, keys?}
let known = null;      // what the server said of the run that is open
let turn = 0;

async function move(state) {
  const mine = ++turn;
  const relit = chosenTheme(state) !== theme();
  const respoken = chosenLanguage(state) !== language();
  wear(chosenTheme(state));
  if (respoken) await loadWords(chosenLanguage(state));
  if (mine !== turn) return;
  const same = open && !relit && !respoken && open.state.page === state.page && open.state.run === state.run;
  if (same && open.update) {
    const before = open.state;
    open.state = state;
    if (await open.update(state, before) !== false) {
      if (mine === turn) drawHeader(state, known, openHelp);
      return;
    }
    if (mine !== turn) return;
  }
  await enter(state, mine);
}

async function enter(state, mine) {
  const stay = open && open.state.page === state.page && open.state.run === state.run;
  leave();
  const halt = new AbortController();
  open = { state, halt };
  const held = open;
  if (known?.id !== state.run) known = null;
  drawHeader(state, known, openHelp);
  setKeys(keys({}));
  if (!stay) scrollTo(0, 0);
  const frame = setTimeout(() => replace(main, skeleton(...FRAMES[state.page] ?? ["line", "chart"])), stay ? 400 : 60);
  try {
    const make = PAGES[state.page];
    if (!make || (state.page !== "runs" && state.page !== "compare" && !state.run)) {
      replace(main, notice(say("page.no_page"), [say("page.no_page_help")]));
      return;
    }
    if (state.run) known = await get(ofRun(state.run), {}, halt.signal);
    if (mine !== turn) return;
    drawHeader(state, known, openHelp);
    const page = await make({ main, state, info: known, signal: halt.signal, frame: () => clearTimeout(frame),
      told: (info) => { known = info; }, again: () => enter(here(), ++turn) });
    if (mine !== turn || open !== held) { page?.leave?.(); return; }
    Object.assign(open, page);
    setKeys(keys(page?.keys ?? {}));
    if (page?.refresh) follow(state.run ?? null, page.refresh, state.run ? known?.version : undefined);
  } catch (reason) {
    if (reason.name === "AbortError" || mine !== turn) return;
    if (!reason.key) console.error(reason);
    replace(main, broken(reason, () => move(here())));
  } finally {
    clearTimeout(frame);
  }
}

function leave() {
  unfollow();
  open?.halt.abort();
  open?.leave?.();
  open = null;
}

function keys(own) {
  return {
    "?": openHelp, l: switchLanguage, d: switchTheme,
    "/": () => { const box = document.querySelector("[data-filter]"); box?.focus(); box?.select(); return Boolean(box); },
    ...own,
    Escape: () => { if (own.Escape?.() !== true) out(); },   // a page may first leave its own zoom
  };
}

// One level up: weight → tensor → run → runs.
function out() {
  const { page, run, tensor, step } = here();
  if (page === "weight") go(address({ run, page: "tensor", tensor, step }));
  else if (page === "run" || page === "compare") go(address({}));
  else if (run) go(address({ run }));
}

async function start() {
  const state = here();
  wear(chosenTheme(state));
  onSystemTheme(() => move(here()));
  if (DRAWN.has(state.page)) plotly().catch(() => {});   // 5 MB: on its way while the numbers are asked for
  try {
    await Promise.all([loadWords(chosenLanguage(state)), loadColours()]);
  } catch (reason) {
    main.textContent = `The server does not answer. 服务器没有应答。 ${reason.message}`;
    return;
  }
  onMove((next) => move(next).catch((reason) => { if (reason.name !== "AbortError") console.error(reason); }));
  await move(state);
  plotly().catch(() => {});
}

start();
