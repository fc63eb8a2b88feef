// One worker: what it does and why, its errors, its model and machine, its last results.

import { Chart, valueAxis } from "./charts.js";
import { ask } from "./connection.js";
import { Keyed, byId, emptyRow, setAttribute, setText, showCells, showFacts } from "./dom.js";
import { age, bytes, clock, count, milliseconds, number, percent, plural, rate, shortened, signed, tick } from "./format.js";
import { jobLink, line, showLines } from "./lists.js";

const EVERY_MS = 2000;
/** For a worker that the server does not know. */
const UNKNOWN_EVERY_MS = 10000;
const LOOK_S = 1;
const ORDER = ["total", "queued", "fetch", "decode", "apply", "forward", "restore"];
const yes = (value, word, other) => (value === null || value === undefined ? null : value ? word : other);

export class WorkerView {
  constructor() {
    this.charts = [new Chart(byId("worker-charts"), rates), new Chart(byId("worker-charts"), looks)];
    this.stages = new Keyed(byId("worker-stages"), () => emptyRow(4));
    this.results = new Keyed(byId("worker-results"), () => emptyRow(5));
    this.id = null;
  }

  open(id) {
    this.id = id;
    this.every = EVERY_MS;
    setText(byId("worker-title"), id);
    this.clear("Loading.");
    this.refresh();
  }

  close() {
    this.id = null;
  }

  tick() {
    if (performance.now() - this.askedAt >= this.every - 100) this.refresh();
  }

  async refresh() {
    this.askedAt = performance.now();
    const { id } = this;
    const told = await ask("worker", { id });
    if (id !== this.id) return;
    this.every = told.error === undefined ? EVERY_MS : UNKNOWN_EVERY_MS;
    if (told.error !== undefined) return this.clear(`Unknown: ${told.error}.`);
    this.show(told);
  }

  clear(why) {
    this.says(why, "");
    for (const place of ["worker-panels", "worker-charts"]) byId(place).hidden = true;
    byId("worker-warning").hidden = true;
    for (const name of ["worker-errors", "worker-events"]) showLines(name, []);
    this.stages.show([], () => null, () => {});
    this.results.show([], () => null, () => {});
    byId("worker-stages-none").hidden = byId("worker-results-none").hidden = false;
  }

  says(text, kind) {
    setText(byId("worker-says"), text);
    setAttribute(byId("worker-says"), "class", `says ${kind}`);
  }

  show(told) {
    for (const place of ["worker-panels", "worker-charts"]) byId(place).hidden = false;
    this.says(sentence(told), told.alive ? (told.record.ready ? "good" : "bad") : "warn");
    showWarning(told.record);
    showPanels(told);
    this.showLists(told);
    const end = Math.floor(told.at_ms / 1000);
    for (const chart of this.charts) {
      chart.show(told, { seconds: 120 * LOOK_S, end });
      chart.tell({ told });
    }
  }

  showLists({ errors, events, stages, results }) {
    showLines("worker-errors", errors.map(({ at_ms, code, message }) => line(at_ms, { text: code, class: "code" }, message)));
    showLines("worker-events", events.map(({ at_ms, text }) => line(at_ms, text)));
    const known = ORDER.filter((name) => stages[name]?.count > 0);
    this.stages.show(known, (name) => name, (row, name) => {
      const { p50, p95, count: many } = stages[name];
      showCells(row, [name, ...[milliseconds(p50), milliseconds(p95), count(many)].map((text) => ({ text, class: "number" }))]);
    });
    this.results.show(results, ({ at_ms, submission_id }) => `${at_ms} ${submission_id}`, (row, result) => showCells(row, [
      { text: result.submission_id, href: jobLink(result.submission_id) }, { text: result.verdict, class: `verdict ${result.verdict}` },
      { text: signed(result.delta), class: "number" }, { text: milliseconds(result.total_ms), class: "number" }, clock(result.at_ms),
    ]));
    byId("worker-stages-none").hidden = known.length > 0;
    byId("worker-results-none").hidden = results.length > 0;
  }
}

