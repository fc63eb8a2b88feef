//! Wall-clock time for messages, and measured time. No decision depends on the wall clock: it may be set
//! at any moment.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Unix time in milliseconds.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    millis(since)
}

/// Whole milliseconds.
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds by the monotonic clock, which does not count while the machine sleeps; never 0, and
/// meaningless outside this process.
pub fn steady_ms() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let start = tokio::time::Instant::from_std(*START);
    // Tokio's, so that tests can let it pass at once.
    let since = tokio::time::Instant::now().saturating_duration_since(start);
    millis(since).saturating_add(1)
}

/// Something that has ended: when it began, and how long it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lap {
    /// When it began.
    pub began: Instant,
    /// How long it took.
    pub took: Duration,
}

impl Lap {
    /// It ends now.
    pub fn since(began: Instant) -> Self {
        Self {
            began,
            took: began.elapsed(),
        }
    }

    /// How long it took, in milliseconds.
    pub fn millis(&self) -> f64 {
        self.took.as_secs_f64() * 1e3
    }
}

/// What a short wait was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// So much time passed.
    Passed(Duration),
    /// The process was stopped meanwhile, as by Ctrl-Z or a frozen container.
    Stopped,
}

/// Waits, and checks whether the process was stopped meanwhile.
pub async fn tick(pause: Duration) -> Tick {
    // Tokio's, so that tests can let it pass at once.
    let began = tokio::time::Instant::now();
    tokio::time::sleep(pause).await;
    let passed = began.elapsed();
    if passed > pause * 8 {
        Tick::Stopped
    } else {
        Tick::Passed(passed)
    }
}

/// Resolves when the process has run for this long; time in which it was stopped does not count.
pub async fn had(time: Duration) {
    had_while(time, || true).await;
}

/// The same, of the time in which it `counts`.
pub async fn had_while(time: Duration, counts: impl Fn() -> bool) {
    const LOOK: Duration = Duration::from_millis(250);
    let mut left = time;
    while !left.is_zero() {
        let pause = left.min(LOOK);
        let counted = counts();
        let passed = match tick(pause).await {
            Tick::Passed(passed) => passed,
            Tick::Stopped => pause,
        };
        if counted && counts() {
            left = left.saturating_sub(passed);
        }
    }
}
