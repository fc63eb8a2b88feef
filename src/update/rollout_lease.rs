//! One worker of a fleet swaps its weights at a time, so that the others take jobs meanwhile: a
//! lease in Redis, which ends when the swap does, or gets no further. Without Redis nobody waits for
//! anybody.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::protocol::state::Phase;
use crate::store::{Reply, Store};
use crate::telemetry::status::WorkerStatus;
use crate::util::clock::steady_ms;

/// What a worker that dies with the lease costs the others.
const LIFE: Duration = Duration::from_secs(10);
/// How often the lease is kept, and how often the others look.
const KEEP: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(200);
/// A swap that shows no sign of getting on for so long holds up nobody any more; where a computation
/// may take longer without one, for as long as that.
const SILENCE: Duration = Duration::from_secs(30);
/// Calls that may fail before a worker goes on without the lease.
const PATIENCE: u32 = 10;

/// The lease, kept until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _kept: DropGuard,
}

impl Turn {
    /// Waits until no other worker swaps; none where Redis does not say.
    pub(super) async fn wait(store: &Store, holder: &str, signs: Signs) -> Option<Self> {
        let mut failures = 0;
        let mut waits = false;
        while failures < PATIENCE {
            match store.hold_swap(holder, LIFE).await {
                Reply::Answer(true) => {
                    return Some(Self::keep(store.clone(), holder.to_owned(), signs));
                }
                Reply::Answer(false) if !std::mem::replace(&mut waits, true) => {
                    tracing::info!("another worker of the fleet swaps its weights; waiting");
                }
                Reply::Answer(false) => {}
                Reply::Failed | Reply::Skipped => failures += 1,
            }
            tokio::time::sleep(LOOK.mul_f64(rand::random_range(0.75..=1.25))).await;
        }
        tracing::warn!("Redis does not say whether another worker swaps its weights; going on");
        None
    }

    fn keep(store: Store, holder: String, signs: Signs) -> Self {
        let over = CancellationToken::new();
        let (ended, since) = (over.clone(), steady_ms());
        tokio::spawn(async move {
            while tokio::time::timeout(KEEP, ended.cancelled()).await.is_err() {
                if signs.gone_since(since) {
                    tracing::warn!("the swap gets no further; the next worker takes its turn");
                    break;
                }
                store.hold_swap(&holder, LIFE).await;
            }
            store.let_go_of_swap(&holder).await;
        });
        Self {
            _kept: over.drop_guard(),
        }
    }
}

/// What shows that a swap gets on: the state, and the progress of the device.
#[derive(Debug, Clone)]
pub(super) struct Signs {
    pub(super) status: Arc<WorkerStatus>,
    pub(super) phase: watch::Receiver<Phase>,
}

impl Signs {
    /// Whether there was none for too long; `since` is when they were first looked for.
    fn gone_since(&self, since: u64) -> bool {
        let progress = &self.status.progress;
        let last = since
            .max(progress.moved_at())
            .max(self.phase.borrow().since);
        let silence = Duration::from_millis(steady_ms().saturating_sub(last));
        silence > SILENCE.max(progress.patience())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::state::{Detail, State};

    #[tokio::test(start_paused = true)]
    async fn the_lease_is_kept_as_long_as_the_swap_gets_on() {
        let secs = Duration::from_secs;
        let (states, phase) = watch::channel(Phase::starting());
        let status = Arc::<WorkerStatus>::default();
        status.progress.settle_pace();
        let signs = Signs {
            status: Arc::clone(&status),
            phase,
        };
        let since = steady_ms();
        tokio::time::advance(SILENCE).await;
        assert!(!signs.gone_since(since));
        let warming = Phase::starting().followed_by(State::Warming, Detail::LoadingModel);
        states.send_replace(warming);
        tokio::time::advance(SILENCE).await;
        assert!(!signs.gone_since(since), "the state changed");
        status.progress.step();
        tokio::time::advance(SILENCE).await;
        assert!(!signs.gone_since(since), "a micro-batch was done");
        tokio::time::advance(secs(1)).await;
        assert!(signs.gone_since(since));
        status.progress.note_pace(secs(6));
        assert!(!signs.gone_since(since), "a micro-batch may take a minute");
    }
}
