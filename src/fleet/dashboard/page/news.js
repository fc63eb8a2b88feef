// What happened lately: events and dead-lettered jobs; only what is new is fetched.

import { ask } from "./connection.js";

const KEPT = { events: 200, parked: 50 };

export class News {
  constructor(onNews) {
    this.onNews = onNews;
    this.forget();
    this.asking = false;
  }

  forget() {
    this.seq = { events: 0, parked: 0 };
    /** Oldest first. */
    this.items = { events: [], parked: [] };
  }

  async follow(theirs) {
    const names = Object.keys(this.seq);
    // A server that began again counts from the start.
    if (names.some((name) => theirs[name] < this.seq[name])) this.forget();
    if (this.asking || names.every((name) => theirs[name] === this.seq[name])) return;
    this.asking = true;
    const answer = await ask("news", this.seq);
    this.asking = false;
    if (answer.error !== undefined) return;
    const changed = names.filter((name) => answer[name].seq !== this.seq[name]);
    for (const name of changed) {
      this.seq[name] = answer[name].seq;
      this.items[name] = [...this.items[name], ...answer[name].items].slice(-KEPT[name]);
    }
    if (changed.length > 0) this.onNews(changed);
  }
}
