//! Results as aggregators read them, their identity (`message_id`) and the key under which the
//! ones that any worker would repeat are stored. Pure.

use rmpv::Value;
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest, Sha256};

use crate::protocol::context::Context;
use crate::protocol::document::{from_document, from_json};
use crate::protocol::failure::{Code, ErrorBody, Failure, Status};
use crate::protocol::job::{Candidate, Kind};
use crate::protocol::label::Label;
use crate::protocol::message::V1;

/// How many values a sketch has.
pub const SKETCH_BINS: usize = 64;

/// A result message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "score_result.v1")]
pub struct ResultMessage {
    /// Always 1.
    pub v: V1,
    /// The kind of the job.
    pub kind: Kind,
    /// The job's name.
    pub submission_id: String,
    /// The job's context, untouched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub context: Option<Context>,
    /// The model's name.
    pub model: String,
    /// The version the job names, else the worker's.
    pub model_version: u64,
    /// The weights of the worker that answered.
    pub weights_id: Option<String>,
    /// The package of the worker that answered.
    pub package_id: Option<String>,
    /// Who answered.
    pub worker_id: String,
    /// Which start of that worker.
    pub incarnation: String,
    /// 1 for the first try, counted over the retry ladder.
    pub attempt: u32,
    /// What became of the job.
    pub status: Status,
    /// The numbers or the error.
    #[serde(flatten)]
    pub body: Body,
    /// When it was decided, unix milliseconds.
    pub scored_at_ms: u64,
}

