// The page's sentences in the reader's language. `say(key, {name: value})`.

let sentences = {};
let current = "en";
let spoken = {};

export async function loadWords(language) {
  const answer = await fetch(`/api/messages?lang=${language}`);
  if (!answer.ok) throw new Error(`/api/messages: ${answer.status}`);
  const body = await answer.json();
  sentences = body.messages;
  current = language;
  spoken = body;
  document.documentElement.lang = body.tag;
}

export function language() {
  return current;
}

// The language after the current one, as [code, name]: what the switch offers.
export function nextLanguage() {
  const all = Object.entries(spoken.languages);
  return all[(all.findIndex(([code]) => code === current) + 1) % all.length];
}

// "{n}", or a word that goes by a number: "{n|step|steps}".
const PLACE = /\{(\w+)(?:\|([^|}]*)\|([^|}]*))?\}/g;

export function say(key, values = {}) {
  const sentence = sentences[key] ?? key;
  return sentence.replace(PLACE, (whole, name, one, many) => {
    if (!(name in values)) return whole;
    if (one === undefined) return values[name];
    return String(values[name]) === "1" ? one : many;
  });
}

// "3 min ago": for how long something has been as it is.
export function ago(unix) {
  return say("page.ago", { time: lasting(Math.max(0, Date.now() / 1000 - unix)) });
}

export function lasting(seconds) {
  if (seconds < 60) return say("page.seconds", { n: Math.round(seconds) });
  if (seconds < 3600) return say("page.minutes", { n: Math.round(seconds / 60) });
  if (seconds < 172800) return say("page.hours", { n: Math.round(seconds / 3600) });
  return say("page.days", { n: Math.round(seconds / 86400) });
}

export function clock(unix) {
  return new Date(unix * 1000).toLocaleString(spoken.locale, {
    year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit",
  });
}
