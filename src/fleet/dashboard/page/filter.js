// Which workers are looked for: every word must occur in what is known of a worker.

const textOf = ({ id, state, why, version, device, host, warn, kind }) =>
  [id, state, why, kind, version === null ? "no-version" : `v${version} version:${version}`, device, host, warn ? "warning" : ""].join(" ").toLowerCase();

export function matcher(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0) return () => true;
  return (worker) => {
    const known = textOf(worker);
    return words.every((word) => known.includes(word));
  };
}

// By name, "gpu-2" comes before "gpu-10".
const { compare } = new Intl.Collator("en", { numeric: true });
export const byName = (a, b) => compare(a.id, b.id);

/** Unknown values come last, whichever way the others are sorted. */
export function by(valueOf, direction) {
  return (a, b) => {
    const [left, right] = [valueOf(a) ?? null, valueOf(b) ?? null];
    if (left === null || right === null) return (left === null) - (right === null) || byName(a, b);
    const order = typeof left === "string" ? compare(left, right) : left - right;
    return direction * order || byName(a, b);
  };
}
