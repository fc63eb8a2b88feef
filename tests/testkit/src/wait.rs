//! Waiting on conditions. A bare sleep is never a condition.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const POLL: Duration = Duration::from_millis(25);

/// Whole seconds, written short.
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Long enough for a debug worker on a busy machine to load, warm and consume.
pub const START: Duration = secs(60);

/// Long enough for anything that takes one round trip and a beat or two.
pub const SOON: Duration = secs(20);

/// Longer than a drain may take by default: whether it ended by itself or was cut short is told by its exit code.
pub const DRAIN: Duration = secs(90);

/// Polls until `probe` yields a value; fails the test, saying what was awaited, after `deadline`.
#[track_caller]
pub fn eventually_some<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> T {
    let until = Instant::now() + deadline;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(
            Instant::now() < until,
            "after {deadline:?} still waiting: {what}"
        );
        std::thread::sleep(POLL);
    }
}

/// Polls until `condition` holds.
#[track_caller]
pub fn eventually(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    eventually_some(deadline, what, || condition().then_some(()));
}

/// Checks that `condition` holds at every poll of a stretch of time.
#[track_caller]
pub fn throughout(stretch: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + stretch;
    while Instant::now() < until {
        assert!(condition(), "did not hold throughout {stretch:?}: {what}");
        std::thread::sleep(POLL);
    }
}

/// Unix milliseconds of this machine, which the workers share.
pub fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock after 1970");
    u64::try_from(since.as_millis()).expect("a clock before the year 584 million")
}
