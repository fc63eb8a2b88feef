//! The part of a result that depends on its status and kind: the numbers, or the error.

use rmpv::Value;
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::protocol::document::from_document;
use crate::protocol::failure::ErrorBody;
use crate::protocol::merge::MergeBody;
use crate::protocol::stop::Stopped;

/// How many values a sketch has.
pub const SKETCH_BINS: usize = 64;

/// The part of a result that depends on its status and kind.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Body {
    /// A scored candidate.
    Score(Box<ScoreBody>),
    /// A measured model.
    Loss(LossBody),
    /// Candidates that were measured together.
    Merge(Box<MergeBody>),
    /// Neither.
    Error {
        /// Why.
        error: ErrorBody,
    },
}

/// The part of a result that has no numbers.
#[derive(Deserialize)]
struct Refused {
    error: ErrorBody,
}

/// The first form that it has. What serde derives for this does not say what is wrong with it, and
/// does not know that null is absent.
impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Value::deserialize(deserializer)?;
        let score = match from_document(&fields) {
            Ok(score) => return Ok(Self::Score(Box::new(score))),
            Err(why) => why,
        };
        let loss = match from_document(&fields) {
            Ok(loss) => return Ok(Self::Loss(loss)),
            Err(why) => why,
        };
        let merge = match from_document(&fields) {
            Ok(merge) => return Ok(Self::Merge(Box::new(merge))),
            Err(why) => why,
        };
        let error = match from_document::<Refused>(&fields) {
            Ok(refused) => {
                let error = refused.error;
                return Ok(Self::Error { error });
            }
            Err(why) => why,
        };
        let has = |name: &str| !fields[name].is_nil();
        let kinds = (has("error"), has("loss"), has("joint"));
        Err(D::Error::custom(match kinds {
            (true, _, _) => error,
            (false, true, _) => loss,
            (false, false, true) => merge,
            (false, false, false) => score,
        }))
    }
}

/// The numbers of a scored candidate. Full precision, never NaN or infinite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ScoreBody {
    /// max(0, delta).
    pub score: f64,
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
    /// Windows measured.
    pub windows: u64,
    /// Targets counted.
    pub tokens: u64,
    /// SHA-256 of the exact windows, hex.
    pub plan: String,
    /// What was measured.
    pub candidate: CandidateFacts,
    /// ONNX Runtime's name of what ran the model.
    pub execution_provider: String,
    /// The device.
    pub device: String,
    /// Element type of the weights.
    pub precision: String,
    /// Where the time went, milliseconds.
    pub timings_ms: Timings,
    /// Given where the plan was not measured whole because its end was decided: the numbers above are then those of
    /// the windows that ran, their mean is biased, `score` is 0, and `stderr` and `ci95` are null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Stopped>,
}

/// Facts about a candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CandidateFacts {
    /// Of the bytes as fetched, hex.
    pub sha256: String,
    /// Tensors touched.
    pub tensors: u64,
    /// Entries sent.
    pub entries: u64,
    /// Entries whose weight changed after rounding.
    pub effective_entries: u64,
    /// Euclidean norm of the values as sent.
    pub l2_norm: f64,
    /// Min-hash sketch of the changed weights, 64 values; null where no changed weight fell into a bin.
    /// Salted with the plan: only sketches of one plan can be compared.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "whole_sketch"
    )]
    #[schemars(length(min = SKETCH_BINS, max = SKETCH_BINS))]
    pub sketch: Vec<Option<u64>>,
}

/// An estimate, from the sketches in two results of one plan, of how many of the weights that either
/// candidate changes both change, 0 to 1, with a standard error of at most 1/16; none where neither
/// changes any.
pub fn similarity(one: &[Option<u64>], other: &[Option<u64>]) -> Option<f64> {
    let pairs = || one.iter().zip(other);
    let filled = pairs().filter(|(a, b)| a.is_some() || b.is_some()).count();
    let equal = pairs().filter(|(a, b)| a.is_some() && a == b).count();
    #[expect(clippy::cast_precision_loss, reason = "at most 64")]
    let ratio = |a: usize, b: usize| a as f64 / b as f64;
    (filled > 0).then(|| ratio(equal, filled))
}

fn whole_sketch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Option<u64>>, D::Error> {
    let sketch = Vec::deserialize(deserializer)?;
    match sketch.len() {
        SKETCH_BINS => Ok(sketch),
        places => Err(D::Error::custom(format!(
            "must have {SKETCH_BINS} places, not {places}"
        ))),
    }
}

/// Milliseconds per stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// Waiting for the candidate's turn on the device.
    pub queued: f64,
    /// Getting the bytes.
    pub fetch: f64,
    /// Decoding and checking them.
    pub decode: f64,
    /// Writing the new values.
    pub apply: f64,
    /// Running the model.
    pub forward: f64,
    /// Copying the baseline back.
    pub restore: f64,
    /// From delivery to verdict.
    pub total: f64,
}

/// The numbers of a measured model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LossBody {
    /// Nats per target.
    pub loss: f64,
    /// Windows measured.
    pub windows: u64,
    /// Targets counted.
    pub tokens: u64,
    /// SHA-256 of the exact windows, hex.
    pub plan: String,
}
