//! Candidates in every container that strangers send: all of them say the same, and whatever is wrong
//! with one is refused by its name.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed step of a test is a failed test"
)]

#[expect(unreachable_pub, reason = "the library of tests/fuzz, too")]
mod fuzz;
mod fuzzed;
mod lenient;
mod real_files;
mod refusals;
mod round_trips;
mod unusual;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use scorer::candidate::fetch::Fetcher;
use scorer::config::{Config, Layers};
use scorer::engine::thread::EngineHandle;
use scorer::engine::trial::build;
use scorer::model::build::Recipe;
use scorer::model::package::Package;
use scorer::protocol::encoding::Encoding;
use scorer::protocol::job::{self, Compression, Format};
use scorer::protocol::result::{JobRef, ResultMessage};
use scorer::scoring::pipeline::{Judged, Pipeline};
use scorer::telemetry::traces::Trace;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::container::{Container, Entry};

/// The version of the package.
const VERSION: u64 = 7;

/// The test model, packaged and ready.
struct Bench {
    _folder: TempDir,
    pipeline: Pipeline,
}

impl Bench {
    async fn new(set: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("package");
        make(&out);
        let config = config(set);
        let engine = EngineHandle::load(&out, &config, Arc::default());
        let engine = engine.await.unwrap();
        engine.turn().await.warm().await.unwrap();
        let fetcher = Fetcher::new(config.candidates.clone(), None).unwrap();
        let pipeline = Pipeline::new(engine, &config, fetcher, "test", None);
        Self {
            _folder: folder,
            pipeline,
        }
    }

    fn package(&self) -> &Package {
        &self.pipeline.engine().package
    }

    /// The result of a candidate, a gradient with rate 1 unless the claims say otherwise.
    async fn judge(&self, container: Container, bytes: &[u8], claims: Value) -> Value {
        let mut candidate = json!({
            "format": container.format(), "semantics": "gradient", "learning_rate": 1.0,
            "data": BASE64.encode(bytes),
        });
        if let Some(compression) = container.compression {
            candidate["compression"] = json!(compression);
        }
        for (key, claim) in claims.as_object().unwrap() {
            candidate[key] = claim.clone();
        }
        let body = json!({
            "v": 1, "kind": "score", "submission_id": "case", "model_version": VERSION,
            "candidate": candidate,
        });
        let job = job::decode(&serde_json::to_vec(&body).unwrap(), Encoding::Json).unwrap();
        let job_ref = JobRef {
            submission_id: job.submission_id.clone(),
            kind: job.task.kind(),
            model_version: job.task.model_version(),
            context: None,
            attempt: 1,
        };
        let judged = self.pipeline.judge(&job, &job_ref, &Trace::silent()).await;
        let Judged::Fresh { verdict, .. } = judged else {
            panic!("there is no store")
        };
        let message = ResultMessage::new(self.pipeline.origin(), job_ref, verdict);
        serde_json::to_value(message).unwrap()
    }

    /// A small update of three tensors, one of them by its alias, if the model has one.
    fn update(&self) -> Vec<Entry> {
        let package = self.package();
        let alias = package.manifest.aliases.iter().flatten().next();
        // The first is the one with the alias.
        let tensors = package.weights.tensors.iter().skip(1).take(2);
        let names = tensors.map(|tensor| tensor.name.as_str());
        let names = names.chain(alias.map(|(alias, _)| alias.as_str()));
        let entry = |name: &str| Entry {
            name: name.to_owned(),
            shape: package.tensor(name).unwrap().shape.to_vec(),
            indices: vec![3, 1, 7, 0],
            values: vec![0.5, -0.25, 0.125, 1.0],
        };
        names.map(entry).collect()
    }
}

/// A container's format and compression, as the crate reads them from a job.
fn format(container: Container) -> (Format, Option<Compression>) {
    let format = serde_json::from_value(json!(container.format()));
    let compression = serde_json::from_value(json!(container.compression));
    (format.unwrap(), compression.unwrap())
}

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model")
}

fn make(out: &Path) {
    let dir = model_dir();
    let recipe = Recipe {
        exclude: Vec::new(),
        graph: dir.join("graph-named.onnx"),
        weights: Some(dir.join("checkpoint.safetensors")),
        shards: dir.join("shards"),
        name: "model".into(),
        version: VERSION,
        out: out.to_owned(),
        objective: scorer::model::manifest::Objective::causal_lm(128),
    };
    build(&recipe).unwrap();
    // The head is tied, which the checkpoint does not say.
    let path = out.join("model.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    manifest["aliases"] = json!({"lm_head.weight": "model.embed_tokens.weight"});
    std::fs::write(path, manifest.to_string()).unwrap();
}

fn config(set: &[&str]) -> Config {
    let set: Vec<String> = std::iter::once("engine.execution_provider=cpu")
        .chain(set.iter().copied())
        .map(str::to_owned)
        .collect();
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    Config::load(&layers).unwrap()
}
