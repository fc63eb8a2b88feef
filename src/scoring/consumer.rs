//! Takes jobs while the worker is ready. Each is judged by the pipeline and settled by the settler, in a
//! task of its own.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::broker::BrokerError;
use crate::broker::amqp::{Deliveries, Delivery};
use crate::protocol::job::{self, Job, Undecodable};
use crate::protocol::result::JobRef;
use crate::protocol::state::Detail;
use crate::scoring::consumer_health;
use crate::scoring::device_queue::DeviceQueue;
use crate::scoring::pipeline::{Judged, Pipeline};
use crate::scoring::settle::Settler;
use crate::store::Store;
use crate::telemetry::metrics;
use crate::telemetry::status::WorkerStatus;
use crate::telemetry::traces::{ReceivedJob, Trace};
use crate::util::blocking;

/// More jobs than the usual may be held while some wait, but no more than so many times as many: the bytes of those that
/// wait are held, too.
const MOST_MORE: u64 = 2;
/// How long abandoned jobs may take to hand themselves back.
pub const HAND_BACK: Duration = Duration::from_millis(500);

/// Why no more jobs can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServeEnd {
    /// Enough jobs were taken one at a time; more may be held again.
    Cleared,
    /// A run makes no progress and is being ended.
    Stalled,
    /// The broker no longer has our consumer, or a job could not be settled on its channel.
    ConsumerLost,
    /// A connection is gone.
    BrokerLost,
    /// The broker does not let us publish results.
    Forbidden,
    /// The engine can no longer be used.
    EngineLost(Detail),
}

/// The consumer that the broker delivers to, and a task for each job that it delivered. Jobs settle on
/// the consumer's channel, so it stays open until the last of them is settled.
#[derive(Debug)]
pub struct Consumer {
    serving: Arc<Serving>,
    deliveries: Deliveries,
    /// More consumers of the same queue: a job that waits for news of another worker leaves its slot to one that can be
    /// computed.
    more: Vec<More>,
    /// Each tells which of these delivered it, if one did.
    jobs: JoinSet<Option<u64>>,
    /// How many were settled, while they are taken one at a time.
    cleared: u16,
}

/// A consumer that was registered for as many jobs as wait.
#[derive(Debug)]
struct More {
    number: u64,
    deliveries: Deliveries,
    slots: u64,
    /// Jobs that came this way and are not settled: its channel is needed until then.
    held: usize,
    cancelled: bool,
}

/// Everything a job needs to be judged and settled.
#[derive(Debug)]
pub struct Serving {
    /// Judges jobs.
    pub pipeline: Pipeline,
    /// Settles them.
    pub settler: Settler,
    /// Where they wait for the device.
    pub device_queue: DeviceQueue,
    /// Tells of the other workers.
    pub store: Store,
    /// How many unacknowledged jobs are held at a time.
    pub prefetch: u16,
    /// How long the broker lets a job be held.
    pub consumer_timeout: Duration,
    /// The last link or consumer was lost. If a message that cannot be decoded caused that, everything
    /// prefetched with it is requeued and its delivery count rises. So one job is held at a time until
    /// `prefetch` of them are settled.
    pub cautious: bool,
    /// How many jobs were delivered.
    pub delivered: AtomicU64,
    /// When this is cancelled, jobs that have not begun to compute are handed back.
    pub abandon: CancellationToken,
}

impl Consumer {
    /// Registers with the broker; returns when the broker has confirmed it.
    ///
    /// # Errors
    /// What was lost.
    pub async fn register(serving: Arc<Serving>) -> Result<Self, ServeEnd> {
        serving.device_queue.open();
        match serving.consume(serving.slots()).await {
            Ok(deliveries) => {
                let status = &serving.settler.status;
                let slots = serving.slots().into();
                status.slots.store(slots, Ordering::Relaxed);
                status.consuming.store(true, Ordering::Relaxed);
                Ok(Self {
                    serving,
                    deliveries,
                    more: Vec::new(),
                    jobs: JoinSet::new(),
                    cleared: 0,
                })
            }
            Err(error) => {
                let status = &serving.settler.status;
                status.error("consumer_lost", &error.to_string());
                tracing::warn!(%error, "no consumer");
                Err(serving.lost())
            }
        }
    }

