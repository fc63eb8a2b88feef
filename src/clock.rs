//! Wall-clock time as the wire carries it, and time that was measured.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Unix time in milliseconds.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Something that is over: when it began, and how long it took.
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
