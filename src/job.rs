//! Jobs as aggregators send them: decoding (MessagePack or JSON), every check that needs no model,
//! and the domain types the rest of the crate works with. Pure; an invalid job cannot leave here.

use rmpv::Value;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de};

use crate::failure::{Code, Failure};
use message::{ScoreMessage, ValidateMessage, check_context};

pub mod message;

const MAX_NESTING: usize = 64;

/// How a body is encoded; the result comes back the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// `application/msgpack`, the default.
    MessagePack,
    /// `application/json`.
    Json,
}

impl Encoding {
    /// What an AMQP `content_type` says; anything that does not name JSON is MessagePack.
    pub fn from_content_type(content_type: Option<&str>) -> Self {
        let essence = content_type
            .and_then(|t| t.split(';').next())
            .map(str::trim);
        match essence {
            Some(t) if t.eq_ignore_ascii_case("application/json") => Self::Json,
            Some(_) | None => Self::MessagePack,
        }
    }

    /// The AMQP `content_type` of this encoding.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::MessagePack => "application/msgpack",
            Self::Json => "application/json",
        }
    }

    /// Encodes a message with named fields.
    ///
    /// # Errors
    /// When the value holds something the encoding cannot express.
    pub fn encode(self, message: &impl Serialize) -> anyhow::Result<Vec<u8>> {
        Ok(match self {
            Self::MessagePack => rmp_serde::to_vec_named(message)?,
            Self::Json => serde_json::to_vec(message)?,
        })
    }

    /// Decodes any document into a dynamic value, nothing left over.
    ///
    /// # Errors
    /// A sentence for the sender.
    pub fn decode(self, body: &[u8]) -> Result<Value, String> {
        match self {
            Self::Json => serde_json::from_slice(body).map_err(|e| format!("not JSON: {e}")),
            Self::MessagePack => {
                let mut rest = body;
                let value = rmpv::decode::read_value_with_max_depth(&mut rest, MAX_NESTING)
                    .map_err(|e| format!("not MessagePack: {e}"))?;
                match rest.len() {
                    0 => Ok(value),
                    n => Err(format!(
                        "not MessagePack: {n} bytes after the end of the value"
                    )),
                }
            }
        }
    }
}

/// The container of a candidate's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// JSON of base64(zlib(values ++ int32 indices)) per tensor.
    BinaryV2,
    /// A safetensors file, dense or indexed.
    Safetensors,
    /// A torch zip with chunks.
    PtChunks,
}

impl Format {
    /// The word used on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BinaryV2 => "binary_v2",
            Self::Safetensors => "safetensors",
            Self::PtChunks => "pt_chunks",
        }
    }
}

/// How the whole body of a candidate is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Zstandard.
    Zstd,
}

/// What the values of a candidate mean, as the wire says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Semantics {
    /// `w <- w - learning_rate * g`.
    Gradient,
    /// `w <- w + d`.
    ParamDiff,
}

impl Semantics {
    /// The word used on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gradient => "gradient",
            Self::ParamDiff => "param_diff",
        }
    }
}

/// Which windows of the held-out data a job is measured on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    /// Shard ids, order kept, none twice; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<Vec<u64>>,
    /// Chooses the windows; 0 to 64 characters.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub nonce: String,
}

/// What kind of job it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Judge a candidate.
    Score,
    /// Measure the current model.
    Validate,
}

impl Kind {
    /// The word used on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Score => "score",
            Self::Validate => "validate",
        }
    }
}

/// How a candidate's values change the weights. Computed in f32, rounded once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// `w <- w - learning_rate * g`.
    Gradient {
        /// Finite and positive.
        learning_rate: f64,
    },
    /// `w <- w + d`.
    ParamDiff,
}

impl Rule {
    /// The wire's word for it.
    pub fn semantics(self) -> Semantics {
        match self {
            Self::Gradient { .. } => Semantics::Gradient,
            Self::ParamDiff => Semantics::ParamDiff,
        }
    }

    /// The learning rate, where the rule has one.
    pub fn learning_rate(self) -> Option<f64> {
        match self {
            Self::Gradient { learning_rate } => Some(learning_rate),
            Self::ParamDiff => None,
        }
    }
}

/// Where a candidate's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In the job itself.
    Inline(Vec<u8>),
    /// To be fetched.
    Url(String),
}

/// A candidate whose description is sound; its bytes are still a stranger's.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The container.
    pub format: Format,
    /// Compression of the whole body.
    pub compression: Option<Compression>,
    /// What the values do.
    pub rule: Rule,
    /// Where the bytes are.
    pub source: Source,
    /// What the sender says the digest is; always there for a URL.
    pub sha256: Option<[u8; 32]>,
    /// What the sender says the size is in bytes; always there for a URL.
    pub size: Option<u64>,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Task {
    /// Judge a candidate against this version of the weights.
    Score {
        /// The version the candidate was made from.
        model_version: u64,
        /// The update to judge.
        candidate: Box<Candidate>,
    },
    /// Measure the current model, if it has this version.
    Validate {
        /// The version asked for, if any.
        model_version: Option<u64>,
    },
}

