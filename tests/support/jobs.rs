//! Jobs as an aggregator writes them: the committed cases, and the bodies made from them.

use std::io::Write as _;
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};

use super::package::{VERSION, fixtures};

/// How a body is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    MessagePack,
    Json,
}

impl Encoding {
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::MessagePack => "application/msgpack",
            Self::Json => "application/json",
        }
    }

    /// Encodes a job; in MessagePack the candidate's bytes are `bin`, in JSON base64 text.
    pub(crate) fn encode(self, job: &Value) -> Vec<u8> {
        match self {
            Self::Json => serde_json::to_vec(job).expect("a JSON value"),
            Self::MessagePack => pack(&message_pack(job)),
        }
    }
}

/// Serializes a MessagePack value.
pub(crate) fn pack(value: &rmpv::Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).expect("writing to memory");
    bytes
}

/// A job as a MessagePack value, its inline bytes as `bin`.
pub(crate) fn message_pack(job: &Value) -> rmpv::Value {
    let mut message = rmpv::ext::to_value(job).expect("JSON fits into MessagePack");
    let candidate = entry(&mut message, "candidate");
    if let Some(data) = candidate.and_then(|c| entry(c, "data"))
        && let Some(bytes) = data.as_str().and_then(|text| BASE64.decode(text).ok())
    {
        *data = rmpv::Value::Binary(bytes);
    }
    message
}

fn entry<'a>(map: &'a mut rmpv::Value, name: &str) -> Option<&'a mut rmpv::Value> {
    let rmpv::Value::Map(fields) = map else {
        return None;
    };
    fields
        .iter_mut()
        .find(|(key, _)| key.as_str() == Some(name))
        .map(|(_, value)| value)
}

/// One line of `cases.json`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) kind: String,
    pub(crate) file: Option<String>,
    pub(crate) format: Option<String>,
    pub(crate) compression: Option<String>,
    pub(crate) semantics: Option<String>,
    pub(crate) learning_rate: Option<f64>,
    pub(crate) model_version: Option<u64>,
    pub(crate) nonce: Option<String>,
    pub(crate) shards: Option<Vec<u64>>,
    pub(crate) label_shift: Option<u64>,
    pub(crate) sha256: Option<String>,
    pub(crate) size: Option<u64>,
    pub(crate) expect: Value,
}

#[derive(Deserialize)]
struct Table {
    cases: Vec<Case>,
}

/// The cases that the package of the tests can answer: those with label shift 1.
pub(crate) fn cases() -> &'static [Case] {
    static CASES: OnceLock<Vec<Case>> = OnceLock::new();
    CASES.get_or_init(|| {
        let file = fixtures().join("cases.json");
        let text = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let table: Table =
            serde_json::from_slice(&text).expect("cases.json as its generator writes it");
        table
            .cases
            .into_iter()
            .filter(|c| c.label_shift.unwrap_or(1) == 1)
            .collect()
    })
}

/// A gradient that is scored, on all shards: what most tests submit.
pub(crate) fn honest() -> &'static Case {
    cases()
        .iter()
        .filter(|c| {
            c.file.is_some()
                && c.expect["status"] == "scored"
                && c.semantics.as_deref() == Some("gradient")
        })
        .filter(|c| {
            c.format.as_deref() == Some("binary_v2")
                && c.compression.is_none()
                && c.model_version.unwrap_or(VERSION) == VERSION
        })
        .min_by_key(|c| {
            (
                c.expect["delta"].as_f64().is_some_and(|d| d <= 0.0),
                c.shards.is_some(),
                c.size,
            )
        })
        .expect("cases.json has a gradient that is scored")
}

impl Case {
    /// Whether it asks for the model's own loss instead of a candidate's.
    pub(crate) fn is_validate(&self) -> bool {
        self.kind == "validate" || self.file.is_none()
    }

    /// Where the candidate's file is.
    pub(crate) fn path(&self) -> std::path::PathBuf {
        let file = self.file.as_deref().expect("a score case has a file");
        let direct = fixtures().join(file);
        if direct.is_file() {
            direct
        } else {
            fixtures().join("candidates").join(file)
        }
    }

    /// The candidate's bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap_or_else(|e| panic!("{}: {e}", self.path().display()))
    }

    /// The job that submits this case with its bytes inline.
    pub(crate) fn job(&self, submission_id: &str) -> Value {
        let mut job = self.bare_job(submission_id);
        if !self.is_validate() {
            job["candidate"]["data"] = json!(BASE64.encode(self.bytes()));
            if let Some(claimed) = &self.sha256 {
                job["candidate"]["sha256"] = json!(claimed);
            }
        }
        job
    }

    /// The same by reference.
    pub(crate) fn job_by_url(&self, submission_id: &str, url: &str) -> Value {
        let bytes = self.bytes();
        let mut job = self.bare_job(submission_id);
        job["candidate"]["url"] = json!(url);
        job["candidate"]["size"] = json!(bytes.len());
        job["candidate"]["sha256"] = json!(digest(&bytes));
        job
    }

    fn bare_job(&self, submission_id: &str) -> Value {
        let mut job = json!({
            "v": 1,
            "kind": if self.is_validate() { "validate" } else { "score" },
            "submission_id": submission_id,
            "model_version": self.model_version.unwrap_or(VERSION),
        });
        if !self.is_validate() {
            job["candidate"] = json!({"format": self.format, "semantics": self.semantics});
            put(
                &mut job["candidate"],
                "compression",
                self.compression.as_ref(),
            );
            put(
                &mut job["candidate"],
                "learning_rate",
                self.learning_rate.as_ref(),
            );
        }
        let mut validation = json!({});
        put(&mut validation, "nonce", self.nonce.as_ref());
        put(&mut validation, "shards", self.shards.as_ref());
        if validation != json!({}) {
            job["validation"] = validation;
        }
        job
    }
}

/// Sets a field if there is something to set it to.
fn put(map: &mut Value, name: &str, value: Option<&impl serde::Serialize>) {
    if let Some(value) = value {
        map[name] = json!(value);
    }
}

/// Hex SHA-256.
pub(crate) fn digest(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(bytes))
}

/// The honest job under another name, on windows that no other nonce chooses.
pub(crate) fn honest_job(submission_id: &str, nonce: &str) -> Value {
    let mut job = honest().job(submission_id);
    job["validation"] = json!({"nonce": nonce});
    job
}

/// A candidate that sets the size of the hazard model's large node, which the package has at 1; see
/// `tests/model/README.md`.
pub(crate) fn hazard_candidate(size: f32) -> Vec<u8> {
    let mut packed = (size - 1.0).to_le_bytes().to_vec();
    packed.extend(0_i32.to_le_bytes());
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    zlib.write_all(&packed).expect("a Vec takes every write");
    let data = BASE64.encode(zlib.finish().expect("a Vec takes every write"));
    let candidate = json!({"size.weight": {"shape": [1], "k": 1, "data": data}});
    candidate.to_string().into_bytes()
}

/// The job that submits it.
pub(crate) fn hazard_job(submission_id: &str, size: f32) -> Value {
    json!({
        "v": 1, "kind": "score", "submission_id": submission_id, "model_version": VERSION,
        "candidate": {
            "format": "binary_v2", "semantics": "param_diff",
            "data": BASE64.encode(hazard_candidate(size)),
        },
    })
}
