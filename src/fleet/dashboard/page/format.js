// Numbers, times and names as people read them. What is unknown is a dash.

const NONE = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const missing = (value) => value === null || value === undefined || Number.isNaN(value);

export const count = (value) => (missing(value) ? NONE : whole.format(value));

/** Three digits are enough to compare; more make columns jump. */
export function number(value) {
  if (missing(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 100) return whole.format(value);
  return value.toFixed(size >= 10 ? 1 : 2).replace(/^(-?0)\.00$/, "$1");
}

export const rate = (value) => (missing(value) ? NONE : value >= 100 ? whole.format(value) : value.toFixed(1));
/** A value beside an axis. */
export const tick = (value) => String(Number(value.toPrecision(4)));

export const percent = (share) => (missing(share) ? NONE : `${Math.round(100 * share)} %`);

export function milliseconds(value) {
  if (missing(value)) return NONE;
  if (value >= 10000) return age(value);
  return value >= 1000 ? `${number(value / 1000)} s` : `${number(value)} ms`;
}

export function age(ms) {
  if (missing(ms)) return NONE;
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

export function bytes(value) {
  if (missing(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const at = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, value)) / 10));
  return `${number(value / 1024 ** at)} ${units[at]}`;
}

export function signed(value, digits = 3) {
  if (missing(value)) return NONE;
  if (value === 0) return "0";
  return `${value < 0 ? "−" : "+"}${amount(Math.abs(value), digits)}`;
}

function amount(size, digits) {
  if (size === 0) return "0";
  return size >= 1e-3 && size < 1e4 ? size.toPrecision(digits) : size.toExponential(digits - 1);
}

/** A value and its standard error, if there is one. */
export const measured = (value, stderr) => (missing(stderr) ? signed(value) : `${signed(value)} ± ${amount(Math.abs(stderr), 2)}`);

export const interval = (low, high) => (missing(low) || missing(high) ? "no interval" : `${signed(low)} to ${signed(high)}`);

const valid = (ms) => (missing(ms) || ms === 0 || Number.isNaN(new Date(ms).getTime()) ? null : new Date(ms));
const two = (value) => String(value).padStart(2, "0");

export function clock(ms) {
  const date = valid(ms);
  return date === null ? NONE : `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

export const machineTime = (ms) => valid(ms)?.toISOString() ?? null;
export const shortened = (digest) => (digest.length > 16 ? `${digest.slice(0, 12)}…` : digest);
export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
export const plural = (many, one, more = `${one}s`) => `${count(many)} ${many === 1 ? one : more}`;
