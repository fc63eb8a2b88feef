//! Every committed candidate, scored through the library on every graph of its model, against the
//! tables that the generators computed independently in f64; and what a package must not get away
//! with.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

mod architectures;
mod merged;
mod packaging;
mod rewritten;
mod small;
mod tinylm;
mod windows;

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
const TOLERANCE: f64 = 2e-6;

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model")
}

fn table(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap()
}

/// How to package a model whose graph, weights and shards lie in one folder.
fn recipe(dir: &Path, graph: &str, weights: &str, objective: Objective, out: &Path) -> Recipe {
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

fn config(set: &[&str]) -> Config {
    let set: Vec<String> = std::iter::once("engine.execution_provider=cpu")
        .chain(set.iter().copied())
        .map(str::to_owned)
        .collect();
    Config::load(&Layers {
        set: &set,
        ..Layers::default()
    })
    .unwrap()
}

fn manifest(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("model.json")).unwrap()).unwrap()
}

async fn pipeline(dir: &Path) -> Pipeline {
    pipeline_with(dir, &config(&[])).await
}

async fn pipeline_with(dir: &Path, config: &Config) -> Pipeline {
    let engine = EngineHandle::load(dir, config, Arc::default())
        .await
        .unwrap();
    engine.turn().await.warm().await.unwrap();
    let fetcher = Fetcher::new(config.candidates.clone(), None).unwrap();
    Pipeline::new(engine, config, fetcher, "test", None)
}

/// The job of a case whose candidate is a file in `dir`.
fn body(dir: &Path, case: &Value) -> Vec<u8> {
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

async fn judge(pipeline: &Pipeline, body: &[u8]) -> Value {
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
fn close(name: &str, field: &str, found: &Value, expected: &Value) -> f64 {
    let difference = (found.as_f64().unwrap() - expected.as_f64().unwrap()).abs();
    assert!(
        difference <= TOLERANCE,
        "{name}: {field} is {found}, the table says {expected}"
    );
    difference
}

#[track_caller]
fn compare(name: &str, result: &Value, expect: &Value) -> f64 {
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
