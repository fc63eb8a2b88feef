// One cell per worker, grouped by what it does: shape and colour say it, the sick come first.

import { Keyed, arrange, byId, element, setAttribute, setText } from "./dom.js";
import { by, byName } from "./filter.js";
import { KINDS, label } from "./fleet.js";
import { age, count, milliseconds, rate } from "./format.js";

const ORDERS = {
  name: byName,
  version: by(({ version }) => version, -1),
  rate: by((worker) => worker.rate, -1),
  p95: by(({ p95 }) => p95, -1),
  for: by(({ for_s }) => for_s, 1),
};
/** Cells ordered by a number that always changes would dance. */
const STILL_MS = 5000;
const LEGEND = [
  ["ready half", "ready, filled by its busy share"], ["ready", "ready, idle"], ["ready warn", "ready, with a recent problem"],
  ["degraded", "degraded"], ["held", "no consumer"], ["paused", "paused"], ["starting", "starting"], ["warming", "warming"],
  ["updating", "updating"], ["reloading", "reloading"], ["draining", "draining, stopped"], ["lost", "lost"],
];

export class FleetMap {
  constructor() {
    this.place = byId("map");
    this.cells = new Map();
    this.groups = new Keyed(this.place, ({ key }) => makeGroup(key));
    this.order = "name";
    this.arranged = { at: -Infinity, what: "" };
    this.current = null;
    byId("legend").append(...LEGEND.map(([kind, text]) => element("li", {}, element("span", { class: `cell ${kind}`, "aria-hidden": "true" }), text)));
    this.tip = new Tip(this.place, (id) => this.workers.get(id));
    this.place.addEventListener("keydown", (event) => this.move(event));
    this.place.addEventListener("focusin", (event) => event.target.dataset.worker !== undefined && this.rove(event.target));
  }

  /** `order` is one of ORDERS. */
  setOrder(order) {
    this.order = order;
    this.arranged.at = -Infinity;
  }

  /** Updates the cells in place; moves them only where a group or the order has changed. */
  show(workers, unknown) {
    setAttribute(this.place, "class", `map${unknown ? " unknown" : ""}${workers.length <= 250 ? " large" : ""}`);
    this.workers = new Map(workers.map((worker) => [worker.id, worker]));
    for (const worker of workers) this.paint(worker);
    for (const [id, cell] of this.cells) if (!this.workers.has(id)) this.drop(id, cell);
    const groups = grouped(workers);
    this.groups.show(groups, ({ key }) => key, heading);
    this.arrange(groups);
    if (!this.current?.isConnected) this.rove(this.place.querySelector("a"));
    this.tip.refresh();
  }

  paint(worker) {
    const cell = this.cells.get(worker.id) ?? this.makeCell(worker.id);
    const level = worker.kind === "ready" ? Math.round((worker.busy ?? 0) / 10) * 10 : 0;
    const kind = `cell ${worker.kind}${worker.warn ? " warn" : ""}`;
    if (cell.className !== kind) cell.className = kind;
    if (cell.level !== level) {
      cell.style.setProperty("--busy", `${level}%`);
      cell.level = level;
    }
    const told = label(worker);
    if (cell.told !== told) {
      cell.setAttribute("aria-label", told);
      cell.told = told;
    }
  }

  makeCell(id) {
    const cell = element("a", { href: `#worker/${encodeURIComponent(id)}`, "data-worker": id, tabindex: "-1" });
    this.cells.set(id, cell);
    return cell;
  }

  drop(id, cell) {
    cell.remove();
    this.cells.delete(id);
  }

  arrange(groups) {
    const what = `${this.order} ${groups.map(({ key, workers }) => `${key}:${workers.map(({ id }) => id).join(" ")}`).join("|")}`;
    const lively = this.order === "rate" || this.order === "p95";
    if (what === this.arranged.what && !(lively && performance.now() - this.arranged.at > STILL_MS)) return;
    this.arranged = { at: performance.now(), what };
    for (const { key, workers } of groups) {
      const cells = [...workers].sort(ORDERS[this.order]).map(({ id }) => this.cells.get(id));
      arrange(this.groups.nodes.get(key).lastElementChild, cells);
    }
  }

  rove(cell) {
    if (this.current !== null && this.current !== undefined) this.current.tabIndex = -1;
    this.current = cell;
    if (cell) cell.tabIndex = 0;
  }

