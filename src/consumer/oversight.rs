//! What the broker itself says of our consumer, asked every few seconds: no event tells of every
//! way to lose one, and a worker that is ready must not be one that gets nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Ended, Serving};

/// How often the broker is asked.
const LOOK: Duration = Duration::from_secs(3);
/// The same, while jobs are being shared.
const SOON: Duration = Duration::from_millis(500);
/// How long it may take to answer. With [`LOOK`] this is how long a link that died silently goes
/// unnoticed.
const ANSWER: Duration = Duration::from_secs(5);
/// What has waited here for this long is better off with a worker that has nothing to do.
const LONG_WAIT: Duration = Duration::from_secs(3);

/// Resolves when the broker has no consumer of ours any more, or does not answer.
pub(super) async fn oversee(serving: &Serving) -> Ended {
    let queue = serving.topology.jobs_queue();
    let (mut starved, mut pause) = (false, LOOK);
    loop {
        let before = serving.delivered.load(Ordering::Relaxed);
        tokio::time::sleep(pause).await;
        let depth = tokio::time::timeout(ANSWER, serving.link.depth(&queue)).await;
        let (waiting, consumers) = match depth {
            Ok(Ok(Some(depth))) => depth,
            Ok(Ok(None)) => {
                tracing::warn!(queue, "the jobs queue is gone");
                return Ended::ConsumerLost;
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "the link to the broker is given up");
                serving.link.lost.cancel();
                return Ended::BrokerLost;
            }
            Err(_) => {
                tracing::warn!("the broker does not answer; its link is given up");
                serving.link.lost.cancel();
                return Ended::BrokerLost;
            }
        };
        let idle = serving.vitals.in_flight.load(Ordering::Relaxed) == 0
            && serving.delivered.load(Ordering::Relaxed) == before;
        let starves = idle && waiting > 0;
        if consumers == 0 || (starves && starved) {
            tracing::warn!(
                waiting,
                consumers,
                "the broker no longer delivers to our consumer"
            );
            return Ended::ConsumerLost;
        }
        starved = starves;
        let shared = waiting == 0 && consumers > 1 && share(serving).await;
        pause = if shared { SOON } else { LOOK };
    }
}

/// Sends back what has waited here for long, as far as other workers have nothing to do: one job
/// for each of them, and what comes back again. True = some were.
async fn share(serving: &Serving) -> bool {
    let line = serving.pipeline.waiting();
    if line.waited(LONG_WAIT) == 0 {
        return false;
    }
    let Some(idle) = serving.store.idle_workers().await.answer() else {
        return false;
    };
    let sent_back = line.send_back(LONG_WAIT, idle);
    if sent_back > 0 {
        tracing::info!(
            sent_back,
            idle,
            "jobs that waited here for long go to idle workers"
        );
    }
    sent_back > 0
}
