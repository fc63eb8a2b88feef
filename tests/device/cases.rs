//! Candidates of each kind, scored by workers on the device: the statuses of the tables, and the independent losses.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use testkit::aggregator::Aggregator;
use testkit::package::{Package, VERSION, fixtures};
use testkit::stack::Stack;
use testkit::table::{compare, job, table};
use testkit::wait::secs;

use crate::on_the_device;

/// A worker on a package, while something is asked of it.
fn served(package: &Package, ask: impl FnOnce(&Aggregator)) {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |settings| {
        on_the_device(settings).set("model.dir", package.path().display())
    });
    worker.heartbeat_when(secs(300), "ready", |r| r["ready"] == true);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    ask(&aggregator);
    worker.drain();
}

/// Submits the cases of a folder that `takes` lets through: how many, and the largest difference of a loss.
fn check(dir: &Path, aggregator: &Aggregator, takes: impl Fn(&Value) -> bool) -> (usize, f64) {
    let table = table(dir);
    let (mut judged, mut largest): (usize, f64) = (0, 0.0);
    for case in table["cases"].as_array().unwrap() {
        if !takes(case) {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        let mut job = job(dir, case);
        job["submission_id"] = json!(name);
        if case["model_version"] == table["model"]["version"] {
            job["model_version"] = json!(VERSION);
        }
        aggregator.submit(&job);
        let result = aggregator.result(name).json();
        largest = largest.max(compare(name, &result, &case["expect"]));
        if case["kind"] == "zero" {
            assert_eq!(result["delta"], 0.0, "{result}");
        }
        judged += 1;
    }
    (judged, largest)
}

/// The same for cases of the language model by name.
fn check_named(aggregator: &Aggregator, names: &[&str]) -> f64 {
    let takes = |case: &Value| names.iter().any(|name| case["name"] == *name);
    let (judged, largest) = check(&fixtures(), aggregator, takes);
    assert_eq!(judged, names.len(), "a name is not in the table");
    assert!(largest > 0.0, "f32 and f64 cannot agree in every bit");
    largest
}

/// All nodes of this graph are on the device.
#[test]
fn a_case_of_each_kind_agrees_with_the_independent_table() {
    let graph = "graph-folded.onnx";
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
    served(&Package::of_graph(graph), |aggregator| {
        let largest = check_named(aggregator, &names);
        println!("{graph}: largest difference to the independent losses: {largest:.3e}");
        containers(aggregator);
    });
}

/// The hardest: shapes are computed on the host, and one tensor is in two places, one of them transposed.
#[test]
fn a_tensor_in_two_places_is_written_in_both() {
    let graph = "graph-two-places.onnx";
    let names = [
        "gradient-embedding-only",
        "difference-one-window",
        "malformed-index-numel",
    ];
    served(&Package::of_graph(graph), |aggregator| {
        let largest = check_named(aggregator, &names);
        println!("{graph}: largest difference to the independent losses: {largest:.3e}");
    });
}

#[test]
fn small_models_agree_with_their_tables() {
    let (own_loss, tokens): (&[&str], &[&str]) =
        (&["--objective", "graph_loss"], &["--window", "16"]);
    for (folder, graph, weights, objective) in [
        ("digits", "graph.onnx", "checkpoint.safetensors", own_loss),
        ("inputs", "graph.onnx", "checkpoint.safetensors", tokens),
        (
            "half",
            "graph-f16.onnx",
            "checkpoint-f16.safetensors",
            tokens,
        ),
    ] {
        let dir = fixtures().join(folder);
        let package = Package::made(&dir, graph, weights, objective);
        let takes = |case: &Value| case["precision"].is_null() || case["precision"] == "f16";
        served(&package, |aggregator| {
            let (judged, largest) = check(&dir, aggregator, takes);
            assert!(judged >= 4, "{folder}: {judged} cases");
            println!("{folder}: largest difference to the independent losses: {largest:.3e}");
        });
    }
}

/// One update in each container gives the same bits on one window.
fn containers(aggregator: &Aggregator) {
    let files = [
        ("source.json", "binary_v2", None),
        ("source.json.zst", "binary_v2", Some("zstd")),
        ("torch-i64-f32.pt", "pt_chunks", None),
        ("pairs-i32-f32.safetensors", "safetensors", None),
    ];
    let mut found = Vec::new();
    for (file, format, compression) in files {
        let bytes = std::fs::read(fixtures().join("candidates/formats").join(file)).unwrap();
        let mut candidate = json!({
            "format": format, "semantics": "param_diff", "data": BASE64.encode(bytes),
        });
        if let Some(compression) = compression {
            candidate["compression"] = json!(compression);
        }
        aggregator.submit(&json!({
            "v": 1, "kind": "score", "submission_id": file, "model_version": VERSION,
            "candidate": candidate, "validation": {"shards": [59998]},
        }));
        let result = aggregator.result(file).json();
        assert_eq!(result["status"], "scored", "{file}: {result}");
        found.push((file, result["loss_after"].as_f64().unwrap().to_bits()));
    }
    assert!(
        found.iter().all(|(_, bits)| *bits == found[0].1),
        "{found:?}"
    );
}
