//! The one place that settles deliveries: publish, wait for the confirm, then acknowledge. Nothing is
//! acknowledged without a result or a parked copy.

use std::time::Duration;

use crate::broker::amqp::Delivery;
use crate::broker::{Outgoing, Properties, PublishError};
use crate::protocol::failure::{Code, Failure, Status};
use crate::protocol::job::{Kind, Undecodable};
use crate::protocol::result::{JobRef, Key, ResultMessage};
use crate::protocol::state::Detail;
use crate::scoring::consumer::Serving;
use crate::scoring::crash_marks::Attempt;
use crate::scoring::disposition::{
    Disposition, RETURNS_BEFORE_REPUBLISH, dispose, too_late_for_the_next_rung,
};
use crate::scoring::pipeline::Judged;
use crate::telemetry::metrics;
use crate::telemetry::traces::Trace;
use crate::util::backoff::Backoff;
use crate::util::clock::Lap;

/// Characters of an error in a header: all headers of a message share one frame.
const MOST_IN_HEADER: usize = 1000;

impl Serving {
    pub(super) async fn settle(
        &self,
        delivery: Delivery,
        job_ref: JobRef,
        deadline_ms: Option<u64>,
        judged: Judged,
        trace: &Trace,
    ) {
        let (verdict, key, attempt) = match judged {
            Judged::Stored { message, key } => {
                self.status.facts().jobs.duplicates += 1;
                metrics::duplicate();
                let message = ResultMessage {
                    context: job_ref.context,
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
        let (number, delays) = (job_ref.attempt, &self.retry_delays);
        let verdict = verdict.map_err(|failure| or_too_late(failure, number, deadline_ms, delays));
        let parked = match dispose(&verdict, number, deadline_ms, delays) {
            Disposition::Climb { rung } => {
                let failure = verdict.err();
                if let Some(attempt) = attempt {
                    attempt.end(failure.as_ref().map(|f| f.code), None).await;
                }
                let name = &job_ref.submission_id;
                return self.climb(delivery, name, rung, failure, trace).await;
            }
            Disposition::Answer => None,
            Disposition::AnswerAndPark => verdict.as_ref().err().cloned(),
        };
        let mut message = ResultMessage::new(self.pipeline.answerer(), job_ref.clone(), verdict);
        if let Some(attempt) = attempt {
            message = self.end(attempt, message, &job_ref).await;
        }
        if let Some(key) = key.as_ref().filter(|_| message.may_be_stored()) {
            self.pipeline.recent_results().keep(key, &message);
        }
        self.answer(delivery, message, key, parked, trace, false)
            .await;
    }

    pub(super) async fn settle_undecodable(
        &self,
        delivery: Delivery,
        undecodable: Undecodable,
        trace: &Trace,
    ) {
        let attempt = delivery.properties.attempt;
        let (job_ref, failure, park) = match undecodable {
            Undecodable::Named {
                submission_id,
                kind,
                model_version,
                context,
                failure,
            } => (
                Some(JobRef {
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
                    .map(|submission_id| JobRef {
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
        match job_ref {
            Some(job_ref) => {
                let message = ResultMessage::new(self.pipeline.answerer(), job_ref, Err(failure));
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
        job_ref: &JobRef,
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
        match self.pipeline.answerer().read(&first, job_ref) {
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
            self.pipeline.recent_results().forget(key);
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
                    self.status.error(&code.to_string(), &what);
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

    async fn acknowledge(&self, delivery: Delivery) -> bool {
        let acknowledged = delivery.acker.ack().await;
        if !acknowledged {
            tracing::warn!("an acknowledgement was lost; the broker will deliver the job again");
        }
        acknowledged
    }

    pub(super) async fn hand_back(&self, delivery: Delivery) {
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
