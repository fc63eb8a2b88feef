// The frame of every chart: heading, drawing (uPlot), legend with the values under the cursor, and the same in words.

import { Keyed, element, setAttribute, setText } from "./dom.js";
import { age, clock } from "./format.js";

const HEIGHT = 190;
/** Seconds between the ticks of an axis of times. */
export const STEPS = [1, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
const FONT = "11px system-ui, sans-serif";

/** A colour of the style sheet, for the canvas. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** uPlot's axis of time, in 24 hours. */
export const timeAxis = () => ({
  stroke: colour("faint"), font: FONT, size: 28, gap: 4, space: 64,
  incrs: STEPS,
  grid: { show: false }, ticks: { stroke: colour("line"), size: 4 }, border: { show: true, stroke: colour("line"), width: 1 },
  values: (_, splits, __, ___, step) => splits.map((at) => clock(at * 1000).slice(0, step < 60 ? 8 : 5)),
});

export const valueAxis = (format, more = {}) => ({
  stroke: colour("faint"), font: FONT, size: 52, gap: 6, space: 34,
  grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false },
  values: (_, splits) => splits.map((value) => (value === null ? null : format(value))),
  ...more,
});

/**
 * A chart of values over time. `kind` has `title`, `unit`, `empty` (what would be here), `draw(columns, context)` =
 * {xs, series: [{name, values, shown?, colour, fill?, width?, dash?, scale?, paths?, format}], scales?, axes, note?} or null
 * where there is nothing, and `told(context)`: the chart in words.
 */
export class Chart {
  constructor(place, kind) {
    this.kind = kind;
    this.frame = new Frame(place, kind);
    this.plot = null;
    this.shape = "";
    new ResizeObserver(() => this.fit()).observe(this.frame.canvas);
  }

  show(columns, context) {
    this.last = [columns, context];
    const drawing = columns === null ? null : this.kind.draw(columns, context);
    this.frame.state(drawing);
    if (drawing === null) return this.forget();
    this.drawing = drawing;
    // A point that is the mean of minutes does not say what is so now.
    this.latest = columns.every_ms >= 60_000 ? `latest ${age(columns.every_ms)}` : "latest";
    const shape = JSON.stringify([context.seconds, drawing.series.map(({ name, colour: of, scale }) => [name, of, scale]), drawing.scales]);
    if (this.plot === null || shape !== this.shape) this.make(shape);
    const data = [drawing.xs, ...drawing.series.map(({ values }) => values)];
    this.plot.batch(() => {
      this.plot.setData(data, true);
      this.plot.setScale("x", { min: context.end - context.seconds, max: context.end });
    });
    this.legend();
  }

  tell(context) {
    this.frame.tell(this.kind.told(context, this.drawing ?? null));
  }

  make(shape) {
    this.forget();
    this.shape = shape;
    const { scales = {}, axes, series } = this.drawing;
    const options = {
      ...size(this.frame.canvas),
      padding: [10, axes.length > 1 ? 0 : 26, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, sync: { key: "time", scales: ["x", null] }, points: { size: 7, width: 1.5 } },
      scales: { x: { time: true }, ...scales },
      axes: [timeAxis(), ...axes],
      series: [{}, ...series.map(line)],
      hooks: { setCursor: [() => this.legend()] },
    };
    this.plot = new uPlot(options, [[], ...series.map(() => [])], this.frame.canvas);
    this.frame.follow(this.plot);
  }

  /** The values under the cursor, else the last ones. */
  legend() {
    if (this.plot === null) return;
    const { xs, series } = this.drawing;
    const under = this.plot.cursor.idx ?? null;
    const at = under === null || under >= xs.length ? xs.length - 1 : under;
    this.frame.legend(series, at, under === null ? this.latest : clock(xs[at] * 1000));
  }

  fit() {
    if (this.plot === null) return;
    const wanted = size(this.frame.canvas);
    if (wanted.width !== this.plot.width) this.plot.setSize(wanted);
  }

  forget() {
    this.plot?.destroy();
    this.plot = null;
  }

