// One sentence: is everything fine, or what is wrong.

import { byId, setAttribute, setText } from "./dom.js";
import { age, count } from "./format.js";

/** Written only when it changes: a screen reader repeats every change. */
export function say(text, kind) {
  setText(byId("status"), text);
  setAttribute(byId("status"), "class", kind);
}

export function headline(now) {
  const queues = now.queues_unknown ? ` Queues are unknown: ${now.queues_unknown}.` : "";
  if (now.unknown) return { text: `The fleet is unknown: ${now.unknown}.${queues}`, kind: "warn" };
  const { alive, ready } = now.totals;
  if (alive === 0) return { text: `No worker is alive.${queues}`, kind: "bad" };
  return { text: `${workers(alive, ready)}${waiting(now)}${queues ? "" : others(now, alive === ready)}.${queues}`, kind: kindOf(now, alive, ready) };
}

function workers(alive, ready) {
  if (ready === alive) return alive === 1 ? "The worker takes jobs" : `All ${count(alive)} workers take jobs`;
  if (ready === 0) return alive === 1 ? "The worker takes no jobs" : `None of ${count(alive)} workers takes jobs`;
  const idle = alive - ready;
  return `${count(idle)} of ${count(alive)} workers ${idle === 1 ? "takes" : "take"} no jobs`;
}

// Seconds would change the sentence at every update.
function waiting({ totals: { oldest } }) {
  if (oldest === null || oldest.ms < 60000) return "";
  return `; the oldest job waits ${oldest.bound === "at_least" ? "at least" : "about"} ${age(oldest.ms)}`;
}

function others({ findings }, allReady) {
  const worst = findings.find(({ severity }) => severity !== "note");
  return allReady && worst ? `, but: ${worst.text}` : "";
}

function kindOf({ findings }, alive, ready) {
  if (ready === 0 || findings.some(({ severity }) => severity === "bad")) return "bad";
  if (ready < alive || findings.some(({ severity }) => severity === "warn")) return "warn";
  return "good";
}
