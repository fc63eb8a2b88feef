// Whether the server has seen another merge.

/** After an answer that says nothing. */
const AGAIN_MS = 5000;

/** Asks anew when the server has seen another merge. */
export class Newest {
  constructor(refresh) {
    this.refresh = refresh;
    this.forget();
  }

  forget() {
    this.seen = null;
    this.failedAt = null;
  }

  follow(seen) {
    const again = this.failedAt !== null && performance.now() - this.failedAt >= AGAIN_MS;
    if (seen === this.seen && !again) return;
    this.seen = seen;
    this.failedAt = null;
    this.refresh();
  }

  failed() {
    this.failedAt = performance.now();
  }
}