/// The part of a result that depends on its status and kind.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Body {
    /// A scored candidate.
    Score(Box<ScoreBody>),
    /// A measured model.
    Loss(LossBody),
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
        let error = match from_document::<Refused>(&fields) {
            Ok(refused) => {
                let error = refused.error;
                return Ok(Self::Error { error });
            }
            Err(why) => why,
        };
        let has = |name: &str| !fields[name].is_nil();
        Err(D::Error::custom(match (has("error"), has("loss")) {
            (true, _) => error,
            (false, true) => loss,
            (false, false) => score,
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

/// Who answers, with which weights: one immutable snapshot per job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultOrigin {
    /// The model's name.
    pub model: String,
    /// The worker's version.
    pub model_version: u64,
    /// Its weights.
    pub weights_id: String,
    /// Its package.
    pub package_id: String,
    /// Its name.
    pub worker_id: String,
    /// Which start of it.
    pub incarnation: String,
}

/// Whose job is answered.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRef {
    /// The job's name.
    pub submission_id: String,
    /// Its kind.
    pub kind: Kind,
    /// The version it names.
    pub model_version: Option<u64>,
    /// Its context.
    pub context: Option<Context>,
    /// Which try this is, from 1.
    pub attempt: u32,
}

impl ResultOrigin {
    /// A stored result, if it is what this worker would have answered: Redis is shared, and what is
    /// read from it is published.
    ///
    /// # Errors
    /// Why it is not.
    pub fn read(&self, text: &str, job_ref: &JobRef) -> Result<ResultMessage, String> {
        let read = from_json::<ResultMessage>(text.as_bytes());
        let message = read.map_err(|e| format!("it cannot be read: {e}"))?;
        let version = job_ref.model_version.unwrap_or(self.model_version);
        let same_job = message.submission_id == job_ref.submission_id
            && message.kind == job_ref.kind
            && (&message.model, message.model_version) == (&self.model, version)
            && message.weights_id.as_ref() == Some(&self.weights_id);
        if !same_job {
            return Err("it answers another job".into());
        }
        let fits = match (&message.body, message.status) {
            (Body::Score(_), Status::Scored) => message.kind == Kind::Score,
            (Body::Loss(_), Status::Scored) => message.kind == Kind::Validate,
            (Body::Error { error }, status) => error.code.status() == status,
            (Body::Score(_) | Body::Loss(_), Status::Rejected | Status::Failed) => false,
        };
        if !fits || !message.may_be_stored() {
            return Err("its parts contradict each other".into());
        }
        Ok(message)
    }
}

/// The verdict on a job.
pub type Verdict = Result<Body, Failure>;

impl ResultMessage {
    /// Puts a verdict under its heading.
    pub fn new(answerer: &ResultOrigin, job_ref: JobRef, verdict: Verdict) -> Self {
        let (status, body) = match verdict {
            Ok(body) => (Status::Scored, body),
            Err(failure) => (
                failure.code.status(),
                Body::Error {
                    error: failure.to_error(),
                },
            ),
        };
        Self {
            v: V1,
            kind: job_ref.kind,
            submission_id: job_ref.submission_id,
            context: job_ref.context,
            model: answerer.model.clone(),
            model_version: job_ref.model_version.unwrap_or(answerer.model_version),
            weights_id: Some(answerer.weights_id.clone()),
            package_id: Some(answerer.package_id.clone()),
            worker_id: answerer.worker_id.clone(),
            incarnation: answerer.incarnation.clone(),
            attempt: job_ref.attempt,
            status,
            body,
            scored_at_ms: crate::util::clock::unix_ms(),
        }
    }

    /// Equal for every copy, so that a reader can drop duplicates.
    pub fn message_id(&self, key: Option<&Key>) -> String {
        let key = key.map_or("", |key| &key.0);
        format!(
            "{}:{}:{}:{key}",
            self.submission_id,
            self.model_version,
            self.status.as_str()
        )
    }

    /// Loss before minus loss after, of a scored candidate.
    pub fn delta(&self) -> Option<f64> {
        match &self.body {
            Body::Score(body) => Some(body.delta),
            Body::Loss(_) | Body::Error { .. } => None,
        }
    }

    /// Reads what a worker has published. `said` is what its message says of the body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &[u8], said: impl Into<Label>) -> Result<Self, String> {
        let label = said.into();
        let message: Self = from_document(&label.decode(body)?)?;
        let text = label.encoding().context_text(body).map(Context::Text);
        Ok(Self {
            context: text.or(message.context),
            ..message
        })
    }

    /// The error code, where there is one.
    pub fn code(&self) -> Option<Code> {
        match &self.body {
            Body::Error { error } => Some(error.code),
            Body::Score(_) | Body::Loss(_) => None,
        }
    }

    /// Whether any worker with the same weights would say the same.
    pub fn may_be_stored(&self) -> bool {
        match &self.body {
            Body::Score(_) | Body::Loss(_) => true,
            Body::Error { error } => error.code.proven_by_candidate(),
        }
    }
}

/// What a job asks, exactly: hex SHA-256 of a MessagePack array.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key(pub String);

