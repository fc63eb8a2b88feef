//! The drain's last resort: a thread that ends the process when its time is over, whatever the
//! model, the broker or Redis do. What it still holds the broker delivers again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::engine::Progress;

/// A drain that is given no time still hands back what it holds, and says goodbye.
const LEAST: Duration = Duration::from_secs(3);

/// Armed once, by the first that asks for a drain.
#[derive(Debug, Clone)]
pub(super) struct Watchdog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    time: Duration,
    armed: AtomicBool,
    progress: OnceLock<Arc<Progress>>,
    overdue: fn(bool),
}

impl Watchdog {
    pub(super) fn new(drain_timeout: Duration, overdue: fn(bool)) -> Self {
        Self(Arc::new(Inner {
            time: drain_timeout.max(LEAST),
            overdue,
            armed: AtomicBool::new(false),
            progress: OnceLock::new(),
        }))
    }

    /// Whether a computation is cut short is seen here.
    pub(super) fn watch(&self, progress: Arc<Progress>) {
        self.0.progress.get_or_init(|| progress);
    }

    /// The time begins to run.
    pub(super) fn arm(&self) {
        if self.0.armed.swap(true, Ordering::Relaxed) {
            return;
        }
        let inner = Arc::clone(&self.0);
        let waiting = move || {
            std::thread::sleep(inner.time);
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
        let computing = |p: &Arc<Progress>| p.busy_since_ms.load(Ordering::Relaxed) != 0;
        let cut_short = self.progress.get().is_some_and(computing);
        tracing::error!(
            cut_short = u8::from(cut_short),
            "the drain takes longer than worker.drain_timeout; the process ends, the broker delivers again what it held"
        );
        (self.overdue)(cut_short);
    }
}
