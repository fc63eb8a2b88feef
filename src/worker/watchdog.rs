//! The last resort of a drain: a thread that ends the process when the time is up, whatever the
//! model, the broker or Redis do. The broker redelivers the jobs that were still held.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::transition::Stop;
use crate::telemetry::progress::Progress;

/// The shortest time for a drain: enough to hand jobs back and to close the connections.
const LEAST: Duration = Duration::from_secs(3);

/// Armed once, by the first request for a drain.
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

    /// The progress that shows whether a computation is cut short.
    pub(super) fn watch(&self, progress: Arc<Progress>) {
        self.0.progress.get_or_init(|| progress);
    }

    /// The worker has ended like this; only its connections are still to be closed.
    pub(super) fn ended(&self, stop: Stop) {
        self.0.ended.get_or_init(|| stop);
    }

    /// Starts the clock.
    pub(super) fn arm(&self) {
        if !self.0.armed.swap(true, Ordering::Relaxed) {
            self.end_after(self.0.time);
        }
    }

    /// The drain must end now: leaves the shortest time.
    pub(super) fn hurry(&self) {
        if !self.0.hurried.swap(true, Ordering::Relaxed) {
            self.end_after(LEAST);
        }
    }

    fn end_after(&self, time: Duration) {
        let inner = Arc::clone(&self.0);
        let waiting = move || {
            std::thread::sleep(time);
            inner.end_process();
        };
        let thread = std::thread::Builder::new().name("scorer-watchdog".into());
        if let Err(error) = thread.spawn(waiting) {
            tracing::warn!(%error, "no watchdog: nothing ends a drain that hangs");
        }
    }
}

impl Inner {
    fn end_process(&self) {
        let stop = self.stop();
        tracing::error!(
            cut_short = u8::from(stop == Stop::CutShort),
            "the drain takes too long; the process ends, and the broker redelivers what it held"
        );
        (self.overdue)(stop);
    }

    /// How the process ends. If it was told to end now, an unfinished drain is no failure.
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
