//! The candidate within a job message, and the checks that turn it into a [`Candidate`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::blob::Blob;
use super::failure::Failure;
use super::job::{Candidate, Compression, Format, Rule, Semantics, Source, invalid};
use super::schema::{given, says};

/// A candidate as the wire carries it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = one_source_and_its_rate)]
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
    #[schemars(extend("exclusiveMinimum" = 0))]
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

/// What [`Candidate`]'s conversion checks of several fields together.
fn one_source_and_its_rate(schema: &mut schemars::Schema) {
    let rules = json!([
        { "oneOf": [given("url"), given("data")] },
        { "if": given("url"), "then": { "allOf": [given("sha256"), given("size")] } },
        {
            "if": says("semantics", "gradient"),
            "then": given("learning_rate"),
            "else": { "not": given("learning_rate") },
        },
    ]);
    schema.insert("allOf".into(), rules);
}

fn source(url: Option<String>, data: Option<Blob>) -> Result<Source, Failure> {
    match (url, data) {
        (Some(url), None) => Ok(Source::Url(url)),
        (None, Some(Blob(data))) => Ok(Source::Inline(data.into())),
        (Some(_), Some(_)) => Err(invalid(
            "candidate.url, candidate.data: both given, exactly one is needed",
        )),
        (None, None) => Err(invalid(
            "candidate.url, candidate.data: neither given, exactly one is needed",
        )),
    }
}

impl TryFrom<CandidateMessage> for Candidate {
    type Error = Failure;

    fn try_from(message: CandidateMessage) -> Result<Self, Failure> {
        let rule = Rule::new(message.semantics, message.learning_rate)
            .map_err(|why| invalid(format!("candidate.learning_rate: {why}")))?;
        let sha256 = message.sha256.as_deref().map(parse_sha256).transpose()?;
        let source = source(message.url, message.data)?;
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