    /// Takes jobs until that is no longer possible. Cancel-safe: each delivery has a task of its own before
    /// the next await.
    pub async fn take(&mut self) -> ServeEnd {
        let serving = Arc::clone(&self.serving);
        let doubtful = Notify::new();
        let health = consumer_health::watch(&serving, &doubtful);
        tokio::pin!(health);
        loop {
            tokio::select! {
                biased;
                () = serving.settler.link.lost.cancelled() => return serving.lost(),
                detail = serving.pipeline.engine().lost() => return ServeEnd::EngineLost(detail),
                () = serving.pipeline.engine().stalled() => return ServeEnd::Stalled,
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => {
                    match done {
                        Ok(from) => self.release(from),
                        Err(error) => {
                            // Its delivery is unsettled; only closing the channel requeues it.
                            tracing::error!(%error, "the task of a job ended early");
                            return ServeEnd::ConsumerLost;
                        }
                    }
                    self.cleared = self.cleared.saturating_add(1);
                    if serving.cautious && self.cleared >= serving.prefetch {
                        return ServeEnd::Cleared;
                    }
                }
                delivery = self.deliveries.next() => match delivery {
                    Some(delivery) => self.begin(delivery, None),
                    None => return serving.lost(),
                },
                (at, delivery) = next_of(&mut self.more) => match delivery {
                    Some(delivery) => self.begin(delivery, Some(at)),
                    None => return serving.lost(),
                },
                () = serving.settler.status.waits.changed() => {
                    if let Err(ended) = self.make_room().await {
                        return ended;
                    }
                }
                ended = &mut health => return ended,
                () = doubtful.notified() => {
                    if let Err(ended) = self.renew().await {
                        return ended;
                    }
                }
            }
        }
    }

    /// Begins a job; `from` is the place of the other consumer that it came by, if it did.
    fn begin(&mut self, delivery: Delivery, from: Option<usize>) {
        // Jobs that were buffered before the link was lost can no longer be settled.
        if !delivery.acker.usable() {
            return;
        }
        let from = from.and_then(|at| self.more.get_mut(at)).map(|more| {
            more.held += 1;
            more.number
        });
        self.serving.delivered.fetch_add(1, Ordering::Relaxed);
        let handling = Arc::clone(&self.serving).handle(delivery);
        self.jobs.spawn(async move {
            handling.await;
            from
        });
    }

    /// A job is settled. Another consumer that is cancelled goes with its last one.
    fn release(&mut self, from: Option<u64>) {
        if let Some(more) = self.more.iter_mut().find(|more| Some(more.number) == from) {
            more.held = more.held.saturating_sub(1);
        }
        self.more.retain(|more| !more.cancelled || more.held > 0);
    }

    /// Holds one job more for each that waits for news of another worker, and no more once none waits. Cancel-safe:
    /// closing a channel requeues what it delivered.
    async fn make_room(&mut self) -> Result<(), ServeEnd> {
        let serving = Arc::clone(&self.serving);
        let (status, slots) = (&serving.settler.status, u64::from(serving.slots()));
        let waiting = status.waits.count();
        if waiting == 0 {
            self.cancel_more().await;
        }
        let active = self.more.iter().filter(|more| !more.cancelled);
        let more: u64 = active.map(|more| more.slots).sum();
        let missing = waiting.min(slots * MOST_MORE).saturating_sub(more);
        let missing = if serving.cautious { 0 } else { missing };
        status
            .slots
            .store(slots + more + missing, Ordering::Relaxed);
        if missing == 0 {
            return Ok(());
        }
        let prefetch = u16::try_from(missing).unwrap_or(u16::MAX);
        let deliveries = serving.consume(prefetch).await;
        let deliveries = deliveries.map_err(|error| {
            tracing::warn!(%error, "no consumer beside the jobs that wait");
            serving.lost()
        })?;
        let number = self.more.last().map_or(0, |more| more.number + 1);
        self.more.push(More {
            number,
            deliveries,
            slots: missing,
            held: 0,
            cancelled: false,
        });
        Ok(())
    }

