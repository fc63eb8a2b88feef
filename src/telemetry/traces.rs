//! What becomes of jobs, as spans for `telemetry.otlp_endpoint`. Where no endpoint is set, or in a build
//! without the feature `traces`, a [`Trace`] keeps the time of delivery and nothing else.

use std::time::Instant;

#[cfg(not(feature = "traces"))]
use super::no_spans as spans;
#[cfg(feature = "traces")]
use super::spans;
use crate::protocol::failure::{Code, Failure, Status};
use crate::protocol::result::ResultMessage;
use crate::util::clock::Lap;
use spans::Span;
pub use spans::{flush, install};

/// What a job goes through, in the order of a scored one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Stage {
    /// Getting the candidate's bytes.
    Fetch,
    /// Decoding and checking them.
    Decode,
    /// Waiting for the device.
    #[strum(serialize = "device wait")]
    DeviceWait,
    /// Running the model as it is, where its losses were not known.
    Baseline,
    /// Writing the candidate into the weights.
    Patch,
    /// Running the model.
    Forward,
    /// Copying the baseline back.
    Restore,
}

/// What a span says of a job.
#[derive(Debug)]
#[cfg_attr(
    not(feature = "traces"),
    expect(dead_code, reason = "there are no spans")
)]
pub(super) enum Value {
    Word(&'static str),
    Text(String),
    Flag(bool),
    Count(u64),
    Number(f64),
}

/// A job that was delivered, as far as spans tell of it.
#[derive(Debug)]
pub struct ReceivedJob<'a> {
    /// `traceparent` and `tracestate`, where the sender gave them.
    pub trace_headers: Vec<(String, String)>,
    /// The message's name, if it has one.
    pub message_id: Option<&'a str>,
    /// What its sender tells conversations apart by.
    pub correlation_id: Option<&'a str>,
    /// When it was sent, in unix seconds.
    pub timestamp: Option<u64>,
    /// The size of its body.
    pub bytes: usize,
    /// From 1.
    pub attempt: u32,
    /// The broker delivered it before.
    pub redelivered: bool,
    /// Where it was published.
    pub exchange: String,
    /// Where it waited.
    pub queue: String,
    /// The model it is for.
    pub model: &'a str,
}

/// One delivery of a job, from the broker to what becomes of it. Its span ends with it; without an
/// outcome the broker delivers the job again.
#[derive(Debug)]
pub struct Trace {
    /// When it was delivered.
    pub received: Instant,
    /// Where spans are sent.
    span: Option<Span>,
}

impl Trace {
    /// Begins now. The parent is whoever sent the job, if its `traceparent` says so.
    pub fn begin(job: &ReceivedJob<'_>) -> Self {
        Self {
            received: Instant::now(),
            span: Span::process(job),
        }
    }

    /// The same for a job that no broker delivers: without spans.
    pub fn silent() -> Self {
        Self {
            received: Instant::now(),
            span: None,
        }
    }

    /// By which logs and spans are found together.
    pub fn id(&self) -> Option<String> {
        self.span.as_ref().map(Span::trace_id)
    }

    /// A stage that is over; returns its milliseconds.
    pub fn stage(&self, stage: Stage, lap: Lap) -> f64 {
        if let Some(span) = &self.span {
            span.stage(stage, lap.began, lap.took, None);
        }
        lap.millis()
    }

    /// Running the model with a candidate: `from` is the first part of the graph with another weight.
    pub fn forward(&self, lap: Lap, from: Option<usize>) {
        if let Some(span) = &self.span {
            let part = from.map(|part| ("scorer.part", Value::Count(part as u64)));
            span.stage(Stage::Forward, lap.began, lap.took, part);
        }
    }

    /// Begins to publish the result.
    pub fn publish(&self, exchange: &str, routing_key: &str) -> Publishing {
        let span = self.span.as_ref();
        Publishing(span.map(|span| span.publish(exchange, routing_key)))
    }

    /// It was answered; `stored` = with the result of an earlier delivery.
    pub fn answered(&self, message: &ResultMessage, stored: bool) {
        let (id, stopped) = (message.submission_id.clone(), message.stopped());
        let said = [
            Some(("scorer.outcome", Value::Word("answered"))),
            Some(("scorer.status", Value::Word(message.status.as_str()))),
            Some(("scorer.submission_id", Value::Text(id))),
            Some(("scorer.stored", Value::Flag(stored))),
            Some(("scorer.model_version", Value::Count(message.model_version))),
            message.delta().map(|d| ("scorer.delta", Value::Number(d))),
            stopped.map(|s| ("scorer.stopped", Value::Word(s.decision.as_str()))),
        ];
        self.tell(said, message.code(), message.status == Status::Failed);
    }

    /// It goes into a retry queue.
    pub fn retried(&self, submission_id: &str, failure: Option<&Failure>) {
        let id = Value::Text(submission_id.to_owned());
        let said = [
            Some(("scorer.outcome", Value::Word("retried"))),
            Some(("scorer.submission_id", id)),
        ];
        self.tell(said, failure.map(|failure| failure.code), failure.is_some());
    }

    /// A copy of it is dead-lettered, and nobody can be answered.
    pub fn parked(&self, failure: &Failure) {
        let said = [Some(("scorer.outcome", Value::Word("parked")))];
        self.tell(said, Some(failure.code), true);
    }

    fn tell<const N: usize>(
        &self,
        said: [Option<(&'static str, Value)>; N],
        code: Option<Code>,
        failed: bool,
    ) {
        let Some(span) = &self.span else { return };
        for (name, value) in said.into_iter().flatten() {
            span.set(name, value);
        }
        let word = code.map(Code::as_str);
        if let Some(word) = word {
            span.set("scorer.code", Value::Word(word));
        }
        if failed {
            let kind = word.unwrap_or("none");
            span.fail(kind, kind);
        }
    }
}

/// A result on its way to the broker's confirm.
#[derive(Debug)]
pub struct Publishing(Option<Span>);

impl Publishing {
    /// What the result carries of this span, where there is one.
    pub fn headers(&self) -> Option<Vec<(String, String)>> {
        self.0.as_ref().map(Span::headers)
    }

    /// The broker has it: the span ends here.
    pub fn confirmed(self) {}

    /// Nobody knows whether the broker has it.
    pub fn lost(self) {
        if let Some(span) = &self.0 {
            span.fail("not_confirmed", "not confirmed");
        }
    }
}
