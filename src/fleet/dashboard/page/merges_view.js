// The last merges: what came of each, the newest first.

import { ask } from "./connection.js";
import { Keyed, byId, emptyRow, setText, showCells } from "./dom.js";
import { clock, count, interval, plural, signed } from "./format.js";
import { mergeLink, workerLink } from "./lists.js";
import { Newest } from "./newest.js";

const CELLS = 9;

export class MergesView {
  constructor() {
    this.rows = new Keyed(byId("merges"), () => emptyRow(CELLS));
    this.newest = new Newest(() => this.refresh());
    this.isOpen = false;
  }

  open() {
    this.isOpen = true;
    this.newest.forget();
    if (byId("merges").children.length === 0) this.clear("Loading.");
    this.refresh();
  }

  close() {
    this.isOpen = false;
  }

  tick(now) {
    this.newest.follow(now.merges);
  }

  clear(why) {
    setText(byId("merges-says"), why);
    byId("merges-panel").hidden = byId("merges-none").hidden = true;
  }

  async refresh() {
    const told = await ask("merges");
    if (!this.isOpen) return;
    if (told.error === undefined) return this.show(told);
    this.newest.failed();
    this.clear(`Unknown: ${told.error}.`);
  }

  show({ merges, watching_since_ms: since, unwatched }) {
    setText(byId("merges-says"), said(merges, since, unwatched));
    byId("merges-panel").hidden = merges.length === 0;
    byId("merges-none").hidden = merges.length > 0;
    this.rows.show(merges, ({ at_ms, submission_id }) => `${at_ms} ${submission_id}`, (row, merge) => showCells(row, cells(merge)));
  }
}

function said(merges, since, unwatched) {
  if (!since && merges.length === 0) return `Unknown: results are not visible: ${unwatched ?? "not connected yet"}.`;
  const when = since ? `seen since ${clock(since)}, when the dashboard began to watch` : `seen; results are not visible now: ${unwatched ?? "not connected yet"}`;
  if (merges.length === 0) return `No merge was ${when}.`;
  const large = merges.filter(({ large_gap: is }) => is).length;
  return `The last ${plural(merges.length, "merge")} ${when}.${large > 0 ? ` ${count(large)} with a large gap.` : ""}`;
}

const many = (value) => ({ text: count(value), class: value === 0 ? "number zero" : "number" });

function cells({ at_ms, submission_id, status, verdict, members, left_out, joint, large_gap, worker }) {
  return [
    { text: submission_id, href: mergeLink(submission_id) }, clock(at_ms), { text: verdict, class: status === "scored" ? null : "code" },
    joint ? many(members) : "", many(left_out), { text: joint ? signed(joint.delta) : "", class: "number" },
    joint ? interval(...(joint.ci95 ?? [])) : "", large_gap === null ? "" : { text: large_gap ? "large" : "small", class: large_gap ? "warn" : "quiet" },
    { text: worker, href: workerLink(worker) },
  ];
}
