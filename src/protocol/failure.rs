//! Why a job was not scored: the error codes, and what each means for the job. The code carries the
//! decision; nothing is decided from an error's text.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::protocol::word::words;

words! {
    /// What became of a job, as the `status` of its result says it.
    pub enum Status {
        /// The job was evaluated.
        Scored,
        /// The job or its candidate is at fault; retrying cannot help.
        Rejected,
        /// The operation failed; this says nothing about the candidate.
        Failed,
    }
}

/// What a worker does with a job that ended in an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Answer at once: a retry cannot change the result.
    Answer,
    /// Retry after each delay; then answer `failed` and dead-letter a copy.
    Retry,
    /// Answer at once and dead-letter a copy: somebody has to look at it.
    Park,
}

words! {
    /// A stable error code of the wire.
    pub enum Code {
        /// The body does not decode or breaks the schema. The message names the field.
        InvalidJob,
        /// The job's `model` is another model.
        ModelMismatch,
        /// The job is for an older version than the worker's. The detail is `{worker, job}`.
        ModelVersionMismatch,
        /// The job is for a newer version, and still is after the retries.
        ModelVersionUnavailable,
        /// The job names a shard that the package does not have. The detail is `{missing, available}`.
        UnknownShard,
        /// The bytes, the inflated bytes or the entries exceed a limit, as declared or as found.
        CandidateTooLarge,
        /// `sha256` or `size` differs from the bytes.
        CandidateDigestMismatch,
        /// The bytes do not parse.
        CandidateMalformed,
        /// The candidate names a tensor that the model does not have, or that candidates may not change.
        CandidateUnknownTensor,
        /// A tensor's shape is not the model's.
        CandidateShapeMismatch,
        /// An index is negative or past the end of its tensor.
        CandidateIndexOutOfRange,
        /// A tensor has the same index twice.
        CandidateDuplicateIndex,
        /// NaN or infinity in the values or in the updated weights.
        CandidateNonFinite,
        /// The candidate has no entries.
        CandidateEmpty,
        /// The URL's scheme, host, port, path or resolved address is not allowed.
        CandidateUrlForbidden,
        /// The candidate could not be fetched, even after the retries.
        CandidateUnavailable,
        /// The candidate makes a window's loss NaN or infinite.
        NonFiniteLoss,
        /// `deadline_ms` passed before the job was evaluated, or would pass before the next retry.
        DeadlineExceeded,
        /// The evaluation took longer than `worker.score_timeout` or half of `amqp.consumer_timeout`, or made no
        /// progress; or it was not begun, because the job, with those before it, would need more than that half. The
        /// detail is then `{needed_ms, limit_ms}`.
        ScoreTimeout,
        /// The device ran out of memory, even with one window at a time.
        OutOfMemory,
        /// ONNX Runtime failed in any other way, even after the retries.
        InferenceFailed,
        /// The job was being scored when `amqp.poison_after` workers died. The detail is `{deaths, workers}`;
        /// of a merge, `members` names those that were worked on by themselves.
        Poisoned,
    }
}

impl Code {
    /// What the code means: the status of the result, what a worker does with the job, and whether the
    /// candidate's own bytes prove the refusal.
    fn meaning(self) -> (Status, Remedy, bool) {
        match self {
            Self::InvalidJob
            | Self::ModelMismatch
            | Self::ModelVersionMismatch
            | Self::UnknownShard
            | Self::CandidateTooLarge
            | Self::CandidateDigestMismatch
            | Self::CandidateUrlForbidden => (Status::Rejected, Remedy::Answer, false),
            Self::CandidateMalformed
            | Self::CandidateUnknownTensor
            | Self::CandidateShapeMismatch
            | Self::CandidateIndexOutOfRange
            | Self::CandidateDuplicateIndex
            | Self::CandidateNonFinite
            | Self::CandidateEmpty
            | Self::NonFiniteLoss => (Status::Rejected, Remedy::Answer, true),
            Self::DeadlineExceeded | Self::ScoreTimeout | Self::OutOfMemory => {
                (Status::Failed, Remedy::Answer, false)
            }
            Self::ModelVersionUnavailable | Self::CandidateUnavailable | Self::InferenceFailed => {
                (Status::Failed, Remedy::Retry, false)
            }
            Self::Poisoned => (Status::Failed, Remedy::Park, false),
        }
    }

    /// The status a result with this code carries.
    pub fn status(self) -> Status {
        let (status, ..) = self.meaning();
        status
    }

    /// What a worker does with such a job.
    pub fn remedy(self) -> Remedy {
        let (_, remedy, _) = self.meaning();
        remedy
    }

