//! Every committed candidate, scored through the library on every graph of its model, against the
//! tables that the generators computed independently in f64; and what a package must not get away
//! with.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

mod architectures;
mod early;
mod merged;
mod packaging;
mod parts;
mod rewritten;
mod small;
mod tinylm;
mod windows;
mod worth;

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
use scorer::protocol::job::decode;
use scorer::protocol::result::{JobRef, ResultMessage};
use scorer::scoring::pipeline::{Judged, Pipeline};
use scorer::telemetry::traces::Trace;
use serde_json::{Value, json};
use testkit::package::fixtures as model_dir;
use testkit::table::{TOLERANCE, close, compare, job, table, unpacked};

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

/// The graphs run in parts here; in the tests of services, where they are too small to be cut unasked, whole.
fn config(set: &[&str]) -> Config {
    let usual = ["engine.execution_provider=cpu", "engine.parts=4"];
    let set: Vec<String> = usual
        .iter()
        .chain(set)
        .copied()
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

/// The body of a case's job.
fn body(dir: &Path, case: &Value) -> Vec<u8> {
    serde_json::to_vec(&job(dir, case)).unwrap()
}

async fn judge(pipeline: &Pipeline, body: &[u8]) -> Value {
    let job = decode(body, Encoding::Json).unwrap();
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
