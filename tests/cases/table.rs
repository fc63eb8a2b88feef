//! The committed tables of cases: packages, jobs, and the comparison of a result with the independent losses. Shared by
//! the tests of the library on the CPU and on the GPU in software.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use scorer::candidate::fetch::Fetcher;
use scorer::config::{Config, Layers};
use scorer::engine::thread::EngineHandle;
use scorer::model::build::Recipe;
use scorer::model::manifest::Objective;
use scorer::protocol::encoding::Encoding;
use scorer::protocol::job;
use scorer::protocol::result::{JobRef, ResultMessage};
use scorer::scoring::pipeline::{Judged, Pipeline};
use scorer::telemetry::traces::Trace;
use serde_json::{Value, json};

/// The largest accepted difference to the independent losses.
pub(crate) const TOLERANCE: f64 = 2e-6;

pub(crate) fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model")
}

pub(crate) fn table(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap()
}

/// A file of an architecture. The committed ones are compressed; a package is made of plain ones.
pub(crate) fn unpacked(name: &str, file: &str) -> Vec<u8> {
    let path = model_dir().join("architectures").join(name).join(file);
    let packed = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    let mut reader = flate2::read::GzDecoder::new(packed.as_slice());
    reader.read_to_end(&mut bytes).unwrap();
    bytes
}

/// How to package a model whose graph, weights and shards lie in one folder.
pub(crate) fn recipe(
    dir: &Path,
    graph: &str,
    weights: &str,
    objective: Objective,
    out: &Path,
) -> Recipe {
    Recipe {
        exclude: Vec::new(),
        graph: dir.join(graph),
        weights: Some(dir.join(weights)),
        shards: dir.join("shards"),
        name: "model".into(),
        version: 1,
        out: out.to_owned(),
        objective,
    }
}

/// The usual settings but for these.
pub(crate) fn settings(set: &[&str]) -> Config {
    let set: Vec<String> = set.iter().map(|one| (*one).to_owned()).collect();
    Config::load(&Layers {
        set: &set,
        ..Layers::default()
    })
    .unwrap()
}

pub(crate) async fn pipeline_with(dir: &Path, config: &Config) -> Pipeline {
    let engine = EngineHandle::load(dir, config, Arc::default())
        .await
        .unwrap();
    engine.turn().await.warm().await.unwrap();
    let fetcher = Fetcher::new(config.candidates.clone(), None).unwrap();
    Pipeline::new(engine, config, fetcher, "test", None)
}

/// The job of a case whose candidate is a file in `dir`.
pub(crate) fn body(dir: &Path, case: &Value) -> Vec<u8> {
    let bytes = std::fs::read(dir.join(case["file"].as_str().unwrap())).unwrap();
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
    serde_json::to_vec(&json!({
        "v": 1, "kind": "score", "submission_id": "case", "model_version": case["model_version"],
        "candidate": candidate, "validation": validation,
    }))
    .unwrap()
}

pub(crate) async fn judge(pipeline: &Pipeline, body: &[u8]) -> Value {
    let job = job::decode(body, Encoding::Json).unwrap();
    let job_ref = JobRef {
        submission_id: job.submission_id.clone(),
        kind: job.task.kind(),
        model_version: job.task.model_version(),
        context: None,
        attempt: 1,
    };
    let Judged::Fresh { verdict, .. } = pipeline.judge(&job, &job_ref, &Trace::silent()).await
    else {
        panic!("no store")
    };
    serde_json::to_value(ResultMessage::new(pipeline.origin(), job_ref, verdict)).unwrap()
}

#[track_caller]
pub(crate) fn close(name: &str, field: &str, found: &Value, expected: &Value) -> f64 {
    let difference = (found.as_f64().unwrap() - expected.as_f64().unwrap()).abs();
    assert!(
        difference <= TOLERANCE,
        "{name}: {field} is {found}, the table says {expected}"
    );
    difference
}

#[track_caller]
pub(crate) fn compare(name: &str, result: &Value, expect: &Value) -> f64 {
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
        result["candidate"]["l2_norm"].as_f64().unwrap(),
        expect["l2_norm"].as_f64().unwrap(),
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