impl Key {
    /// The key of a job on these weights and windows. `sha256` is the claimed digest for a URL,
    /// the real one for inline data.
    pub fn new(
        answerer: &ResultOrigin,
        job_ref: &JobRef,
        candidate: Option<(&Candidate, &[u8; 32])>,
        plan: &[u8; 32],
    ) -> Self {
        let nil = Value::Nil;
        let text = |t: &str| Value::from(t);
        let rule = candidate.map(|(c, _)| c.rule);
        let parts = Value::Array(vec![
            text(job_ref.kind.as_str()),
            text(&job_ref.submission_id),
            Value::from(job_ref.model_version.unwrap_or(answerer.model_version)),
            text(&answerer.package_id),
            text(&answerer.weights_id),
            candidate.map_or(nil.clone(), |(_, sha256)| text(&hex::encode(sha256))),
            candidate.map_or(nil.clone(), |(c, _)| text(c.format.as_str())),
            rule.map_or(nil.clone(), |r| text(r.semantics().as_str())),
            rule.and_then(crate::protocol::job::Rule::learning_rate)
                .map_or(nil, Value::from),
            text(&hex::encode(plan)),
        ]);
        let mut packed = Vec::new();
        let written = rmpv::encode::write_value(&mut packed, &parts);
        debug_assert!(written.is_ok(), "a Vec takes every write");
        Self(hex::encode(Sha256::digest(packed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::encoding::Encoding;

    fn answerer() -> ResultOrigin {
        ResultOrigin {
            model: "m".into(),
            model_version: 7,
            weights_id: "w".into(),
            package_id: "p".into(),
            worker_id: "a".into(),
            incarnation: "i".into(),
        }
    }

    fn job_ref() -> JobRef {
        JobRef {
            submission_id: "s".into(),
            kind: Kind::Validate,
            model_version: None,
            context: Some(Value::Map(vec![(1.into(), Value::Binary(vec![1, 2]))]).into()),
            attempt: 1,
        }
    }

    #[test]
    fn a_result_survives_both_encodings_with_full_precision() {
        let body = Body::Loss(LossBody {
            loss: 0.1 + 0.2,
            windows: 3,
            tokens: 9,
            plan: "x".into(),
        });
        let mut message = ResultMessage::new(&answerer(), job_ref(), Ok(body));
        let packed = Encoding::MessagePack.encode(&message).unwrap();
        let read = ResultMessage::decode(&packed, Encoding::MessagePack);
        assert_eq!(read.as_ref(), Ok(&message));
        message.context = None;
        let json = Encoding::Json.encode(&message).unwrap();
        assert_eq!(ResultMessage::decode(&json, Encoding::Json), Ok(message));
    }

    /// The result of a job, as it is published.
    fn answered(body: &[u8], encoding: Encoding) -> Vec<u8> {
        let job = crate::protocol::job::decode(body, encoding).unwrap();
        let job_ref = JobRef {
            context: job.context,
            ..job_ref()
        };
        let failure = Failure::new(Code::OutOfMemory, "x");
        let message = ResultMessage::new(&answerer(), job_ref, Err(failure));
        encoding.encode(&message).unwrap()
    }

    #[test]
    fn a_context_of_json_comes_back_to_the_digit() {
        let context = r#"{"a":[1.10,1e400,-0.0,7.0,123456789012345678901234567890,1E+2,0.1e1],"b":null,"é\u00e9":{"context":{}}}"#;
        let body =
            format!(r#"{{"v":1,"kind":"validate","submission_id":"s","context": {context}}}"#);
        let answer = answered(body.as_bytes(), Encoding::Json);
        let text = String::from_utf8(answer.clone()).unwrap();
        assert!(text.contains(&format!(r#""context":{context},"#)), "{text}");
        // And by who reads results and hands them on.
        let read = ResultMessage::decode(&answer, Encoding::Json).unwrap();
        assert_eq!(Encoding::Json.encode(&read).unwrap(), answer);
        assert!(Encoding::MessagePack.encode(&read).is_err());
    }

    #[test]
    fn a_context_of_messagepack_comes_back_with_every_type() {
        let numbers = vec![
            Value::F32(0.1),
            Value::F32(7.0),
            Value::F64(7.0),
            Value::F64(-0.0),
            Value::F64(f64::NAN),
            Value::F32(f32::INFINITY),
            u64::MAX.into(),
            i64::MIN.into(),
        ];
        let context = Value::Map(vec![
            ("numbers".into(), Value::Array(numbers)),
            (Value::F64(1.0), Value::Nil),
            (1.into(), Value::Binary(vec![0xff])),
            (Value::Array(vec![]), Value::Boolean(false)),
            ("time".into(), Value::Ext(-1, vec![0; 12])),
            ("own".into(), Value::Ext(5, vec![1])),
            (
                "context".into(),
                Value::Map(vec![("context".into(), Value::F64(2.0))]),
            ),
        ]);
        let field = |name: &str, value: Value| (Value::from(name), value);
        let body = Value::Map(vec![
            field("v", 1.into()),
            field("kind", "validate".into()),
            field("submission_id", "s".into()),
            field("context", context.clone()),
        ]);
        let packed = |value: &Value| Encoding::MessagePack.encode(value).unwrap();
        let answer = answered(&packed(&body), Encoding::MessagePack);
        let as_sent = packed(&context);
        assert!(answer.windows(as_sent.len()).any(|part| part == as_sent));
        let read = ResultMessage::decode(&answer, Encoding::MessagePack).unwrap();
        assert_eq!(Encoding::MessagePack.encode(&read).unwrap(), answer);
    }

    #[test]
    fn what_is_wrong_with_a_result_is_named() {
        let known = include_str!("../../schemas/examples/valid/score_result.v1-scored.json");
        let bent = |from: &str, to: &str| {
            assert!(known.contains(from), "{from}");
            ResultMessage::decode(known.replace(from, to).as_bytes(), Encoding::Json).unwrap_err()
        };
        assert!(bent("\"windows\": ", "\"windows\": 0.5e-").starts_with("windows: "));
        assert!(bent("\"loss_before\"", "\"loss_befor\"").contains("missing field `loss_before`"));
    }

    #[test]
    fn a_stored_number_comes_back_with_every_bit() {
        for bits in (0..10_000_u64).map(|n| 0x3f1d_0000_0000_0000 + n * 0x0000_0123_4567_89ab) {
            let text = serde_json::to_string(&f64::from_bits(bits)).unwrap();
            let read: f64 = serde_json::from_str(&text).unwrap();
            assert_eq!(read.to_bits(), bits, "{text}");
        }
    }

    #[test]
    fn a_stored_result_is_read_only_for_its_own_job() {
        let body = |kind| match kind {
            Kind::Validate => Body::Loss(LossBody {
                loss: 0.5,
                windows: 3,
                tokens: 9,
                plan: "x".into(),
            }),
            Kind::Score => Body::Error {
                error: Failure::new(Code::OutOfMemory, "x").to_error(),
            },
        };
        let sound = ResultMessage::new(&answerer(), job_ref(), Ok(body(Kind::Validate)));
        let sound = ResultMessage {
            context: None,
            ..sound
        };
        let read = |message: &ResultMessage| {
            answerer().read(&serde_json::to_string(message).unwrap(), &job_ref())
        };
        assert_eq!(read(&sound).as_ref(), Ok(&sound));
        let changes: [fn(&mut ResultMessage); 6] = [
            |m| m.submission_id = "t".into(),
            |m| m.kind = Kind::Score,
            |m| m.model_version = 8,
            |m| m.model = "n".into(),
            |m| m.weights_id = None,
            |m| m.status = Status::Rejected,
        ];
        for change in changes {
            let mut other = sound.clone();
            change(&mut other);
            assert!(read(&other).is_err(), "{other:?}");
        }
        let failed = ResultMessage {
            status: Status::Failed,
            body: body(Kind::Score),
            ..sound
        };
        assert!(read(&failed).is_err(), "what may not be stored");
        assert!(answerer().read("[]", &job_ref()).is_err());
    }

    #[test]
    fn the_key_depends_on_what_is_asked_and_not_on_who_answers() {
        let key = |answerer: &ResultOrigin, plan| Key::new(answerer, &job_ref(), None, plan);
        let other = ResultOrigin {
            worker_id: "b".into(),
            incarnation: "j".into(),
            ..answerer()
        };
        assert_eq!(key(&answerer(), &[0; 32]), key(&other, &[0; 32]));
        assert_ne!(key(&answerer(), &[0; 32]), key(&answerer(), &[1; 32]));
        let newer = ResultOrigin {
            weights_id: "w2".into(),
            ..answerer()
        };
        assert_ne!(key(&answerer(), &[0; 32]), key(&newer, &[0; 32]));
    }

    #[test]
    fn failures_and_configuration_are_never_stored() {
        let result =
            |code| ResultMessage::new(&answerer(), job_ref(), Err(Failure::new(code, "x")));
        assert!(result(Code::CandidateMalformed).may_be_stored());
        assert!(!result(Code::CandidateTooLarge).may_be_stored());
        assert!(!result(Code::OutOfMemory).may_be_stored());
        assert_eq!(result(Code::OutOfMemory).message_id(None), "s:7:failed:");
    }
}
