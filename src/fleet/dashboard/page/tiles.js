// The numbers of this second.

import { Keyed, byId, element, setAttribute, setText } from "./dom.js";
import { age, count, percent, rate } from "./format.js";

const tiles = new Keyed(byId("now"), () => element("div", {}, element("dt"), element("dd"), element("dd", { class: "sub" })));

export function showTiles(now) {
  tiles.show(facts(now), ([name]) => name, (tile, [name, value, sub, kind]) => {
    setText(tile.children[0], name);
    setText(tile.children[1], value);
    setText(tile.children[2], sub);
    setAttribute(tile, "class", kind ?? null);
  });
}

function facts(now) {
  const { totals, queues } = now;
  const known = (value) => (now.unknown ? "unknown" : value);
  const queued = (value) => (queues ? count(value) : "unknown");
  const idle = totals.alive - totals.ready;
  return [
    ["Ready", known(`${count(totals.ready)} of ${count(totals.alive)}`), now.unknown ? "" : idle ? `${count(idle)} take no jobs` : "all take jobs", !now.unknown && idle ? "bad" : null],
    ["Throughput", known(rate(totals.jobs_per_s)), "jobs/s, mean of 10 s"],
    ["Busy", known(percent(totals.busy)), "of the ready devices"],
    ["Waiting", queued(queues?.jobs), "jobs in the queue"],
    ["Oldest job", ...oldest(now)],
    ["To be retried", queued(queues?.retry), "jobs on the ladder"],
    ["Dead-lettered", queued(queues?.dead), "jobs parked", queues?.dead ? "warn" : null],
    ["Consumers", queued(queues?.consumers), "of the jobs queue"],
  ];
}

function oldest({ queues, totals: { oldest: job } }) {
  if (!queues) return ["unknown", "waiting time"];
  if (job === null) return queues.jobs ? ["unknown", "waiting time"] : ["none", "nothing waits"];
  return [age(job.ms), job.bound === "at_least" ? "waits at least" : "waits about", job.ms >= 60000 ? "warn" : null];
}
