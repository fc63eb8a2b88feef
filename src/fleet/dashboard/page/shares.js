// A member's contribution with its error bar, beside what it changes alone: all members on one scale.

import { element, setAttribute, setText, Keyed } from "./dom.js";
import { signed } from "./format.js";

/** Ticks wanted, and the room left at both ends, as a part of what is between them. */
const TICKS = 3;
const ROOM = 0.05;

/** Where a value lies between the ends, in percent; and the values that are written beside the axis. */
export function scaleOf(members) {
  const values = members.flatMap(({ alone, contribution: { value, ci95 } }) => [alone?.delta ?? 0, value, ...(ci95 ?? [])]);
  const most = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
  // In parts of the largest: numbers of any size have a place.
  const [least, largest] = values.reduce(([low, high], value) => [Math.min(low, value / most), Math.max(high, value / most)], [0, 0]);
  const span = (largest - least || 1) * (1 + 2 * ROOM);
  const low = least - ROOM * (largest - least || 1);
  const at = (value) => (100 * (value / most - low)) / span;
  return { at, ticks: ticks([least, largest], most) };
}

/** Round values, zero among them. */
function ticks([least, largest], most) {
  const rough = ((largest - least) / TICKS) * most;
  const decade = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * decade).find((step) => step >= rough) ?? 0;
  if (!(step > 0 && Number.isFinite(step))) return [0];
  const steps = Math.floor(largest / (step / most)) - Math.ceil(least / (step / most));
  return Array.from({ length: steps + 1 }, (_, i) => (Math.ceil(least / (step / most)) + i) * step);
}

/** The lane of one member. */
export const lane = () => element("div", { class: "lane", "aria-hidden": "true" }, ...["alone", "own", "error", "zero"].map((kind) => element("span", { class: kind })));

export function showLane(place, { alone, contribution: { value, ci95 } }, { at }) {
  const [loner, own, error, zero] = place.children;
  stretch(loner, at, 0, alone?.delta ?? 0);
  stretch(own, at, 0, value);
  setAttribute(own, "class", `own ${classOf(ci95)}`);
  error.hidden = ci95 === null;
  if (ci95 !== null) stretch(error, at, ...ci95);
  zero.style.left = `${at(0)}%`;
}

function stretch(bar, at, from, to) {
  const [left, right] = [at(from), at(to)].sort((a, b) => a - b);
  bar.style.left = `${left}%`;
  bar.style.width = `${right - left}%`;
}

function classOf(ci95) {
  if (ci95 === null) return "unclear";
  return ci95[0] > 0 ? "better" : ci95[1] < 0 ? "worse" : "unclear";
}

/** The values of the scale, above the lanes. */
export class Axis {
  constructor(place) {
    this.marks = new Keyed(place, () => element("span"));
  }

  show({ at, ticks: values }) {
    this.marks.show(values, String, (mark, value) => {
      setText(mark, signed(value, 1));
      mark.style.left = `${at(value)}%`;
    });
  }
}
