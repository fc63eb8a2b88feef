// What is wrong, worst first. A finding about workers filters the map and the table.

import { Keyed, byId, element, setAttribute, setText } from "./dom.js";
import { capital, plural } from "./format.js";

/** Shown until all are asked for. */
const FIRST = 6;
const WORDS = { bad: "Bad", warn: "Warning", note: "Note" };

export class Findings {
  constructor(onFilter) {
    this.onFilter = onFilter;
    this.all = false;
    byId("findings-more").addEventListener("click", () => {
      this.all = !this.all;
      this.show(this.now);
    });
    this.list = new Keyed(byId("findings"), (finding) => this.make(finding));
  }

  make({ filter }) {
    const icon = element("span", { class: "icon", "aria-hidden": "true" });
    const parts = [icon, element("b"), element("span", { class: "text" }, element("span"), element("span", { class: "quiet" }))];
    if (filter === null) return element("li", {}, element("div", {}, ...parts));
    const button = element("button", { type: "button" }, ...parts, element("span", { class: "do" }));
    button.addEventListener("click", () => this.onFilter(button.dataset.filter));
    return element("li", {}, button);
  }

  show(now) {
    this.now = now;
    const found = now.unknown ? [] : now.findings;
    const judged = !now.unknown && now.totals.alive > 0;
    const nothing = byId("findings-none");
    nothing.hidden = found.length > 0;
    setText(nothing, now.unknown ? "Unknown while the fleet is unknown." : judged ? "Nothing is wrong." : "No worker is alive, so nothing can be judged.");
    setAttribute(nothing, "class", judged ? "fine" : "quiet");
    // The text has numbers in it; severity and filter stay.
    const key = ({ severity, filter }) => JSON.stringify([severity, filter]);
    this.list.show(found.slice(0, this.all ? found.length : FIRST), key, update);
    const more = byId("findings-more");
    more.hidden = found.length <= FIRST;
    setText(more, this.all ? "Show fewer" : `Show ${plural(found.length - FIRST, "more finding", "more findings")}`);
    setAttribute(more, "aria-expanded", this.all);
  }
}

function update(item, { severity, text, filter }) {
  setAttribute(item, "class", severity);
  const place = item.firstElementChild;
  if (filter !== null) place.dataset.filter = filter;
  setText(place.children[1], WORDS[severity]);
  const [what, ...meaning] = capital(text).split(/(?<=\.) /);
  setText(place.children[2].firstElementChild, meaning.length > 0 ? `${what} ` : what);
  setText(place.children[2].lastElementChild, meaning.join(" "));
  if (filter !== null) setText(place.children[3], "show");
}
