// What is wrong, worst first. A finding about workers filters the map and the table.

import { Keyed, byId, element, setAttribute, setText } from "./dom.js";

const WORDS = { bad: "Bad", warn: "Warning", note: "Note" };

export class Findings {
  constructor(onFilter) {
    this.onFilter = onFilter;
    this.list = new Keyed(byId("findings"), (finding) => this.make(finding));
  }

  make({ filter }) {
    const icon = element("span", { class: "icon", "aria-hidden": "true" });
    const parts = [icon, element("b"), element("span", { class: "text" })];
    if (filter === null) return element("li", {}, element("div", {}, ...parts));
    const button = element("button", { type: "button" }, ...parts, element("span", { class: "do" }));
    button.addEventListener("click", () => this.onFilter(button.dataset.filter));
    return element("li", {}, button);
  }

  show(now) {
    const nothing = byId("findings-none");
    nothing.hidden = now.findings.length > 0;
    setText(nothing, now.unknown ? "Unknown while the fleet is unknown." : "Nothing is wrong.");
    setAttribute(nothing, "class", now.unknown ? "quiet" : "fine");
    // The text has numbers in it: its place among those of its kind tells it apart.
    const keyed = now.findings.map((finding, at) => ({ ...finding, key: `${finding.severity} ${finding.filter ?? `#${at}`} ${finding.filter === null}` }));
    const seen = new Map();
    for (const finding of keyed) {
      seen.set(finding.key, (seen.get(finding.key) ?? 0) + 1);
      finding.key += ` ${seen.get(finding.key)}`;
    }
    this.list.show(keyed, ({ key }) => key, update);
  }
}

function update(item, { severity, text, filter }) {
  setAttribute(item, "class", severity);
  const place = item.firstElementChild;
  if (filter !== null) place.dataset.filter = filter;
  setText(place.children[1], WORDS[severity]);
  setText(place.children[2], text);
  if (filter !== null) setText(place.children[3], "show");
}
