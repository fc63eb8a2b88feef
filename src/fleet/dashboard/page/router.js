// The address says which view is shown: # the fleet, #worker/ID, #job/ID, #contributors, #merges, #merge/ID.

import { byId, setAttribute } from "./dom.js";

const TITLE = "scorer";
const OF_ONE = ["worker", "job", "merge"];
const OF_ALL = { fleet: null, contributors: "Contributors", merges: "Merges" };

function parsed(hash) {
  const [name, ...rest] = hash.replace(/^#/, "").split("/");
  const id = decoded(rest.join("/"));
  if (OF_ONE.includes(name) && id !== "") return { name, id };
  return { name: Object.hasOwn(OF_ALL, name) ? name : "fleet", id: null };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** The view that Escape leads to. */
const above = (name) => (name === "merge" ? "merges" : "fleet");

export class Router {
  /** A view has `open(id)`, `tick(now)` and `close()`. */
  constructor(views) {
    this.views = views;
    this.at = { name: "fleet", id: null };
    /** What led away from a view, by its name. */
    this.openers = {};
  }

  start() {
    addEventListener("hashchange", () => this.go(true));
    this.go(false);
  }

  go(moved) {
    const to = parsed(location.hash);
    const from = this.at.name;
    this.views[from]?.close();
    if (to.name !== from) this.openers[from] = document.activeElement;
    this.at = to;
    for (const name of ["fleet", ...Object.keys(this.views)]) byId(`view-${name}`).hidden = name !== to.name;
    for (const name of Object.keys(OF_ALL)) setAttribute(byId(`nav-${name}`), "aria-current", name === to.name ? "page" : null);
    this.views[to.name]?.open(to.id);
    document.title = to.name === "fleet" ? TITLE : `${to.id ?? OF_ALL[to.name]} · ${TITLE}`;
    if (moved) this.focus(to.name, from);
  }

  /** On the way back the focus comes to what led away. */
  focus(name, from) {
    const opener = this.openers[name];
    const back = (name === "fleet" || above(from) === name) && opener?.isConnected && opener !== document.body ? opener : null;
    if (back === null) window.scrollTo(0, 0);
    (back ?? byId(`${name}-title`)).focus();
    delete this.openers[name];
  }

  back() {
    if (this.at.name !== "fleet") location.hash = above(this.at.name) === "fleet" ? "" : above(this.at.name);
  }

  tick(now) {
    this.views[this.at.name]?.tick(now);
  }
}