  /** The colours have changed. */
  remake() {
    if (this.plot === null) return;
    this.forget();
    this.show(...this.last);
  }
}

const size = (place) => ({ width: Math.max(200, place.clientWidth), height: HEIGHT });

function line({ name, colour: of, fill, width = 1.5, dash, scale = "y", paths }) {
  const stroke = colour(of);
  return { label: name, stroke, width, dash, scale, paths, fill: fill ? mixed(stroke, colour("panel"), fill) : undefined, points: { show: false, size: 5, fill: stroke, filter: lone } };
}

/** Values without a neighbour: no line goes to them, so each is a dot. */
function lone({ data }, series) {
  const at = (i) => data[series][i] ?? null;
  return data[0].flatMap((_, i) => (at(i) !== null && at(i - 1) === null && at(i + 1) === null ? [i] : []));
}

/** So much of one hexadecimal colour in another; opaque, for layers would shine through one another. */
function mixed(over, under, share) {
  const part = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
  const mix = (at) => Math.round(share * part(over, at) + (1 - share) * part(under, at));
  return `rgb(${mix(1)} ${mix(3)} ${mix(5)})`;
}

/** What is around a drawing; also used by the charts that uPlot's lines are not enough for. */
export class Frame {
  constructor(place, { title, unit, empty, wide, role = "img" }) {
    const id = `chart-${title.toLowerCase().replace(/[^a-z]+/g, "-")}`;
    this.title = title;
    this.tools = element("div", { class: "tools" });
    this.canvas = element("div", { class: "canvas", tabindex: "0", role });
    this.values = element("ul", { class: "values" });
    this.when = element("span", { class: "when" });
    this.words = element("figcaption", {});
    this.note = element("p", { class: "quiet" });
    this.empty = element("p", { class: "empty" }, empty);
    const heading = element("h3", { id }, title, " ", element("span", { class: "unit" }, unit));
    const legend = element("div", { class: "key" }, this.when, this.values);
    this.figure = element("figure", { class: `panel chart${wide ? " wide-chart" : ""}`, "aria-labelledby": id });
    this.figure.append(element("div", { class: "head" }, heading, this.tools), this.note, this.canvas, this.empty, legend, this.words);
    this.key = legend;
    this.items = new Keyed(this.values, () => element("li", {}, element("span", { class: "swatch", "aria-hidden": "true" }), element("span"), element("b")));
    this.canvas.addEventListener("keydown", (event) => this.step(event));
    this.canvas.addEventListener("blur", () => this.leave());
    place.append(this.figure);
    this.state(null);
  }

  state(drawing) {
    this.canvas.hidden = this.key.hidden = drawing === null;
    this.empty.hidden = drawing !== null;
    setText(this.note, drawing?.note ?? "");
    this.note.hidden = !drawing?.note;
  }

  tell(words) {
    setText(this.words, words);
    setAttribute(this.canvas, "aria-label", `${this.title}: ${words}`);
  }

  follow(plot) {
    this.plot = plot;
  }

  /** The arrow keys move the cursor from point to point. */
  step(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || !this.plot) return;
    event.preventDefault();
    // What the keyboard asks for is read out; what the pointer passes is not.
    setAttribute(this.key, "aria-live", "polite");
    const xs = this.plot.data[0];
    const from = this.plot.cursor.idx ?? xs.length - 1;
    const at = Math.max(0, Math.min(xs.length - 1, from + steps[event.key]));
    // The first point may lie just before the picture.
    this.plot.setCursor({ left: Math.max(0, this.plot.valToPos(xs[at], "x")), top: 20 });
  }

  leave() {
    setAttribute(this.key, "aria-live", null);
    this.plot?.setCursor({ left: -10, top: -10 });
  }

  legend(series, at, when) {
    setText(this.when, when);
    this.items.show(series, ({ name }) => name, (item, { name, values, shown, colour: of, dash, format }) => {
      setAttribute(item.children[0], "class", `swatch of-${of}${dash ? " dashed" : ""}`);
      setText(item.children[1], name);
      setText(item.children[2], format((shown ?? values)[at]));
    });
  }
}
