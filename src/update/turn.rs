//! One worker of a fleet swaps its weights at a time, so that the others take jobs meanwhile: a
//! lease in Redis. Without Redis nobody waits for anybody.

use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};

use crate::store::{Reply, Store};

/// What a worker that dies with the lease costs the others.
const LIFE: Duration = Duration::from_secs(10);
/// How often the lease is kept, and how often the others look.
const KEEP: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(200);
/// Calls that may fail before a worker goes on without the lease.
const PATIENCE: u32 = 10;

/// The lease, kept until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _kept: DropGuard,
}

impl Turn {
    /// Waits until no other worker swaps; none where Redis does not say.
    pub(super) async fn wait(store: &Store, holder: &str) -> Option<Self> {
        let mut failures = 0;
        let mut waits = false;
        while failures < PATIENCE {
            match store.hold_swap(holder, LIFE).await {
                Reply::Answer(true) => return Some(Self::keep(store.clone(), holder.to_owned())),
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

    fn keep(store: Store, holder: String) -> Self {
        let over = CancellationToken::new();
        let ended = over.clone();
        tokio::spawn(async move {
            while tokio::time::timeout(KEEP, ended.cancelled()).await.is_err() {
                store.hold_swap(&holder, LIFE).await;
            }
            store.let_go_of_swap(&holder).await;
        });
        Self {
            _kept: over.drop_guard(),
        }
    }
}
