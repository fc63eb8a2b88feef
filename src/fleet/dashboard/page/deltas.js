// Scored candidates: delta and its 95 % interval on a signed logarithmic scale; a point leads to its job.

import { Frame, colour, timeAxis, valueAxis } from "./charts.js";
import { element, setText } from "./dom.js";
import { age, clock, interval, signed } from "./format.js";
import { jobLink } from "./lists.js";

const HEIGHT = 260;
/** Pixels at which the pointer catches a candidate. */
const NEAR = 20;
const LOOKS = { better: { colour: "good", name: "better" }, worse: { colour: "series-2", name: "worse" }, unclear: { colour: "neutral", name: "unclear" } };

export function classOf({ low, high }) {
  if (low !== null && low > 0) return "better";
  return high !== null && high < 0 ? "worse" : "unclear";
}

export const candidate = ([at_ms, delta, low, high, id, worker]) => ({ at: at_ms / 1000, delta, low, high, id, worker });

export class Deltas {
  constructor(place) {
    this.frame = new Frame(place, { title: "Deltas", unit: "loss before − loss after, with 95 % intervals; signed log scale", empty: "Each scored candidate with its interval, as soon as a result is seen.", wide: true, role: "application" });
    this.frame.step = (event) => this.step(event);
    this.frame.values.append(...Object.entries(LOOKS).map(([kind, { name }]) => element("li", {}, element("span", { class: `mark ${kind}`, "aria-hidden": "true" }), element("span", {}, name), element("b"))));
    this.tip = element("div", { class: "tip", role: "status", hidden: "" });
    this.frame.canvas.append(this.tip);
    setText(this.frame.when, "shown");
    this.plot = null;
    this.points = [];
    this.chosen = null;
    new ResizeObserver(() => this.fit()).observe(this.frame.canvas);
    this.frame.canvas.addEventListener("click", () => this.open());
    this.frame.canvas.addEventListener("blur", () => this.choose(null));
  }

  /** `items` are those that the server has of the range, oldest first. */
  show(items, context) {
    this.last = [items, context];
    const { end, seconds } = context;
    this.points = items.map(candidate);
    this.every = (context.columns?.every_ms ?? 0) / 1000;
    this.frame.state(this.points.length === 0 ? null : {});
    this.tell();
    if (this.points.length === 0) return this.forget();
    const threshold = thresholdOf(this.points);
    if (this.plot === null || threshold !== this.threshold) this.make(threshold);
    this.plot.batch(() => {
      this.plot.setData([this.points.map(({ at }) => at), this.points.map(({ delta }) => delta)]);
      this.plot.setScale("x", { min: end - seconds, max: end });
    });
  }

  tell() {
    const counts = { better: 0, worse: 0, unclear: 0 };
    for (const point of this.points) counts[classOf(point)] += 1;
    Object.keys(LOOKS).forEach((kind, at) => setText(this.frame.values.children[at].lastElementChild, counts[kind]));
    const told = this.points.length === 0 ? "no scored candidate seen in this range" : `of every ${age(1000 * this.every)} the best, the worst and the last: ${counts.better} better, ${counts.worse} worse, ${counts.unclear} unclear`;
    this.frame.tell(told);
  }

