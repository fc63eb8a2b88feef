// One merge: its members by contribution, those that were left out, and the whole in numbers.

import { ask } from "./connection.js";
import { Keyed, byId, element, emptyRow, setAttribute, setText, showCells, showFacts } from "./dom.js";
import { by } from "./filter.js";
import { clock, count, interval, measured, milliseconds, percent, plural, signed } from "./format.js";
import { jobLink, workerLink } from "./lists.js";
import { Newest } from "./newest.js";
import { Axis, lane, scaleOf, showLane } from "./shares.js";
import { SortableHead } from "./sortable.js";

const value = ({ contribution }) => contribution.value;

/** What is left of a change that is clear; of one that is not, a share says nothing. */
function kept({ alone, contribution }) {
  const clear = alone !== null && alone.delta > 2 * (alone.stderr ?? Infinity);
  return clear ? contribution.value / alone.delta : null;
}

const COLUMNS = [
  { key: "id", title: "Member", of: ({ id }) => id, direction: 1 },
  { key: "lane", title: "", fixed: true },
  { key: "contribution", title: "Contribution", of: value, direction: -1, number: true },
  { key: "interval", title: "95 % interval", fixed: true },
  { key: "alone", title: "Alone", of: ({ alone }) => alone?.delta, direction: -1, number: true },
  { key: "kept", title: "Of alone", of: kept, direction: 1, number: true },
  { key: "last", title: "Last", of: ({ last }) => last?.delta, direction: -1, number: true },
  { key: "weight", title: "Weight", of: ({ weight }) => weight, direction: -1, number: true },
];
const LANE = COLUMNS.findIndex(({ key }) => key === "lane");

export class MergeView {
  constructor() {
    this.rows = new Keyed(byId("merge-members"), memberRow);
    this.head = new SortableHead(byId("merge-head"), COLUMNS, () => this.showMembers(), { key: "contribution", direction: -1 });
    const axis = element("div", { class: "axis", "aria-hidden": "true" });
    this.head.row.children[LANE].append(element("span", { class: "hidden" }, "Picture"), axis);
    this.axis = new Axis(axis);
    this.leftOut = new Keyed(byId("merge-left-out"), () => element("li", {}, element("span"), " ", element("span", { class: "code" })));
    this.newest = new Newest(() => this.refresh());
    this.id = null;
  }

  open(id) {
    this.id = id;
    this.newest.forget();
    setText(byId("merge-title"), id);
    this.clear("Loading.");
    this.refresh();
  }

  close() {
    this.id = null;
  }

  tick(now) {
    this.newest.follow(now.merges);
  }

  async refresh() {
    const { id } = this;
    const told = await ask("merge", { id });
    if (id !== this.id) return;
    if (told.error === undefined) return this.show(told);
    this.newest.failed();
    this.clear(`Unknown: ${told.error}.`);
  }

  clear(why) {
    this.says(why, "");
    for (const part of ["gap", "measured", "left-out-panel", "facts-panel"]) byId(`merge-${part}`).hidden = true;
  }

  says(text, kind) {
    setText(byId("merge-says"), text);
    setAttribute(byId("merge-says"), "class", `says ${kind}`);
  }

  show(merge) {
    this.merged = merge.members.filter(({ contribution }) => contribution !== null);
    const leftOut = merge.members.filter(({ contribution }) => contribution === null);
    this.says(sentence(merge, this.merged, leftOut), merge.status === "failed" ? "bad" : "");
    byId("merge-gap").hidden = !merge.measured?.gap.large;
    byId("merge-measured").hidden = this.merged.length === 0;
    this.showMembers();
    byId("merge-left-out-panel").hidden = leftOut.length === 0;
    setText(byId("merge-left-out-title"), merge.measured ? "Left out" : "Members at fault");
    this.leftOut.show(leftOut, ({ id }) => id, (item, { id, code, status }) => {
      setText(item.firstElementChild, id);
      setText(item.lastElementChild, code ?? status);
    });
    byId("merge-facts-panel").hidden = false;
    showFacts(byId("merge-facts"), facts(merge, this.id));
  }

  showMembers() {
    if (!this.merged) return;
    const { column: { of }, direction } = this.head;
    const scale = scaleOf(this.merged);
    this.axis.show(scale);
    this.rows.show([...this.merged].sort(by(of, direction)), ({ id }) => id, (row, member) => {
      showCells(row, cells(member));
      showLane(row.children[LANE].firstElementChild, member, scale);
    });
  }
}

function memberRow() {
  const row = emptyRow(COLUMNS.length);
  row.children[LANE].append(lane());
  return row;
}

function cells(member) {
  const { id, alone, last, weight, contribution } = member;
  const of = (change) => (change === null ? "" : measured(change.delta, change.stderr));
  const right = (text) => ({ text, class: "number" });
  return [
    id, null, right(measured(contribution.value, contribution.stderr)), interval(...(contribution.ci95 ?? [])), right(of(alone)),
    right(percent(kept(member))), right(of(last)), right(weight === null ? "" : String(Number(weight.toPrecision(4)))),
  ];
}

function sentence({ status, verdict, message, worker, at_ms, measured: whole, unlisted }, merged, leftOut) {
  const by = `by ${worker} at ${clock(at_ms)}`;
  if (whole === null) return `${status === "failed" ? "Failed" : "Refused"} ${by}: ${verdict}: ${message}`;
  const { joint: { delta, ci95 } } = whole;
  const parts = [plural(merged.length, "member"), leftOut.length > 0 && `${count(leftOut.length)} left out`, unlisted > 0 && `${count(unlisted)} more are not shown`];
  return `Joint delta ${signed(delta)} (${interval(...(ci95 ?? []))}) of ${parts.filter(Boolean).join(", ")}. Measured ${by}.`;
}

function facts({ measured: whole, windows, worker, model_version, attempt, earlier }, id) {
  const numbers = whole === null ? [] : [
    ["Joint delta", measured(whole.joint.delta, whole.joint.stderr)], ["Its 95 % interval", interval(...(whole.joint.ci95 ?? []))],
    ["Loss before", whole.joint.loss_before], ["Loss after", whole.joint.loss_after],
    ["Gap", `${measured(whole.gap.value, whole.gap.stderr)}, ${whole.gap.large ? "large" : "small"}: the joint delta minus the sum of the contributions`, whole.gap.large ? "warn" : null],
    ["Passes", count(whole.passes)], ["Windows", count(windows)], ["Took", milliseconds(whole.total_ms)],
  ];
  return [
    ...numbers, ["Worker", { text: worker, href: workerLink(worker) }], ["Model version", model_version], ["Attempt", attempt],
    ["Job", { text: "its verdicts, stored result and workers", href: jobLink(id) }],
    ["Earlier results", earlier > 0 ? count(earlier) : null],
  ];
}