impl Task {
    /// What kind of job it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Score { .. } => Kind::Score,
            Self::Validate { .. } => Kind::Validate,
        }
    }

    /// The version the job names.
    pub fn model_version(&self) -> Option<u64> {
        match self {
            Self::Score { model_version, .. } => Some(*model_version),
            Self::Validate { model_version } => *model_version,
        }
    }
}

/// A sound job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Names the job.
    pub submission_id: String,
    /// The model it is for, if it says so.
    pub model: Option<String>,
    /// What is asked for.
    pub task: Task,
    /// The windows to use.
    pub validation: Validation,
    /// Unix milliseconds after which the answer is of no use.
    pub deadline_ms: Option<u64>,
    /// Echoed untouched.
    pub context: Option<Value>,
}

/// A body that is no sound job.
#[derive(Debug, Clone, PartialEq)]
pub enum Undecodable {
    /// Nobody to answer under a name of their own: not a map, or no readable `submission_id`.
    Anonymous(Failure),
    /// The schema is broken but the sender can be answered.
    Named {
        /// The job's name.
        submission_id: String,
        /// Its kind, as far as it can be read.
        kind: Kind,
        /// The version it names, as far as it can be read.
        model_version: Option<u64>,
        /// Its context, if that is sound.
        context: Option<Value>,
        /// What is wrong with it.
        failure: Failure,
    },
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(Code::InvalidJob, message)
}

/// Decodes and checks a job.
///
/// # Errors
/// Says who can be answered and what is wrong, naming the field.
#[expect(clippy::result_large_err, reason = "one refusal per body, moved once")]
pub fn decode(body: &[u8], encoding: Encoding) -> Result<Job, Undecodable> {
    let document = encoding
        .decode(body)
        .map_err(|m| Undecodable::Anonymous(invalid(m)))?;
    let Value::Map(fields) = document else {
        return Err(Undecodable::Anonymous(invalid("the body is not a map")));
    };
    let submission_id = text_field(&fields, "submission_id").filter(|id| is_submission_id(id));
    let Some(submission_id) = submission_id.map(str::to_owned) else {
        return Err(Undecodable::Anonymous(invalid(
            "submission_id: must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -",
        )));
    };
    let kind = match text_field(&fields, "kind") {
        Some("validate") => Kind::Validate,
        Some(_) | None => Kind::Score,
    };
    let model_version = field(&fields, "model_version").and_then(Value::as_u64);
    let context = field(&fields, "context")
        .filter(|c| check_context(c).is_ok())
        .cloned();
    parse(fields, encoding).map_err(|failure| Undecodable::Named {
        submission_id,
        kind,
        model_version,
        context,
        failure,
    })
}

fn parse(mut fields: Vec<(Value, Value)>, encoding: Encoding) -> Result<Job, Failure> {
    check_unique(&fields)?;
    let kind = match fields.iter().position(|(k, _)| k.as_str() == Some("kind")) {
        Some(at) => fields.remove(at).1,
        None => {
            return Err(invalid(
                "kind: missing, it must be \"score\" or \"validate\"",
            ));
        }
    };
    match kind.as_str() {
        Some("score") => {
            let message: ScoreMessage = typed(Value::Map(fields), encoding)?;
            message.try_into()
        }
        Some("validate") => {
            let message: ValidateMessage = typed(Value::Map(fields), encoding)?;
            message.try_into()
        }
        Some(_) | None => Err(invalid(format!(
            "kind: {kind} is neither \"score\" nor \"validate\""
        ))),
    }
}

fn typed<T: de::DeserializeOwned>(document: Value, encoding: Encoding) -> Result<T, Failure> {
    if encoding == Encoding::MessagePack && document["candidate"]["data"].is_str() {
        return Err(invalid("candidate.data: must be MessagePack bin, not text"));
    }
    from_document(&document).map_err(invalid)
}

/// Reads a type out of a decoded document, naming the field that is wrong.
///
/// # Errors
/// `field: what is wrong`.
pub fn from_document<T: de::DeserializeOwned>(document: &Value) -> Result<T, String> {
    // Through MessagePack: rmpv's own deserializer refuses enums written as text.
    let mut packed = Vec::new();
    rmpv::encode::write_value(&mut packed, document).map_err(|e| e.to_string())?;
    let mut reader = rmp_serde::Deserializer::from_read_ref(&packed);
    serde_path_to_error::deserialize(&mut reader).map_err(|e| match e.path().to_string().as_str() {
        "." => e.into_inner().to_string(),
        path => format!("{path}: {}", e.inner()),
    })
}

