//! Why a job was not scored: the error codes of the wire, what each means for the job, and the
//! stage that refused it. An error here always carries its decision; nobody guesses from text.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What became of a job, as the `status` of its result says it.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    JsonSchema,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[strum(serialize_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The job was evaluated.
    Scored,
    /// The job or its candidate is at fault; retrying cannot help.
    Rejected,
    /// The operation failed; this says nothing about the candidate.
    Failed,
}

impl Status {
    /// The word used on the wire and in routing keys.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// What is done with a job that ended in an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Answer at once: trying again cannot change the verdict.
    Answer,
    /// Climb the retry ladder; at its end answer `failed` and park a copy.
    Retry,
    /// Answer at once and park a copy: somebody has to look at it.
    Park,
}

/// A stable error code of the wire.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    JsonSchema,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[strum(serialize_all = "snake_case")]
#[serde(rename_all = "snake_case")]
#[expect(
    missing_docs,
    reason = "each code is specified in the README's table under its own name"
)]
pub enum Code {
    InvalidJob,
    ModelMismatch,
    ModelVersionMismatch,
    ModelVersionUnavailable,
    UnknownShard,
    CandidateTooLarge,
    CandidateDigestMismatch,
    CandidateMalformed,
    CandidateUnknownTensor,
    CandidateShapeMismatch,
    CandidateIndexOutOfRange,
    CandidateDuplicateIndex,
    CandidateNonFinite,
    CandidateEmpty,
    CandidateUrlForbidden,
    CandidateUnavailable,
    NonFiniteLoss,
    DeadlineExceeded,
    ScoreTimeout,
    OutOfMemory,
    InferenceFailed,
    Poisoned,
}

impl Code {
    /// The word used on the wire.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The status a result with this code carries.
    pub fn status(self) -> Status {
        match self {
            Self::InvalidJob
            | Self::ModelMismatch
            | Self::ModelVersionMismatch
            | Self::UnknownShard
            | Self::CandidateTooLarge
            | Self::CandidateDigestMismatch
            | Self::CandidateMalformed
            | Self::CandidateUnknownTensor
            | Self::CandidateShapeMismatch
            | Self::CandidateIndexOutOfRange
            | Self::CandidateDuplicateIndex
            | Self::CandidateNonFinite
            | Self::CandidateEmpty
            | Self::CandidateUrlForbidden
            | Self::NonFiniteLoss => Status::Rejected,
            Self::ModelVersionUnavailable
            | Self::CandidateUnavailable
            | Self::DeadlineExceeded
            | Self::ScoreTimeout
            | Self::OutOfMemory
            | Self::InferenceFailed
            | Self::Poisoned => Status::Failed,
        }
    }

    /// Whether a worker tries such a job again by itself.
    pub fn remedy(self) -> Remedy {
        match self {
            Self::CandidateUnavailable | Self::ModelVersionUnavailable | Self::InferenceFailed => {
                Remedy::Retry
            }
            Self::InvalidJob
            | Self::ModelMismatch
            | Self::ModelVersionMismatch
            | Self::UnknownShard
            | Self::CandidateTooLarge
            | Self::CandidateDigestMismatch
            | Self::CandidateMalformed
            | Self::CandidateUnknownTensor
            | Self::CandidateShapeMismatch
            | Self::CandidateIndexOutOfRange
            | Self::CandidateDuplicateIndex
            | Self::CandidateNonFinite
            | Self::CandidateEmpty
            | Self::CandidateUrlForbidden
            | Self::NonFiniteLoss
            | Self::DeadlineExceeded
            | Self::ScoreTimeout
            | Self::OutOfMemory => Remedy::Answer,
            Self::Poisoned => Remedy::Park,
        }
    }

    /// Whether the candidate's own bytes prove the refusal, so that any worker with the same
    /// model would say the same and the result may be stored.
    pub fn proven_by_candidate(self) -> bool {
        match self {
            Self::CandidateMalformed
            | Self::CandidateUnknownTensor
            | Self::CandidateShapeMismatch
            | Self::CandidateIndexOutOfRange
            | Self::CandidateDuplicateIndex
            | Self::CandidateNonFinite
            | Self::CandidateEmpty
            | Self::NonFiniteLoss => true,
            Self::InvalidJob
            | Self::ModelMismatch
            | Self::ModelVersionMismatch
            | Self::ModelVersionUnavailable
            | Self::UnknownShard
            | Self::CandidateTooLarge
            | Self::CandidateDigestMismatch
            | Self::CandidateUrlForbidden
            | Self::CandidateUnavailable
            | Self::DeadlineExceeded
            | Self::ScoreTimeout
            | Self::OutOfMemory
            | Self::InferenceFailed
            | Self::Poisoned => false,
        }
    }

    /// Whether the sender may usefully submit the same job again later.
    pub fn retryable(self) -> bool {
        self.status() == Status::Failed && !matches!(self, Self::DeadlineExceeded | Self::Poisoned)
    }
}

/// Characters of a message.
const MAX_MESSAGE_CHARS: usize = 400;

/// A typed refusal: the code decides, the message explains, the detail is for programs.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct Failure {
    /// What it means for the job.
    pub code: Code,
    /// What was wrong and where, for a person.
    pub message: String,
    /// The same for a program; an object, possibly empty.
    pub detail: Map<String, Value>,
}

impl Failure {
    /// A failure without detail. A long message is cut: it may quote a stranger, whose words may be
    /// as long as a body.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if let Some((end, _)) = message.char_indices().nth(MAX_MESSAGE_CHARS) {
            message.truncate(end);
            message.push_str("...");
        }
        Self {
            code,
            message,
            detail: Map::new(),
        }
    }

    /// Adds one fact for programs.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.detail.insert(key.to_owned(), value.into());
        self
    }

    /// The `error` object of a result.
    pub fn to_error(&self) -> ErrorBody {
        ErrorBody {
            code: self.code,
            message: self.message.clone(),
            retryable: self.code.retryable(),
            detail: self.detail.clone(),
        }
    }
}

/// The `error` of a result that is not scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// What it means for the job.
    pub code: Code,
    /// What was wrong and where.
    pub message: String,
    /// Whether submitting the same job again later can help.
    pub retryable: bool,
    /// Facts for programs.
    pub detail: Map<String, Value>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use strum::VariantArray;

    #[test]
    fn the_word_of_a_code_is_its_serde_name() {
        assert_eq!(Code::VARIANTS.len(), 22);
        for code in Code::VARIANTS {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }

    #[test]
    fn only_failures_are_retried_and_never_stored() {
        let retried = |code: &&Code| code.remedy() == Remedy::Retry;
        for code in Code::VARIANTS.iter().filter(retried) {
            assert_eq!(code.status(), Status::Failed, "{code:?}");
            assert!(!code.proven_by_candidate(), "{code:?}");
        }
        let stored = |code: &&Code| code.proven_by_candidate();
        for code in Code::VARIANTS.iter().filter(stored) {
            assert_eq!(code.status(), Status::Rejected, "{code:?}");
        }
        let retried: Vec<&str> = Code::VARIANTS
            .iter()
            .filter(retried)
            .map(|c| c.as_str())
            .collect();
        let expected = [
            "model_version_unavailable",
            "candidate_unavailable",
            "inference_failed",
        ];
        assert_eq!(retried, expected);
    }
}
