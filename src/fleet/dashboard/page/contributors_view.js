// Who sends what: by a key of the jobs' context that the operator chose.

import { ask } from "./connection.js";
import { Keyed, byId, emptyRow, setAttribute, setText, showCells } from "./dom.js";
import { by } from "./filter.js";
import { clock, count, plural } from "./format.js";
import { SortableHead } from "./sortable.js";

const TOLD = 3;
const EVERY_MS = 5000;
const LIMIT = 100;
const refusals = ({ refused }) => Object.values(refused).reduce((sum, many) => sum + many, 0);

const COLUMNS = [
  { key: "name", title: "Contributor", of: ({ name }) => name, direction: 1 },
  { key: "submissions", title: "Submissions", of: ({ submissions }) => submissions, direction: -1, number: true },
  { key: "better", title: "Better", of: ({ better }) => better, direction: -1, number: true },
  { key: "worse", title: "Worse", of: ({ worse }) => worse, direction: -1, number: true },
  { key: "unclear", title: "Unclear", of: ({ unclear }) => unclear, direction: -1, number: true },
  { key: "failed", title: "Failed", of: ({ failed }) => failed, direction: -1, number: true },
  { key: "refused", title: "Refused", of: refusals, direction: -1, number: true },
  { key: "codes", title: "Refused by code", fixed: true },
  { key: "copies", title: "Likely copies", of: ({ copies }) => copies, direction: -1, number: true },
  { key: "from", title: "Last copied from", fixed: true },
];

export class ContributorsView {
  constructor() {
    this.rows = new Keyed(byId("contributors"), () => emptyRow(COLUMNS.length));
    this.head = new SortableHead(byId("contributors-head"), COLUMNS, () => this.show(), { key: "copies", direction: -1 });
    this.told = null;
    this.limit = LIMIT;
    this.isOpen = false;
    byId("contributors-filter").addEventListener("input", () => this.show());
    byId("contributors-more").addEventListener("click", () => {
      this.limit += LIMIT;
      this.show();
    });
  }

  open() {
    this.isOpen = true;
    this.says("Loading.");
    this.refresh();
  }

  close() {
    this.isOpen = false;
  }

  tick() {
    if (performance.now() - this.askedAt >= EVERY_MS) this.refresh();
  }

  says(text) {
    setText(byId("contributors-says"), text);
  }

  async refresh() {
    this.askedAt = performance.now();
    const told = await ask("contributors");
    if (!this.isOpen) return;
    if (told.error !== undefined) return this.says(`Unknown: ${told.error}.`);
    this.told = told;
    this.show();
  }

  show() {
    if (this.told === null) return;
    const { key, since_ms, rows } = this.told;
    this.says(`By ${key} in the jobs' context${since_ms ? `, since ${clock(since_ms)}` : ""}. ${copiers(rows)}`);
    const text = byId("contributors-filter").value.trim().toLowerCase();
    const matching = rows.filter((row) => searched(row).includes(text)).sort(this.order());
    setText(byId("contributors-shown"), text ? `${count(matching.length)} of ${count(rows.length)}` : plural(rows.length, "contributor"));
    this.rows.show(matching.slice(0, this.limit), ({ name, others }) => `${others === true} ${name}`, (row, item) => {
      setAttribute(row, "class", item.copies > 0 ? "copying" : null);
      showCells(row, cells(item));
    });
    byId("contributors-more").hidden = matching.length <= this.limit;
  }

  order() {
    const { column: { of }, direction } = this.head;
    const chosen = by(of, direction);
    const larger = by(({ submissions }) => submissions, -1);
    // All others together always come last.
    return (a, b) => (a.others === true) - (b.others === true) || (of(a) === of(b) ? larger(named(a), named(b)) : chosen(named(a), named(b)));
  }
}

const named = (row) => ({ ...row, id: row.name });
const codes = ({ refused }) => Object.entries(refused).sort((a, b) => b[1] - a[1]).map(([code, many]) => `${code}\u00a0${count(many)}`).join(", ");
const searched = (row) => [row.name, codes(row), row.copied_from?.name].join(" ").toLowerCase();

function copiers(rows) {
  const all = rows.filter(({ copies }) => copies > 0).sort((a, b) => b.copies - a.copies);
  if (all.length === 0) return "No likely copy was seen.";
  const most = all.slice(0, TOLD).map(({ name, copies }) => `${name} (${count(copies)})`).join(", ");
  return `Likely copies from ${most}${all.length > TOLD ? ` and ${plural(all.length - TOLD, "other")}` : ""}.`;
}

const likeness = ({ similarity }) => (similarity === null || similarity === undefined ? "" : `, ${(100 * similarity).toFixed(1)} % alike`);

function cells(row) {
  const from = row.copied_from;
  const numbers = [row.submissions, row.better, row.worse, row.unclear, row.failed, refusals(row)];
  return [
    { text: row.name, class: row.others ? "quiet" : null },
    ...numbers.map((value) => ({ text: count(value), class: value === 0 ? "number zero" : "number" })),
    { text: codes(row), class: "codes" },
    { text: count(row.copies), class: row.copies > 0 ? "number warn" : "number zero" },
    from ? { text: `${from.name}${likeness(from)}: ${from.submission_id}`, href: `#job/${encodeURIComponent(from.submission_id)}` } : { text: "" },
  ];
}
