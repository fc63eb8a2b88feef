// One job: every verdict that was seen, what is stored, whether it is parked, who computes it now. Where nothing says, "unknown".

import { ask } from "./connection.js";
import { Keyed, byId, element, setAttribute, setText, showFacts } from "./dom.js";
import { age, capital, clock, count, milliseconds, plural } from "./format.js";
import { mergeLink, workerLink } from "./lists.js";

const EVERY_MS = 5000;
const NO_REASON = "without a reason";

export class JobView {
  constructor() {
    const card = () => element("div", { class: "card" }, element("h3"), element("dl", { class: "facts flow" }));
    this.verdicts = new Keyed(byId("job-verdicts"), card);
    this.parked = new Keyed(byId("job-parked"), card);
    this.marks = new Keyed(byId("job-running"), () => element("li", {}, element("a"), " ", element("span")));
    this.id = null;
  }

  open(id) {
    this.id = id;
    setText(byId("job-title"), id);
    this.show({ verdicts: [], parked: [], watching_since_ms: null, unwatched: "loading", stored: { state: "unknown", why: "loading" }, running: { state: "unknown", why: "loading" } });
    this.refresh();
  }

  close() {
    this.id = null;
  }

  tick(now) {
    this.now = now.at_ms;
    if (performance.now() - this.askedAt >= EVERY_MS) this.refresh();
  }

  async refresh() {
    this.askedAt = performance.now();
    const { id } = this;
    const told = await ask("job", { id });
    if (id !== this.id) return;
    const why = told.error;
    this.show(why === undefined ? told : { verdicts: [], parked: [], watching_since_ms: null, unwatched: why, stored: { state: "unknown", why }, running: { state: "unknown", why } });
  }

  show(job) {
    const unwatched = `Unknown: results are not visible: ${job.unwatched ?? "not connected yet"}.`;
    const since = (what) => (job.watching_since_ms ? `${what} since ${clock(job.watching_since_ms)}, when the dashboard began to watch.` : unwatched);
    this.says(job);
    note("job-verdicts", job.verdicts, since("None seen"));
    this.verdicts.show(job.verdicts, ({ at_ms, key, attempt, worker }) => `${at_ms} ${key} ${attempt} ${worker}`, (card, seen) => showVerdict(card, seen, this.id));
    this.showStored(job.stored);
    this.showMarks(job.running);
    note("job-parked", job.parked, since("Not seen among the dead-lettered jobs"));
    this.parked.show(job.parked, ({ at_ms, code }) => `${at_ms} ${code}`, showParked);
  }

  says({ verdicts, parked, stored, running }) {
    const [last] = verdicts;
    const text = last ? `${last.code === null ? capital(outcome(last)) : `${capital(last.status)}: ${last.code},`} by ${last.worker ?? "an unknown worker"} at ${clock(last.at_ms)}.`
      : running.state === "found" ? "It is computed now."
      : parked.length > 0 ? `Dead-lettered: ${parked[0].code || NO_REASON}.`
      : stored.state === "found" ? "Its result is stored." : "Nothing says what became of it.";
    setText(byId("job-says"), text);
    setAttribute(byId("job-says"), "class", `says ${last?.status === "failed" || (!last && parked.length > 0) ? "bad" : ""}`);
  }

  showStored(stored) {
    const words = { found: "", absent: "None. Results of failed jobs and refusals that depend on the worker are never stored; others expire.", unknown: `Unknown: ${stored.why}.` };
    setText(byId("job-stored-none"), words[stored.state]);
    byId("job-stored-none").hidden = stored.state === "found";
    byId("job-stored").hidden = stored.state !== "found";
    if (stored.state === "found") showFacts(byId("job-stored"), flat(stored.result));
  }

  showMarks(running) {
    const words = { found: "", absent: "No worker computes it now.", unknown: `Unknown: ${running.why}.` };
    setText(byId("job-running-none"), words[running.state]);
    byId("job-running-none").hidden = running.state === "found";
    this.marks.show(running.marks ?? [], ({ worker, incarnation }) => `${worker} ${incarnation}`, (item, mark) => {
      setAttribute(item.firstElementChild, "href", workerLink(mark.worker));
      setText(item.firstElementChild, mark.worker);
      setText(item.lastElementChild, this.doing(mark));
    });
  }