function sentence({ alive, lost_at_ms, at_ms, age_ms, since_ms, record }) {
  const doing = `${record.state || "in no known state"}${record.state_detail ? `: ${record.state_detail}` : ""}`;
  if (!alive) return `No longer alive${lost_at_ms ? `, since ${age(at_ms - lost_at_ms)}` : ""}; it was last ${doing}.`;
  const held = record.state === "ready" && !record.ready ? ", but it takes no jobs" : "";
  const since = since_ms === null ? "" : `, for ${age(at_ms - since_ms)}`;
  return `${doing}${since}${held}. Last heartbeat ${age_ms < 2000 ? "now" : `${age(age_ms)} ago`}.`;
}

function showWarning({ engine, store, update, warm, broker }) {
  const warnings = [
    engine.software_device && `The device ${engine.device} is software in place of a GPU, which is meant for tests.`,
    store && !store.ok && `Redis does not do what jobs ask of it: ${store.last_error ?? "no reason given"}.`,
    update?.failure && `The live version is not served: ${update.failure}.`,
    update?.refused && `Version ${update.refused.version} was refused: ${update.refused.why}.`,
    broker.blocked && "RabbitMQ blocks publishing.",
    warm.inert_count > 0 && `${plural(warm.inert_count, "tensor has", "tensors have")} no visible effect on the loss.`,
  ].filter(Boolean);
  byId("worker-warning").hidden = warnings.length === 0;
  setText(byId("worker-warning"), warnings.join(" "));
}

function showPanels({ at_ms: now, record }) {
  const ago = (ms) => (ms ? (now - ms < 1000 ? "now" : `${age(now - ms)} ago`) : null);
  showFacts(byId("worker-jobs"), jobFacts(record, ago));
  showFacts(byId("worker-model"), modelFacts(record, ago));
  showFacts(byId("worker-warm"), warmFacts(record, now, ago));
  showFacts(byId("worker-engine"), engineFacts(record));
  showFacts(byId("worker-host"), hostFacts(record, ago));
  showFacts(byId("worker-links"), linkFacts(record));
}

const jobFacts = ({ jobs, accepting, progress }, ago) => [
  ["Scored", count(jobs.scored)], ["Rejected", count(jobs.rejected)], ["Failed", count(jobs.failed), jobs.failed > 0 ? "warn" : null],
  ["Answered from store", count(jobs.duplicates)], ["Redelivered", count(jobs.redelivered)],
  ["Held now", `${count(jobs.in_flight + jobs.buffered)}, ${accepting ? "takes more" : "takes no more"}`],
  ["Median", milliseconds(jobs.p50_ms)], ["p95", milliseconds(jobs.p95_ms)], ["Mean", milliseconds(jobs.avg_ms)],
  ["Last result", ago(jobs.last_scored_at_ms) ?? "none yet"], ["This computation", progress.busy_ms > 0 ? `for ${milliseconds(progress.busy_ms)}` : "idle"],
];

const modelFacts = ({ model, update }, ago) => [
  ["Name", model.name], ["Version", model.version ?? "none"], ["Weights", model.weights_id, "digest"], ["Plan", model.plan, "digest"],
  ["Shards", model.shards.length > 0 ? model.shards.join(", ") : "none"], ["Baselines kept", count(model.baseline_cache_entries)],
  ["Updates", update ? null : "not followed"], ["Live version", update?.live_version], ["Manifest read", ago(update?.looked_at_ms)],
  ["Download", update?.bytes_wanted ? `${bytes(update.bytes_here)} of ${bytes(update.bytes_wanted)}` : null],
  ["Not served because", update?.failure, "warn"],
  ["Refused version", update?.refused && `${update.refused.version}, ${ago(update.refused.at_ms)}: ${update.refused.why}`, "warn"],
];

