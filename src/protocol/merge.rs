//! The numbers of a merge: what its members are worth together, and each in the company of the others.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::failure::{ErrorBody, Status};
use super::result::{CandidateFacts, Timings};
use super::word::words;

words! {
    /// What becomes of a merge one of whose members is refused.
    #[derive(Default)]
    pub enum OnRejected {
        /// The others are merged, with the weights that they have.
        #[default]
        Drop,
        /// It is refused, too.
        Fail,
    }
}

/// The numbers of a merge. Full precision, never NaN or infinite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MergeBody {
    /// What the members do together.
    pub joint: Joint,
    /// Windows measured.
    pub windows: u64,
    /// Targets counted.
    pub tokens: u64,
    /// SHA-256 of the exact windows, hex.
    pub plan: String,
    /// Passes over the windows that ran, without the baseline.
    pub passes: u64,
    /// In ascending order of their ids.
    pub members: Vec<MergeMember>,
    /// What the contributions do not sum to.
    pub gap: GapBody,
    /// ONNX Runtime's name of what ran the model.
    pub execution_provider: String,
    /// The device.
    pub device: String,
    /// Element type of the weights.
    pub precision: String,
    /// Where the time went, milliseconds.
    pub timings_ms: Timings,
}

/// What all members do together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Joint {
    /// Loss before minus loss after, from per-window paired differences.
    pub delta: f64,
    /// Standard error of delta; null below two windows.
    pub stderr: Option<f64>,
    /// 95 % interval of delta by Student's t; null below two windows.
    pub ci95: Option<[f64; 2]>,
    /// Nats per target.
    pub loss_before: f64,
    /// Nats per target.
    pub loss_after: f64,
}

/// A member of a merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MergeMember {
    /// Its name in the job.
    pub id: String,
    /// `scored`; or why it was left out: `rejected` where it is at fault, `failed` where it could not be fetched.
    pub status: Status,
    /// Its weight in the merge.
    pub weight: f64,
    /// Why it was left out, unless it is scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    /// What was measured, without a sketch; `effective_entries` are those of this member alone, with its weight. This
    /// and the rest are given if it is scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<CandidateFacts>,
    /// The change of the loss by this member alone, with its weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alone: Option<Change>,
    /// The joint change minus that of all others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Change>,
    /// The mean of both: the Shapley value where the loss is quadratic in the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contribution: Option<Contribution>,
}

/// A change of the loss, positive where it falls.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Change {
    /// From per-window paired differences.
    pub delta: f64,
    /// Standard error of delta; null below two windows.
    pub stderr: Option<f64>,
}

/// What a member contributes to the joint change.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Contribution {
    /// (alone + last) / 2.
    pub value: f64,
    /// From per-window half-sums; null below two windows.
    pub stderr: Option<f64>,
    /// 95 % interval by Student's t; null below two windows.
    pub ci95: Option<[f64; 2]>,
}

/// What the contributions do not sum to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GapBody {
    /// The joint change minus the sum of the contributions; 0 for two members.
    pub value: f64,
    /// From per-window values; null below two windows.
    pub stderr: Option<f64>,
    /// Beyond 3 % of the largest contribution and beyond two standard errors: the contributions are then a guide, not
    /// a measure.
    pub large: bool,
}

impl MergeBody {
    /// Whether any worker with the same weights would say the same: the bytes of those left out prove why.
    pub fn may_be_stored(&self) -> bool {
        let errors = self.members.iter().filter_map(|m| m.error.as_ref());
        { errors }.all(|error| error.code.proven_by_candidate())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::encoding::Encoding;
    use crate::protocol::failure::{Code, Failure};
    use crate::protocol::job::Kind;
    use crate::protocol::result::{Body, JobRef, ResultMessage, ResultOrigin};

    const EXAMPLE: &str = include_str!("../../schemas/examples/valid/score_result.v1-merge.json");

    fn example() -> (ResultMessage, MergeBody) {
        let message = ResultMessage::decode(EXAMPLE.as_bytes(), Encoding::Json).unwrap();
        let Body::Merge(body) = message.body.clone() else {
            panic!("{message:?}")
        };
        (message, *body)
    }

    #[test]
    fn a_merge_is_stored_where_the_bytes_of_those_left_out_prove_why() {
        let (message, mut body) = example();
        assert!(message.may_be_stored());
        let left_out = |code| MergeMember {
            error: Some(Failure::new(code, "x").to_error()),
            ..body.members[0].clone()
        };
        let (proven, unavailable) = (Code::CandidateMalformed, Code::CandidateUnavailable);
        let (proven, unavailable) = (left_out(proven), left_out(unavailable));
        body.members.push(proven);
        assert!(body.may_be_stored());
        body.members.push(unavailable);
        assert!(!body.may_be_stored());
    }

    #[test]
    fn the_largest_merge_fits_into_64_kilobytes() {
        let (message, mut body) = example();
        let member = body.members.iter().find(|m| m.error.is_none()).unwrap();
        let mut member = member.clone();
        member.id = "m".repeat(64);
        let number = -1.234_567_890_123_456_7e-5;
        member.contribution = Some(Contribution {
            value: number,
            stderr: Some(number),
            ci95: Some([number; 2]),
        });
        let change = Some(Change {
            delta: number,
            stderr: Some(number),
        });
        (member.alone, member.last, member.weight) = (change, change, number);
        body.members = vec![member; 64];
        let message = ResultMessage {
            body: Body::Merge(Box::new(body)),
            context: None,
            ..message
        };
        for encoding in [Encoding::Json, Encoding::MessagePack] {
            let bytes = encoding.encode(&message).unwrap();
            assert!(bytes.len() <= 64 * 1024, "{encoding:?}: {}", bytes.len());
            assert_eq!(
                ResultMessage::decode(&bytes, encoding).as_ref(),
                Ok(&message)
            );
        }
    }

    #[test]
    fn a_stored_merge_answers_a_merge_only() {
        let (message, _) = example();
        let message = message.with_context(None);
        let origin = ResultOrigin {
            model: message.model.clone(),
            model_version: message.model_version,
            weights_id: message.weights_id.clone().unwrap(),
            package_id: message.package_id.clone().unwrap(),
            worker_id: message.worker_id.clone(),
            incarnation: message.incarnation.clone(),
        };
        let text = serde_json::to_string(&message).unwrap();
        let read = |kind| {
            let job_ref = JobRef {
                submission_id: message.submission_id.clone(),
                kind,
                model_version: Some(message.model_version),
                context: None,
                attempt: 1,
            };
            origin.read(&text, &job_ref)
        };
        assert_eq!(read(Kind::Merge).as_ref(), Ok(&message));
        assert!(read(Kind::Score).is_err());
    }
}
