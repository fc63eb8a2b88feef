//! Taking jobs while the worker is ready: each is judged in a task of its own and then settled, which
//! is in [`settle`].

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::broker::BrokerError;
use crate::broker::amqp::{Deliveries, Delivery, Link};
use crate::broker::topology::Topology;
use crate::protocol::job;
use crate::protocol::result::JobRef;
use crate::protocol::state::Detail;
use crate::scoring::pipeline::{Judged, Pipeline};
use crate::store::Store;
use crate::telemetry::metrics;
use crate::telemetry::status::WorkerStatus;
use crate::telemetry::traces::{ReceivedJob, Trace};
use crate::util::blocking;

/// What abandoned jobs get to hand themselves back.
pub const HAND_BACK: Duration = Duration::from_millis(500);

/// Why no more jobs can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServeEnd {
    /// The jobs that were taken one at a time are settled: more may be held again.
    Cleared,
    /// A run makes no progress; it is being ended.
    Stalled,
    /// The broker no longer has our consumer, or a job could not be settled on its channel.
    ConsumerLost,
    /// A connection is gone.
    BrokerLost,
    /// The broker does not let us publish what jobs are answered with.
    Forbidden,
    /// The engine can no longer be used.
    EngineLost(Detail),
}

/// Our consumer at the broker, and the jobs that came through it: one task each. They settle on
/// its channel, so it lives until the last of them has.
#[derive(Debug)]
pub struct Consumer {
    serving: Arc<Serving>,
    deliveries: Deliveries,
    jobs: JoinSet<()>,
    /// Settled, of those that are taken one at a time.
    cleared: u16,
}

/// Everything a job needs to be judged and settled.
#[derive(Debug)]
pub struct Serving {
    /// Judges.
    pub pipeline: Pipeline,
    /// Delivers and takes results.
    pub link: Arc<Link>,
    /// Names of queues and exchanges.
    pub topology: Arc<Topology>,
    /// Reports.
    pub status: Arc<WorkerStatus>,
    /// Stored results.
    pub store: Store,
    /// How long they are kept.
    pub results_ttl: Duration,
    /// Unacknowledged jobs held.
    pub prefetch: u16,
    /// The last link, or the last consumer, was lost. Should it have been for a message that nobody
    /// can take, then those delivered beside it would be lost, and counted by the broker, again and
    /// again: so as many jobs as are held otherwise are taken one at a time first.
    pub cautious: bool,
    /// Jobs that came.
    pub delivered: AtomicU64,
    /// Rungs of the retry ladder.
    pub retry_delays: Vec<Duration>,
    /// Jobs that have not begun to compute are handed back when this is cancelled.
    pub abandon: CancellationToken,
}

impl Consumer {
    /// Registers at the broker; returns when the broker has confirmed it.
    ///
    /// # Errors
    /// What is lost.
    pub async fn register(serving: Arc<Serving>) -> Result<Self, ServeEnd> {
        serving.pipeline.waiting().open();
        match serving.consume().await {
            Ok(deliveries) => {
                let slots = serving.slots();
                serving.status.slots.store(slots.into(), Ordering::Relaxed);
                serving.status.consuming.store(true, Ordering::Relaxed);
                Ok(Self {
                    serving,
                    deliveries,
                    jobs: JoinSet::new(),
                    cleared: 0,
                })
            }
            Err(error) => {
                serving.status.error("consumer_lost", &error.to_string());
                tracing::warn!(%error, "no consumer");
                Err(serving.lost())
            }
        }
    }

