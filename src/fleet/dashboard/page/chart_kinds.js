// The charts of the fleet over time: what each draws and what it says in words.

import { STEPS, valueAxis } from "./charts.js";
import { age, count, milliseconds, number, percent, plural, rate, tick } from "./format.js";

const largest = (values) => values.reduce((most, value) => (value === null || value === undefined ? most : Math.max(most, value)), 0);
const some = (values) => values.some((value) => value !== null && value !== undefined);
const fromZero = { range: (_, __, most) => [0, most > 0 ? most * 1.12 : 1] };
const integers = (value) => (Number.isInteger(value) ? count(value) : null);

export const throughput = {
  title: "Throughput", unit: "jobs/s", empty: "Jobs per second, as soon as a worker is alive.",
  draw: ({ at, jobs_per_s: values }) => some(values) ? {
    xs: at, axes: [valueAxis(tick)], scales: { y: fromZero },
    series: [{ name: "jobs/s", values, colour: "series-1", fill: 0.14, format: rate }],
  } : null,
  told: ({ now, columns, range }) => now.unknown ? "unknown" : `${rate(now.totals.jobs_per_s)} jobs/s now; maximum ${rate(largest([...(columns?.jobs_per_s ?? []), now.totals.jobs_per_s]))} in ${range.title}`,
};

const CLASSES = [["better", "good"], ["unclear", "neutral"], ["worse", "series-2"], ["validated", "series-1"], ["merged", "series-5"], ["rejected", "series-3"], ["failed", "bad"]];
const WORDS = { rejected: "refused" };
/** Seconds per bar, by range. */
const BAR = { "10m": 10, "1h": 60, "8h": 600, "1d": 1800 };

/** Layers on one another: each series holds the sum of itself and those below it; the highest is drawn first. */
function stacked(layers) {
  let sums = null;
  const made = layers.map((layer) => {
    sums = layer.values.map((value, at) => (value ?? 0) + (sums?.[at] ?? 0));
    return { ...layer, values: sums, shown: layer.values };
  });
  return made.reverse();
}

/** Means per second by the start of each bar; the first and the last bar cover less time. */
function binned({ at, every_ms }, values, seconds) {
  const bars = new Map();
  at.forEach((time, i) => {
    // A point is about the interval that ends with it.
    const start = Math.ceil(time / seconds - 1) * seconds;
    const { sum, points } = bars.get(start) ?? { sum: 0, points: 0 };
    bars.set(start, { sum: sum + (values[i] ?? 0), points: points + 1 });
  });
  return new Map([...bars].map(([start, { sum, points }]) => [start, (sum * 1000) / (points * every_ms)]));
}

export const verdicts = {
  title: "Verdicts", unit: "results/s, mean of each bar", empty: "Results by verdict, as soon as one is seen.",
  draw: (columns, { range }) => {
    const { classes } = columns;
    const layers = CLASSES.filter(([name]) => largest(classes[name] ?? []) > 0);
    if (layers.length === 0) return null;
    const bins = layers.map(([name]) => binned(columns, classes[name], BAR[range.key]));
    const xs = [...bins[0].keys()];
    const paths = uPlot.paths.bars({ align: 1, size: [1, Infinity], gap: 1 });
    const series = layers.map(([name, of], i) => ({ name: WORDS[name] ?? name, values: xs.map((x) => bins[i].get(x)), colour: of, fill: 0.75, width: 0, paths, format: number }));
    return { xs, series: stacked(series), axes: [valueAxis(tick)], scales: { y: fromZero } };
  },
  told: ({ now: { classes, watching_since_ms: since, unwatched }, range }) => {
    if (!since) return `results are not visible: ${unwatched ?? "not connected yet"}`;
    const parts = CLASSES.filter(([name]) => classes[name] > 0).map(([name]) => `${count(classes[name])} ${WORDS[name] ?? name}`);
    return `${parts.join(", ") || "no result"} since the dashboard watches; each bar is ${age(1000 * BAR[range.key])}`;
  },
};

const STAGES = [["total", "series-1"], ["queued", "series-2", [6, 4]], ["fetch", "series-3"], ["decode", "series-4", [2, 3]], ["apply", "series-5"], ["forward", "series-6"], ["restore", "series-7", [7, 3, 2, 3]]];
const positive = (values) => values.map((value) => (value > 0 ? value : null));
const logarithmic = { y: { distr: 3, range: (_, least, most) => [10 ** Math.floor(Math.log10(least || 1)), 10 ** Math.ceil(Math.log10((most || 10) * 1.01))] } };

/** `percentile` is "p50" or "p95". */
export const latency = {
  title: "Latency by stage", unit: "log scale", empty: "Milliseconds per job, as soon as one is done.",
  draw: ({ at, stages, workers_p50, workers_p95 }, { percentile }) => {
    const seen = STAGES.filter(([name]) => some(stages[name]?.[percentile] ?? []));
    const axes = [valueAxis((ms) => (ms >= 1000 ? `${tick(ms / 1000)} s` : `${tick(ms)} ms`), { size: 58 })];
    if (seen.length > 0) {
      const series = seen.map(([name, of, dash], i) => ({ name, values: positive(stages[name][percentile]), colour: of, dash, width: i === 0 ? 2.5 : 1.25, format: milliseconds }));
      return { xs: at, axes, scales: logarithmic, series };
    }
    if (!some(workers_p50) && !some(workers_p95)) return null;
    const series = [
      { name: "median of the workers' medians", values: positive(workers_p50), colour: "series-1", format: milliseconds },
      { name: "p95 of the slowest worker", values: positive(workers_p95), colour: "series-2", dash: [5, 4], format: milliseconds },
    ];
    return { xs: at, axes, scales: logarithmic, series, note: "No result is visible in this time: these are the workers' own numbers, without stages." };
  },
  told: ({ now }) => now.unknown ? "unknown" : now.totals.p50_ms === null ? "no worker has done a job yet" : `the last 256 jobs of each worker, as in the table: median ${milliseconds(now.totals.p50_ms)}, p95 of the slowest ${milliseconds(now.totals.p95_ms)}; each point above: the results of its time`,
};

