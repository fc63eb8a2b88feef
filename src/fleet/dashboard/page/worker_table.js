// The workers that match the filter, as a table: the sick first until a header is clicked.

import { Keyed, byId, emptyRow, showCells } from "./dom.js";
import { by, byName } from "./filter.js";
import { rank } from "./fleet.js";
import { age, count, milliseconds, rate } from "./format.js";
import { SortableHead } from "./sortable.js";

const COLUMNS = [
  { key: "id", title: "Worker", of: ({ id }) => id, direction: 1 },
  { key: "state", title: "State", of: rank, direction: 1 },
  { key: "why", title: "Why", of: ({ why }) => why, direction: 1 },
  { key: "for", title: "For", of: ({ for_s }) => for_s, direction: 1, number: true },
  { key: "version", title: "Version", of: ({ version }) => version, direction: -1, number: true },
  { key: "rate", title: "Jobs/s", of: (worker) => worker.rate, direction: -1, number: true },
  { key: "p95", title: "p95", of: ({ p95 }) => p95, direction: -1, number: true },
  { key: "busy", title: "Busy %", of: ({ busy }) => busy, direction: -1, number: true },
  { key: "failed", title: "Failed", of: ({ failed }) => failed, direction: -1, number: true },
  { key: "device", title: "Device", of: ({ device }) => device, direction: 1 },
];
const FIRST = 20;
const MORE = 100;

export class WorkerTable {
  constructor(onChange) {
    this.rows = new Keyed(byId("workers"), () => emptyRow(COLUMNS.length));
    this.head = new SortableHead(byId("workers-head"), COLUMNS, onChange, { key: "state", direction: 1 });
    this.limit = FIRST;
    byId("more").addEventListener("click", () => {
      this.limit += MORE;
      onChange();
    });
  }

  show(workers, unknown) {
    const sorted = [...workers].sort(this.order());
    this.rows.show(sorted.slice(0, this.limit), ({ id }) => id, (row, worker) => showCells(row, cells(worker, unknown)));
    byId("more").hidden = sorted.length <= this.limit;
    byId("more").textContent = `Show ${Math.min(MORE, sorted.length - this.limit)} more`;
  }

  order() {
    const { column, direction } = this.head;
    const chosen = by(column.of, direction);
    // Within a state: the newest change first.
    return column.key === "state" ? (a, b) => direction * (rank(a) - rank(b)) || (a.kind !== "ready" && (a.for_s ?? 0) - (b.for_s ?? 0)) || byName(a, b) : chosen;
  }
}

function cells(worker, unknown) {
  const state = unknown ? "unknown" : worker.state;
  const kind = unknown ? "" : `${worker.kind}${worker.warn ? " warned" : ""}`;
  const numbers = [age(1000 * (worker.for_s ?? NaN)), worker.version ?? "–", rate(worker.rate), milliseconds(worker.p95), worker.busy ?? "–", count(worker.failed)];
  return [
    { text: worker.id, href: `#worker/${encodeURIComponent(worker.id)}` },
    { text: state, class: `state ${kind}` },
    { text: worker.warn ? `${worker.why}, recent problem` : worker.why },
    ...numbers.map((text) => ({ text, class: "number" })),
    { text: worker.device ?? "–" },
  ];
}
