//! Rolling updates: one worker of a fleet swaps its weights at a time, while the others take jobs. A
//! lease in Redis says whose turn it is; it ends when the swap does, or stops making progress. Without
//! Redis no worker waits.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::protocol::state::Phase;
use crate::store::{Reply, Store};
use crate::telemetry::status::WorkerStatus;
use crate::util::clock::steady_ms;

/// How long the others wait for a worker that died with the lease.
const TTL: Duration = Duration::from_secs(10);
/// How often the holder renews the lease.
const RENEW: Duration = Duration::from_secs(3);
/// How often the others try to get it.
const POLL: Duration = Duration::from_millis(200);
/// A swap without progress for this long loses the lease; longer where one computation may take longer.
const STALLED: Duration = Duration::from_secs(30);
/// Calls that may fail before a worker swaps without the lease.
const ATTEMPTS: u32 = 10;

/// The lease, renewed until it is dropped.
#[derive(Debug)]
pub(super) struct RolloutLease {
    _renewing: DropGuard,
}

impl RolloutLease {
    /// Waits until no other worker swaps its weights. None if Redis does not answer.
    pub(super) async fn acquire(
        store: &Store,
        holder: &str,
        progress: SwapProgress,
    ) -> Option<Self> {
        let mut failures = 0;
        let mut waiting = false;
        while failures < ATTEMPTS {
            match store.hold_swap(holder, TTL).await {
                Reply::Answer(true) => {
                    return Some(Self::renew(store.clone(), holder.to_owned(), progress));
                }
                Reply::Answer(false) if !std::mem::replace(&mut waiting, true) => {
                    tracing::info!("another worker of the fleet is swapping its weights; waiting");
                }
                Reply::Answer(false) => {}
                Reply::Failed | Reply::Skipped => failures += 1,
            }
            tokio::time::sleep(POLL.mul_f64(rand::random_range(0.75..=1.25))).await;
        }
        tracing::warn!(
            "Redis does not answer whether another worker is swapping its weights; going on without the lease"
        );
        None
    }

    fn renew(store: Store, holder: String, progress: SwapProgress) -> Self {
        let over = CancellationToken::new();
        let (ended, since) = (over.clone(), steady_ms());
        tokio::spawn(async move {
            while tokio::time::timeout(RENEW, ended.cancelled())
                .await
                .is_err()
            {
                if progress.stalled(since) {
                    tracing::warn!(
                        "the swap makes no progress; the next worker may swap its weights"
                    );
                    break;
                }
                store.hold_swap(&holder, TTL).await;
            }
            store.let_go_of_swap(&holder).await;
        });
        Self {
            _renewing: over.drop_guard(),
        }
    }
}

/// What shows that a swap makes progress: the worker's state, and the computing thread.
#[derive(Debug, Clone)]
pub(super) struct SwapProgress {
    pub(super) status: Arc<WorkerStatus>,
    pub(super) phase: watch::Receiver<Phase>,
}

impl SwapProgress {
    /// Whether there was none for too long, of the time after `since`.
    fn stalled(&self, since: u64) -> bool {
        let progress = &self.status.progress;
        let last = since
            .max(progress.moved_at())
            .max(self.phase.borrow().since);
        let idle = Duration::from_millis(steady_ms().saturating_sub(last));
        idle > STALLED.max(progress.patience())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::state::{Detail, State};

    #[tokio::test(start_paused = true)]
    async fn the_lease_is_renewed_as_long_as_the_swap_makes_progress() {
        let secs = Duration::from_secs;
        let (states, phase) = watch::channel(Phase::starting());
        let status = Arc::<WorkerStatus>::default();
        status.progress.settle_pace();
        let progress = SwapProgress {
            status: Arc::clone(&status),
            phase,
        };
        let since = steady_ms();
        tokio::time::advance(STALLED).await;
        assert!(!progress.stalled(since));
        let warming = Phase::starting().followed_by(State::Warming, Detail::LoadingModel);
        states.send_replace(warming);
        tokio::time::advance(STALLED).await;
        assert!(!progress.stalled(since), "the state changed");
        status.progress.step();
        tokio::time::advance(STALLED).await;
        assert!(!progress.stalled(since), "a micro-batch was done");
        tokio::time::advance(secs(1)).await;
        assert!(progress.stalled(since));
        status.progress.note_pace(secs(6));
        assert!(!progress.stalled(since), "a micro-batch may take a minute");
    }
}