  move(event) {
    const cells = [...this.place.querySelectorAll("a")];
    const to = target(event.key, cells, cells.indexOf(document.activeElement));
    if (to === undefined) return;
    event.preventDefault();
    to.focus();
  }
}

function target(key, cells, at) {
  if (at < 0) return undefined;
  switch (key) {
    case "ArrowRight": return cells[at + 1];
    case "ArrowLeft": return cells[at - 1];
    case "Home": return cells[0];
    case "End": return cells.at(-1);
    case "ArrowDown": return nextRow(cells.slice(at + 1), cells[at]);
    case "ArrowUp": return nextRow(cells.slice(0, at).reverse(), cells[at]);
    default: return undefined;
  }
}

/** The cell of the next row that is nearest to the column of `from`. */
function nextRow(cells, from) {
  const here = from.getBoundingClientRect();
  const places = cells.map((cell) => ({ cell, place: cell.getBoundingClientRect() })).filter(({ place }) => Math.abs(place.top - here.top) > 4);
  const row = places.filter(({ place }) => Math.abs(place.top - places[0].place.top) <= 4);
  row.sort((a, b) => Math.abs(a.place.left - here.left) - Math.abs(b.place.left - here.left));
  return row[0]?.cell;
}

function grouped(workers) {
  const groups = new Map(KINDS.map(({ key, word }) => [key, { key, word, workers: [] }]));
  for (const worker of workers) groups.get(worker.kind).workers.push(worker);
  return [...groups.values()].filter((group) => group.workers.length > 0);
}

function makeGroup(key) {
  const name = element("h3", {}, element("span", { class: "word" }), element("span", { class: "many" }), element("span", { class: "whys" }));
  return element("div", { class: `group ${key}` }, name, element("div", { class: "cells" }));
}

function heading(group, { key, word, workers }) {
  const [name] = group.children;
  setText(name.children[0], word);
  setText(name.children[1], count(workers.length));
  setText(name.children[2], key === "ready" ? "" : reasons(workers));
}

function reasons(workers) {
  const counts = new Map();
  for (const { why } of workers) if (why) counts.set(why, (counts.get(why) ?? 0) + 1);
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  const told = sorted.slice(0, 3).map(([why, many]) => (sorted.length === 1 ? why : `${why} ${count(many)}`));
  return `${told.join(" · ")}${sorted.length > 3 ? ` · ${sorted.length - 3} other reasons` : ""}`;
}

/** What a cell stands for, beside it while it has the pointer or the focus. */
class Tip {
  constructor(place, find) {
    this.node = byId("tip");
    this.find = find;
    this.cell = null;
    const on = (event) => this.open(event.target.closest("[data-worker]"));
    place.addEventListener("mouseover", on);
    place.addEventListener("focusin", on);
    place.addEventListener("mouseleave", () => this.close());
    place.addEventListener("focusout", () => this.close());
  }

  get isOpen() {
    return this.cell !== null;
  }

  open(cell) {
    if (cell === null) return this.close();
    this.cell = cell;
    this.refresh();
    const [at, around] = [cell.getBoundingClientRect(), this.node.offsetParent.getBoundingClientRect()];
    const left = Math.max(8, Math.min(at.left - around.left, around.width - this.node.offsetWidth - 8));
    this.node.style.left = `${left}px`;
    this.node.style.top = `${at.bottom - around.top + 8}px`;
  }

  refresh() {
    const worker = this.cell === null ? undefined : this.find(this.cell.dataset.worker);
    this.node.hidden = worker === undefined;
    if (worker !== undefined) showTip(this.node, worker);
  }

  close() {
    this.cell = null;
    this.node.hidden = true;
  }
}

function showTip(node, worker) {
  if (node.childElementCount === 0) node.append(element("b"), element("p"), element("p"), element("p"));
  const lines = [
    worker.id,
    `${[worker.state, worker.why].filter(Boolean).join(" · ")} · for ${age(1000 * (worker.for_s ?? NaN))}`,
    worker.kind === "lost" ? "" : `${rate(worker.rate)} jobs/s · p95 ${milliseconds(worker.p95)} · busy ${worker.busy ?? "–"} % · version ${worker.version ?? "–"}`,
    [worker.device, worker.host, worker.warn && "a recent problem: open it for the error"].filter(Boolean).join(" · "),
  ];
  lines.forEach((line, at) => setText(node.children[at], line));
}