  make(threshold) {
    this.forget();
    this.threshold = threshold;
    const options = {
      width: Math.max(200, this.frame.canvas.clientWidth), height: HEIGHT,
      padding: [10, 26, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false }, sync: { key: "time", scales: ["x", null] } },
      scales: { x: { time: true }, y: { distr: 4, asinh: threshold, range: () => limits(this.points, threshold) } },
      axes: [timeAxis(), valueAxis(tick, { size: 68, filter: (_, splits) => splits, splits: (_, __, least, most) => ticks(least, most, threshold) })],
      series: [{}, { scale: "y", paths: () => null, points: { show: false } }],
      hooks: { drawSeries: [() => this.draw()], setCursor: [(plot) => this.hover(plot)] },
    };
    this.plot = new uPlot(options, [[], []], this.frame.canvas);
    this.frame.follow(this.plot);
  }

  draw() {
    const { ctx, bbox } = this.plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    this.zero(ctx, bbox);
    for (const point of this.points) if (point !== this.chosen) this.mark(ctx, point, false);
    if (this.chosen !== null) this.mark(ctx, this.chosen, true);
    ctx.restore();
  }

  zero(ctx, bbox) {
    const y = Math.round(this.plot.valToPos(0, "y", true)) + 0.5;
    ctx.strokeStyle = colour("faint");
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
  }

  mark(ctx, point, chosen) {
    const kind = classOf(point);
    const x = this.plot.valToPos(point.at, "x", true);
    const y = (value) => this.plot.valToPos(value, "y", true);
    const size = (chosen ? 6 : 3.5) * devicePixelRatio;
    ctx.strokeStyle = ctx.fillStyle = this.palette[kind];
    ctx.lineWidth = (chosen ? 2 : 1) * devicePixelRatio;
    if (point.low !== null && point.high !== null) {
      ctx.globalAlpha = chosen ? 1 : kind === "unclear" ? 0.3 : 0.55;
      ctx.beginPath();
      ctx.moveTo(x, y(point.low));
      ctx.lineTo(x, y(point.high));
      ctx.stroke();
    }
    ctx.globalAlpha = 1;
    shape(ctx, kind, x, y(point.delta), size);
  }

  get palette() {
    return (this.colours ??= Object.fromEntries(Object.entries(LOOKS).map(([kind, look]) => [kind, colour(look.colour)])));
  }

  hover(plot) {
    const { left, top } = plot.cursor;
    // A cursor that another chart moves has no point of its own.
    if (left < 0 || plot.cursor.event === undefined && document.activeElement !== this.frame.canvas) return this.choose(null);
    if (document.activeElement === this.frame.canvas && this.keyed) return;
    this.choose(nearest(this.points, plot, left, top));
  }

  choose(point) {
    if (point === this.chosen) return;
    this.chosen = point;
    this.tip.hidden = point === null;
    this.frame.canvas.classList.toggle("hit", point !== null);
    if (point !== null) this.showTip(point);
    this.plot?.redraw(false);
  }

  showTip(point) {
    const lines = [point.id, `${classOf(point)} · ${signed(point.delta)} (${interval(point.low, point.high)})`, `${clock(point.at * 1000)} · ${point.worker}`];
    this.tip.replaceChildren(element("b", {}, lines[0]), ...lines.slice(1).map((text) => element("p", {}, text)));
    const [x, y] = [this.plot.valToPos(point.at, "x") + this.plot.over.offsetLeft, this.plot.valToPos(point.delta, "y")];
    const beyond = x + this.tip.offsetWidth + 16 > this.frame.canvas.clientWidth;
    this.tip.style.left = `${Math.max(0, beyond ? x - this.tip.offsetWidth - 12 : x + 12)}px`;
    this.tip.style.top = `${Math.max(0, Math.min(y, HEIGHT - this.tip.offsetHeight - 30))}px`;
  }

  /** The arrow keys go from candidate to candidate, Enter opens its job. */
  step(event) {
    if (event.key === "Enter") return this.open();
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || this.points.length === 0) return;
    event.preventDefault();
    const last = this.points.length - 1;
    const from = this.chosen === null ? last + (event.key === "ArrowLeft" ? 1 : 0) : this.points.findIndex(({ id, at }) => id === this.chosen.id && at === this.chosen.at);
    this.choose(this.points[Math.max(0, Math.min(last, from + steps[event.key]))]);
  }

  open() {
    if (this.chosen !== null) location.hash = jobLink(this.chosen.id);
  }

  fit() {
    const width = Math.max(200, this.frame.canvas.clientWidth);
    if (this.plot !== null && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  forget() {
    this.choose(null);
    this.plot?.destroy();
    this.plot = null;
  }

  remake() {
    this.colours = undefined;
    if (this.plot === null) return;
    this.forget();
    this.show(...this.last);
  }
}

function shape(ctx, kind, x, y, size) {
  ctx.beginPath();
  if (kind === "unclear") {
    ctx.arc(x, y, size * 0.8, 0, 2 * Math.PI);
    return ctx.stroke();
  }
  const up = kind === "better" ? -1 : 1;
  ctx.moveTo(x, y + up * size);
  ctx.lineTo(x + size, y - up * size * 0.8);
  ctx.lineTo(x - size, y - up * size * 0.8);
  ctx.closePath();
  ctx.fill();
}

function nearest(points, plot, left, top) {
  let best = null;
  let least = NEAR * NEAR;
  for (const point of points) {
    const [x, y] = [plot.valToPos(point.at, "x") - left, plot.valToPos(point.delta, "y") - top];
    if (x * x + y * y < least) [best, least] = [point, x * x + y * y];
  }
  return best;
}

/** Decades on each side of zero: more would neither be read nor be computed. */
const DECADES = 16;

/** Below this the scale is linear: a tenth of the deltas are smaller. */
function thresholdOf(points) {
  const sizes = points.map(({ delta }) => Math.abs(delta)).filter((size) => size > 0).sort((a, b) => a - b);
  const decade = (size) => Math.floor(Math.log10(size));
  const low = sizes[Math.floor(sizes.length / 10)] ?? 1e-6;
  return 10 ** Math.max(decade(low), decade(sizes.at(-1) ?? low) - DECADES);
}

/** Whole decades around the deltas; an interval may leave the picture. */
function limits(points, threshold) {
  const decade = (size) => (size <= threshold ? threshold : 10 ** Math.ceil(Math.log10(size) - 1e-9));
  const sizes = (sign) => points.map(({ delta }) => sign * delta).filter((size) => size > 0);
  const edge = (all) => (all.length === 0 ? threshold : decade(all.reduce((most, size) => Math.max(most, size), 0)));
  return [-edge(sizes(-1)), edge(sizes(1))];
}

/** Zero and the decades on both sides, every second one where there are many. */
function ticks(least, most, threshold) {
  const decades = (size) => Array.from({ length: Math.max(0, Math.round(Math.log10(size / threshold))) + 1 }, (_, at) => threshold * 10 ** at);
  const thin = (all) => (all.length > 4 ? all.filter((_, at) => at > 0 && (all.length - 1 - at) % 2 === 0) : all);
  const [below, above] = [thin(decades(-least)), thin(decades(most))];
  return [...below.reverse().map((size) => -size), 0, ...above];
}

function tick(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 0.001 && size < 10000 ? String(Number(size.toPrecision(1))) : `1e${Math.round(Math.log10(size))}`;
  return `${value < 0 ? "−" : "+"}${text.replace("-", "−")}`;
}