    /// Takes jobs until that is no longer possible. Cancel-safe: a delivery is in a task of its
    /// own before the next await.
    pub async fn take(&mut self) -> ServeEnd {
        let serving = Arc::clone(&self.serving);
        let doubtful = Notify::new();
        let oversight = crate::scoring::consumer_health::oversee(&serving, &doubtful);
        tokio::pin!(oversight);
        loop {
            tokio::select! {
                biased;
                () = serving.link.lost.cancelled() => return serving.lost(),
                detail = serving.pipeline.engine().lost() => return ServeEnd::EngineLost(detail),
                () = serving.pipeline.engine().stalled() => return ServeEnd::Stalled,
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => {
                    if let Err(error) = done {
                        // Its delivery is unsettled, and only the end of the channel gives it back.
                        tracing::error!(%error, "the task of a job ended early");
                        return ServeEnd::ConsumerLost;
                    }
                    self.cleared = self.cleared.saturating_add(1);
                    if serving.cautious && self.cleared >= serving.prefetch {
                        return ServeEnd::Cleared;
                    }
                }
                delivery = self.deliveries.next() => match delivery {
                    // What was buffered before a loss can no longer be settled: not worth computing.
                    Some(delivery) if !delivery.acker.usable() => {}
                    Some(delivery) => {
                        serving.delivered.fetch_add(1, Ordering::Relaxed);
                        self.jobs.spawn(Arc::clone(&serving).handle(delivery));
                    }
                    None => return serving.lost(),
                },
                ended = &mut oversight => return ended,
                () = doubtful.notified() => {
                    if let Err(ended) = self.renew().await {
                        return ended;
                    }
                }
            }
        }
    }

    /// Registers anew, and lets go of the old consumer only then. Not while jobs are held, which
    /// settle on its channel. Cancel-safe: with the old consumer's channel go its deliveries.
    async fn renew(&mut self) -> Result<(), ServeEnd> {
        if !self.jobs.is_empty() {
            return Ok(());
        }
        tracing::debug!("the consumer is registered anew: the broker may have lost it");
        let Ok(new) = self.serving.consume().await else {
            return Err(self.serving.lost());
        };
        let mut old = std::mem::replace(&mut self.deliveries, new);
        for delivery in old.cancel().await {
            self.serving.hand_back(delivery).await;
        }
        Ok(())
    }

    /// Leaves the queue, and hands back what was delivered but not begun.
    pub async fn unregister(&mut self) {
        let left = self.deliveries.cancel().await;
        // Not before: what is handed back while we have a consumer comes back to us, and is counted again.
        self.serving.pipeline.leave();
        self.serving
            .status
            .consuming
            .store(false, Ordering::Relaxed);
        for delivery in left {
            self.serving.hand_back(delivery).await;
        }
    }

    /// Lets those jobs end that will be done by the deadline, hands the others back at once, and
    /// abandons what is left then, or when there is a hurry. True = a computation was cut short.
    pub async fn finish(mut self, deadline: Instant, hurry: CancellationToken) -> bool {
        let (stay, go) = self.serving.pipeline.waiting().close(deadline);
        if stay + go > 0 {
            tracing::info!(
                stay,
                go,
                seconds_left = (deadline - Instant::now()).as_secs_f64(),
                "jobs that will be done in time end here, the others are handed back"
            );
        }
        let joined = tokio::time::timeout_at(deadline.into(), self.join());
        if let Some(Ok(())) = hurry.run_until_cancelled(joined).await {
            return false;
        }
        let computing = self.serving.status.progress.is_busy();
        tracing::warn!(
            left = self.jobs.len(),
            cut_short = u8::from(computing),
            "the time for running jobs is over; they are handed back"
        );
        self.abandon().await;
        computing
    }

    /// Lets the job of a run that was ended for making no progress be answered, and hands back those
    /// that wait behind it.
    pub async fn settle_stalled(mut self, limit: Duration) {
        self.serving.pipeline.waiting().close(Instant::now());
        if tokio::time::timeout(limit, self.join()).await.is_err() {
            self.abandon().await;
        }
    }

    /// Ends what computes and hands back what can still be handed back.
    pub async fn abandon(mut self) {
        self.serving.abandon.cancel();
        if tokio::time::timeout(HAND_BACK, self.join()).await.is_err() {
            tracing::warn!(
                left = self.jobs.len(),
                "left to the broker to deliver again"
            );
        }
    }

