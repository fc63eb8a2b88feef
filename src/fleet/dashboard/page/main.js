// Starts the page: takes what the server sends to the parts that show it, and follows the address.

import { Chart } from "./charts.js";
import { KINDS, latency } from "./chart_kinds.js";
import { follow } from "./connection.js";
import { ContributorsView } from "./contributors_view.js";
import { Deltas } from "./deltas.js";
import { byId, element, setAttribute, setText } from "./dom.js";
import { matcher } from "./filter.js";
import { Findings } from "./findings.js";
import { Fleet } from "./fleet.js";
import { FleetMap } from "./fleet_map.js";
import { count } from "./format.js";
import { JobView } from "./job_view.js";
import { showEvents, showOutcomes, showParked, jobLink } from "./lists.js";
import { MergeView } from "./merge_view.js";
import { MergesView } from "./merges_view.js";
import { News } from "./news.js";
import { Router } from "./router.js";
import { headline, say } from "./status_line.js";
import { showTiles } from "./tiles.js";
import { RANGES, Timeline } from "./timeline.js";
import { WorkerTable } from "./worker_table.js";
import { WorkerView } from "./worker_view.js";

const fleet = new Fleet();
const map = new FleetMap();
const table = new WorkerTable(() => showWorkers());
const findings = new Findings((text) => setFilter(text));
const charts = KINDS.map((kind) => new Chart(byId("charts"), kind));
const deltas = new Deltas(byId("charts"));
const timeline = new Timeline(() => showCharts());
const news = new News((changed) => showNews(changed));
const views = { worker: new WorkerView(), job: new JobView(), contributors: new ContributorsView(), merges: new MergesView(), merge: new MergeView() };
const router = new Router(views);
let percentile = "p95";

function showWorkers() {
  const { now } = fleet;
  if (now === null) return;
  const everyone = fleet.everyone();
  const matching = everyone.filter(matcher(byId("filter").value));
  const filtered = byId("filter").value.trim() !== "";
  setText(byId("shown"), filtered ? `${count(matching.length)} of ${count(everyone.length)}` : everyoneInWords());
  byId("map-none").hidden = matching.length > 0;
  for (const part of ["map", "legend", "table-title", "table"]) byId(part).hidden = matching.length === 0;
  setText(byId("map-none"), everyone.length === 0 ? "No worker is alive. Start one with scorer run." : "No worker matches the filter.");
  map.show(matching, now.unknown !== null);
  table.show(matching, now.unknown !== null);
}

function everyoneInWords() {
  const { workers, lost } = fleet;
  return lost.length === 0 ? `${count(workers.length)} alive` : `${count(workers.length)} alive, ${count(lost.length)} lost in the last 10 minutes`;
}

function setFilter(text) {
  byId("filter").value = text;
  showWorkers();
  byId("filter").focus();
}

/** What charts are drawn from beside the points themselves. The range ends at the last point. */
function context() {
  const { columns, range } = timeline;
  const end = columns?.at.at(-1) ?? fleet.now.at_ms / 1000;
  return { now: fleet.now, columns, range, seconds: range.seconds, end, percentile };
}

function showCharts() {
  if (fleet.now === null) return;
  for (const chart of charts) chart.show(timeline.columns, context());
  deltas.show(timeline.columns?.candidates ?? [], context());
  tellCharts();
}

function tellCharts() {
  for (const chart of charts) chart.tell(context());
}

function showNews(changed) {
  if (changed.includes("events")) showEvents(news.items.events);
  if (changed.includes("parked")) showParked(news.items.parked);
}

function showNow(now) {
  fleet.setNow(now);
  setAttribute(document.body, "class", now.unknown ? "old" : null);
  setText(byId("model"), now.model ?? "");
  byId("demo").hidden = now.demo === null;
  setText(byId("demo"), now.demo === null ? "" : `DEMO: a simulated fleet of ${count(now.demo)} workers. Nothing here is real.`);
  byId("nav-contributors").hidden = now.contributors === null;
  const { text, kind } = headline(now);
  say(text, kind);
  findings.show(now);
  showTiles(now);
  showWorkers();
  showOutcomes(now);
  tellCharts();
  timeline.follow(now.timeline_at);
  news.follow(now.news);
  router.tick(now);
}

function segments(place, choices, chosen, onChoose) {
  const buttons = choices.map(({ key, title }) => {
    const button = element("button", { type: "button", "aria-pressed": String(key === chosen) }, title);
    button.addEventListener("click", () => {
      for (const other of buttons) setAttribute(other, "aria-pressed", String(other === button));
      onChoose(key);
    });
    return button;
  });
  place.append(...buttons);
}

function listen() {
  segments(byId("ranges"), RANGES, timeline.range.key, (key) => {
    timeline.choose(key);
    if (fleet.now !== null) timeline.follow(fleet.now.timeline_at);
  });
  const { tools } = charts[KINDS.indexOf(latency)].frame;
  tools.className = "segments";
  tools.setAttribute("role", "group");
  tools.setAttribute("aria-label", "Percentile");
  segments(tools, [{ key: "p50", title: "p50" }, { key: "p95", title: "p95" }], percentile, (key) => {
    percentile = key;
    showCharts();
  });
  byId("filter").addEventListener("input", showWorkers);
  byId("order").addEventListener("change", ({ target }) => {
    map.setOrder(target.value);
    showWorkers();
  });
  byId("job-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const id = byId("job-id").value.trim();
    if (id !== "") location.hash = jobLink(id);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const chart of [...charts, deltas, ...views.worker.charts]) chart.remake();
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("main").focus();
  });
  document.addEventListener("keydown", escape);
}

/** Escape closes what is smallest: the hint, the filter, the view. */
function escape(event) {
  if (event.key !== "Escape") return;
  const { target } = event;
  if (map.tip.isOpen) return map.tip.close();
  if (target.type === "search" && target.value !== "") {
    target.value = "";
    target.dispatchEvent(new Event("input"));
    return;
  }
  router.back();
}

// Outdated values are marked as such.
function silent(why) {
  say(`The dashboard's server ${why}. The values below are out of date.`, "warn");
  setAttribute(document.body, "class", "old");
}

listen();
router.start();
follow({ fleet: (members) => fleet.setMembers(members), now: showNow, silent });
