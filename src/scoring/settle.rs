//! The one place that settles deliveries: publish, wait for the confirm, then acknowledge. Nothing is
//! acknowledged without a published result, retry or dead-lettered copy.

use std::sync::Arc;
use std::time::Duration;

use crate::broker::amqp::{Delivery, Link, Publisher};
use crate::broker::topology::Topology;
use crate::broker::{Outgoing, Properties, PublishError};
use crate::protocol::failure::{Code, Failure, Status};
use crate::protocol::job::{Kind, Undecodable};
use crate::protocol::result::{JobRef, Key, ResultMessage, ResultOrigin, Verdict};
use crate::protocol::state::Detail;
use crate::scoring::crash_marks::CrashMark;
use crate::scoring::disposition::{Disposition, RETURNS_BEFORE_REPUBLISH, Try, dispose, too_late};
use crate::scoring::pipeline::Judged;
use crate::scoring::recent_results::RecentResults;
use crate::telemetry::metrics;
use crate::telemetry::status::WorkerStatus;
use crate::telemetry::traces::Trace;
use crate::util::backoff::Backoff;
use crate::util::clock::{Lap, unix_ms};

/// Settles deliveries.
#[derive(Debug)]
pub struct Settler {
    /// Takes what is published.
    pub link: Arc<Link>,
    /// Names of queues and exchanges.
    pub topology: Arc<Topology>,
    /// Counts what is answered.
    pub status: Arc<WorkerStatus>,
    /// Results of jobs that are not acknowledged yet.
    pub recent_results: RecentResults,
    /// The worker and the model that results come from.
    pub origin: Arc<ResultOrigin>,
    /// How long a stored result is kept.
    pub results_ttl: Duration,
    /// Rungs of the retry ladder.
    pub retry_delays: Vec<Duration>,
}

/// What is published for a job that is answered.
struct Answer {
    message: ResultMessage,
    key: Option<Key>,
    /// Why a copy of the job is dead-lettered, if it is.
    dead_letter: Option<Failure>,
    /// The result was stored before.
    stored: bool,
}

impl Settler {
    /// Settles a job by what came of it.
    pub async fn settle(
        &self,
        delivery: Delivery,
        job_ref: JobRef,
        deadline_ms: Option<u64>,
        judged: Judged,
        trace: &Trace,
    ) {
        match judged {
            Judged::Fresh { verdict, key, mark } => {
                let judged = (verdict, key, mark);
                self.settle_verdict(delivery, job_ref, deadline_ms, judged, trace)
                    .await;
            }
            Judged::Stored { message, key } => {
                self.status.facts().jobs.duplicates += 1;
                metrics::duplicate();
                let answer = Answer {
                    message: message.with_context(job_ref.context),
                    key: Some(key),
                    dead_letter: None,
                    stored: true,
                };
                self.answer(delivery, answer, trace).await;
            }
            Judged::Requeue => self.hand_back(delivery).await,
        }
    }

    async fn settle_verdict(
        &self,
        delivery: Delivery,
        job_ref: JobRef,
        deadline_ms: Option<u64>,
        (verdict, key, mark): (Verdict, Option<Key>, Option<CrashMark>),
        trace: &Trace,
    ) {
        let tried = Try {
            attempt: job_ref.attempt,
            deadline_ms,
            now_ms: unix_ms(),
        };
        let code = verdict.as_ref().err().map(|failure| failure.code);
        let (verdict, dead_letter) = match dispose(code, tried, &self.retry_delays) {
            Disposition::Climb { rung } => {
                if let Some(mark) = mark {
                    mark.end(code, None).await;
                }
                let (name, failure) = (&job_ref.submission_id, verdict.err());
                return self.climb(delivery, name, rung, failure, trace).await;
            }
            Disposition::Answer => (verdict, None),
            Disposition::AnswerTooLate => (verdict.map_err(too_late), None),
            Disposition::AnswerAndDeadLetter => {
                let failure = verdict.as_ref().err().cloned();
                (verdict, failure)
            }
        };
        let mut message = ResultMessage::new(&self.origin, job_ref.clone(), verdict);
        if let Some(mark) = mark {
            message = self.store_first(mark, message, &job_ref).await;
        }
        if let Some(key) = key.as_ref().filter(|_| message.may_be_stored()) {
            self.recent_results.keep(key, &message);
        }
        let answer = Answer {
            message,
            key,
            dead_letter,
            stored: false,
        };
        self.answer(delivery, answer, trace).await;
    }

