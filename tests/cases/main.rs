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
mod table;
mod tinylm;
mod windows;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use scorer::candidate::fetch::Fetcher;
use scorer::config::Config;
use scorer::engine::thread::EngineHandle;
use scorer::model::build::Recipe;
use scorer::model::manifest::Objective;
use scorer::scoring::pipeline::Pipeline;
use serde_json::{Value, json};
use table::{
    TOLERANCE, body, close, compare, judge, model_dir, pipeline_with, recipe, settings, table,
    unpacked,
};

fn config(set: &[&str]) -> Config {
    let cpu = ["engine.execution_provider=cpu"];
    settings(&[&cpu, set].concat())
}

fn manifest(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("model.json")).unwrap()).unwrap()
}

async fn pipeline(dir: &Path) -> Pipeline {
    pipeline_with(dir, &config(&[])).await
}
