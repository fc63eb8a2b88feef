// Small helpers for elements. Every text on the page passes through textContent, never through markup.

export const byId = (id) => document.getElementById(id);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) setAttribute(made, key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : plain(child))));
  return made;
}

/** Marks that turn the direction of writing would also turn what stands beside a stranger's text. */
const TURNS = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
const plain = (text) => String(text).replace(TURNS, "\ufffd");

/** Writes nothing where nothing changes: no repaint, no lost selection, no repeated announcement. */
export function setText(node, text) {
  const wanted = plain(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

/** `null` removes the attribute. */
export function setAttribute(node, name, value) {
  if (value === null || value === undefined) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) {
    node.setAttribute(name, value);
  }
}

/** Makes `nodes` the children of `parent`, in this order; moves only what is out of place and keeps the focus. */
export function arrange(parent, nodes) {
  const focused = document.activeElement;
  nodes.forEach((node, at) => {
    if (parent.children[at] !== node) parent.insertBefore(node, parent.children[at] ?? null);
  });
  while (parent.children.length > nodes.length) parent.lastElementChild.remove();
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}

/** Children by key: made once, updated in place, removed when their key is gone. Of equal keys each has a child. */
export class Keyed {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.nodes = new Map();
  }

  show(items, keyOf, update) {
    const wanted = new Map();
    const many = new Map();
    for (const item of items) {
      const name = keyOf(item);
      const place = many.get(name) ?? 0;
      many.set(name, place + 1);
      const key = place === 0 ? name : `${name} ${place}`;
      const node = this.nodes.get(key) ?? this.make(item);
      wanted.set(key, node);
      update(node, item);
    }
    this.nodes = wanted;
    arrange(this.parent, [...wanted.values()]);
  }
}

/** A description list: pairs of a name and a text or link; null and undefined are left out. */
export function showFacts(list, pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  list.facts ??= new Keyed(list, () => element("div", {}, element("dt"), element("dd")));
  list.facts.show(known, ([name]) => name, (node, [name, value, kind]) => {
    const place = node.lastElementChild;
    setText(node.firstElementChild, name);
    setAttribute(place, "class", kind ?? null);
    // A digest is cut by the style sheet: whole while it has the focus, and when it is copied.
    setAttribute(place, "tabindex", kind === "digest" ? 0 : null);
    fill(place, value);
  });
}

/** A table row's cells, in place. A cell is a text or {text, class, href}; null leaves it as it is. */
export function showCells(row, cells) {
  cells.forEach((cell, at) => {
    if (cell === null) return;
    setAttribute(row.children[at], "class", cell.class ?? null);
    fill(row.children[at], cell);
  });
}

/** A text, or {text, href?}. */
function fill(place, content) {
  const { text, href } = typeof content === "object" ? content : { text: content };
  if (href === undefined) return setText(place, text);
  if (place.firstElementChild === null) place.replaceChildren(element("a"));
  setAttribute(place.firstElementChild, "href", href);
  setText(place.firstElementChild, text);
}

export const emptyRow = (cells) => element("tr", {}, element("th", { scope: "row" }), ...Array.from({ length: cells - 1 }, () => element("td")));
