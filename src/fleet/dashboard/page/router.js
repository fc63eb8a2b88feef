// The address says which view is shown: # the fleet, #worker/ID, #job/ID, #contributors.

import { byId, setAttribute } from "./dom.js";

const TITLE = "scorer";

function parsed(hash) {
  const [name, ...rest] = hash.replace(/^#/, "").split("/");
  const id = decoded(rest.join("/"));
  if ((name === "worker" || name === "job") && id !== "") return { name, id };
  return { name: name === "contributors" ? name : "fleet", id: null };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export class Router {
  /** A view has `open(id)`, `tick(now)` and `close()`. */
  constructor(views) {
    this.views = views;
    this.at = { name: "fleet", id: null };
    this.opener = null;
  }

  start() {
    // Which link was followed, so that the focus finds back to it.
    document.addEventListener("click", ({ target }) => {
      const link = target.closest?.("#view-fleet a[href^='#']");
      if (link) this.opener = link;
    });
    addEventListener("hashchange", () => this.go(true));
    this.go(false);
  }

  go(moved) {
    const to = parsed(location.hash);
    this.views[this.at.name]?.close();
    this.at = to;
    for (const name of ["fleet", ...Object.keys(this.views)]) byId(`view-${name}`).hidden = name !== to.name;
    for (const name of ["fleet", "contributors"]) setAttribute(byId(`nav-${name}`), "aria-current", name === to.name ? "page" : null);
    this.views[to.name]?.open(to.id);
    document.title = to.name === "fleet" ? TITLE : `${to.id ?? "Contributors"} · ${TITLE}`;
    if (moved) this.focus(to.name);
  }

  focus(name) {
    const back = name === "fleet" && this.opener?.isConnected ? this.opener : null;
    if (back === null) window.scrollTo(0, 0);
    (back ?? byId(`${name}-title`)).focus();
    if (name === "fleet") this.opener = null;
  }

  back() {
    if (this.at.name !== "fleet") location.hash = "";
  }

  tick(now) {
    this.views[this.at.name]?.tick(now);
  }
}
