//! Jobs as the wire carries them: the messages, their versions and bytes, and the checks that make
//! a message a sound [`Job`]. The JSON Schema is made from these types. Which encoding a body has,
//! and who can be answered when a body is no job, is the parent's.

use base64::Engine as _;
use rmpv::Value;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{
    Candidate, Compression, Format, Job, Rule, Semantics, Source, Task, Validation, invalid,
    is_submission_id,
};
use crate::failure::Failure;

/// The most bytes the `context` of a job may take, encoded.
pub const MAX_CONTEXT_BYTES: usize = 4096;

/// The version of every message of this crate: the number 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct V1;

impl Serialize for V1 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(1)
    }
}

impl<'de> Deserialize<'de> for V1 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u64::deserialize(deserializer)? {
            1 => Ok(Self),
            other => Err(de::Error::custom(format!(
                "version {other} is not supported, only 1 is"
            ))),
        }
    }
}

impl JsonSchema for V1 {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "V1".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "const": 1 })
    }
}

/// Bytes: `bin` in MessagePack, base64 text in JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(&self.0))
        } else {
            serializer.serialize_bytes(&self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Blob;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes (MessagePack bin) or base64 text (JSON)")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }
            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Blob, E> {
                Ok(Blob(bytes))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Blob, E> {
                base64::engine::general_purpose::STANDARD
                    .decode(text)
                    .map(Blob)
                    .map_err(|e| E::custom(format!("not base64: {e}")))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Blob {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Blob".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "contentEncoding": "base64" })
    }
}

/// A candidate as the wire carries it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CandidateMessage {
    /// The container.
    pub format: Format,
    /// Compression of the whole body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// What the values mean.
    pub semantics: Semantics,
    /// Required for `gradient`, refused for `param_diff`; finite and positive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Where to fetch the bytes; exactly one of `url` and `data`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The bytes themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Blob>,
    /// SHA-256 of the bytes as fetched, 64 hex digits; required with `url`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9a-fA-F]{64}$"))]
    pub sha256: Option<String>,
    /// Number of the bytes as fetched; required with `url`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

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
    pub validation: Option<Validation>,
    /// Unix milliseconds after which the answer is of no use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Echoed untouched; at most 4 KiB encoded.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub context: Option<Value>,
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

/// A job as the wire carries it.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[schemars(title = "score_job.v1")]
pub enum JobMessage {
    /// Judge a candidate.
    Score(ScoreMessage),
    /// Measure the current model.
    Validate(ValidateMessage),
}

pub(super) fn check_context(context: &Value) -> Result<(), Failure> {
    if !context.is_map() {
        return Err(invalid("context: must be a map"));
    }
    let size = rmp_serde::to_vec(context).map_or(usize::MAX, |bytes| bytes.len());
    if size > MAX_CONTEXT_BYTES {
        return Err(invalid(format!(
            "context: {size} bytes encoded, at most {MAX_CONTEXT_BYTES} are allowed"
        )));
    }
    Ok(())
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

fn check_submission_id(id: &str) -> Result<(), Failure> {
    if is_submission_id(id) {
        Ok(())
    } else {
        Err(invalid("submission_id: not a valid name"))
    }
}

impl TryFrom<ScoreMessage> for Job {
    type Error = Failure;

    fn try_from(message: ScoreMessage) -> Result<Self, Failure> {
        check_submission_id(&message.submission_id)?;
        message.context.as_ref().map_or(Ok(()), check_context)?;
        Ok(Self {
            submission_id: message.submission_id,
            model: message.model,
            task: Task::Score {
                model_version: message.model_version,
                candidate: Box::new(message.candidate.try_into()?),
            },
            validation: check_validation(message.validation)?,
            deadline_ms: message.deadline_ms,
            context: message.context,
        })
    }
}

impl TryFrom<ValidateMessage> for Job {
    type Error = Failure;

    fn try_from(message: ValidateMessage) -> Result<Self, Failure> {
        check_submission_id(&message.submission_id)?;
        message.context.as_ref().map_or(Ok(()), check_context)?;
        Ok(Self {
            submission_id: message.submission_id,
            model: message.model,
            task: Task::Validate {
                model_version: message.model_version,
            },
            validation: check_validation(message.validation)?,
            deadline_ms: message.deadline_ms,
            context: message.context,
        })
    }
}

impl TryFrom<CandidateMessage> for Candidate {
    type Error = Failure;

    fn try_from(message: CandidateMessage) -> Result<Self, Failure> {
        let rule = match (message.semantics, message.learning_rate) {
            (Semantics::Gradient, Some(learning_rate))
                if learning_rate.is_finite() && learning_rate > 0.0 =>
            {
                Rule::Gradient { learning_rate }
            }
            (Semantics::Gradient, Some(_)) => {
                return Err(invalid(
                    "candidate.learning_rate: must be finite and greater than 0",
                ));
            }
            (Semantics::Gradient, None) => {
                return Err(invalid(
                    "candidate.learning_rate: missing, a gradient needs one",
                ));
            }
            (Semantics::ParamDiff, None) => Rule::ParamDiff,
            (Semantics::ParamDiff, Some(_)) => {
                return Err(invalid(
                    "candidate.learning_rate: not allowed with param_diff",
                ));
            }
        };
        let sha256 = message.sha256.as_deref().map(parse_sha256).transpose()?;
        let source = match (message.url, message.data) {
            (Some(url), None) => Source::Url(url),
            (None, Some(Blob(data))) => Source::Inline(data),
            (Some(_), Some(_)) => {
                return Err(invalid(
                    "candidate.url, candidate.data: both given, exactly one is needed",
                ));
            }
            (None, None) => {
                return Err(invalid(
                    "candidate.url, candidate.data: neither given, exactly one is needed",
                ));
            }
        };
        if matches!(source, Source::Url(_)) && (sha256.is_none() || message.size.is_none()) {
            let missing = if sha256.is_none() { "sha256" } else { "size" };
            return Err(invalid(format!(
                "candidate.{missing}: missing, it is required with url"
            )));
        }
        Ok(Self {
            format: message.format,
            compression: message.compression,
            rule,
            source,
            sha256,
            size: message.size,
        })
    }
}

fn parse_sha256(text: &str) -> Result<[u8; 32], Failure> {
    let mut digest = [0; 32];
    hex::decode_to_slice(text, &mut digest)
        .map_err(|_| invalid("candidate.sha256: must be 64 hexadecimal digits"))?;
    Ok(digest)
}
