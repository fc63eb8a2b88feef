// Results by code, dead-lettered jobs, events: what has happened since the dashboard started.

import { Keyed, byId, element, setAttribute, setText } from "./dom.js";
import { clock, count, machineTime } from "./format.js";

export const jobLink = (id) => `#job/${encodeURIComponent(id)}`;
export const mergeLink = (id) => `#merge/${encodeURIComponent(id)}`;
export const workerLink = (id) => `#worker/${encodeURIComponent(id)}`;

/** A line of a list: when, then texts and links ({text, href}). */
export function line(at, ...parts) {
  const made = element("li", {}, element("time", { datetime: machineTime(at) }, clock(at)));
  for (const part of parts.filter(Boolean)) {
    const { text, href, class: kind } = typeof part === "object" ? part : { text: part };
    const node = element(href === undefined ? "span" : "a", { href: href ?? null, class: kind ?? null }, text);
    made.append(" ", node);
  }
  return made;
}

export function showLines(name, lines) {
  byId(name).replaceChildren(...lines);
  byId(name).hidden = lines.length === 0;
  const none = byId(`${name}-none`);
  if (none !== null) none.hidden = lines.length > 0;
}

export const showEvents = (events) => showLines("events", [...events].reverse().map(({ at_ms, worker, text }) => line(at_ms, { text: worker, href: workerLink(worker) }, text)));

export const showParked = (jobs) => showLines("parked", [...jobs].reverse().map((job) => line(
  job.at_ms,
  job.submission_id ? { text: job.submission_id, href: jobLink(job.submission_id) } : "without a submission id",
  job.code && { text: job.code, class: "code" },
  job.message,
  job.worker && { text: job.worker, href: workerLink(job.worker) },
)));

const bars = new Keyed(byId("verdicts"), () => element("li", {}, element("span"), element("span", { class: "track", "aria-hidden": "true" }, element("span")), element("span", { class: "number" })));
const GOOD = new Set(["better", "validated"]);
const MEASURED = new Set([...GOOD, "worse", "unclear", "merged"]);

export function showOutcomes({ watching_since_ms: since, unwatched, verdicts, classes, queues }) {
  setText(byId("verdicts-since"), since ? `since ${clock(since)}` : `results are not visible: ${unwatched ?? "not connected yet"}`);
  const split = Object.entries(classes).filter(([name, many]) => many > 0 && MEASURED.has(name));
  const codes = Object.entries(verdicts).filter(([code]) => !MEASURED.has(code)).sort((a, b) => b[1] - a[1]);
  const all = [...split, ...codes];
  const most = Math.max(1, ...all.map(([, many]) => many));
  bars.show(all, ([name]) => name, (item, [name, many]) => {
    setText(item.children[0], name);
    item.children[1].firstElementChild.style.width = `${(100 * many) / most}%`;
    setAttribute(item, "class", GOOD.has(name) ? "fine" : split.some(([other]) => other === name) ? "" : "refused");
    setText(item.children[2], count(many));
  });
  const dead = queues ? count(queues.dead) : "An unknown number";
  const listed = since ? `listed since ${clock(since)}` : `results are not visible: ${unwatched ?? "not connected yet"}`;
  setText(byId("parked-count"), `${dead} dead-lettered; ${listed}; scorer dead list shows all.`);
}
