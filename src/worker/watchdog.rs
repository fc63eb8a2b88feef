//! The drain's last resort: a thread that ends the process when its time is over, whatever the
//! model, the broker or Redis do. What it still holds the broker delivers again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::Stop;
use crate::telemetry::progress::Progress;

/// A drain that is given no time still hands back what it holds, and says goodbye.
const LEAST: Duration = Duration::from_secs(3);

/// Armed once, by the first that asks for a drain.
#[derive(Debug, Clone)]
pub(super) struct Watchdog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    time: Duration,
    armed: AtomicBool,
    hurried: AtomicBool,
    progress: OnceLock<Arc<Progress>>,
    ended: OnceLock<Stop>,
    overdue: fn(Stop),
}

impl Watchdog {
    pub(super) fn new(drain_timeout: Duration, overdue: fn(Stop)) -> Self {
        Self(Arc::new(Inner {
            time: drain_timeout.max(LEAST),
            overdue,
            armed: AtomicBool::new(false),
            hurried: AtomicBool::new(false),
            progress: OnceLock::new(),
            ended: OnceLock::new(),
        }))
    }

    /// Whether a computation is cut short is seen here.
    pub(super) fn watch(&self, progress: Arc<Progress>) {
        self.0.progress.get_or_init(|| progress);
    }

    /// The worker is done, but for its goodbyes.
    pub(super) fn ended(&self, stop: Stop) {
        self.0.ended.get_or_init(|| stop);
    }

    /// The time begins to run.
    pub(super) fn arm(&self) {
        if !self.0.armed.swap(true, Ordering::Relaxed) {
            self.bite_after(self.0.time);
        }
    }

    /// The time is over: what is left is the least that a goodbye takes.
    pub(super) fn hurry(&self) {
        if !self.0.hurried.swap(true, Ordering::Relaxed) {
            self.bite_after(LEAST);
        }
    }

    fn bite_after(&self, time: Duration) {
        let inner = Arc::clone(&self.0);
        let waiting = move || {
            std::thread::sleep(time);
            inner.bite();
        };
        let thread = std::thread::Builder::new().name("scorer-watchdog".into());
        if let Err(error) = thread.spawn(waiting) {
            tracing::warn!(%error, "nothing watches over the drain");
        }
    }
}

impl Inner {
    fn bite(&self) {
        let stop = self.stop();
        tracing::error!(
            cut_short = u8::from(stop == Stop::CutShort),
            "the drain takes longer than it may; the process ends, the broker delivers again what it held"
        );
        (self.overdue)(stop);
    }

    /// How the process ends. One that was told twice to end has not failed by doing so.
    fn stop(&self) -> Stop {
        let computing = self.progress.get().is_some_and(|p| p.is_busy());
        let hurried = self.hurried.load(Ordering::Relaxed);
        match (self.ended.get(), computing) {
            (Some(stop), _) => *stop,
            (None, true) => Stop::CutShort,
            (None, false) if hurried => Stop::Drained,
            (None, false) => Stop::Stuck,
        }
    }
}