  /** Of a merge, also the member that is measured by itself. */
  doing({ dead, started_ms, member }) {
    if (dead) return `was counted as dead while it computed it${member === null ? "" : `; it measured ${member}`}`;
    const since = started_ms === null ? "" : this.now ? ` for ${age(this.now - started_ms)}` : ` since ${clock(started_ms)}`;
    return `has been computing it${since}${member === null ? "" : `; measures ${member}`}`;
  }
}

const outcome = ({ verdict, status, code }) => verdict ?? (code ? `${status}, ${code},` : status);

function note(name, items, text) {
  setText(byId(`${name}-none`), text);
  byId(`${name}-none`).hidden = items.length > 0;
}

function showVerdict(card, seen, id) {
  setText(card.firstElementChild, `${seen.verdict ?? seen.code ?? seen.status} · ${clock(seen.at_ms)}`);
  setAttribute(card.firstElementChild, "class", `verdict ${seen.verdict ?? seen.status}`);
  const timings = Object.entries(seen.timings_ms ?? {}).filter(([, ms]) => ms !== null).map(([stage, ms]) => `${stage} ${milliseconds(ms)}`);
  showFacts(card.lastElementChild, [
    ["Status", seen.status], ["Kind", seen.kind], ["Members", seen.kind === "merge" ? { text: "what each is worth", href: mergeLink(id) } : null], ["Code", seen.code, "code"], ["Message", seen.message, "across"],
    ["Retry helps", seen.retryable === null || seen.retryable === undefined ? null : seen.retryable ? "perhaps" : "no"],
    ["Stopped early", stoppedFact(seen), "across"], ["Delta", seen.delta],
    ["95 % interval", seen.ci95 ? seen.ci95.join(" to ") : seen.delta === null || seen.delta === undefined ? null : "none"], ["Score", seen.score], ["Loss", seen.loss],
    ["Loss before", seen.loss_before], ["Loss after", seen.loss_after], ["Windows", seen.windows], ["Worker", seen.worker && { text: seen.worker, href: workerLink(seen.worker) }],
    ["Attempt", seen.attempt], ["Model version", seen.model_version], ["Timings", timings.join(", "), "across"],
    ["Trace id", ...traceFact(seen)], ["Key", seen.key, "digest"],
  ]);
}

const stoppedFact = ({ stopped, windows }) => stopped
  && `${stopped.decision}, after ${windows} of ${stopped.of} windows: the delta is at most ${signed(stopped.upper)} (alpha ${stopped.alpha}${stopped.proven ? ", proven" : ""})`
  + (stopped.finished ? `; measured to its end to check this, it is ${signed(stopped.finished.delta)}` : "");

const traceFact = ({ trace_id: id }) => (id ? [id, "digest"] : ["unknown: it had none"]);

function showParked(card, { at_ms, code, message, worker, trace_id }) {
  setText(card.firstElementChild, `${code || NO_REASON} · ${clock(at_ms)}`);
  showFacts(card.lastElementChild, [["Why", message || "unknown", "across"], ["Worker", worker ? { text: worker, href: workerLink(worker) } : "unknown"], ["Trace id", ...traceFact({ trace_id })]]);
}

/** A stored result as pairs of a path and a value. */
function flat(value, path = "") {
  if (value === null || typeof value !== "object") return value === null ? [] : [[path, typeof value === "string" && value.length > 40 ? value : String(value), typeof value === "string" && value.length > 40 ? "digest" : null]];
  if (Array.isArray(value)) {
    if (value.every((item) => typeof item !== "object")) return [[path, value.join(", ")]];
    return value.length > 20 ? [[path, plural(value.length, "entry", "entries")]] : value.flatMap((item, at) => flat(item, `${path}[${count(at)}]`));
  }
  return Object.entries(value).flatMap(([key, item]) => flat(item, path === "" ? key : `${path}.${key}`));
}
