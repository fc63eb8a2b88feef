//! Takes jobs while the worker is ready. Each is judged by the pipeline and settled by the settler, in a
//! task of its own.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
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
/// How long the registration of a consumer may take that is not wanted any more.
const CHANGE: Duration = Duration::from_secs(1);
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

/// The consumer that the broker delivers to, and a task for each job that it delivered.
#[derive(Debug)]
pub struct Consumer {
    serving: Arc<Serving>,
    deliveries: Deliveries,
    /// More consumers of the same queue: a job that waits for news of another worker leaves its slot to one that can be
    /// computed.
    more: Vec<More>,
    /// In tasks of their own, so that each comes to its end whatever interrupts the taking of jobs: the broker would give
    /// what is handed back to a consumer that nobody cancels, and count it again.
    changes: JoinSet<Change>,
    jobs: JoinSet<()>,
    /// How many were settled, while they are taken one at a time.
    cleared: u16,
}

/// A consumer that was registered for as many jobs as wait.
#[derive(Debug)]
struct More {
    deliveries: Deliveries,
    slots: u64,
}

/// A change of what the broker delivers to.
#[derive(Debug)]
enum Change {
    /// A consumer takes the place of the first.
    Renewed(Result<Deliveries, BrokerError>),
    /// One more has so many slots.
    Added(Result<Deliveries, BrokerError>, u64),
    /// One is cancelled, and what it was delivered and did not begin is handed back.
    Cancelled,
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
                    changes: JoinSet::new(),
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
                    if let Err(error) = done {
                        // Its delivery is unsettled; only closing the channel requeues it.
                        tracing::error!(%error, "the task of a job ended early");
                        return ServeEnd::ConsumerLost;
                    }
                    self.cleared = self.cleared.saturating_add(1);
                    if serving.cautious && self.cleared >= serving.prefetch {
                        return ServeEnd::Cleared;
                    }
                }
                delivery = self.deliveries.next() => match delivery {
                    Some(delivery) => self.begin(delivery),
                    None => return serving.lost(),
                },
                delivery = next_of(&mut self.more) => match delivery {
                    Some(delivery) => self.begin(delivery),
                    None => return serving.lost(),
                },
                Some(changed) = self.changes.join_next(), if !self.changes.is_empty() => {
                    if let Err(ended) = self.changed(changed) {
                        return ended;
                    }
                }
                () = serving.settler.status.waits.changed() => self.make_room(),
                ended = &mut health => return ended,
                () = doubtful.notified() => self.renew(),
            }
        }
    }

    fn begin(&mut self, delivery: Delivery) {
        // Jobs that were buffered before the link was lost can no longer be settled.
        if !delivery.acker.usable() {
            return;
        }
        self.serving.delivered.fetch_add(1, Ordering::Relaxed);
        self.jobs.spawn(Arc::clone(&self.serving).handle(delivery));
    }

    /// Holds one job more for each that waits for news of another worker, and no more once none waits.
    fn make_room(&mut self) {
        if !self.changes.is_empty() {
            // Looked at again at its end.
            return;
        }
        let serving = Arc::clone(&self.serving);
        let (status, slots) = (&serving.settler.status, u64::from(serving.slots()));
        let waiting = status.waits.count();
        if waiting == 0 {
            for more in std::mem::take(&mut self.more) {
                self.cancel(more.deliveries);
            }
        }
        let more: u64 = self.more.iter().map(|more| more.slots).sum();
        let missing = waiting.min(slots * MOST_MORE).saturating_sub(more);
        let missing = if serving.cautious { 0 } else { missing };
        status
            .slots
            .store(slots + more + missing, Ordering::Relaxed);
        if missing > 0 {
            let prefetch = u16::try_from(missing).unwrap_or(u16::MAX);
            self.changes
                .spawn(async move { Change::Added(serving.consume(prefetch).await, missing) });
        }
    }

    /// Registers a consumer in place of the first. Not while jobs are held: the new one would hold as many besides.
    fn renew(&mut self) {
        if !self.jobs.is_empty() || !self.changes.is_empty() {
            return;
        }
        tracing::debug!("registering a new consumer: the broker may have lost this one");
        let serving = Arc::clone(&self.serving);
        self.changes
            .spawn(async move { Change::Renewed(serving.consume(serving.slots()).await) });
    }

    fn cancel(&mut self, mut deliveries: Deliveries) {
        let serving = Arc::clone(&self.serving);
        self.changes.spawn(async move {
            let left = deliveries.cancel().await;
            serving.hand_back(left).await;
            Change::Cancelled
        });
    }

    fn changed(&mut self, changed: Result<Change, JoinError>) -> Result<(), ServeEnd> {
        match changed {
            Ok(Change::Renewed(Ok(new))) => {
                let old = std::mem::replace(&mut self.deliveries, new);
                self.cancel(old);
            }
            Ok(Change::Added(Ok(deliveries), slots)) => self.more.push(More { deliveries, slots }),
            Ok(Change::Cancelled) => {}
            Ok(Change::Renewed(Err(error)) | Change::Added(Err(error), _)) => {
                tracing::warn!(%error, "no other consumer");
                return Err(self.serving.lost());
            }
            Err(error) => {
                tracing::error!(%error, "a change of consumers ended early");
                return Err(ServeEnd::ConsumerLost);
            }
        }
        self.make_room();
        Ok(())
    }

    /// Cancels the consumer, and hands back what was delivered but not begun.
    pub async fn unregister(&mut self) {
        let mut left = self.deliveries.cancel().await;
        left.extend(self.cancel_others().await);
        // Not before: the broker would return those jobs to this consumer, and count them again.
        self.serving.pipeline.leave();
        let status = &self.serving.settler.status;
        status.consuming.store(false, Ordering::Relaxed);
        self.serving.hand_back(left).await;
    }

    /// Cancels every consumer but the first, also those that are being registered.
    async fn cancel_others(&mut self) -> Vec<Delivery> {
        let mut others: Vec<_> = std::mem::take(&mut self.more)
            .into_iter()
            .map(|more| more.deliveries)
            .collect();
        let lost = self.serving.settler.link.lost.clone();
        while let Some(Ok(Some(changed))) = lost
            .run_until_cancelled(timeout(CHANGE, self.changes.join_next()))
            .await
        {
            match changed {
                Ok(Change::Renewed(Ok(new)) | Change::Added(Ok(new), _)) => others.push(new),
                Ok(Change::Cancelled | Change::Renewed(Err(_)) | Change::Added(Err(_), _))
                | Err(_) => {}
            }
        }
        // What has not come by now goes with its channel.
        self.changes.shutdown().await;
        let mut left = Vec::new();
        for mut deliveries in others {
            left.extend(deliveries.cancel().await);
        }
        left
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
        if timeout(limit, self.join()).await.is_err() {
            self.abandon().await;
        }
    }

    /// Ends the computation and hands back what can still be handed back.
    pub async fn abandon(mut self) {
        self.serving.abandon.cancel();
        if timeout(HAND_BACK, self.join()).await.is_err() {
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

    /// Hands back what was not begun. A broker that does not take it in time requeues it by itself, when the channel
    /// closes.
    async fn hand_back(&self, left: Vec<Delivery>) {
        let handing_back = async {
            for delivery in left {
                self.settler.hand_back(delivery).await;
            }
        };
        if timeout(HAND_BACK, handing_back).await.is_err() {
            tracing::warn!("the broker does not take jobs back; they return with their channel");
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

/// The next delivery of any of them; never, where there is none of them. Cancel-safe.
async fn next_of(more: &mut [More]) -> Option<Delivery> {
    let next = more
        .iter_mut()
        .map(|more| more.deliveries.next().boxed())
        .collect::<Vec<_>>();
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