export const queue = {
  title: "Queue", unit: "jobs; age of the oldest on the right", empty: "Jobs that wait, as soon as RabbitMQ answers.",
  draw: ({ at, waiting, retry, oldest_s }) => some(waiting) ? {
    xs: at, scales: { y: fromZero, age: { range: (_, __, most) => [0, Math.max(5, most * 1.12)] } },
    axes: [valueAxis(integers), valueAxis((seconds) => (seconds < 120 ? `${seconds} s` : age(1000 * seconds)), { side: 1, scale: "age", incrs: STEPS, grid: { show: false } })],
    series: [
      { name: "waiting", values: waiting, colour: "series-1", fill: 0.14, format: count },
      { name: "to be retried", values: retry, colour: "series-3", format: count },
      { name: "oldest job", values: oldest_s, colour: "series-2", dash: [5, 4], scale: "age", format: (seconds) => age(1000 * (seconds ?? NaN)) },
    ],
  } : null,
  told: ({ now: { unknown, queues, queues_unknown, totals: { oldest } } }) => {
    if (!queues) return `unknown: ${unknown ?? queues_unknown ?? "there are several models"}`;
    const waits = oldest === null ? "" : `; the oldest waits ${oldest.bound === "at_least" ? "at least" : "about"} ${age(oldest.ms)}`;
    return `${count(queues.jobs)} waiting, ${count(queues.retry)} to be retried now${waits}`;
  },
};

export const busy = {
  title: "Devices", unit: "busy %; workers on the right", empty: "Busy share of the devices, as soon as a worker is alive.",
  draw: ({ at, busy: share, ready, alive }) => largest(alive) > 0 ? {
    xs: at, scales: { y: { range: [0, 1] }, workers: fromZero },
    axes: [valueAxis(percent), valueAxis(integers, { side: 1, scale: "workers", grid: { show: false } })],
    series: [
      { name: "busy", values: share, colour: "series-1", fill: 0.14, format: percent },
      { name: "alive", values: alive, colour: "neutral", dash: [5, 4], scale: "workers", format: count },
      { name: "ready", values: ready, colour: "series-4", width: 2, scale: "workers", format: count },
    ],
  } : null,
  told: ({ now: { unknown, totals } }) => unknown ? "unknown" : `${totals.busy === null ? "busy share unknown" : `${percent(totals.busy)} busy`}; ${count(totals.ready)} of ${plural(totals.alive, "worker")} ready now`,
};

const BANDS = ["series-1", "series-3", "series-4", "series-5", "series-2", "series-6", "series-7"];
// The names that are no numbers: workers without a model, and those with a version before the others.
const byVersion = (a, b) => (a === "none") - (b === "none") || (b === "older") - (a === "older") || a - b;
const bandOf = (name) => (name === "none" || name === "older" ? "neutral" : BANDS[Number(name) % BANDS.length]);
/** As many have a curve of their own. */
const MOST_NAMED = 8;
const VERSION = { none: ["no model", "without a model"], older: ["older", "older versions"] };

/** Names of versions and how many workers have each; those beyond the newest few are one. */
function servedBy(served) {
  const workers = new Map();
  const newest = [...new Set(served.filter((version) => version !== null))].sort((a, b) => b - a).slice(0, MOST_NAMED);
  for (const version of served) {
    const name = version === null ? "none" : newest.includes(version) ? String(version) : "older";
    workers.set(name, (workers.get(name) ?? 0) + 1);
  }
  return [...workers].sort(([a], [b]) => byVersion(a, b));
}

export const versions = {
  title: "Versions", unit: "workers by model version", empty: "Workers by model version, as soon as one has loaded a model.",
  draw: ({ at, versions: counts }) => {
    const names = Object.keys(counts).filter((name) => largest(counts[name]) > 0).sort(byVersion);
    if (names.length === 0) return null;
    const paths = uPlot.paths.stepped({ align: 1 });
    // The colour of a version is the same whatever else is shown.
    const layers = names.map((name) => ({
      name: VERSION[name]?.[0] ?? `v${name}`, values: counts[name], colour: bandOf(name),
      fill: 0.6, width: 0, paths, format: count,
    }));
    return { xs: at, series: stacked(layers), axes: [valueAxis(integers)], scales: { y: fromZero } };
  },
  told: ({ now }) => {
    if (now.unknown) return "unknown";
    const parts = servedBy(now.workers.version).map(([name, workers]) => `${VERSION[name]?.[1] ?? `version ${name}`}: ${plural(workers, "worker")}`);
    return parts.length === 0 ? "no worker is alive" : `${parts.join(", ")} now`;
  },
};

export const KINDS = [throughput, latency, queue, busy, verdicts, versions];
