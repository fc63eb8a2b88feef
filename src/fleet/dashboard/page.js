// Redraws the page whenever the server sends an update. Texts are untrusted: they are set as text, never as markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
let chosen = null;
let page = null;
// By the monotonic clock.
let heardAt = -Infinity;
let refused = null;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const round = (number, digits = 1) => (number === null || number === undefined ? "–" : number.toFixed(digits));
const clock = (ms) => new Date(ms).toLocaleTimeString();

function age(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

function drawing(label, height = 120) {
  return shape("svg", { viewBox: `0 0 600 ${height}`, role: "img", "aria-label": label, preserveAspectRatio: "none" });
}

// Curves over time, each a list of numbers or null; the label gives the last and the largest value for screen readers.
function curves(place, points, series, unit) {
  const most = Math.max(1e-9, ...series.flatMap(({ of }) => points.map((point) => of(point) ?? 0)));
  const now = series.map(({ name, of }) => `${name} ${round(of(points.at(-1)))} now`).join(", ");
  const told = `${now}; maximum ${round(most)} ${unit} in the last ${age(points.at(-1).at_ms - points[0].at_ms)}`;
  const svg = drawing(told);
  const x = (at) => (points.length < 2 ? 0 : (600 * at) / (points.length - 1));
  const y = (value) => 110 - (100 * value) / most;
  svg.append(shape("line", { class: "axis", x1: 0, x2: 600, y1: 110, y2: 110 }));
  series.forEach(({ of }, at) => {
    const path = points.map((point, i) => [x(i), of(point)]).filter(([, value]) => value !== null && value !== undefined);
    const d = path.map(([px, value], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(shape("path", { class: at ? "curve second" : "curve", d }));
  });
  place.replaceChildren(svg, element("p", told, { class: "since" }));
}

function sparkline(rates) {
  const most = Math.max(1e-9, ...rates);
  const svg = shape("svg", { class: "spark", viewBox: "0 0 60 20", "aria-hidden": "true", preserveAspectRatio: "none" });
  const d = rates.map((rate, i) => `${i ? "L" : "M"}${60 - rates.length + i} ${(19 - (18 * rate) / most).toFixed(1)}`).join("");
  svg.append(shape("path", { class: "curve", d }));
  return svg;
}

function histogram(place, values) {
  if (!values.length) return place.replaceChildren(element("p", "No candidate has been scored since the dashboard started.", { class: "since" }));
  // Outliers are counted in the outermost bins, or one bad candidate would flatten all the others.
  const sorted = [...values].sort((a, b) => a - b), at = (share) => sorted[Math.floor(share * (sorted.length - 1))];
  const least = at(0.05), most = at(0.95), bins = 30;
  const width = (most - least) / bins || 1;
  const counts = new Array(bins).fill(0);
  for (const value of values) counts[Math.max(0, Math.min(bins - 1, Math.floor((value - least) / width)))] += 1;
  const better = values.filter((value) => value > 0).length;
  const told = `${values.length} candidates: ${better} lowered the loss; 90 % are between ${least.toPrecision(3)} and ${most.toPrecision(3)}`;
  const svg = drawing(told), tallest = Math.max(...counts);
  counts.forEach((count, at) => {
    const height = (100 * count) / tallest, middle = least + (at + 0.5) * width;
    svg.append(shape("rect", { class: middle > 0 ? "bar" : "bar down", x: at * 20, width: 18, y: 110 - height, height }));
  });
  place.replaceChildren(svg, element("p", told, { class: "since" }));
}

// A band for each version: how many workers had it, over time.
function rollout(place, points) {
  const versions = [...new Set(points.flatMap((point) => Object.keys(point.versions)))].sort((a, b) => a - b);
  const rows = versions.map((version) => {
    const counts = points.map((point) => point.versions[version] ?? 0), most = Math.max(1, ...counts);
    const told = `version ${version}: ${counts.at(-1)} workers now, maximum ${most}`;
    const svg = drawing(told, 24);
    svg.classList.add("band");
    counts.forEach((count, at) => {
      const width = 600 / counts.length, height = (20 * count) / most;
      if (count) svg.append(shape("rect", { class: "bar", x: at * width, width: width + 0.5, y: 22 - height, height }));
    });
    const row = element("div");
    row.append(element("p", told, { class: "since" }), svg);
    return row;
  });
  place.replaceChildren(...(rows.length ? rows : [element("p", "No worker has a model yet.", { class: "since" })]));
}

function now() {
  const unknown = page.unknown !== null, queues = page.queues;
  const ready = page.workers.filter((worker) => worker.ready).length;
  const facts = [
    ["Ready", unknown ? "unknown" : `${ready} of ${page.workers.length}`],
    ["Jobs per second", unknown ? "unknown" : round(page.workers.reduce((sum, worker) => sum + (worker.rates.at(-1) ?? 0), 0))],
    ["Waiting", queues ? queues.jobs : "unknown"],
    ["To be retried", queues ? queues.retry : "unknown"],
    ["Dead-lettered", queues ? queues.dead : "unknown"],
    ["Consumers", queues ? queues.consumers : "unknown"],
  ];
  byId("now").replaceChildren(...facts.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
}

function say(text, kind) {
  const status = byId("status");
  // Set only when it changes, or a screen reader would repeat it at every update.
  if (status.textContent !== text) status.textContent = text;
  status.className = kind;
}

function headline() {
  const why = [page.unknown && `The fleet is unknown: ${page.unknown}.`, page.queues_unknown && `Queues are unknown: ${page.queues_unknown}.`];
  const unknown = why.filter(Boolean).join(" ");
  if (unknown) return say(unknown, "warn");
  const ready = page.workers.filter((worker) => worker.ready).length;
  if (!page.workers.length) return say("No worker is alive.", "bad");
  say(ready ? `${ready} of ${page.workers.length} workers take jobs.` : "No worker takes jobs.", ready ? "good" : "bad");
}

function row(worker) {
  const made = element("tr"), name = element("th", null, { scope: "row" });
  const button = element("button", worker.id, { type: "button", "data-worker": worker.id, "aria-label": `History of ${worker.id}` });
  name.append(button);
  const known = page.unknown === null;
  const state = element("td", known ? worker.state : "unknown");
  state.className = !known ? "warn" : worker.ready ? "good" : "bad";
  const numbers = [round(worker.rates.at(-1)), round(worker.p50_ms), round(worker.p95_ms), worker.scored, worker.rejected, worker.failed];
  const last = element("td");
  last.append(sparkline(worker.rates));
  made.append(
    name, state, element("td", worker.since_ms ? age(page.at_ms - worker.since_ms) : "–"), element("td", worker.detail),
    element("td", worker.version ?? "–"), ...numbers.map((number) => element("td", number, { class: "number" })), last,
  );
  return made;
}

function workers() {
  const focused = document.activeElement?.dataset?.worker;
  byId("workers").replaceChildren(...page.workers.map(row));
  if (focused) document.querySelector(`[data-worker="${CSS.escape(focused)}"]`)?.focus();
}

function line(at, ...texts) {
  const made = element("li");
  const when = Number.isNaN(new Date(at).getTime()) ? 0 : at;
  made.append(element("time", clock(when), { datetime: new Date(when).toISOString() }), ` ${texts.filter(Boolean).join(" · ")}`);
  return made;
}

function history() {
  const worker = page.workers.find(({ id }) => id === chosen);
  byId("history").hidden = chosen === null;
  if (chosen === null) return;
  byId("history-title").textContent = `History of ${chosen}`;
  byId("history-error").textContent = worker ? (worker.error ? `Last error: ${worker.error}` : "No error since it started.") : "This worker is no longer alive.";
  const events = page.events.filter((event) => event.worker === chosen).reverse();
  byId("history-events").replaceChildren(...events.map((event) => line(event.at_ms, event.text)));
}

function verdicts() {
  const since = page.watching_since_ms;
  byId("verdicts-since").textContent = since ? `since ${clock(since)}` : `results are not visible: ${page.unwatched ?? "not connected yet"}`;
  const counts = Object.entries(page.verdicts).sort((a, b) => b[1] - a[1]);
  const all = counts.reduce((sum, [, count]) => sum + count, 0);
  byId("verdicts").replaceChildren(...counts.map(([code, count]) => {
    const made = element("li");
    made.append(element("span", code), element("meter", null, { min: 0, max: all, value: count, "aria-label": `${code}: ${count} of ${all}` }), element("span", count, { class: "number" }));
    return made;
  }));
}

function parked() {
  const count = page.queues ? page.queues.dead : "unknown number";
  const since = page.watching_since_ms ? `listed since ${clock(page.watching_since_ms)}` : `results are not visible: ${page.unwatched ?? "not connected yet"}`;
  byId("parked-count").textContent = `${count} dead-lettered; ${since}; scorer dead list shows all.`;
  byId("parked").replaceChildren(...[...page.parked].reverse().map((job) => line(job.at_ms, job.submission_id, job.code, job.message, job.worker)));
}

function draw() {
  byId("model").textContent = page.model ?? "";
  headline();
  now();
  workers();
  history();
  if (page.points.length) {
    curves(byId("rate"), page.points, [{ name: "jobs per second", of: (point) => point.jobs_per_s }], "jobs per second");
    curves(byId("latency"), page.points, [{ name: "p50", of: (point) => point.p50_ms }, { name: "p95 of the slowest", of: (point) => point.p95_ms }], "ms");
    rollout(byId("versions"), page.points);
  }
  histogram(byId("deltas"), page.deltas);
  verdicts();
  parked();
  byId("events").replaceChildren(...[...page.events].reverse().map((event) => line(event.at_ms, event.worker, event.text)));
}

document.addEventListener("click", (event) => {
  const id = event.target.dataset?.worker;
  if (id === undefined) return;
  chosen = id;
  history();
  byId("history-title").focus();
});

function close() {
  const before = chosen;
  chosen = null;
  history();
  if (before !== null) document.querySelector(`[data-worker="${CSS.escape(before)}"]`)?.focus();
}
byId("history-close").addEventListener("click", close);
document.addEventListener("keydown", (event) => event.key === "Escape" && close());

// A browser reconnects by itself when a connection breaks, but not after a refusal.
function follow() {
  const source = new EventSource("events");
  source.addEventListener("message", (event) => {
    const told = JSON.parse(event.data);
    if (told.at_ms === undefined) return;
    [heardAt, refused] = [performance.now(), null];
    page = told;
    draw();
  });
  source.addEventListener("error", async () => {
    if (source.readyState !== EventSource.CLOSED) return;
    setTimeout(follow, 5000);
    const answer = await fetch("events").catch(() => null);
    if (answer === null) return;
    if (answer.ok) await answer.body.cancel();
    else refused = (await answer.text()).trim();
  });
}
follow();

// Outdated values are marked as such.
setInterval(() => {
  if (performance.now() - heardAt < 5000) return;
  const why = refused === null ? "does not answer" : `refused: ${refused}`;
  say(`The dashboard's server ${why}. The values below are out of date.`, "warn");
}, 1000);
