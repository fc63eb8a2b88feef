//! Watches whether the whole fleet is ready, in the eyes of Redis and of the broker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use testkit::wait::secs;

use crate::plan::FLEET;
use crate::strike::Site;

/// What the fleet has to be ready again after the last fault: several times what it takes on an idle machine.
const LIMIT: Duration = secs(60);
/// After this the round is given up.
const PATIENCE: Duration = secs(90);
/// Ready for so long is ready.
const STEADY: Duration = Duration::from_millis(1500);
const POLL: Duration = Duration::from_millis(100);

/// The last time the fleet was not ready, and what it said.
pub(crate) struct Watch {
    unready: Mutex<(Instant, Vec<String>)>,
}

impl Watch {
    pub(crate) fn new() -> Self {
        Self {
            unready: Mutex::new((Instant::now(), vec!["nobody has looked yet".into()])),
        }
    }

    /// Looks until it is told to stop.
    pub(crate) fn run(&self, site: &Site, stop: &AtomicBool) {
        let (mut client, queue) = (site.client(), site.stack.jobs_queue());
        while !stop.load(Ordering::Relaxed) {
            let mut unready = site.fleet.unready();
            match client.depth(&queue) {
                Ok(Some((_, consumers))) if consumers as usize == FLEET => {}
                other => unready.push(format!("the broker says {other:?}")),
            }
            if !unready.is_empty() {
                *self.unready() = (Instant::now(), unready);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until the fleet is ready; how long it took, counted from the last fault or death. The
    /// error says who was not ready in time.
    pub(crate) fn recovered(&self, site: &Site) -> Result<Duration, String> {
        loop {
            let fault = site.quiet_since();
            let since = site
                .fleet
                .last_death()
                .map_or(fault, |death| death.max(fault));
            let (last, reasons) = self.unready().clone();
            let took = last.saturating_duration_since(since);
            if last.elapsed() > STEADY || since.elapsed() > PATIENCE {
                let late = took > LIMIT;
                let what =
                    format!("the fleet was not ready {took:.1?} after the last fault: {reasons:?}");
                return if late { Err(what) } else { Ok(took) };
            }
            std::thread::sleep(POLL);
        }
    }

    fn unready(&self) -> MutexGuard<'_, (Instant, Vec<String>)> {
        self.unready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
