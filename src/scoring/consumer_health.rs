//! Asks the broker every few seconds about our consumer. No event tells of every way to lose one, and a
//! worker that is ready must not be one that is delivered nothing.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::doubt::Doubt;
use crate::scoring::consumer::{ServeEnd, Serving};

/// How often the broker is asked.
const LOOK: Duration = Duration::from_secs(3);
/// How long it may take to answer. A link that died silently goes unnoticed for [`LOOK`] and this.
const ANSWER: Duration = Duration::from_secs(5);
/// A job that has waited here for this long is better off with an idle worker.
const LONG_WAIT: Duration = Duration::from_secs(1);
/// How often such jobs are looked for.
const STEP: Duration = Duration::from_millis(500);

/// What the broker says of the jobs queue.
#[derive(Debug, Clone, Copy)]
struct Depth {
    waiting: u32,
    consumers: u32,
}

impl Depth {
    /// Whether other workers wait for jobs, and the queue has none for them.
    fn others_starve(self) -> bool {
        self.waiting == 0 && self.consumers > 1
    }
}

/// Whether the broker still delivers to us. Pure.
#[derive(Debug, Default)]
struct Delivering {
    /// At the last look jobs waited, and we were idle.
    starved: bool,
}

impl Delivering {
    /// `idle`: since the last look no job was held or delivered. Jobs that wait then are counted once as
    /// on their way to us.
    fn has_ended(&mut self, depth: Depth, idle: bool) -> bool {
        let starves = idle && depth.waiting > 0;
        let before = std::mem::replace(&mut self.starved, starves);
        depth.consumers == 0 || (starves && before)
    }
}

/// Resolves when the broker no longer has our consumer or does not answer. Notifies `doubtful` when ours
/// may be one of the consumers that the broker has lost silently, as happens in a cluster to a queue that
/// is deleted and declared again.
pub(super) async fn watch(serving: &Serving, doubtful: &Notify) -> ServeEnd {
    let queue = serving.settler.topology.jobs_queue();
    let (mut delivering, mut doubt) = (Delivering::default(), Doubt::default());
    loop {
        let before = serving.delivered.load(Ordering::Relaxed);
        let looked = Instant::now();
        while looked.elapsed() < LOOK {
            tokio::time::sleep(STEP).await;
            if let Err(ended) = share(serving, &queue).await {
                return ended;
            }
        }
        let depth = match ask(serving, &queue).await {
            Ok(depth) => depth,
            Err(ended) => return ended,
        };
        let idle = serving.settler.status.in_flight.load(Ordering::Relaxed) == 0
            && serving.delivered.load(Ordering::Relaxed) == before;
        if delivering.has_ended(depth, idle) {
            let Depth { waiting, consumers } = depth;
            tracing::warn!(
                waiting,
                consumers,
                "the broker no longer delivers to our consumer"
            );
            return ServeEnd::ConsumerLost;
        }
        if idle && is_doubtful(serving, &mut doubt, depth.consumers).await {
            doubtful.notify_one();
        }
    }
}

/// Whether the queue has fewer consumers than it should, and the missing one may be ours.
async fn is_doubtful(serving: &Serving, doubt: &mut Doubt, consumers: u32) -> bool {
    let alive = serving.store.live_workers().await.answer();
    let expected = match alive {
        Some(alive) if alive <= consumers => Some(alive),
        Some(alive) if !doubt.asks(alive) => return false,
        Some(_) => serving.store.consuming_workers().await.answer(),
        None => None,
    };
    doubt.is_due(consumers, expected)
}

/// Asks the broker about the queue.
async fn ask(serving: &Serving, queue: &str) -> Result<Depth, ServeEnd> {
    let link = &serving.settler.link;
    match tokio::time::timeout(ANSWER, link.depth(queue)).await {
        Ok(Ok(Some((waiting, consumers)))) => return Ok(Depth { waiting, consumers }),
        Ok(Ok(None)) => {
            tracing::warn!(queue, "the jobs queue is gone");
            return Err(ServeEnd::ConsumerLost);
        }
        Ok(Err(error)) => tracing::warn!(%error, "the link to the broker is given up"),
        Err(_) => tracing::warn!("the broker does not answer; its link is given up"),
    }
    link.lost.cancel();
    Err(ServeEnd::BrokerLost)
}

/// Sends jobs that have waited here for long back for other workers, one for each that is idle, unless
/// the queue has jobs for them.
async fn share(serving: &Serving, queue: &str) -> Result<(), ServeEnd> {
    if !serving.device_queue.has_stalled(LONG_WAIT) {
        return Ok(());
    }
    let idle = serving.store.idle_workers().await.answer().unwrap_or(0);
    if idle > 0 && ask(serving, queue).await?.others_starve() {
        let sent_back = serving.device_queue.send_back(LONG_WAIT, idle);
        tracing::info!(
            sent_back,
            idle,
            "jobs that waited here for long go to idle workers"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_consumer_is_lost_when_there_is_none_or_jobs_wait_twice_while_we_are_idle() {
        // Waiting jobs, consumers, whether we are idle, at each look; at which look it has ended.
        type Looks = &'static [(u32, u32, bool)];
        let table: &[(Looks, Option<usize>)] = &[
            (&[(0, 1, true), (0, 1, true)], None),
            (&[(5, 1, false), (5, 1, false)], None),
            (&[(0, 0, true)], Some(0)),
            (&[(0, 2, false), (0, 0, false)], Some(1)),
            (&[(1, 2, true), (1, 2, true)], Some(1)),
            (&[(1, 2, true), (1, 2, false), (1, 2, true)], None),
            (&[(1, 2, true), (0, 2, true), (1, 2, true)], None),
        ];
        for (looks, expected) in table {
            let mut delivering = Delivering::default();
            let ended = looks.iter().position(|(waiting, consumers, idle)| {
                let depth = Depth {
                    waiting: *waiting,
                    consumers: *consumers,
                };
                delivering.has_ended(depth, *idle)
            });
            assert_eq!(ended, *expected, "{looks:?}");
        }
    }

    #[test]
    fn other_workers_starve_when_the_queue_is_empty_and_not_ours_alone() {
        for (waiting, consumers, starve) in
            [(0, 2, true), (0, 1, false), (0, 0, false), (1, 2, false)]
        {
            let depth = Depth { waiting, consumers };
            assert_eq!(depth.others_starve(), starve, "{depth:?}");
        }
    }
}
