// The workers as the page knows them: names and devices come rarely, numbers every second.

import { age } from "./format.js";

/** What a worker does, as shape and colour; the sick come first. `key` is also the class of the cell. */
export const KINDS = [
  { key: "lost", word: "Lost" },
  { key: "degraded", word: "Degraded" },
  { key: "held", word: "Ready without a consumer" },
  { key: "paused", word: "Paused" },
  { key: "other", word: "Other" },
  { key: "starting", word: "Starting" },
  { key: "warming", word: "Warming" },
  { key: "updating", word: "Updating" },
  { key: "reloading", word: "Reloading" },
  { key: "draining", word: "Draining" },
  { key: "stopped", word: "Stopped" },
  { key: "ready", word: "Ready" },
];
const RANK = new Map(KINDS.map(({ key }, at) => [key, at]));
export const rank = (worker) => RANK.get(worker.kind) * 2 - (worker.warn ? 1 : 0);

function kindOf(state, why, ready) {
  if (state === "ready") return ready ? "ready" : "held";
  if (state === "degraded") return why === "paused" ? "paused" : "degraded";
  return RANK.has(state) && state !== "lost" ? state : "other";
}

export class Fleet {
  constructor() {
    this.rev = null;
    /** Those alive, by name. */
    this.workers = [];
    /** Those that vanished lately. */
    this.lost = [];
    this.now = null;
  }

  setMembers({ rev, ids, devices, device, hosts }) {
    const known = new Map(this.workers.map((worker) => [worker.id, worker]));
    this.rev = rev;
    this.workers = ids.map((id, at) => ({
      ...known.get(id),
      id,
      device: devices[device[at]] ?? null,
      host: hosts[at] ?? null,
    }));
  }

  setNow(now) {
    this.now = now;
    if (now.fleet_rev === this.rev) this.workers.forEach((worker, at) => this.fill(worker, now, at));
    this.lost = now.lost.map(({ id, at_ms, state }) => lostWorker(id, now.at_ms - at_ms, state));
  }

  fill(worker, { words, workers: columns }, at) {
    worker.state = words[columns.state[at]] ?? "unknown";
    worker.why = words[columns.why[at]] ?? "";
    worker.ready = columns.ready[at] === "1";
    worker.warn = columns.warn[at] === "1";
    for (const name of ["for_s", "version", "rate", "p95", "busy", "failed"]) worker[name] = columns[name][at];
    worker.kind = kindOf(worker.state, worker.why, worker.ready);
  }

  /** Everyone who is shown. A worker that is back is no longer lost. */
  everyone() {
    const alive = new Set(this.workers.map(({ id }) => id));
    return [...this.lost.filter(({ id }) => !alive.has(id)), ...this.workers.filter(({ kind }) => kind !== undefined)];
  }

  find(id) {
    return this.everyone().find((worker) => worker.id === id);
  }
}

function lostWorker(id, forMs, state) {
  const nothing = { version: null, rate: null, p95: null, busy: null, failed: null, device: null, host: null };
  return { ...nothing, id, state: "lost", why: state ? `last ${state}` : "", ready: false, warn: false, kind: "lost", for_s: Math.floor(forMs / 1000) };
}

export function label(worker) {
  const since = worker.for_s === null ? "" : `, for ${age(1000 * worker.for_s)}`;
  const problem = worker.warn ? ", with a recent problem" : "";
  return `${worker.id}: ${[worker.state, worker.why].filter(Boolean).join(", ")}${since}${problem}`;
}