    /// Cancels the other consumers, and hands back what they were delivered and did not begin.
    async fn cancel_more(&mut self) {
        for more in self.more.iter_mut().filter(|more| !more.cancelled) {
            more.cancelled = true;
            for delivery in more.deliveries.cancel().await {
                self.serving.settler.hand_back(delivery).await;
            }
        }
        self.release(None);
    }

    /// Registers a new consumer, then cancels the old one. Not while jobs are held, because they settle
    /// on its channel. Cancel-safe: closing the old consumer's channel requeues its deliveries.
    async fn renew(&mut self) -> Result<(), ServeEnd> {
        if !self.jobs.is_empty() {
            return Ok(());
        }
        tracing::debug!("registering a new consumer: the broker may have lost this one");
        let Ok(new) = self.serving.consume(self.serving.slots()).await else {
            return Err(self.serving.lost());
        };
        let mut old = std::mem::replace(&mut self.deliveries, new);
        for delivery in old.cancel().await {
            self.serving.settler.hand_back(delivery).await;
        }
        Ok(())
    }

    /// Cancels the consumer, and hands back what was delivered but not begun.
    pub async fn unregister(&mut self) {
        let left = self.deliveries.cancel().await;
        self.cancel_more().await;
        // Not before: the broker would return those jobs to this consumer, and count them again.
        self.serving.pipeline.leave();
        let status = &self.serving.settler.status;
        status.consuming.store(false, Ordering::Relaxed);
        for delivery in left {
            self.serving.settler.hand_back(delivery).await;
        }
    }

    /// Waits for jobs that will finish by the deadline, hands the others back at once, and abandons what
    /// is left at the deadline, or when told to `hurry`. True = a computation was cut short.
    pub async fn finish(mut self, deadline: Instant, hurry: CancellationToken) -> bool {
        let (stay, go) = self.serving.device_queue.close(deadline);
        if stay + go > 0 {
            tracing::info!(
                stay,
                go,
                seconds_left = (deadline - Instant::now()).as_secs_f64(),
                "jobs that will finish in time run to their end, the others are handed back"
            );
        }
        let joined = tokio::time::timeout_at(deadline.into(), self.join());
        if let Some(Ok(())) = hurry.run_until_cancelled(joined).await {
            return false;
        }
        let computing = self.serving.settler.status.progress.is_busy();
        tracing::warn!(
            left = self.jobs.len(),
            cut_short = u8::from(computing),
            "the time for running jobs is over; those that are left are handed back"
        );
        self.abandon().await;
        computing
    }

    /// Waits until the job whose run was ended for making no progress is answered, and hands back those
    /// behind it.
    pub async fn settle_stalled(mut self, limit: Duration) {
        self.serving.device_queue.close(Instant::now());
        if tokio::time::timeout(limit, self.join()).await.is_err() {
            self.abandon().await;
        }
    }

