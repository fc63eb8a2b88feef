//! What the broker itself says of our consumer, asked every few seconds: no event tells of every
//! way to lose one, and a worker that is ready must not be one that gets nothing.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::doubt::Doubt;
use crate::scoring::consumer::{ServeEnd, Serving};

/// How often the broker is asked.
const LOOK: Duration = Duration::from_secs(3);
/// How long it may take to answer. With [`LOOK`] this is how long a link that died silently goes
/// unnoticed.
const ANSWER: Duration = Duration::from_secs(5);
/// What has waited here for this long is better off with a worker that has nothing to do.
const LONG_WAIT: Duration = Duration::from_secs(1);
/// How often it is looked for.
const STEP: Duration = Duration::from_millis(500);

/// Resolves when the broker has no consumer of ours any more, or does not answer. Tells the `doubtful`
/// when ours may be one of those that it lost without a word, as happens to a queue that is deleted and
/// declared again in a cluster.
pub(super) async fn oversee(serving: &Serving, doubtful: &Notify) -> ServeEnd {
    let queue = serving.topology.jobs_queue();
    let (mut starved, mut doubt) = (false, Doubt::default());
    loop {
        let before = serving.delivered.load(Ordering::Relaxed);
        let looked = Instant::now();
        while looked.elapsed() < LOOK {
            tokio::time::sleep(STEP).await;
            if let Err(ended) = share(serving, &queue).await {
                return ended;
            }
        }
        let (waiting, consumers) = match ask(serving, &queue).await {
            Ok(depth) => depth,
            Err(ended) => return ended,
        };
        let idle = serving.status.in_flight.load(Ordering::Relaxed) == 0
            && serving.delivered.load(Ordering::Relaxed) == before;
        let starves = idle && waiting > 0;
        if consumers == 0 || (starves && starved) {
            tracing::warn!(
                waiting,
                consumers,
                "the broker no longer delivers to our consumer"
            );
            return ServeEnd::ConsumerLost;
        }
        starved = starves;
        if idle && is_doubtful(serving, &mut doubt, consumers).await {
            doubtful.notify_one();
        }
    }
}

/// Whether the queue has fewer consumers than there should be, and ours may be the one.
async fn is_doubtful(serving: &Serving, doubt: &mut Doubt, consumers: u32) -> bool {
    let alive = serving.store.live_workers().await.answer();
    let should = match alive {
        Some(alive) if alive <= consumers => Some(alive),
        Some(alive) if !doubt.asks(alive) => return false,
        Some(_) => serving.store.consuming_workers().await.answer(),
        None => None,
    };
    doubt.is_due(consumers, should)
}

/// Jobs that wait in the queue, and its consumers.
async fn ask(serving: &Serving, queue: &str) -> Result<(u32, u32), ServeEnd> {
    match tokio::time::timeout(ANSWER, serving.link.depth(queue)).await {
        Ok(Ok(Some(depth))) => return Ok(depth),
        Ok(Ok(None)) => {
            tracing::warn!(queue, "the jobs queue is gone");
            return Err(ServeEnd::ConsumerLost);
        }
        Ok(Err(error)) => tracing::warn!(%error, "the link to the broker is given up"),
        Err(_) => tracing::warn!("the broker does not answer; its link is given up"),
    }
    serving.link.lost.cancel();
    Err(ServeEnd::BrokerLost)
}

/// Sends back what has waited here for long, as far as other workers have nothing to do and the
/// queue has nothing for them: one job for each of them, and what comes back again.
async fn share(serving: &Serving, queue: &str) -> Result<(), ServeEnd> {
    let line = serving.pipeline.waiting();
    if line.waited(LONG_WAIT) == 0 {
        return Ok(());
    }
    let idle = serving.store.idle_workers().await.answer().unwrap_or(0);
    if idle == 0 {
        return Ok(());
    }
    let (waiting, consumers) = ask(serving, queue).await?;
    if waiting == 0 && consumers > 1 {
        let sent_back = line.send_back(LONG_WAIT, idle);
        tracing::info!(
            sent_back,
            idle,
            "jobs that waited here for long go to idle workers"
        );
    }
    Ok(())
}
