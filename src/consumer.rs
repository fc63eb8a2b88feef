//! Taking jobs while the worker is ready, and the one place that settles them: publish, wait for
//! the confirm, then acknowledge. Nothing is acknowledged without a result or a parked copy.

mod doubt;
mod oversight;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::broker::amqp::{Deliveries, Delivery, Link};
use crate::broker::topology::Topology;
use crate::broker::{BrokerError, Outgoing, Properties, PublishError};
use crate::clock::Lap;
use crate::crash::Attempt;
use crate::failure::{Code, Failure, Status};
use crate::heartbeat::Vitals;
use crate::job::{self, Kind, Undecodable};
use crate::lifecycle::Detail;
use crate::metrics;
use crate::offload;
use crate::pipeline::{Judged, Pipeline};
use crate::result::{Addressee, Key, ResultMessage};
use crate::retry::{
    Backoff, Disposition, RETURNS_BEFORE_REPUBLISH, dispose, too_late_for_the_next_rung,
};
use crate::store::Store;
use crate::traces::Trace;

/// Characters of an error in a header: all headers of a message share one frame.
const MOST_IN_HEADER: usize = 1000;

/// What abandoned jobs get to hand themselves back.
pub const HAND_BACK: Duration = Duration::from_millis(500);

/// Why no more jobs can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
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
    pub vitals: Arc<Vitals>,
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
    pub async fn register(serving: Arc<Serving>) -> Result<Self, Ended> {
        serving.pipeline.waiting().open();
        match serving.consume().await {
            Ok(deliveries) => {
                let slots = serving.slots();
                serving.vitals.slots.store(slots.into(), Ordering::Relaxed);
                serving.vitals.consuming.store(true, Ordering::Relaxed);
                Ok(Self {
                    serving,
                    deliveries,
                    jobs: JoinSet::new(),
                    cleared: 0,
                })
            }
            Err(error) => {
                serving.vitals.error("consumer_lost", &error.to_string());
                tracing::warn!(%error, "no consumer");
                Err(serving.lost())
            }
        }
    }

    /// Takes jobs until that is no longer possible. Cancel-safe: a delivery is in a task of its
    /// own before the next await.
    pub async fn take(&mut self) -> Ended {
        let serving = Arc::clone(&self.serving);
        let doubtful = Notify::new();
        let oversight = oversight::oversee(&serving, &doubtful);
        tokio::pin!(oversight);
        loop {
            tokio::select! {
                biased;
                () = serving.link.lost.cancelled() => return serving.lost(),
                detail = serving.pipeline.engine().lost() => return Ended::EngineLost(detail),
                () = serving.pipeline.engine().stalled() => return Ended::Stalled,
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => {
                    if let Err(error) = done {
                        // Its delivery is unsettled, and only the end of the channel gives it back.
                        tracing::error!(%error, "the task of a job ended early");
                        return Ended::ConsumerLost;
                    }
                    self.cleared = self.cleared.saturating_add(1);
                    if serving.cautious && self.cleared >= serving.prefetch {
                        return Ended::Cleared;
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
    async fn renew(&mut self) -> Result<(), Ended> {
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
            .vitals
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
        let computing = self.serving.vitals.progress.is_busy();
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

    fn lost(&self) -> Ended {
        match self.link.lost.is_cancelled() {
            true if self.link.is_forbidden() => Ended::Forbidden,
            true => Ended::BrokerLost,
            false => Ended::ConsumerLost,
        }
    }

    async fn handle(self: Arc<Self>, mut delivery: Delivery) {
        let _held = Held::new(&self.vitals);
        let trace = Trace::begin(&delivery, &self.topology);
        if delivery.redelivered {
            self.vitals.facts().jobs.redelivered += 1;
            metrics::redelivered();
        }
        let label = delivery.properties.label();
        let body = std::mem::take(&mut delivery.body);
        let decoding = offload::by_size(body.len(), move || {
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
                let addressee = Addressee {
                    submission_id: job.submission_id.clone(),
                    kind: job.task.kind(),
                    model_version: job.task.model_version(),
                    context: job.context.clone(),
                    attempt: delivery.properties.attempt,
                };
                let judging = self.pipeline.judge(&job, &addressee, &trace);
                let judged = tokio::select! {
                    judged = AssertUnwindSafe(judging).catch_unwind() => judged,
                    () = self.abandon.cancelled() => return self.hand_back(delivery).await,
                };
                let judged = judged.unwrap_or_else(|_| Judged::panicked());
                self.settle(delivery, addressee, job.deadline_ms, judged, &trace)
                    .await;
            }
            Err(undecodable) => self.settle_undecodable(delivery, undecodable, &trace).await,
        }
    }

    async fn settle(
        &self,
        delivery: Delivery,
        addressee: Addressee,
        deadline_ms: Option<u64>,
        judged: Judged,
        trace: &Trace,
    ) {
        let (verdict, key, attempt) = match judged {
            Judged::Stored { message, key } => {
                self.vitals.facts().jobs.duplicates += 1;
                metrics::duplicate();
                let message = ResultMessage {
                    context: addressee.context,
                    ..*message
                };
                return self
                    .answer(delivery, message, Some(key), None, trace, true)
                    .await;
            }
            Judged::Fresh {
                verdict,
                key,
                attempt,
            } => (verdict, key, attempt),
            Judged::Undecided => return self.hand_back(delivery).await,
        };
        let (number, delays) = (addressee.attempt, &self.retry_delays);
        let verdict = verdict.map_err(|failure| or_too_late(failure, number, deadline_ms, delays));
        let parked = match dispose(&verdict, number, deadline_ms, delays) {
            Disposition::Climb { rung } => {
                let failure = verdict.err();
                if let Some(attempt) = attempt {
                    attempt.end(failure.as_ref().map(|f| f.code), None).await;
                }
                let name = &addressee.submission_id;
                return self.climb(delivery, name, rung, failure, trace).await;
            }
            Disposition::Answer => None,
            Disposition::AnswerAndPark => verdict.as_ref().err().cloned(),
        };
        let mut message = ResultMessage::new(self.pipeline.answerer(), addressee.clone(), verdict);
        if let Some(attempt) = attempt {
            message = self.end(attempt, message, &addressee).await;
        }
        if let Some(key) = key.as_ref().filter(|_| message.may_be_stored()) {
            self.pipeline.unsettled().keep(key, &message);
        }
        self.answer(delivery, message, key, parked, trace, false)
            .await;
    }

    async fn settle_undecodable(
        &self,
        delivery: Delivery,
        undecodable: Undecodable,
        trace: &Trace,
    ) {
        let attempt = delivery.properties.attempt;
        let (addressee, failure, park) = match undecodable {
            Undecodable::Named {
                submission_id,
                kind,
                model_version,
                context,
                failure,
            } => (
                Some(Addressee {
                    submission_id,
                    kind,
                    model_version,
                    context,
                    attempt,
                }),
                failure,
                false,
            ),
            Undecodable::Anonymous(failure) => {
                let named = delivery
                    .properties
                    .message_id
                    .clone()
                    .map(|submission_id| Addressee {
                        submission_id,
                        kind: Kind::Score,
                        model_version: None,
                        context: None,
                        attempt,
                    });
                (named, failure, true)
            }
        };
        let parked = park.then(|| failure.clone());
        match addressee {
            Some(addressee) => {
                let message = ResultMessage::new(self.pipeline.answerer(), addressee, Err(failure));
                self.answer(delivery, message, None, parked, trace, false)
                    .await;
            }
            None => {
                tracing::warn!(
                    error = %failure,
                    bytes = delivery.body.len(),
                    trace_id = trace.id(),
                    "a body that nobody can be answered for is parked"
                );
                if self.park(&delivery, &failure).await {
                    trace.parked(&failure);
                    self.acknowledge(delivery).await;
                }
            }
        }
    }

    /// Ends the attempt and stores its result. If another worker was first to store one, that is the
    /// one to publish, so that all copies agree.
    async fn end(
        &self,
        attempt: Attempt,
        message: ResultMessage,
        addressee: &Addressee,
    ) -> ResultMessage {
        let text = message.may_be_stored().then(|| {
            let bare = ResultMessage {
                context: None,
                ..message.clone()
            };
            serde_json::to_string(&bare).ok()
        });
        let text = text.flatten();
        let keep = text.as_deref().map(|text| (text, self.results_ttl));
        let Some(first) = attempt.end(message.code(), keep).await else {
            return message;
        };
        match self.pipeline.answerer().read(&first, addressee) {
            Ok(first) => ResultMessage {
                context: message.context,
                ..first
            },
            Err(error) => {
                tracing::warn!(%error, job = message.submission_id, "a stored result is ignored");
                message
            }
        }
    }

    /// Publishes the result (and the parked copy), then acknowledges.
    async fn answer(
        &self,
        delivery: Delivery,
        message: ResultMessage,
        key: Option<Key>,
        parked: Option<Failure>,
        trace: &Trace,
        stored: bool,
    ) {
        let job = &delivery.properties;
        let publishing = trace.publish(
            &self.topology.results_exchange(),
            &self.routing_key(&message),
        );
        let durable = match self.outgoing(&message, key.as_ref(), job, publishing.headers(job)) {
            Ok(durable) => durable,
            Err(error) => {
                tracing::error!(%error, "a result cannot be encoded; the job is handed back");
                return self.hand_back(delivery).await;
            }
        };
        let reply = job.reply_to.as_ref();
        let reply = reply.map(|queue| durable.to_reply_queue(queue));
        if !self.publish(&self.link.results, durable).await {
            return publishing.lost();
        }
        drop(publishing);
        if let Some(reply) = reply
            && !self.publish_reply(reply).await
        {
            return;
        }
        if let Some(failure) = &parked
            && !self.park(&delivery, failure).await
        {
            return;
        }
        self.account(&message, stored, trace);
        if self.acknowledge(delivery).await
            && let Some(key) = &key
        {
            self.pipeline.unsettled().forget(key);
        }
    }

    fn routing_key(&self, message: &ResultMessage) -> String {
        format!("{}.{}", self.topology.model, message.status.as_str())
    }

    fn outgoing(
        &self,
        message: &ResultMessage,
        key: Option<&Key>,
        job: &Properties,
        headers: Vec<(String, String)>,
    ) -> anyhow::Result<Outgoing> {
        let encoding = job.encoding();
        let properties = Properties {
            content_type: Some(encoding.content_type().into()),
            content_encoding: None,
            message_id: Some(message.message_id(key)),
            correlation_id: job.correlation_id.clone(),
            reply_to: None,
            timestamp: Some(message.scored_at_ms / 1000),
            headers,
            attempt: 1,
        };
        Ok(Outgoing {
            exchange: self.topology.results_exchange(),
            routing_key: self.routing_key(message),
            body: encoding.encode(message)?,
            properties,
            mandatory: true,
        })
    }

    /// The copy for whoever asked is a courtesy: a reply queue that is full must not hold the job,
    /// whose result is safe. False = the link is lost.
    async fn publish_reply(&self, reply: Outgoing) -> bool {
        let queue = reply.routing_key.clone();
        match self.link.results.publish(reply).await {
            Ok(()) => true,
            Err(PublishError::Refused(why)) => {
                tracing::warn!(%why, %queue, "the copy for reply_to is refused and left out");
                true
            }
            Err(PublishError::Lost(why) | PublishError::Unroutable(why)) => {
                tracing::warn!(%why, %queue, "a reply is not confirmed; the broker will deliver its job again");
                false
            }
        }
    }

    async fn climb(
        &self,
        delivery: Delivery,
        submission_id: &str,
        rung: usize,
        failure: Option<Failure>,
        trace: &Trace,
    ) {
        let Some(queue) = self.topology.retry_queue(rung) else {
            return self.hand_back(delivery).await;
        };
        let attempt = delivery.properties.attempt;
        let why = failure.as_ref().map(ToString::to_string);
        tracing::info!(
            submission_id,
            attempt,
            %queue,
            error = why,
            trace_id = trace.id(),
            "the job will be tried again"
        );
        let again = Outgoing {
            exchange: String::new(),
            routing_key: queue,
            body: delivery.body.clone(),
            properties: Properties {
                attempt: attempt + 1,
                ..delivery.properties.clone()
            },
            mandatory: true,
        };
        if self.publish(&self.link.jobs, again).await {
            metrics::retried(failure.as_ref());
            trace.retried(submission_id, failure.as_ref());
            self.acknowledge(delivery).await;
        }
    }

    async fn park(&self, delivery: &Delivery, failure: &Failure) -> bool {
        let mut properties = delivery.properties.clone();
        properties
            .headers
            .retain(|(name, _)| !name.starts_with("x-error-") && name != "x-worker-id");
        properties.headers.extend([
            ("x-error-code".to_owned(), failure.code.as_str().to_owned()),
            (
                "x-error-message".to_owned(),
                failure.message.chars().take(MOST_IN_HEADER).collect(),
            ),
            (
                "x-worker-id".to_owned(),
                self.pipeline.answerer().worker_id.clone(),
            ),
        ]);
        let copy = Outgoing {
            exchange: self.topology.dead_exchange(),
            routing_key: self.topology.model.clone(),
            body: delivery.body.clone(),
            properties,
            mandatory: true,
        };
        let parked = self.publish(&self.link.jobs, copy).await;
        if parked {
            metrics::parked(failure);
        }
        parked
    }

    /// Publishes until confirmed; false = the link is lost and the broker will deliver again.
    async fn publish(&self, publisher: &crate::broker::amqp::Publisher, message: Outgoing) -> bool {
        let mut backoff = Backoff::between(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            match publisher.publish(message.clone()).await {
                Ok(()) => return true,
                Err(error @ (PublishError::Lost(_) | PublishError::Unroutable(_))) => {
                    let (exchange, routing_key) = (&message.exchange, &message.routing_key);
                    tracing::warn!(
                        why = %error,
                        %exchange,
                        %routing_key,
                        "a message is not confirmed; the broker will deliver its job again"
                    );
                    // Where this happens again and again, whoever sees the link come and go finds why.
                    let what = format!("to {exchange:?} for {routing_key:?}: {error}");
                    let code = match self.link.is_forbidden() {
                        true => Detail::PublishForbidden,
                        false => Detail::BrokerDisconnected,
                    };
                    self.vitals.error(&code.to_string(), &what);
                    return false;
                }
                Err(PublishError::Refused(why)) => {
                    tracing::warn!(%why, exchange = message.exchange, routing_key = message.routing_key, "refused, tried again");
                    tokio::select! {
                        () = tokio::time::sleep(backoff.wait()) => {}
                        () = self.link.lost.cancelled() => return false,
                    }
                }
            }
        }
    }

    async fn acknowledge(&self, delivery: Delivery) -> bool {
        let acknowledged = delivery.acker.ack().await;
        if !acknowledged {
            tracing::warn!("an acknowledgement was lost; the broker will deliver the job again");
        }
        acknowledged
    }

    async fn hand_back(&self, delivery: Delivery) {
        if delivery.delivery_count < RETURNS_BEFORE_REPUBLISH {
            return give_back(delivery).await;
        }
        let fresh = Outgoing {
            exchange: self.topology.jobs_exchange(),
            routing_key: self.topology.model.clone(),
            body: delivery.body.clone(),
            properties: Properties {
                // It does not wait since then.
                timestamp: None,
                ..delivery.properties.clone()
            },
            mandatory: true,
        };
        match self.link.jobs.publish(fresh).await {
            Ok(()) => drop(self.acknowledge(delivery).await),
            // The queue is full, of which this job is a part: it is better counted than held.
            Err(PublishError::Refused(_)) => give_back(delivery).await,
            Err(PublishError::Lost(why) | PublishError::Unroutable(why)) => {
                tracing::debug!(%why, "the broker takes the job back by itself");
            }
        }
    }

    fn account(&self, message: &ResultMessage, stored: bool, trace: &Trace) {
        let lap = Lap::since(trace.received);
        metrics::answered(message, lap.took, stored);
        trace.answered(message, stored);
        let mut facts = self.vitals.facts();
        facts.finished(lap.millis());
        match message.status {
            Status::Scored => facts.jobs.scored += 1,
            Status::Rejected => facts.jobs.rejected += 1,
            Status::Failed => facts.jobs.failed += 1,
        }
        drop(facts);
        tracing::info!(
            submission_id = message.submission_id,
            status = message.status.as_str(),
            code = message.code().map(Code::as_str),
            model_version = message.model_version,
            delta = message.delta(),
            attempt = message.attempt,
            duration_ms = lap.millis(),
            trace_id = trace.id(),
            "job answered"
        );
    }
}

/// A job for a newer version that would still be newer at its deadline is late already.
fn or_too_late(
    failure: Failure,
    attempt: u32,
    deadline_ms: Option<u64>,
    delays: &[Duration],
) -> Failure {
    if !too_late_for_the_next_rung(&failure, attempt, deadline_ms, delays) {
        return failure;
    }
    let message = format!(
        "{}; it would still be newer when its deadline passes",
        failure.message
    );
    Failure {
        code: Code::DeadlineExceeded,
        message,
        detail: failure.detail,
    }
}

async fn give_back(delivery: Delivery) {
    if !delivery.acker.hand_back().await {
        tracing::debug!("the channel is gone; the broker takes the job back by itself");
    }
}

/// Counts a held job, whatever becomes of its task.
struct Held<'a>(&'a Vitals);

impl<'a> Held<'a> {
    fn new(vitals: &'a Vitals) -> Self {
        vitals.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(vitals)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