    /// Ends the computation and hands back what can still be handed back.
    pub async fn abandon(mut self) {
        self.serving.abandon.cancel();
        if tokio::time::timeout(HAND_BACK, self.join()).await.is_err() {
            tracing::warn!(
                left = self.jobs.len(),
                "jobs that are left will be delivered again by the broker"
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
    /// How many unacknowledged jobs are held at a time.
    fn slots(&self) -> u16 {
        if self.cautious { 1 } else { self.prefetch }
    }

    /// A consumer on the jobs queue, which is declared again if it was deleted.
    async fn consume(&self, prefetch: u16) -> Result<Deliveries, BrokerError> {
        let Settler { link, topology, .. } = &self.settler;
        let queue = topology.jobs_queue();
        let tag = &self.settler.origin.worker_id;
        let consume = || link.consume_for(&queue, tag, prefetch, self.consumer_timeout);
        match consume().await {
            Err(BrokerError::Missing(why)) => {
                tracing::warn!(%why, "the topology is declared again");
                link.declare(topology).await?;
                consume().await
            }
            consumed @ (Ok(_)
            | Err(
                BrokerError::Differs(_)
                | BrokerError::Forbidden(_)
                | BrokerError::Denied(_)
                | BrokerError::Failed(_),
            )) => consumed,
        }
    }

    fn lost(&self) -> ServeEnd {
        let link = &self.settler.link;
        match link.lost.is_cancelled() {
            true if link.is_forbidden() => ServeEnd::Forbidden,
            true => ServeEnd::BrokerLost,
            false => ServeEnd::ConsumerLost,
        }
    }

    fn received<'a>(&'a self, delivery: &'a Delivery) -> ReceivedJob<'a> {
        let (properties, topology) = (&delivery.properties, &self.settler.topology);
        ReceivedJob {
            trace_headers: properties.trace_headers(),
            message_id: properties.message_id.as_deref(),
            correlation_id: properties.correlation_id.as_deref(),
            timestamp: properties.timestamp,
            bytes: delivery.body.len(),
            attempt: properties.attempt,
            redelivered: delivery.redelivered,
            exchange: topology.jobs_exchange(),
            queue: topology.jobs_queue(),
            model: &topology.model,
        }
    }

    async fn handle(self: Arc<Self>, mut delivery: Delivery) {
        let status = &self.settler.status;
        let _held = Held::new(status);
        let trace = Trace::begin(&self.received(&delivery));
        if delivery.redelivered {
            status.facts().jobs.redelivered += 1;
            metrics::redelivered();
        }
        let Some(decoded) = decode(&mut delivery).await else {
            // The body is gone with a panic of ours; closing the channel requeues the job.
            return self.settler.link.lost.cancel();
        };
        match decoded {
            Ok(job) => self.judge(delivery, job, &trace).await,
            Err(undecodable) => {
                let settled = self
                    .settler
                    .settle_undecodable(delivery, undecodable, &trace);
                settled.await;
            }
        }
    }

    async fn judge(&self, delivery: Delivery, job: Job, trace: &Trace) {
        let job_ref = JobRef::new(&job, delivery.properties.attempt);
        let judging = self.pipeline.judge(&job, &job_ref, trace);
        let judged = tokio::select! {
            judged = AssertUnwindSafe(judging).catch_unwind() => judged,
            () = self.abandon.cancelled() => return self.settler.hand_back(delivery).await,
        };
        let judged = judged.unwrap_or_else(|_| Judged::panicked());
        let settled = self
            .settler
            .settle(delivery, job_ref, job.deadline_ms, judged, trace);
        settled.await;
    }
}

/// The next delivery of any of them that still consumes, and its place; never, where none does. Cancel-safe.
async fn next_of(more: &mut [More]) -> (usize, Option<Delivery>) {
    let consuming = more
        .iter_mut()
        .enumerate()
        .filter(|(_, more)| !more.cancelled);
    let next =
        consuming.map(|(at, more)| async move { (at, more.deliveries.next().await) }.boxed());
    let next: Vec<_> = next.collect();
    if next.is_empty() {
        return std::future::pending().await;
    }
    futures_util::future::select_all(next).await.0
}

/// Decodes a delivery, a large one off the async threads; `None` = that panicked.
async fn decode(delivery: &mut Delivery) -> Option<Result<Job, Undecodable>> {
    let label = delivery.properties.label();
    let body = std::mem::take(&mut delivery.body);
    let decoding = blocking::by_size(body.len(), move || {
        let decoded = job::decode(&body, label);
        (body, decoded)
    });
    let (body, decoded) = decoding.await?;
    delivery.body = body;
    Some(decoded)
}

/// Counts a job as held until its task ends, however it ends.
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
