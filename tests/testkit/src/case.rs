//! Jobs as an aggregator writes them, made from the committed cases.

use std::path::PathBuf;
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::digest::digest;
use crate::package::{VERSION, fixtures};

/// One line of `cases.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    /// The name in the table.
    pub name: String,
    /// `score`, `validate`, or empty for `score`.
    #[serde(default)]
    pub kind: String,
    /// The candidate's file, below the fixtures or their `candidates`.
    pub file: Option<String>,
    /// The container.
    pub format: Option<String>,
    /// The compression around it.
    pub compression: Option<String>,
    /// `gradient` or `param_diff`.
    pub semantics: Option<String>,
    /// The rate of a gradient.
    pub learning_rate: Option<f64>,
    /// The version the job names; none is [`VERSION`].
    pub model_version: Option<u64>,
    /// What chooses the windows.
    pub nonce: Option<String>,
    /// The shards to read; none is all.
    pub shards: Option<Vec<u64>>,
    /// By how much the labels are shifted; none is 1.
    pub label_shift: Option<u64>,
    /// The digest that the job claims.
    pub sha256: Option<String>,
    /// The candidate's size in bytes.
    pub size: Option<u64>,
    /// The expected result.
    pub expect: Value,
}

#[derive(Deserialize)]
struct Table {
    cases: Vec<Case>,
}

/// The cases that the package of the tests can answer: those with label shift 1.
pub fn cases() -> &'static [Case] {
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
pub fn honest() -> &'static Case {
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

/// A gradient of the last layer alone.
pub fn of_the_last_layer() -> &'static Case {
    let mut cases = cases().iter();
    let found = cases.find(|case| case.name == "gradient-one-layer");
    found.expect("cases.json has it")
}

impl Case {
    /// Whether it asks for the model's own loss instead of a candidate's.
    pub fn is_validate(&self) -> bool {
        self.kind == "validate" || self.file.is_none()
    }

    /// Where the candidate's file is.
    pub fn path(&self) -> PathBuf {
        let file = self.file.as_deref().expect("a score case has a file");
        let direct = fixtures().join(file);
        if direct.is_file() {
            direct
        } else {
            fixtures().join("candidates").join(file)
        }
    }

    /// The candidate's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap_or_else(|e| panic!("{}: {e}", self.path().display()))
    }

    /// The job that submits this case with its bytes inline.
    pub fn job(&self, submission_id: &str) -> Value {
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
    pub fn job_by_url(&self, submission_id: &str, url: &str) -> Value {
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

/// The honest job under another name, on windows that no other nonce chooses.
pub fn honest_job(submission_id: &str, nonce: &str) -> Value {
    let mut job = honest().job(submission_id);
    job["validation"] = json!({"nonce": nonce});
    job
}