    async fn join(&mut self) {
        while let Some(done) = self.jobs.join_next().await {
            if let Err(error) = done {
                tracing::error!(%error, "the task of a job ended early");
            }
        }
    }
}

impl Serving {
    /// Unacknowledged jobs held at a time.
    fn slots(&self) -> u16 {
        if self.cautious { 1 } else { self.prefetch }
    }

    /// A consumer on the jobs queue, which is declared again where it was deleted.
    async fn consume(&self) -> Result<Deliveries, BrokerError> {
        let (queue, prefetch) = (self.topology.jobs_queue(), self.slots());
        let tag = &self.pipeline.answerer().worker_id;
        match self.link.consume(&queue, tag, prefetch).await {
            Err(BrokerError::Missing(why)) => {
                tracing::warn!(%why, "the topology is declared again");
                self.link.declare(&self.topology).await?;
                self.link.consume(&queue, tag, prefetch).await
            }
            consumed @ (Ok(_)
            | Err(
                BrokerError::Differs(_) | BrokerError::Forbidden(_) | BrokerError::Failed(_),
            )) => consumed,
        }
    }

    fn lost(&self) -> ServeEnd {
        match self.link.lost.is_cancelled() {
            true if self.link.is_forbidden() => ServeEnd::Forbidden,
            true => ServeEnd::BrokerLost,
            false => ServeEnd::ConsumerLost,
        }
    }

    fn received<'a>(&'a self, delivery: &'a Delivery) -> ReceivedJob<'a> {
        let properties = &delivery.properties;
        ReceivedJob {
            trace_headers: properties.trace_headers(),
            message_id: properties.message_id.as_deref(),
            correlation_id: properties.correlation_id.as_deref(),
            timestamp: properties.timestamp,
            bytes: delivery.body.len(),
            attempt: properties.attempt,
            redelivered: delivery.redelivered,
            exchange: self.topology.jobs_exchange(),
            queue: self.topology.jobs_queue(),
            model: &self.topology.model,
        }
    }

    async fn handle(self: Arc<Self>, mut delivery: Delivery) {
        let _held = Held::new(&self.status);
        let trace = Trace::begin(&self.received(&delivery));
        if delivery.redelivered {
            self.status.facts().jobs.redelivered += 1;
            metrics::redelivered();
        }
        let label = delivery.properties.label();
        let body = std::mem::take(&mut delivery.body);
        let decoding = blocking::by_size(body.len(), move || {
            let decoded = job::decode(&body, label);
            (body, decoded)
        });
        let Some((body, decoded)) = decoding.await else {
            // The body went down with a panic of ours; the end of the channel gives the job back.
            return self.link.lost.cancel();
        };
        delivery.body = body;
        match decoded {
            Ok(job) => {
                let job_ref = JobRef {
                    submission_id: job.submission_id.clone(),
                    kind: job.task.kind(),
                    model_version: job.task.model_version(),
                    context: job.context.clone(),
                    attempt: delivery.properties.attempt,
                };
                let judging = self.pipeline.judge(&job, &job_ref, &trace);
                let judged = tokio::select! {
                    judged = AssertUnwindSafe(judging).catch_unwind() => judged,
                    () = self.abandon.cancelled() => return self.hand_back(delivery).await,
                };
                let judged = judged.unwrap_or_else(|_| Judged::panicked());
                self.settle(delivery, job_ref, job.deadline_ms, judged, &trace)
                    .await;
            }
            Err(undecodable) => self.settle_undecodable(delivery, undecodable, &trace).await,
        }
    }
}

/// Counts a held job, whatever becomes of its task.
struct Held<'a>(&'a WorkerStatus);

impl<'a> Held<'a> {
    fn new(status: &'a WorkerStatus) -> Self {
        status.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(status)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