const warmFacts = ({ warm, last_ready_at_ms }, now, ago) => [
  ["Attempts", count(warm.attempt)], ["Last ended", ago(warm.last_at_ms) ?? "none yet"], ["Took", milliseconds(warm.last_ms)],
  ["Baseline loss", warm.baseline_loss === null || warm.baseline_loss === undefined ? "unknown" : `${warm.baseline_loss.toPrecision(6)} nats per target`],
  ["Next retry", warm.next_retry_at_ms ? (warm.next_retry_at_ms > now ? `in ${age(warm.next_retry_at_ms - now)}` : "now") : null],
  ["Last became ready", ago(last_ready_at_ms) ?? "never"], ["Inert tensors", count(warm.inert_count ?? 0), warm.inert_count > 0 ? "warn" : null],
  ["Their names", warm.inert?.join("\n"), "names"],
];

const engineFacts = ({ engine }) => [
  ["Provider", engine.execution_provider], ["Device", engine.device], ["Device is", yes(engine.software_device, "software, meant for tests", "hardware"), engine.software_device ? "warn" : null],
  ["Nodes on the device", engine.placement ? count(engine.placement.device) : "unknown"], ["Nodes on the host", engine.placement ? count(engine.placement.host) : "unknown"],
  ["Precision", engine.precision], ["Micro-batch", engine.micro_batch], ["Parts of the graph", engine.parts], ["ONNX Runtime", engine.onnxruntime], ["Class", engine.class, "digest"],
];

const hostFacts = ({ host, host_info: info, pid, build, memory, started_at_ms, incarnation }, ago) => [
  ["Host", host], ["GPU", info.gpu_model], ["GPU memory", info.gpu_memory_bytes ? bytes(info.gpu_memory_bytes) : null], ["Processor", `${info.cpu_model}, ${info.cores} cores`],
  ["Memory", bytes(info.ram_bytes)], ["System", `${info.os} ${info.arch}`], ["Process", `${pid}, ${bytes(memory.rss_bytes)} resident`], ["Started", ago(started_at_ms)],
  ["Build", build.git ? `${build.version} (${shortened(build.git)})` : build.version], ["Incarnation", incarnation, "digest"],
];

const linkFacts = ({ broker, store }) => [
  ["RabbitMQ", yes(broker.connected, "connected", "not connected"), broker.connected ? null : "bad"], ["Consumer", yes(broker.consuming, "confirmed", "not confirmed"), broker.consuming ? null : "bad"],
  ["Publishing", yes(broker.blocked, "blocked", "allowed"), broker.blocked ? "bad" : null], ["Connections so far", broker.generation], ["Node", broker.node],
  ["Result store", store === null || store === undefined ? "unknown" : store.ok ? "works" : "does not work", store && !store.ok ? "bad" : null], ["Its error", store?.last_error, "warn"],
];

const times = ({ at_ms }, values) => values.map((_, at) => Math.floor(at_ms / 1000) - LOOK_S * (values.length - 1 - at));

const rates = {
  title: "Its throughput", unit: "jobs/s, mean of 10 s, last two minutes", empty: "Jobs per second, look by look.",
  draw: (told) => told.rates.length === 0 ? null : {
    xs: times(told, told.rates), axes: [valueAxis(tick)], scales: { y: { range: (_, __, most) => [0, Math.max(1, most * 1.12)] } },
    series: [{ name: "jobs/s", values: told.rates, colour: "series-1", fill: 0.14, format: rate }],
  },
  told: ({ told: { rates: values } }) => values.length === 0 ? "unknown" : `${rate(values.at(-1))} jobs/s now; maximum ${rate(Math.max(...values))}`,
};

const looks = {
  title: "Its device", unit: "computing at each look, last two minutes", empty: "Whether the device computes, look by look.",
  draw: (told) => told.busy.length === 0 ? null : {
    xs: times(told, told.busy), axes: [valueAxis((value) => ({ 0: "idle", 1: "busy" })[value] ?? null)], scales: { y: { range: [0, 1.12] } },
    series: [{ name: "device", values: told.busy, colour: "series-4", fill: 0.35, paths: uPlot.paths.stepped({ align: -1 }), format: (value) => (value === null || value === undefined ? "–" : value ? "busy" : "idle") }],
  },
  told: ({ told: { busy } }) => busy.length === 0 ? "unknown" : `busy at ${percent(busy.filter(Boolean).length / busy.length)} of ${number(busy.length).replace(/\.\d+$/, "")} looks`,
};
