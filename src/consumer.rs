//! Taking jobs while the worker is ready, and the one place that settles them: publish, wait for
//! the confirm, then acknowledge. Nothing is acknowledged without a result or a parked copy.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::broker::amqp::{Deliveries, Delivery, Link};
use crate::broker::topology::Topology;
use crate::broker::{Outgoing, Properties, PublishError};
use crate::failure::{Code, Failure, Status};
use crate::heartbeat::Vitals;
use crate::job::{self, Encoding, Kind, Undecodable};
use crate::lifecycle::Detail;
use crate::pipeline::{Judged, Pipeline};
use crate::result::{Addressee, Key, ResultMessage};
use crate::retry::{Backoff, Disposition, dispose, too_late_for_the_next_rung};
use crate::store::Store;

/// Before RabbitMQ 4.3 every return counts against the queue's delivery limit of 20; from here on
/// a job is handed back as a fresh message instead.
const RETURNS_BEFORE_REPUBLISH: u64 = 10;

/// Characters of an error in a header: all headers of a message share one frame.
const MOST_IN_HEADER: usize = 1000;

/// What abandoned jobs get to hand themselves back.
const HAND_BACK: Duration = Duration::from_secs(2);

/// Why no more jobs can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The broker no longer has our consumer, or a job could not be settled on its channel.
    ConsumerLost,
    /// A connection is gone.
    BrokerLost,
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
        let queue = serving.topology.jobs_queue();
        let tag = &serving.pipeline.answerer().worker_id;
        match serving.link.consume(&queue, tag, serving.prefetch).await {
            Ok(deliveries) => {
                serving.vitals.consuming.store(true, Ordering::Relaxed);
                Ok(Self {
                    serving,
                    deliveries,
                    jobs: JoinSet::new(),
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
        let serving = &self.serving;
        loop {
            tokio::select! {
                biased;
                () = serving.link.lost.cancelled() => return Ended::BrokerLost,
                detail = serving.pipeline.engine().lost() => return Ended::EngineLost(detail),
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => {
                    if let Err(error) = done {
                        // Its delivery is unsettled, and only the end of the channel gives it back.
                        tracing::error!(%error, "the task of a job ended early");
                        return Ended::ConsumerLost;
                    }
                }
                delivery = self.deliveries.next() => match delivery {
                    // What was buffered before a loss can no longer be settled: not worth computing.
                    Some(delivery) if !delivery.acker.usable() => {}
                    Some(delivery) => {
                        self.jobs.spawn(Arc::clone(serving).handle(delivery));
                    }
                    None => return serving.lost(),
                },
            }
        }
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

    /// Lets running jobs end until the deadline, then abandons them. True = a computation was cut
    /// short.
    pub async fn finish(mut self, deadline: Instant) -> bool {
        if tokio::time::timeout_at(deadline.into(), self.join())
            .await
            .is_ok()
        {
            return false;
        }
        let busy_since = &self.serving.vitals.progress.busy_since_ms;
        let computing = busy_since.load(Ordering::Relaxed) != 0;
        tracing::warn!(
            left = self.jobs.len(),
            computing,
            "the drain's deadline has come; jobs are handed back"
        );
        self.abandon().await;
        computing
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
    fn lost(&self) -> Ended {
        if self.link.lost.is_cancelled() {
            Ended::BrokerLost
        } else {
            Ended::ConsumerLost
        }
    }

    async fn handle(self: Arc<Self>, mut delivery: Delivery) {
        let _held = Held::new(&self.vitals);
        let received = Instant::now();
        if delivery.redelivered {
            self.vitals.facts().jobs.redelivered += 1;
        }
        let encoding = delivery.properties.encoding();
        // Off the async threads: a stranger's body may be large, and they also drain and beat.
        let body = std::mem::take(&mut delivery.body);
        let decoding = tokio::task::spawn_blocking(move || {
            let decoded = job::decode(&body, encoding);
            (body, decoded)
        });
        let Ok((body, decoded)) = decoding.await else {
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
                let judging = self.pipeline.judge(&job, &addressee, received);
                let judged = tokio::select! {
                    judged = AssertUnwindSafe(judging).catch_unwind() => judged,
                    () = self.abandon.cancelled() => return self.hand_back(delivery).await,
                };
                let judged = judged.unwrap_or_else(|_| Judged::panicked());
                self.settle(delivery, addressee, job.deadline_ms, judged, received)
                    .await;
            }
            Err(undecodable) => {
                self.settle_undecodable(delivery, undecodable, received)
                    .await
            }
        }
    }

    async fn settle(
        &self,
        delivery: Delivery,
        addressee: Addressee,
        deadline_ms: Option<u64>,
        judged: Judged,
        received: Instant,
    ) {
        let attempt = addressee.attempt;
        let (verdict, key) = match judged {
            Judged::Stored { message, key } => {
                self.vitals.facts().jobs.duplicates += 1;
                let message = ResultMessage {
                    context: addressee.context,
                    ..*message
                };
                return self
                    .answer(delivery, message, Some(key), None, received)
                    .await;
            }
            Judged::Fresh {
                verdict: Err(failure),
                key,
            } if too_late_for_the_next_rung(&failure, attempt, deadline_ms, &self.retry_delays) => {
                let message = format!(
                    "{}; it would still be newer when its deadline passes",
                    failure.message
                );
                (
                    Err(Failure {
                        code: Code::DeadlineExceeded,
                        message,
                        detail: failure.detail,
                    }),
                    key,
                )
            }
            Judged::Fresh { verdict, key } => (verdict, key),
            Judged::Undecided => return self.hand_back(delivery).await,
        };
        let parked = match dispose(&verdict, attempt, deadline_ms, &self.retry_delays) {
            Disposition::Climb { rung } => return self.climb(delivery, rung, verdict.err()).await,
            Disposition::Answer => None,
            Disposition::AnswerAndPark => verdict.as_ref().err().cloned(),
        };
        let context = addressee.context.clone();
        let message = ResultMessage::new(self.pipeline.answerer(), addressee, verdict);
        let message = self.first_of_its_key(message, key.as_ref(), context).await;
        self.answer(delivery, message, key, parked, received).await;
    }

    async fn settle_undecodable(
        &self,
        delivery: Delivery,
        undecodable: Undecodable,
        received: Instant,
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
                self.answer(delivery, message, None, parked, received).await;
            }
            None => {
                tracing::warn!(error = %failure, "a body that nobody can be answered for is parked");
                if self.park(&delivery, &failure).await {
                    self.acknowledge(delivery).await;
                }
            }
        }
    }

    /// If another worker was first to store a result, its result is the one to publish, so that
    /// all copies agree.
    async fn first_of_its_key(
        &self,
        message: ResultMessage,
        key: Option<&Key>,
        context: Option<rmpv::Value>,
    ) -> ResultMessage {
        let Some(key) = key.filter(|_| message.may_be_stored()) else {
            return message;
        };
        let bare = ResultMessage {
            context: None,
            ..message.clone()
        };
        let Ok(text) = serde_json::to_string(&bare) else {
            return message;
        };
        let first = self.store.keep(&key.0, &text, self.results_ttl).await;
        match first.and_then(|text| serde_json::from_str::<ResultMessage>(&text).ok()) {
            Some(first) => ResultMessage { context, ..first },
            None => message,
        }
    }

    /// Publishes the result (and the parked copy), then acknowledges.
    async fn answer(
        &self,
        delivery: Delivery,
        message: ResultMessage,
        key: Option<Key>,
        parked: Option<Failure>,
        received: Instant,
    ) {
        let encoding = delivery.properties.encoding();
        let durable = match self.outgoing(&message, key.as_ref(), &delivery.properties, encoding) {
            Ok(durable) => durable,
            Err(error) => {
                tracing::error!(%error, "a result cannot be encoded; the job is handed back");
                return self.hand_back(delivery).await;
            }
        };
        let reply = delivery.properties.reply_to.as_ref();
        let reply = reply.map(|queue| durable.to_reply_queue(queue));
        if !self.publish(&self.link.results, durable).await {
            return;
        }
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
        self.account(&message, received);
        self.acknowledge(delivery).await;
    }

    fn outgoing(
        &self,
        message: &ResultMessage,
        key: Option<&Key>,
        job: &Properties,
        encoding: Encoding,
    ) -> anyhow::Result<Outgoing> {
        let properties = Properties {
            content_type: Some(encoding.content_type().into()),
            message_id: Some(message.message_id(key)),
            correlation_id: job.correlation_id.clone(),
            reply_to: None,
            timestamp: Some(message.scored_at_ms / 1000),
            headers: job.trace_headers(),
            attempt: 1,
        };
        Ok(Outgoing {
            exchange: self.topology.results_exchange(),
            routing_key: format!("{}.{}", self.topology.model, message.status.as_str()),
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
            Err(PublishError::Lost(why)) => {
                tracing::warn!(%why, "a reply is not confirmed; the broker will deliver its job again");
                false
            }
        }
    }

    async fn climb(&self, delivery: Delivery, rung: usize, failure: Option<Failure>) {
        let Some(queue) = self.topology.retry_queue(rung) else {
            return self.hand_back(delivery).await;
        };
        let attempt = delivery.properties.attempt;
        tracing::info!(attempt, %queue, error = failure.map(|f| f.to_string()), "the job will be tried again");
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
        self.publish(&self.link.jobs, copy).await
    }

    /// Publishes until confirmed; false = the link is lost and the broker will deliver again.
    async fn publish(&self, publisher: &crate::broker::amqp::Publisher, message: Outgoing) -> bool {
        let mut backoff = Backoff::between(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            match publisher.publish(message.clone()).await {
                Ok(()) => return true,
                Err(PublishError::Lost(why)) => {
                    tracing::warn!(%why, "a message is not confirmed; the broker will deliver its job again");
                    return false;
                }
                Err(PublishError::Refused(why)) => {
                    tracing::warn!(%why, exchange = message.exchange, key = message.routing_key, "refused, tried again");
                    tokio::select! {
                        () = tokio::time::sleep(backoff.wait()) => {}
                        () = self.link.lost.cancelled() => return false,
                    }
                }
            }
        }
    }

    async fn acknowledge(&self, delivery: Delivery) {
        if !delivery.acker.ack().await {
            tracing::warn!("an acknowledgement was lost; the broker will deliver the job again");
        }
    }

    async fn hand_back(&self, delivery: Delivery) {
        if delivery.delivery_count < RETURNS_BEFORE_REPUBLISH {
            if !delivery.acker.hand_back().await {
                tracing::debug!("the channel is gone; the broker takes the job back by itself");
            }
            return;
        }
        let fresh = Outgoing {
            exchange: self.topology.jobs_exchange(),
            routing_key: self.topology.model.clone(),
            body: delivery.body.clone(),
            properties: delivery.properties.clone(),
            mandatory: true,
        };
        if self.publish(&self.link.jobs, fresh).await {
            self.acknowledge(delivery).await;
        }
    }

    fn account(&self, message: &ResultMessage, received: Instant) {
        let millis = received.elapsed().as_secs_f64() * 1e3;
        let mut facts = self.vitals.facts();
        facts.finished(millis);
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
            attempt = message.attempt,
            duration_ms = millis,
            "job answered"
        );
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