    /// Settles a job that cannot be decoded: whoever it names is answered, and a job that does not name
    /// itself is dead-lettered.
    pub async fn settle_undecodable(
        &self,
        delivery: Delivery,
        undecodable: Undecodable,
        trace: &Trace,
    ) {
        let (job_ref, failure, dead_letter) = job_of(&delivery.properties, undecodable);
        let Some(job_ref) = job_ref else {
            tracing::warn!(
                error = %failure,
                bytes = delivery.body.len(),
                trace_id = trace.id(),
                "a message that names no job is dead-lettered: nobody can be answered"
            );
            if self.park(&delivery, &failure).await {
                trace.parked(&failure);
                self.acknowledge(delivery).await;
            }
            return;
        };
        let answer = Answer {
            dead_letter: dead_letter.then(|| failure.clone()),
            message: ResultMessage::new(&self.origin, job_ref, Err(failure)),
            key: None,
            stored: false,
        };
        self.answer(delivery, answer, trace).await;
    }

    /// Ends the attempt and stores its result. If another worker stored one first, that is the one to
    /// publish, so that all copies agree.
    async fn store_first(
        &self,
        mark: CrashMark,
        message: ResultMessage,
        job_ref: &JobRef,
    ) -> ResultMessage {
        let bare = || message.clone().with_context(None);
        let text = message.may_be_stored().then(bare);
        let text = text.and_then(|bare| serde_json::to_string(&bare).ok());
        let keep = text.as_deref().map(|text| (text, self.results_ttl));
        let Some(first) = mark.end(message.code(), keep).await else {
            return message;
        };
        match self.origin.read(&first, job_ref) {
            Ok(first) => first.with_context(message.context),
            Err(error) => {
                tracing::warn!(%error, job = message.submission_id, "a stored result is ignored");
                message
            }
        }
    }

