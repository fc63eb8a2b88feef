//! Job messages, and the checks that turn one into a valid [`Job`]. The JSON Schema is generated from
//! these types. Encodings, and who gets the answer when a body is not a job, are in `job`.

use rmpv::Value;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub use super::blob::Blob;
pub use super::candidate::CandidateMessage;
pub use super::member::MemberMessage;
pub use super::version::V1;
use crate::protocol::context::Context;
use crate::protocol::failure::Failure;
use crate::protocol::heartbeat::Ability;
use crate::protocol::job::{Job, Task, Validation, invalid};
use crate::protocol::member::check_members;
use crate::protocol::merge::OnRejected;
use crate::protocol::stop::Stop;

/// A score job as the wire carries it (without `kind`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreMessage {
    /// Always 1.
    pub v: V1,
    /// Names the job; 1 to 128 of `[A-Za-z0-9._:-]`.
    #[schemars(regex(pattern = r"^[A-Za-z0-9._:-]{1,128}$"))]
    pub submission_id: String,
    /// If given it must be the worker's model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The version of the weights the candidate was made from.
    pub model_version: u64,
    /// The update to judge.
    pub candidate: CandidateMessage,
    /// The windows to judge it on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<ScoreValidation>,
    /// Unix milliseconds after which the answer is of no use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Echoed untouched; at most 4 KiB encoded.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub context: Option<Value>,
}

/// Which windows of the held-out data a candidate is judged on, and whether some of them may decide.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreValidation {
    /// Shard ids, order kept, none twice; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub shards: Option<Vec<u64>>,
    /// Chooses the windows; 0 to 64 characters.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub nonce: String,
    /// Lets the evaluation end early; default never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
}

/// A validate job as the wire carries it (without `kind`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ValidateMessage {
    /// Always 1.
    pub v: V1,
    /// Names the job; 1 to 128 of `[A-Za-z0-9._:-]`.
    #[schemars(regex(pattern = r"^[A-Za-z0-9._:-]{1,128}$"))]
    pub submission_id: String,
    /// If given it must be the worker's model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// If given it must be the worker's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_version: Option<u64>,
    /// The windows to measure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
    /// Unix milliseconds after which the answer is of no use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Echoed untouched; at most 4 KiB encoded.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub context: Option<Value>,
}

/// A merge job as the wire carries it (without `kind`): what candidates are worth together, and each in the company of the
/// others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MergeMessage {
    /// Always 1.
    pub v: V1,
    /// Names the job; 1 to 128 of `[A-Za-z0-9._:-]`.
    #[schemars(regex(pattern = r"^[A-Za-z0-9._:-]{1,128}$"))]
    pub submission_id: String,
    /// If given it must be the worker's model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The version of the weights the candidates were made from.
    pub model_version: u64,
    /// At least two, and at most the workers' `candidates.max_members`; no id twice.
    #[schemars(length(min = 2))]
    pub members: Vec<MemberMessage>,
    /// What becomes of the merge if a member is refused; default `drop`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_rejected: Option<OnRejected>,
    /// The windows to judge them on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
    /// Unix milliseconds after which the answer is of no use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Echoed untouched; at most 4 KiB encoded.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub context: Option<Value>,
}

/// A job as the wire carries it.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[schemars(title = "score_job.v1")]
pub enum JobMessage {
    /// Judge a candidate.
    Score(ScoreMessage),
    /// Measure the current model.
    Validate(ValidateMessage),
    /// Judge candidates together.
    Merge(MergeMessage),
}

impl JobMessage {
    /// What a worker must know to answer it.
    pub fn needs(&self) -> Ability {
        match self {
            Self::Score(message) => match &message.validation {
                Some(ScoreValidation { stop: Some(_), .. }) => Ability::Stop,
                Some(ScoreValidation { stop: None, .. }) | None => Ability::Score,
            },
            Self::Validate(_) => Ability::Validate,
            Self::Merge(_) => Ability::Merge,
        }
    }

    /// Names the job.
    pub fn submission_id(&self) -> &str {
        match self {
            Self::Score(message) => &message.submission_id,
            Self::Validate(message) => &message.submission_id,
            Self::Merge(message) => &message.submission_id,
        }
    }

    /// The version of the weights that it names; a validate job may name none.
    pub fn model_version(&self) -> Option<u64> {
        match self {
            Self::Score(message) => Some(message.model_version),
            Self::Validate(message) => message.model_version,
            Self::Merge(message) => Some(message.model_version),
        }
    }
}

fn check_validation(validation: Option<Validation>) -> Result<Validation, Failure> {
    let validation = validation.unwrap_or_default();
    if validation.nonce.chars().count() > 64 {
        return Err(invalid("validation.nonce: longer than 64 characters"));
    }
    let shards = validation.shards.as_deref().unwrap_or_default();
    let mut seen = std::collections::HashSet::new();
    if let Some(repeated) = shards.iter().find(|id| !seen.insert(**id)) {
        return Err(invalid(format!(
            "validation.shards: {repeated} is given twice"
        )));
    }
    if validation.shards.as_ref().is_some_and(Vec::is_empty) {
        return Err(invalid(
            "validation.shards: empty; leave it out to use all shards",
        ));
    }
    Ok(validation)
}

impl ScoreMessage {
    /// `text` is the context as it was sent, if that was JSON.
    pub(super) fn check(self, text: Option<Box<RawValue>>) -> Result<Job, Failure> {
        let context = self.context.map(|context| Context::new(context, text));
        let ScoreValidation {
            shards,
            nonce,
            stop,
        } = self.validation.unwrap_or_default();
        let stop = stop.map(Stop::checked).transpose();
        Ok(Job {
            submission_id: self.submission_id,
            model: self.model,
            task: Task::Score {
                model_version: self.model_version,
                candidate: Box::new(self.candidate.try_into()?),
                stop: stop.map_err(|why| invalid(format!("validation.stop.{why}")))?,
            },
            validation: check_validation(Some(Validation { shards, nonce }))?,
            deadline_ms: self.deadline_ms,
            context: context.transpose()?,
        })
    }
}

impl ValidateMessage {
    /// `text` is the context as it was sent, if that was JSON.
    pub(super) fn check(self, text: Option<Box<RawValue>>) -> Result<Job, Failure> {
        let context = self.context.map(|context| Context::new(context, text));
        Ok(Job {
            submission_id: self.submission_id,
            model: self.model,
            task: Task::Validate {
                model_version: self.model_version,
            },
            validation: check_validation(self.validation)?,
            deadline_ms: self.deadline_ms,
            context: context.transpose()?,
        })
    }
}

impl MergeMessage {
    /// `text` is the context as it was sent, if that was JSON.
    pub(super) fn check(self, text: Option<Box<RawValue>>) -> Result<Job, Failure> {
        let context = self.context.map(|context| Context::new(context, text));
        Ok(Job {
            submission_id: self.submission_id,
            model: self.model,
            task: Task::Merge {
                model_version: self.model_version,
                members: check_members(self.members)?,
                on_rejected: self.on_rejected.unwrap_or_default(),
            },
            validation: check_validation(self.validation)?,
            deadline_ms: self.deadline_ms,
            context: context.transpose()?,
        })
    }
}

#[cfg(test)]
mod tests;
