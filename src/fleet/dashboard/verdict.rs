//! A result as the dashboard keeps it: what it says, in a few hundred bytes.

use serde::Serialize;

use super::text::{MESSAGE, NAME, cut};
use crate::protocol::failure::Status;
use crate::protocol::job::Kind;
use crate::protocol::result::{Body, ResultMessage, Timings};
use crate::protocol::stop::{Decision, Stopped};

/// What a result says of its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, strum::VariantArray)]
#[serde(rename_all = "snake_case")]
pub(super) enum Class {
    /// The whole interval of the delta is above zero.
    Better,
    /// The whole interval is below zero, or it was decided early that the delta is.
    Worse,
    /// Zero is in the interval, or there is none; or it was decided early that the delta is too small.
    Unclear,
    /// The model was measured, no candidate.
    Validated,
    /// Candidates were measured together: what that says is in the numbers of each.
    Merged,
    /// The job or its candidate is at fault.
    Rejected,
    /// The operation failed.
    Failed,
}

/// A result, and what its message says beside it.
#[derive(Debug, Clone)]
pub(super) struct SeenResult {
    /// By the board's clock.
    pub(super) at_ms: u64,
    pub(super) result: ResultMessage,
    /// Under which it is stored.
    pub(super) key: Option<String>,
    pub(super) trace_id: Option<String>,
}

/// A result that was seen.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Verdict {
    pub(super) at_ms: u64,
    pub(super) kind: Kind,
    pub(super) status: Status,
    pub(super) class: Class,
    /// A class, or a code.
    pub(super) verdict: &'static str,
    pub(super) code: Option<&'static str>,
    pub(super) message: Option<Box<str>>,
    pub(super) retryable: Option<bool>,
    /// Of the whole plan.
    pub(super) delta: Option<f64>,
    pub(super) stopped: Option<Stopped>,
    pub(super) ci95: Option<[f64; 2]>,
    pub(super) score: Option<f64>,
    pub(super) loss: Option<f64>,
    /// Of the whole plan.
    pub(super) loss_before: Option<f64>,
    pub(super) loss_after: Option<f64>,
    pub(super) windows: Option<u64>,
    pub(super) worker: Box<str>,
    pub(super) attempt: u32,
    pub(super) model_version: u64,
    pub(super) trace_id: Option<Box<str>>,
    pub(super) key: Option<Box<str>>,
    pub(super) timings_ms: Option<Timings>,
}

impl Class {
    pub(super) fn of(result: &ResultMessage) -> Self {
        match (&result.body, result.status) {
            (Body::Score(body), _) => match (body.stopped.map(|s| s.decision), body.ci95) {
                (Some(Decision::Worse), _) => Self::Worse,
                (Some(Decision::Futile), _) => Self::Unclear,
                (None, ci95) => Self::of_interval(ci95),
            },
            (Body::Loss(_), _) => Self::Validated,
            (Body::Merge(_), _) => Self::Merged,
            (Body::Error { .. }, Status::Failed) => Self::Failed,
            (Body::Error { .. }, Status::Rejected | Status::Scored) => Self::Rejected,
        }
    }

    fn of_interval(ci95: Option<[f64; 2]>) -> Self {
        match ci95 {
            Some([low, high]) if low > 0.0 && high > 0.0 => Self::Better,
            Some([low, high]) if low < 0.0 && high < 0.0 => Self::Worse,
            Some(_) | None => Self::Unclear,
        }
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::Unclear => "unclear",
            Self::Validated => "validated",
            Self::Merged => "merged",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
        }
    }
}

impl Verdict {
    pub(super) fn of(seen: &SeenResult) -> Self {
        let result = &seen.result;
        let class = Class::of(result);
        let boxed = |text: &String| Box::from(cut(text, NAME));
        let (score, loss, windows, error) = match &result.body {
            Body::Score(body) => (Some(body), None, Some(body.windows), None),
            Body::Loss(body) => (None, Some(body), Some(body.windows), None),
            // Its numbers are no candidate's, and its times are those of many passes: charts of candidates have neither.
            Body::Merge(body) => (None, None, Some(body.windows), None),
            Body::Error { error } => (None, None, None, Some(error)),
        };
        // The losses of some windows say as little as their mean.
        let whole = score.filter(|body| body.stopped.is_none());
        let code = error.map(|error| error.code.as_str());
        Self {
            at_ms: seen.at_ms,
            kind: result.kind,
            status: result.status,
            class,
            verdict: code.unwrap_or_else(|| class.word()),
            code,
            message: error.map(|error| cut(&error.message, MESSAGE).into()),
            retryable: error.map(|error| error.retryable),
            delta: result.delta(),
            stopped: result.stopped().copied(),
            ci95: score.and_then(|body| body.ci95),
            score: score.map(|body| body.score),
            loss: loss.map(|body| body.loss),
            loss_before: whole.map(|body| body.loss_before),
            loss_after: whole.map(|body| body.loss_after),
            windows,
            worker: boxed(&result.worker_id),
            attempt: result.attempt,
            model_version: result.model_version,
            trace_id: seen.trace_id.as_ref().map(boxed),
            key: seen.key.as_deref().map(Into::into),
            timings_ms: score.map(|body| body.timings_ms),
        }
    }
}