    /// Publishes the result (and the dead-lettered copy), then acknowledges.
    async fn answer(&self, delivery: Delivery, answer: Answer, trace: &Trace) {
        let Answer {
            message,
            key,
            dead_letter,
            stored,
        } = answer;
        let job = &delivery.properties;
        let publishing = trace.publish(
            &self.topology.results_exchange(),
            &self.routing_key(&message),
        );
        let headers = publishing.headers().unwrap_or_else(|| job.trace_headers());
        let durable = match self.outgoing(&message, key.as_ref(), job, headers) {
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
        publishing.confirmed();
        if let Some(reply) = reply
            && !self.publish_reply(reply).await
        {
            return;
        }
        if let Some(failure) = &dead_letter
            && !self.park(&delivery, failure).await
        {
            return;
        }
        self.account(&message, stored, trace);
        if self.acknowledge(delivery).await
            && let Some(key) = &key
        {
            self.recent_results.forget(key);
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
            message_id: Some(message.message_id(key)),
            correlation_id: job.correlation_id.clone(),
            timestamp: Some(message.scored_at_ms / 1000),
            headers,
            attempt: 1,
            ..Properties::default()
        };
        Ok(Outgoing {
            exchange: self.topology.results_exchange(),
            routing_key: self.routing_key(message),
            body: encoding.encode(message)?,
            properties,
            mandatory: true,
        })
    }

    /// The copy for `reply_to` is a courtesy: a reply queue that is full must not hold up the job, whose
    /// result is safe. False = the link is lost.
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

    /// Publishes the job to a rung of the retry ladder, then acknowledges.
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

    /// Dead-letters a copy of the job; whether the broker confirmed it.
    async fn park(&self, delivery: &Delivery, failure: &Failure) -> bool {
        let said = &delivery.properties;
        let said = said.dead_lettered(failure, &self.origin.worker_id);
        let copy = self.topology.dead_letter(delivery.body.clone(), said);
        let confirmed = self.publish(&self.link.jobs, copy).await;
        if confirmed {
            metrics::parked(failure);
        }
        confirmed
    }

    /// Publishes until confirmed; false = the link is lost and the broker will deliver the job again.
    async fn publish(&self, publisher: &Publisher, message: Outgoing) -> bool {
        let mut backoff = Backoff::between(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            match publisher.publish(message.clone()).await {
                Ok(()) => return true,
                Err(error @ (PublishError::Lost(_) | PublishError::Unroutable(_))) => {
                    self.not_confirmed(&message, &error);
                    return false;
                }
                Err(PublishError::Refused(why)) => {
                    tracing::warn!(%why, exchange = message.exchange, routing_key = message.routing_key, "refused, tried again");
                    tokio::select! {
                        () = tokio::time::sleep(backoff.next_delay()) => {}
                        () = self.link.lost.cancelled() => return false,
                    }
                }
            }
        }
    }

    fn not_confirmed(&self, message: &Outgoing, error: &PublishError) {
        let (exchange, routing_key) = (&message.exchange, &message.routing_key);
        tracing::warn!(
            why = %error,
            %exchange,
            %routing_key,
            "a message is not confirmed; the broker will deliver its job again"
        );
        // Where this happens again and again, the status tells why the link comes and goes.
        let what = format!("to {exchange:?} for {routing_key:?}: {error}");
        let code = match self.link.is_forbidden() {
            true => Detail::PublishForbidden,
            false => Detail::BrokerDisconnected,
        };
        self.status.error(&code.to_string(), &what);
    }

    async fn acknowledge(&self, delivery: Delivery) -> bool {
        let acknowledged = delivery.acker.ack().await;
        if !acknowledged {
            tracing::warn!("an acknowledgement was lost; the broker will deliver the job again");
        }
        acknowledged
    }

    /// Returns the job to the queue.
    pub async fn hand_back(&self, delivery: Delivery) {
        if delivery.delivery_count < RETURNS_BEFORE_REPUBLISH {
            return give_back(delivery).await;
        }
        let properties = Properties {
            // It has not waited since then.
            timestamp: None,
            ..delivery.properties.clone()
        };
        let fresh = self.topology.job(delivery.body.clone(), properties);
        match self.link.jobs.publish(fresh).await {
            Ok(()) => drop(self.acknowledge(delivery).await),
            // The queue is full, and this job is part of it: better to have the return counted than to
            // hold the job.
            Err(PublishError::Refused(_)) => give_back(delivery).await,
            Err(PublishError::Lost(why) | PublishError::Unroutable(why)) => {
                tracing::debug!(%why, "the broker requeues the job by itself");
            }
        }
    }

    fn account(&self, message: &ResultMessage, stored: bool, trace: &Trace) {
        let lap = Lap::since(trace.received);
        metrics::answered(message, lap.took, stored);
        trace.answered(message, stored);
        let mut facts = self.status.facts();
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
            stopped = message.stopped().map(|stopped| stopped.decision.as_str()),
            attempt = message.attempt,
            duration_ms = lap.millis(),
            trace_id = trace.id(),
            "job answered"
        );
    }
}

/// The job that an undecodable message names, why it cannot be decoded, and whether a copy of it is
/// dead-lettered.
fn job_of(properties: &Properties, undecodable: Undecodable) -> (Option<JobRef>, Failure, bool) {
    let attempt = properties.attempt;
    match undecodable {
        Undecodable::Named {
            submission_id,
            kind,
            model_version,
            context,
            failure,
        } => {
            let job_ref = JobRef {
                submission_id,
                kind,
                model_version,
                context,
                attempt,
            };
            (Some(job_ref), failure, false)
        }
        Undecodable::Anonymous(failure) => {
            let job_ref = properties.message_id.clone().map(|submission_id| JobRef {
                submission_id,
                kind: Kind::Score,
                model_version: None,
                context: None,
                attempt,
            });
            (job_ref, failure, true)
        }
    }
}

async fn give_back(delivery: Delivery) {
    if !delivery.acker.hand_back().await {
        tracing::debug!("the channel is gone; the broker requeues the job by itself");
    }
}
