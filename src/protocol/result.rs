//! Results as aggregators read them, and their identity (`message_id`).

mod body;
mod key;
mod origin;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use body::{Body, CandidateFacts, LossBody, SKETCH_BINS, ScoreBody, Timings, similarity};
pub use key::{Asked, Key};
pub use origin::{JobRef, ResultOrigin};

use crate::protocol::context::Context;
use crate::protocol::document::from_document;
use crate::protocol::failure::{Code, Failure, Status};
use crate::protocol::job::Kind;
use crate::protocol::label::Label;
use crate::protocol::message::V1;
use crate::protocol::stop::Stopped;

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

    /// The same for a job with this context.
    #[must_use]
    pub fn with_context(self, context: Option<Context>) -> Self {
        Self { context, ..self }
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

    /// Loss before minus loss after, of a candidate that was measured on the whole plan. The mean of one that was
    /// stopped is biased, and measures nothing.
    pub fn delta(&self) -> Option<f64> {
        match &self.body {
            Body::Score(body) if body.stopped.is_none() => Some(body.delta),
            Body::Score(_) | Body::Loss(_) | Body::Merge(_) | Body::Error { .. } => None,
        }
    }

    /// How the evaluation of a candidate was decided early, if it was.
    pub fn stopped(&self) -> Option<&Stopped> {
        match &self.body {
            Body::Score(body) => body.stopped.as_ref(),
            Body::Loss(_) | Body::Merge(_) | Body::Error { .. } => None,
        }
    }

    /// Reads what a worker has published. `said` is what its message says of the body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &[u8], said: impl Into<Label>) -> Result<Self, String> {
        let label = said.into();
        let mut message: Self = from_document(&label.decode(body)?)?;
        let text = label.encoding().context_text(body).map(Context::Text);
        let context = text.or_else(|| message.context.take());
        Ok(message.with_context(context))
    }

    /// The error code, where there is one.
    pub fn code(&self) -> Option<Code> {
        match &self.body {
            Body::Error { error } => Some(error.code),
            Body::Score(_) | Body::Loss(_) | Body::Merge(_) => None,
        }
    }

    /// Whether any worker with the same weights would say the same.
    pub fn may_be_stored(&self) -> bool {
        match &self.body {
            Body::Score(_) | Body::Loss(_) => true,
            Body::Merge(body) => body.may_be_stored(),
            Body::Error { error } => error.is_proven(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::encoding::Encoding;
    use rmpv::Value;

    pub(super) fn answerer() -> ResultOrigin {
        ResultOrigin {
            model: "m".into(),
            model_version: 7,
            weights_id: "w".into(),
            package_id: "p".into(),
            worker_id: "a".into(),
            incarnation: "i".into(),
        }
    }

    pub(super) fn job_ref() -> JobRef {
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
    fn failures_and_configuration_are_never_stored() {
        let result =
            |code| ResultMessage::new(&answerer(), job_ref(), Err(Failure::new(code, "x")));
        assert!(result(Code::CandidateMalformed).may_be_stored());
        assert!(!result(Code::CandidateTooLarge).may_be_stored());
        assert!(!result(Code::OutOfMemory).may_be_stored());
        assert_eq!(result(Code::OutOfMemory).message_id(None), "s:7:failed:");
    }
}