fn check_unique(fields: &[(Value, Value)]) -> Result<(), Failure> {
    for (at, (name, _)) in fields.iter().enumerate() {
        if fields.iter().take(at).any(|(earlier, _)| earlier == name) {
            return Err(invalid(format!("{name}: given twice")));
        }
    }
    Ok(())
}

fn field<'a>(fields: &'a [(Value, Value)], name: &str) -> Option<&'a Value> {
    fields
        .iter()
        .find(|(k, _)| k.as_str() == Some(name))
        .map(|(_, v)| v)
}

fn text_field<'a>(fields: &'a [(Value, Value)], name: &str) -> Option<&'a str> {
    field(fields, name).and_then(Value::as_str)
}

/// Whether the text can name a job.
pub fn is_submission_id(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sound() -> serde_json::Value {
        json!({"v": 1, "kind": "score", "submission_id": "s-1", "model_version": 7,
               "candidate": {"format": "binary_v2", "semantics": "gradient", "learning_rate": 0.5, "data": "e30="},
               "context": {"miner_id": 5}})
    }

    fn refusal(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut body = sound();
        change(&mut body);
        match decode(&serde_json::to_vec(&body).unwrap(), Encoding::Json) {
            Err(Undecodable::Named { failure, .. } | Undecodable::Anonymous(failure)) => {
                failure.message
            }
            Ok(job) => panic!("accepted: {job:?}"),
        }
    }

    #[test]
    fn the_same_job_decodes_equally_from_json_and_messagepack() {
        let json = decode(&serde_json::to_vec(&sound()).unwrap(), Encoding::Json).unwrap();
        let mut message = rmpv::ext::to_value(sound()).unwrap();
        let Value::Map(fields) = &mut message else {
            panic!()
        };
        for (key, value) in fields {
            if key.as_str() == Some("candidate") {
                let Value::Map(candidate) = value else {
                    panic!()
                };
                for (key, value) in candidate {
                    if key.as_str() == Some("data") {
                        *value = Value::Binary(b"{}".to_vec());
                    }
                }
            }
        }
        let packed = decode(&rmp_serde::to_vec(&message).unwrap(), Encoding::MessagePack).unwrap();
        assert_eq!(json, packed);
    }

    #[test]
    fn every_broken_field_is_named() {
        for (expected, message) in [
            (
                "candidate.data",
                refusal(|b| b["candidate"]["data"] = json!("%%")),
            ),
            (
                "candidate.learning_rate",
                refusal(|b| b["candidate"]["learning_rate"] = json!(0)),
            ),
            (
                "candidate.learning_rate",
                refusal(|b| b["candidate"]["semantics"] = json!("param_diff")),
            ),
            (
                "candidate.format",
                refusal(|b| b["candidate"]["format"] = json!("pickle")),
            ),
            (
                "candidate.sha256",
                refusal(|b| b["candidate"]["sha256"] = json!("12")),
            ),
            (
                "candidate.url",
                refusal(|b| b["candidate"]["url"] = json!("file:///x")),
            ),
            ("colour", refusal(|b| b["colour"] = json!("red"))),
            ("kind", refusal(|b| b["kind"] = json!("guess"))),
            ("v", refusal(|b| b["v"] = json!(2))),
            ("model_version", refusal(|b| b["model_version"] = json!(-1))),
            (
                "validation.shards",
                refusal(|b| b["validation"] = json!({"shards": [3, 3]})),
            ),
            (
                "validation.nonce",
                refusal(|b| b["validation"] = json!({"nonce": "x".repeat(65)})),
            ),
            (
                "context",
                refusal(|b| b["context"] = json!({"long": "x".repeat(5000)})),
            ),
            ("context", refusal(|b| b["context"] = json!([1]))),
            (
                "submission_id",
                refusal(|b| b["submission_id"] = json!("a b")),
            ),
        ] {
            assert!(
                message.contains(expected),
                "{message:?} does not name {expected}"
            );
        }
    }

    #[test]
    fn a_body_without_a_name_is_anonymous() {
        for body in [&b"\xc1"[..], b"[1]", b"{}", b"{\"submission_id\": 5}", b""] {
            for encoding in [Encoding::Json, Encoding::MessagePack] {
                assert!(
                    matches!(decode(body, encoding), Err(Undecodable::Anonymous(_))),
                    "{body:?}"
                );
            }
        }
    }

    #[test]
    fn deeply_nested_bodies_are_refused_not_followed() {
        let json = "[".repeat(100_000);
        assert!(Encoding::Json.decode(json.as_bytes()).is_err());
        assert!(Encoding::MessagePack.decode(&vec![0x91; 100_000]).is_err());
    }
}
