//! Taking jobs while the worker is ready, and the one place that settles them: publish, wait for
//! the confirm, then acknowledge. Nothing is acknowledged without a result or a parked copy.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::broker::amqp::{Deliveries, Delivery, Link};
use crate::broker::topology::Topology;
use crate::broker::{Outgoing, Properties, PublishError};
use crate::failure::{Code, Failure, Status};
use crate::heartbeat::Vitals;
use crate::job::{self, Encoding, Kind, Undecodable};
use crate::pipeline::{Judged, Pipeline};
use crate::result::{Addressee, Key, ResultMessage};
use crate::retry::{Backoff, Disposition, dispose, too_late_for_the_next_rung};
use crate::store::Store;

/// Before RabbitMQ 4.3 every return counts against the queue's delivery limit of 20; from here on
/// a job is handed back as a fresh message instead.
const RETURNS_BEFORE_REPUBLISH: u64 = 10;

/// Why serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The worker asked for it.
    Asked,
    /// The broker no longer has our consumer.
    ConsumerLost,
    /// A connection is gone.
    BrokerLost,
    /// The engine can no longer be used.
    EngineBroken,
}

/// Jobs that run on after the consumer has left, and the channel they are settled on.
#[derive(Debug)]
pub struct Running {
    /// One task per job.
    pub jobs: JoinSet<()>,
    _deliveries: Option<Deliveries>,
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

impl Serving {
    /// Registers the consumer and takes jobs until something ends it. `on_ready` is called when
    /// the broker has confirmed the consumer, `on_left` when it has taken it away again.
    ///
    /// Returns the jobs that are still running; they settle by themselves as long as it is kept.
    pub async fn serve(
        self: &Arc<Self>,
        leave: &CancellationToken,
        on_ready: impl FnOnce(),
        on_left: impl FnOnce(Ended),
    ) -> (Ended, Running) {
        let mut jobs = JoinSet::new();
        let queue = self.topology.jobs_queue();
        let tag = self.pipeline.answerer().worker_id.clone();
        let mut deliveries = match self.link.consume(&queue, &tag, self.prefetch).await {
            Ok(deliveries) => deliveries,
            Err(error) => {
                self.vitals.error("consumer_lost", &error.to_string());
                let ended = if self.link.lost.is_cancelled() {
                    Ended::BrokerLost
                } else {
                    Ended::ConsumerLost
                };
                on_left(ended);
                return (
                    ended,
                    Running {
                        jobs,
                        _deliveries: None,
                    },
                );
            }
        };
        self.vitals.consuming.store(true, Ordering::Relaxed);
        on_ready();
        let ended = self.take(&mut deliveries, &mut jobs, leave).await;
        let left = deliveries.cancel().await;
        self.vitals.consuming.store(false, Ordering::Relaxed);
        on_left(ended);
        for delivery in left {
            self.hand_back(delivery).await;
        }
        (
            ended,
            Running {
                jobs,
                _deliveries: Some(deliveries),
            },
        )
    }

    async fn take(
        self: &Arc<Self>,
        deliveries: &mut Deliveries,
        jobs: &mut JoinSet<()>,
        leave: &CancellationToken,
    ) -> Ended {
        loop {
            tokio::select! {
                biased;
                () = leave.cancelled() => return Ended::Asked,
                () = self.link.lost.cancelled() => return Ended::BrokerLost,
                () = self.pipeline.engine().broken() => return Ended::EngineBroken,
                Some(done) = jobs.join_next(), if !jobs.is_empty() => log_panic(done),
                delivery = deliveries.next() => match delivery {
                    // What was buffered before a loss can no longer be settled: not worth computing.
                    Some(delivery) if !delivery.acker.usable() => {}
                    Some(delivery) => {
                        let serving = Arc::clone(self);
                        jobs.spawn(async move { serving.handle(delivery).await });
                    }
                    None if self.link.lost.is_cancelled() => return Ended::BrokerLost,
                    None => return Ended::ConsumerLost,
                },
            }
        }
    }

    async fn handle(self: Arc<Self>, delivery: Delivery) {
        let _held = Held::new(&self.vitals);
        let received = Instant::now();
        if delivery.redelivered {
            self.vitals.facts().jobs.redelivered += 1;
        }
        let encoding = delivery.properties.encoding();
        match job::decode(&delivery.body, encoding) {
            Ok(job) => {
                let addressee = Addressee {
                    submission_id: job.submission_id.clone(),
                    kind: job.task.kind(),
                    model_version: job.task.model_version(),
                    context: job.context.clone(),
                    attempt: delivery.properties.attempt,
                };
                let judged = tokio::select! {
                    judged = self.pipeline.judge(&job, &addressee, received) => judged,
                    () = self.abandon.cancelled() => return self.hand_back(delivery).await,
                };
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
        let outgoing = match self.outgoing(&message, key.as_ref(), &delivery.properties, encoding) {
            Ok(outgoing) => outgoing,
            Err(error) => {
                tracing::error!(%error, "a result cannot be encoded; the job is handed back");
                return self.hand_back(delivery).await;
            }
        };
        for copy in outgoing {
            if !self.publish(&self.link.results, copy).await {
                return;
            }
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
    ) -> anyhow::Result<Vec<Outgoing>> {
        let properties = Properties {
            content_type: Some(encoding.content_type().into()),
            message_id: Some(message.message_id(key)),
            correlation_id: job.correlation_id.clone(),
            reply_to: None,
            timestamp: Some(message.scored_at_ms / 1000),
            headers: job.trace_headers(),
            attempt: 1,
        };
        let durable = Outgoing {
            exchange: self.topology.results_exchange(),
            routing_key: format!("{}.{}", self.topology.model, message.status.as_str()),
            body: encoding.encode(message)?,
            properties,
            mandatory: true,
        };
        let reply = job.reply_to.as_ref().map(|queue| Outgoing {
            exchange: String::new(),
            routing_key: queue.clone(),
            mandatory: false,
            ..durable.clone()
        });
        Ok(std::iter::once(durable).chain(reply).collect())
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
            ("x-error-message".to_owned(), failure.message.clone()),
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
        facts.model.baseline_cache_entries = self.pipeline.engine().baseline_cache_entries() as u64;
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

fn log_panic(done: Result<(), tokio::task::JoinError>) {
    if let Err(error) = done.map_err(|e| e.to_string()) {
        // The delivery went down unsettled with its task: the broker delivers it again.
        tracing::error!(%error, "a job's task ended early");
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