    /// Whether the candidate's own bytes prove the refusal, so that any worker with the same
    /// model would say the same and the result may be stored.
    pub fn proven_by_candidate(self) -> bool {
        let (.., proven) = self.meaning();
        proven
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
    /// A failure without detail. A long message is cut: it may quote untrusted text of any length.
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

impl ErrorBody {
    /// Whether the candidate's bytes prove it; of a merge, those of every member that its detail names, because one that
    /// was only away might have changed it.
    pub fn is_proven(&self) -> bool {
        let members = self.detail.get("members").and_then(Value::as_array);
        let mut codes = members.into_iter().flatten().map(|member| &member["code"]);
        let proven = |code: &Value| {
            let code = serde_json::from_value::<Code>(code.clone());
            code.is_ok_and(Code::proven_by_candidate)
        };
        self.code.proven_by_candidate() && codes.all(proven)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use strum::VariantArray as _;

    use super::*;

    /// The contract: each code's word and status, what a worker does with the job, whether the result may be
    /// stored, and whether the sender may submit the job again.
    #[rustfmt::skip]
    const CONTRACT: [(Code, &str, Status, Remedy, bool, bool); 22] = {
        use Code as C;
        use Remedy::{Answer, Park, Retry};
        use Status::{Failed, Rejected};
        [
            (C::InvalidJob,                "invalid_job",                  Rejected, Answer, false, false),
            (C::ModelMismatch,             "model_mismatch",               Rejected, Answer, false, false),
            (C::ModelVersionMismatch,      "model_version_mismatch",       Rejected, Answer, false, false),
            (C::ModelVersionUnavailable,   "model_version_unavailable",    Failed,   Retry,  false, true),
            (C::UnknownShard,              "unknown_shard",                Rejected, Answer, false, false),
            (C::CandidateTooLarge,         "candidate_too_large",          Rejected, Answer, false, false),
            (C::CandidateDigestMismatch,   "candidate_digest_mismatch",    Rejected, Answer, false, false),
            (C::CandidateMalformed,        "candidate_malformed",          Rejected, Answer, true,  false),
            (C::CandidateUnknownTensor,    "candidate_unknown_tensor",     Rejected, Answer, true,  false),
            (C::CandidateShapeMismatch,    "candidate_shape_mismatch",     Rejected, Answer, true,  false),
            (C::CandidateIndexOutOfRange,  "candidate_index_out_of_range", Rejected, Answer, true,  false),
            (C::CandidateDuplicateIndex,   "candidate_duplicate_index",    Rejected, Answer, true,  false),
            (C::CandidateNonFinite,        "candidate_non_finite",         Rejected, Answer, true,  false),
            (C::CandidateEmpty,            "candidate_empty",              Rejected, Answer, true,  false),
            (C::CandidateUrlForbidden,     "candidate_url_forbidden",      Rejected, Answer, false, false),
            (C::CandidateUnavailable,      "candidate_unavailable",        Failed,   Retry,  false, true),
            (C::NonFiniteLoss,             "non_finite_loss",              Rejected, Answer, true,  false),
            (C::DeadlineExceeded,          "deadline_exceeded",            Failed,   Answer, false, false),
            (C::ScoreTimeout,              "score_timeout",                Failed,   Answer, false, true),
            (C::OutOfMemory,               "out_of_memory",                Failed,   Answer, false, true),
            (C::InferenceFailed,           "inference_failed",             Failed,   Retry,  false, true),
            (C::Poisoned,                  "poisoned",                     Failed,   Park,   false, false),
        ]
    };

    #[test]
    fn the_contract_has_every_code_once_in_the_order_of_the_type() {
        let listed: Vec<Code> = CONTRACT.iter().map(|row| row.0).collect();
        assert_eq!(listed, Code::VARIANTS);
    }

    #[test]
    fn every_code_is_what_the_contract_says() {
        for (code, word, status, remedy, stored, again) in CONTRACT {
            assert_eq!(code.as_str(), word);
            assert_eq!(code.status(), status, "{word}");
            assert_eq!(code.remedy(), remedy, "{word}");
            assert_eq!(code.proven_by_candidate(), stored, "{word}");
            assert_eq!(code.retryable(), again, "{word}");
        }
    }

    #[test]
    fn every_code_is_written_and_read_by_its_word() {
        for (code, word, ..) in CONTRACT {
            assert_eq!(serde_json::to_value(code).unwrap(), word);
            assert_eq!(serde_json::from_value::<Code>(word.into()).unwrap(), code);
        }
    }

    #[test]
    fn a_merge_is_refused_for_good_where_the_bytes_of_all_that_were_left_out_prove_why() {
        let refused = |codes: &[&str]| {
            let members: Vec<Value> = codes
                .iter()
                .map(|code| json!({"id": "m", "code": code}))
                .collect();
            let failure = Failure::new(Code::CandidateEmpty, "x").with("members", members);
            failure.to_error().is_proven()
        };
        assert!(refused(&[]));
        assert!(refused(&["candidate_empty", "non_finite_loss"]));
        for unproven in [
            "candidate_unavailable",
            "candidate_too_large",
            "of_the_future",
        ] {
            assert!(!refused(&["candidate_empty", unproven]), "{unproven}");
        }
    }
}
