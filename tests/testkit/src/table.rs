//! The committed tables of cases: their jobs, and the comparison of a result with the independent losses.

use std::io::Read as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::package::fixtures;

/// The largest accepted difference to the independent losses.
pub const TOLERANCE: f64 = 2e-6;

/// The table of a model of the fixtures.
pub fn table(dir: &Path) -> Value {
    let file = dir.join("cases.json");
    let text = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    serde_json::from_slice(&text).expect("cases.json as its generator writes it")
}

/// A file of an architecture. The committed ones are compressed; a package is made of plain ones.
pub fn unpacked(name: &str, file: &str) -> Vec<u8> {
    let path = fixtures().join("architectures").join(name).join(file);
    let packed = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    let mut reader = flate2::read::GzDecoder::new(packed.as_slice());
    reader.read_to_end(&mut bytes).expect("it is compressed");
    bytes
}

/// The job of a case whose candidate is a file in `dir`.
pub fn job(dir: &Path, case: &Value) -> Value {
    let bytes =
        std::fs::read(dir.join(case["file"].as_str().expect("a file"))).expect("the candidate");
    let mut candidate = json!({
        "format": case["format"], "semantics": case["semantics"],
        "sha256": case["sha256"], "size": case["size"],
        "data": BASE64.encode(bytes),
    });
    if !case["learning_rate"].is_null() {
        candidate["learning_rate"] = case["learning_rate"].clone();
    }
    let mut validation = json!({ "nonce": case["nonce"] });
    if !case["shards"].is_null() {
        validation["shards"] = case["shards"].clone();
    }
    json!({
        "v": 1, "kind": "score", "submission_id": "case", "model_version": case["model_version"],
        "candidate": candidate, "validation": validation,
    })
}

/// Fails unless a loss is that of the table within the tolerance; the difference.
#[track_caller]
pub fn close(name: &str, field: &str, found: &Value, expected: &Value) -> f64 {
    let difference =
        (found.as_f64().expect("a number") - expected.as_f64().expect("a number")).abs();
    assert!(
        difference <= TOLERANCE,
        "{name}: {field} is {found}, the table says {expected}"
    );
    difference
}

/// Fails unless a result is that of the table; the largest difference of a loss.
#[track_caller]
pub fn compare(name: &str, result: &Value, expect: &Value) -> f64 {
    assert_eq!(result["status"], expect["status"], "{name}: {result}");
    if expect["status"] != "scored" {
        assert_eq!(result["error"]["code"], expect["code"], "{name}: {result}");
        return 0.0;
    }
    let fields = ["loss_before", "loss_after", "delta", "score"];
    let largest = fields
        .iter()
        .map(|f| close(name, f, &result[f], &expect[f]))
        .fold(0.0, f64::max);
    for field in ["windows", "tokens", "plan"] {
        assert_eq!(result[field], expect[field], "{name}: {field}");
    }
    for field in ["tensors", "entries", "effective_entries"] {
        assert_eq!(result["candidate"][field], expect[field], "{name}: {field}");
    }
    let norm = (
        result["candidate"]["l2_norm"].as_f64().expect("a number"),
        expect["l2_norm"].as_f64().expect("a number"),
    );
    assert!(
        (norm.0 - norm.1).abs() <= 1e-9 * norm.1.max(1.0),
        "{name}: l2_norm {norm:?}"
    );
    if expect["stderr"].is_null() {
        assert!(
            result["stderr"].is_null() && result["ci95"].is_null(),
            "{name}"
        );
        return largest;
    }
    close(name, "stderr", &result["stderr"], &expect["stderr"]);
    close(name, "ci95[0]", &result["ci95"][0], &expect["ci95"][0]);
    close(name, "ci95[1]", &result["ci95"][1], &expect["ci95"][1]);
    largest
}
