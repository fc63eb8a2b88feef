// The history of the chosen range: fetched once, then only what is new.

import { ask } from "./connection.js";

export const RANGES = [
  { key: "10m", title: "10 min", seconds: 600 },
  { key: "1h", title: "1 h", seconds: 3600 },
  { key: "8h", title: "8 h", seconds: 28800 },
  { key: "1d", title: "1 day", seconds: 86400 },
];
const PLAIN = ["jobs_per_s", "busy", "alive", "ready", "waiting", "retry", "dead", "oldest_s", "workers_p50", "workers_p95"];

export class Timeline {
  constructor(onPoints) {
    this.onPoints = onPoints;
    this.range = RANGES[0];
    this.kept = new Map();
    this.asking = false;
  }

  get columns() {
    return this.kept.get(this.range.key) ?? null;
  }

  choose(key) {
    this.range = RANGES.find((range) => range.key === key);
    if (this.columns !== null) this.onPoints();
  }

  /** Fetches what the server has and this page has not. `lastMs` is the server's last point of each range. */
  async follow(timelineAt) {
    const { range } = this;
    const last = timelineAt?.[range.key] ?? null;
    const mine = this.lastMs(range.key);
    if (this.asking || last === null || last === mine) return;
    this.asking = true;
    // A server that began again has less than this page.
    const fresh = mine === null || last < mine;
    const answer = await ask("timeline", fresh ? { range: range.key } : { range: range.key, after: mine });
    this.asking = false;
    if (answer.error !== undefined) return;
    this.kept.set(range.key, fresh ? answer : joined(this.kept.get(range.key), answer, range.seconds));
    if (range === this.range) this.onPoints();
  }

  lastMs(key) {
    const at = this.kept.get(key)?.at.at(-1);
    return at === undefined ? null : at * 1000;
  }
}

/** The newer columns behind the older ones, without what has left the range. */
function joined(old, newer, seconds) {
  const end = newer.at.at(-1) ?? old.at.at(-1);
  const kept = old.at.filter((at) => at > end - seconds).length;
  const [skip, more] = [old.at.length - kept, newer.at.length];
  const join = (left, right, none) => [...(left ?? new Array(old.at.length).fill(none)).slice(skip), ...(right ?? new Array(more).fill(none))];
  const all = (left, right, none) => Object.fromEntries([...new Set([...Object.keys(left), ...Object.keys(right)])].map((key) => [key, join(left[key], right[key], none)]));
  const stages = [...new Set([...Object.keys(old.stages), ...Object.keys(newer.stages)])].map((stage) => {
    const [left, right] = [old.stages[stage] ?? {}, newer.stages[stage] ?? {}];
    return [stage, { p50: join(left.p50, right.p50, null), p95: join(left.p95, right.p95, null) }];
  });
  return {
    ...newer,
    at: join(old.at, newer.at),
    ...Object.fromEntries(PLAIN.map((name) => [name, join(old[name], newer[name], null)])),
    stages: Object.fromEntries(stages),
    classes: all(old.classes, newer.classes, 0),
    versions: all(old.versions, newer.versions, 0),
    candidates: [...old.candidates.filter(([atMs]) => atMs > (end - seconds) * 1000), ...newer.candidates],
  };
}
