//! Candidates of each kind, scored on the device: the statuses of the tables, and the independent losses.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use scorer::engine::trial::build;
use scorer::model::manifest::Objective;
use scorer::scoring::pipeline::Pipeline;
use serde_json::{Value, json};

use crate::config;
use crate::table::{TOLERANCE, body, compare, judge, model_dir, pipeline_with, recipe, table};

/// The graph that runs as it is: all of its nodes are on the device.
const PLAIN: &str = "graph-folded.onnx";
/// The hardest: shapes are computed on the host, and one tensor is in two places, one of them transposed.
const HARDEST: &str = "graph-two-places.onnx";

async fn pipeline(dir: &Path, graph: &str, weights: &str, objective: Objective) -> Pipeline {
    let out = tempfile::tempdir().unwrap();
    let mut recipe = recipe(dir, graph, weights, objective, out.path());
    recipe.version = table(dir)["model"]["version"].as_u64().unwrap();
    build(&recipe).unwrap();
    // What is loaded is mapped: the folder may go.
    pipeline_with(out.path(), &config(&[])).await
}

async fn language_model(graph: &str) -> Pipeline {
    let objective = Objective::causal_lm(128);
    pipeline(&model_dir(), graph, "checkpoint.safetensors", objective).await
}

/// Judges the cases of a folder that `takes` lets through: how many, and the largest difference of a loss.
async fn check(dir: &Path, pipeline: &Pipeline, takes: impl Fn(&Value) -> bool) -> (usize, f64) {
    let table = table(dir);
    let (mut judged, mut largest): (usize, f64) = (0, 0.0);
    for case in table["cases"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|c| takes(c))
    {
        let result = judge(pipeline, &body(dir, case)).await;
        let name = case["name"].to_string();
        largest = largest.max(compare(&name, &result, &case["expect"]));
        if case["kind"] == "zero" {
            assert_eq!(result["delta"], 0.0, "{result}");
        }
        judged += 1;
    }
    (judged, largest)
}

/// Judges these cases of the language model; the largest difference of a loss.
async fn check_named(pipeline: &Pipeline, names: &[&str]) -> f64 {
    let takes = |case: &Value| names.iter().any(|name| case["name"] == *name);
    let (judged, largest) = check(&model_dir(), pipeline, takes).await;
    assert_eq!(judged, names.len(), "a name is not in the table");
    assert!(largest > 0.0, "f32 and f64 cannot agree in every bit");
    largest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_case_of_each_kind_agrees_with_the_independent_table() {
    let pipeline = language_model(PLAIN).await;
    let names = [
        "gradient-f16",
        "gradient-other-nonce",
        "difference-list-unsorted",
        "difference-shard-subset",
        "difference-one-window",
        "inverted-gradient-301",
        "noise-list",
        "zero-effect",
        "stale-older",
        "malformed-nan",
        "malformed-huge-weights",
    ];
    let largest = check_named(&pipeline, &names).await;
    println!("{PLAIN}: largest difference to the independent losses: {largest:.3e}");
    containers(&pipeline).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tensor_in_two_places_of_the_hardest_graph_is_written_in_both() {
    let pipeline = language_model(HARDEST).await;
    let names = [
        "gradient-embedding-only",
        "difference-one-window",
        "malformed-index-numel",
    ];
    let largest = check_named(&pipeline, &names).await;
    println!("{HARDEST}: largest difference to the independent losses: {largest:.3e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn small_models_agree_with_their_tables() {
    let own_loss = Objective::GraphLoss {};
    for (folder, graph, weights, objective) in [
        ("digits", "graph.onnx", "checkpoint.safetensors", own_loss),
        (
            "inputs",
            "graph.onnx",
            "checkpoint.safetensors",
            Objective::causal_lm(16),
        ),
        (
            "half",
            "graph-f16.onnx",
            "checkpoint-f16.safetensors",
            Objective::causal_lm(16),
        ),
    ] {
        let dir = model_dir().join(folder);
        let pipeline = pipeline(&dir, graph, weights, objective).await;
        let takes = |case: &Value| case["precision"].is_null() || case["precision"] == "f16";
        let (judged, largest) = check(&dir, &pipeline, takes).await;
        assert!(judged >= 4 && (0.0..=TOLERANCE).contains(&largest));
        println!("{folder}/{graph}: largest difference to the independent losses: {largest:.3e}");
    }
}

/// One update in each container gives the same bits on one window.
async fn containers(pipeline: &Pipeline) {
    let files = [
        ("source.json", "binary_v2", None),
        ("source.json.zst", "binary_v2", Some("zstd")),
        ("torch-i64-f32.pt", "pt_chunks", None),
        ("pairs-i32-f32.safetensors", "safetensors", None),
    ];
    let mut found = Vec::new();
    for (file, format, compression) in files {
        let bytes = std::fs::read(model_dir().join("candidates/formats").join(file)).unwrap();
        let mut candidate = json!({
            "format": format, "semantics": "param_diff", "data": BASE64.encode(bytes),
        });
        if let Some(compression) = compression {
            candidate["compression"] = json!(compression);
        }
        let job = json!({
            "v": 1, "kind": "score", "submission_id": file, "model_version": 7,
            "candidate": candidate, "validation": {"shards": [59998]},
        });
        let result = judge(pipeline, &serde_json::to_vec(&job).unwrap()).await;
        assert_eq!(result["status"], "scored", "{file}: {result}");
        found.push((file, result["loss_after"].as_f64().unwrap().to_bits()));
    }
    assert!(
        found.iter().all(|(_, bits)| *bits == found[0].1),
        "{found:?}"
    );
}
