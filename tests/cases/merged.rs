//! Untrained tensors that exporters merge into one initializer: packaging gives each its own copy,
//! and a change to one of them gives the loss that an independent table says, no other's.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use scorer::engine::trial::build;
use scorer::model::build::Built;
use scorer::model::manifest::PackageError;

use super::*;

fn package(graph: &str, out: &Path) -> Result<Built, PackageError> {
    build(&Recipe {
        exclude: Vec::new(),
        graph: model_dir().join("merged").join(graph),
        weights: Some(model_dir().join("merged/checkpoint.safetensors")),
        shards: model_dir().join("hazard/shards"),
        name: "merged".into(),
        version: 1,
        out: out.to_owned(),
        objective: Objective::causal_lm(16),
    })
}

/// A job that adds `change` to a whole tensor.
fn changing(case: &Value) -> Vec<u8> {
    let change = case["change"].as_array().unwrap();
    let mut packed = ZlibEncoder::new(Vec::new(), Compression::fast());
    for value in change {
        // Every one of them was a float32 when it was written.
        #[expect(clippy::cast_possible_truncation, reason = "exact")]
        let value = value.as_f64().unwrap() as f32;
        packed.write_all(&value.to_le_bytes()).unwrap();
    }
    for index in 0..i32::try_from(change.len()).unwrap() {
        packed.write_all(&index.to_le_bytes()).unwrap();
    }
    let data = BASE64.encode(packed.finish().unwrap());
    let name = case["tensor"].as_str().unwrap();
    let entry = json!({"shape": case["shape"], "k": change.len(), "data": data});
    let candidate = serde_json::to_vec(&json!({ name: entry })).unwrap();
    serde_json::to_vec(&json!({
        "v": 1, "kind": "score", "submission_id": name, "model_version": 1,
        "candidate": {
            "format": "binary_v2", "semantics": "param_diff", "data": BASE64.encode(candidate),
        },
    }))
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_to_a_merged_tensor_changes_that_tensor_alone() {
    let table = table(&model_dir().join("merged"));
    let cases = table["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 20);
    for graph in ["graph-traced.onnx", "graph-scripted.onnx"] {
        let out = tempfile::tempdir().unwrap();
        package(graph, out.path()).unwrap();
        let pipeline = pipeline(out.path()).await;
        let mut largest: f64 = 0.0;
        for case in cases {
            let result = judge(&pipeline, &changing(case)).await;
            assert_eq!(result["status"], "scored", "{result}");
            for (field, expected) in [
                ("loss_before", &table["loss"]),
                ("loss_after", &case["loss"]),
            ] {
                let difference =
                    (result[field].as_f64().unwrap() - expected.as_f64().unwrap()).abs();
                let name = &case["tensor"];
                assert!(
                    difference <= TOLERANCE,
                    "{graph}: {name}: {field} is {}, the table says {expected}",
                    result[field]
                );
                largest = largest.max(difference);
            }
        }
        println!("{graph}: largest difference to the independent losses: {largest:.3e}");
    }
}

#[test]
fn every_merged_tensor_has_an_initializer_that_no_other_has() {
    let out = tempfile::tempdir().unwrap();
    let built = package("graph-traced.onnx", out.path()).unwrap();
    for case in table(&model_dir().join("merged"))["cases"]
        .as_array()
        .unwrap()
    {
        let name = case["tensor"].as_str().unwrap();
        let [place] = built.manifest.tensors[name].places.as_slice() else {
            panic!("{name} has {:?}", built.manifest.tensors[name].places);
        };
        assert_eq!(place.initializer, name);
        assert_eq!(place.transposed, name.ends_with("up.weight"));
    }
}

#[test]
fn what_the_exporter_does_not_tell_apart_is_refused_by_name() {
    let out = tempfile::tempdir().unwrap();
    let refusal = package("graph-untold.onnx", out.path()).unwrap_err().0;
    for case in table(&model_dir().join("merged"))["cases"]
        .as_array()
        .unwrap()
    {
        let name = case["tensor"].as_str().unwrap();
        assert!(refusal.contains(name), "{name}: {refusal}");
    }
    assert!(
        refusal.contains("node node_layer_norm (LayerNormalization, no module)"),
        "{refusal}"
    );
    assert!(std::fs::read_dir(out.path()).unwrap().next().is_none());
}

/// The ones that an exporter gives to a normalisation without weights are nobody's tensor.
#[test]
fn a_constant_that_was_merged_with_tensors_is_refused_by_its_node() {
    let out = tempfile::tempdir().unwrap();
    let refusal = package("graph-constant.onnx", out.path()).unwrap_err().0;
    assert!(
        refusal.contains("(LayerNormalization, module \"\")"),
        "{refusal}"
    );
    assert!(
        refusal.contains("norm.weight [16]") && !refusal.contains("up.weight"),
        "{refusal}"
    );
}
