// The server's updates, and whether they still come.

const RETRY_MS = 5000;
const OLD_MS = 5000;

/**
 * Calls `on.fleet` and `on.now` with what the server sends, and `on.silent(why)` once a second while it sends nothing.
 */
export function follow(on) {
  // By the monotonic clock.
  const link = { heardAt: -Infinity, refused: null };
  connect(on, link);
  setInterval(() => {
    if (performance.now() - link.heardAt < OLD_MS) return;
    on.silent(link.refused === null ? "does not answer" : `refused: ${link.refused}`);
  }, 1000);
}

// A browser reconnects by itself when a connection breaks, but not after a refusal.
function connect(on, link) {
  const source = new EventSource("events");
  source.addEventListener("fleet", (event) => {
    const members = JSON.parse(event.data);
    if (members.ids !== undefined) on.fleet(members);
  });
  source.addEventListener("now", (event) => {
    const now = JSON.parse(event.data);
    // Before its first look the server knows nothing.
    if (now.at_ms === undefined) return;
    [link.heardAt, link.refused] = [performance.now(), null];
    on.now(now);
  });
  source.addEventListener("error", async () => {
    if (source.readyState !== EventSource.CLOSED) return;
    setTimeout(() => connect(on, link), RETRY_MS);
    link.refused = await refusal();
  });
}

async function refusal() {
  const answer = await fetch("events").catch(() => null);
  if (answer === null) return null;
  if (!answer.ok) return (await answer.text()).trim();
  await answer.body.cancel();
  return null;
}

/** The answer, or {error} in the server's or our words. */
export async function ask(path, query = {}) {
  const answer = await fetch(`${path}?${new URLSearchParams(query)}`).catch(() => null);
  if (answer === null) return { error: "the dashboard's server does not answer" };
  const body = await answer.json().catch(() => null);
  if (body === null) return { error: `the dashboard's server answered ${answer.status}` };
  return answer.ok ? body : { error: body.error ?? `the dashboard's server answered ${answer.status}` };
}
