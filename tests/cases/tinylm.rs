//! The language model: three graphs of the same weights, and the hazard model, used gently.

use std::collections::HashMap;
use std::io::Write as _;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use scorer::engine::trial::build;
use scorer::protocol::result::Body;

use super::*;

const TWO_PLACES: &str = "graph-two-places.onnx";
const GRAPHS: [&str; 3] = ["graph-named.onnx", "graph-folded.onnx", TWO_PLACES];

pub(crate) fn package(graph: &str, label_shift: usize, out: &Path) -> PathBuf {
    let out = out.join(format!("{graph}-{label_shift}"));
    let recipe = Recipe {
        exclude: Vec::new(),
        graph: model_dir().join(graph),
        weights: Some(model_dir().join("checkpoint.safetensors")),
        shards: model_dir().join("shards"),
        name: "tinylm".into(),
        version: 7,
        out: out.clone(),
        objective: Objective::CausalLm {
            window: 128,
            windows_per_row: 1,
            label_shift,
            ignore_index: -100,
        },
    };
    build(&recipe).unwrap();
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn every_case_agrees_with_the_independent_table_on_every_graph() {
    let out = tempfile::tempdir().unwrap();
    let table = table(&model_dir());
    for graph in GRAPHS {
        let mut largest: f64 = 0.0;
        let mut pipelines = HashMap::new();
        for shift in [1_usize, 2] {
            pipelines.insert(shift, pipeline(&package(graph, shift, out.path())).await);
        }
        let cases = table["cases"].as_array().unwrap();
        assert!(cases.len() >= 40, "only {} cases", cases.len());
        for case in cases {
            let name = format!("{graph} {}", case["name"]);
            let shift = usize::try_from(case["label_shift"].as_u64().unwrap()).unwrap();
            let pipeline = &pipelines[&shift];
            largest = largest.max(compare(
                &name,
                &judge(pipeline, &body(&model_dir(), case)).await,
                &case["expect"],
            ));
        }
        println!("{graph}: largest difference to the independent losses: {largest:.3e}");
    }
}

/// Were the second place missed, the head would keep the old embedding. No probe sees that, because
/// the loss moves all the same.
#[test]
fn a_tied_head_that_was_folded_is_a_second_place() {
    let out = tempfile::tempdir().unwrap();
    let manifest = manifest(&package(TWO_PLACES, 1, out.path()));
    assert_eq!(
        manifest["tensors"]["model.embed_tokens.weight"]["places"],
        json!([
            {"initializer": "model.embed_tokens.weight", "transposed": false},
            {"initializer": "onnx::MatMul_777", "transposed": true},
        ])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_baseline_agrees_with_the_table_for_every_choice_of_windows() {
    let out = tempfile::tempdir().unwrap();
    let table = table(&model_dir());
    for baseline in table["baselines"].as_array().unwrap() {
        let shift = usize::try_from(baseline["label_shift"].as_u64().unwrap()).unwrap();
        let dir = out
            .path()
            .join(format!("{}-{:?}", baseline["nonce"], baseline["plan"]).replace('"', ""));
        std::fs::create_dir_all(&dir).unwrap();
        let pipeline = pipeline(&package("graph-folded.onnx", shift, &dir)).await;
        let mut validation = json!({ "nonce": baseline["nonce"] });
        if !baseline["shards"].is_null() {
            validation["shards"] = baseline["shards"].clone();
        }
        let job =
            json!({"v": 1, "kind": "validate", "submission_id": "b", "validation": validation});
        let result = judge(&pipeline, &serde_json::to_vec(&job).unwrap()).await;
        assert_eq!(result["status"], "scored", "{result}");
        assert_eq!(result["plan"], baseline["plan"]);
        assert_eq!(result["weights_id"], table["model"]["weights_id"]);
        close("baseline", "loss", &result["loss"], &baseline["loss"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_are_equal_bit_for_bit_whatever_ran_before() {
    let out = tempfile::tempdir().unwrap();
    let table = table(&model_dir());
    let pipeline = pipeline(&package("graph-folded.onnx", 1, out.path())).await;
    let shift_one = |case: &&Value| case["label_shift"] == 1;
    let cases: Vec<&Value> = table["cases"]
        .as_array()
        .unwrap()
        .iter()
        .filter(shift_one)
        .collect();
    let mut first = HashMap::new();
    for case in &cases {
        let result = judge(&pipeline, &body(&model_dir(), case)).await;
        first.insert(
            case["name"].to_string(),
            result["delta"].as_f64().map(f64::to_bits),
        );
    }
    for case in cases.iter().rev() {
        let result = judge(&pipeline, &body(&model_dir(), case)).await;
        assert_eq!(
            first[&case["name"].to_string()],
            result["delta"].as_f64().map(f64::to_bits),
            "{}",
            case["name"]
        );
        if case["kind"] == "zero" {
            assert_eq!(result["delta"], 0.0, "{result}");
        }
    }
}

/// The CPU provider divides a matrix among threads so that no sum is split; where a provider does,
/// this does not hold, and workers of one fleet must not differ.
#[tokio::test(flavor = "multi_thread")]
async fn one_thread_or_two_give_the_same_bits() {
    let out = tempfile::tempdir().unwrap();
    let dir = package("graph-folded.onnx", 1, out.path());
    let mut results = Vec::new();
    for threads in ["engine.threads=1", "engine.threads=2"] {
        let pipeline = pipeline_with(&dir, &config(&[threads])).await;
        let mut scores = Vec::new();
        for case in table(&model_dir())["cases"].as_array().unwrap() {
            if case["label_shift"] == 1 {
                let result = judge(&pipeline, &body(&model_dir(), case)).await;
                let bits = |field: &str| result[field].as_f64().map(f64::to_bits);
                scores.push((
                    case["name"].clone(),
                    bits("loss_before"),
                    bits("loss_after"),
                ));
            }
        }
        results.push(scores);
    }
    assert!(results[0].iter().any(|(_, before, _)| before.is_some()));
    assert_eq!(results[0], results[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_another_digest_is_refused_by_name() {
    let out = tempfile::tempdir().unwrap();
    let dir = package("graph-named.onnx", 1, out.path());
    let shard = std::fs::read_dir(dir.join("shards"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let error = EngineHandle::load(&dir, &config(&[]), Arc::default())
        .await
        .unwrap_err();
    assert!(
        error
            .message
            .contains(&shard.file_name().unwrap().to_string_lossy().into_owned()),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_shard_is_refused_unless_a_subset_is_allowed() {
    let out = tempfile::tempdir().unwrap();
    let dir = package("graph-named.onnx", 1, out.path());
    std::fs::remove_file(dir.join("shards/shard_059998.safetensors")).unwrap();
    let load = async |config: &Config| EngineHandle::load(&dir, config, Arc::default()).await;
    let error = load(&config(&[])).await.unwrap_err();
    assert!(error.message.contains("shard_059998"), "{error}");
    let mut lenient = config(&[]);
    lenient.model.allow_shards_subset = true;
    let engine = load(&lenient).await.unwrap();
    let ids: Vec<u64> = engine.package.shards.iter().map(|s| s.id).collect();
    assert_eq!(ids, [59996, 59997, 59999, 60000]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_candidate_may_name_a_tied_tensor_by_its_alias() {
    let out = tempfile::tempdir().unwrap();
    let dir = package("graph-folded.onnx", 1, out.path());
    let path = dir.join("model.json");
    let mut manifest = manifest(&dir);
    manifest["aliases"] = json!({"lm_head.weight": "model.embed_tokens.weight"});
    std::fs::write(&path, manifest.to_string()).unwrap();
    let pipeline = pipeline(&dir).await;
    let table = table(&model_dir());
    let named = |case: &&Value| case["name"] == "gradient-embedding-only";
    let mut case = table["cases"]
        .as_array()
        .unwrap()
        .iter()
        .find(named)
        .unwrap()
        .clone();
    let original = judge(&pipeline, &body(&model_dir(), &case)).await;
    let text = std::fs::read_to_string(model_dir().join(case["file"].as_str().unwrap())).unwrap();
    let renamed = text.replace("model.embed_tokens.weight", "lm_head.weight");
    assert_ne!(text, renamed, "the case touches the embedding");
    let file = out.path().join("renamed.json");
    std::fs::write(&file, &renamed).unwrap();
    case["file"] = json!(file);
    case["sha256"] = Value::Null;
    case["size"] = json!(renamed.len());
    let mut job: Value = serde_json::from_slice(&body(&model_dir(), &case)).unwrap();
    job["candidate"].as_object_mut().unwrap().remove("sha256");
    let aliased = judge(&pipeline, &serde_json::to_vec(&job).unwrap()).await;
    assert_eq!(aliased["delta"], original["delta"], "{aliased}");
    assert_ne!(aliased["delta"], 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_that_is_not_met_is_a_failed_warm_up() {
    let out = tempfile::tempdir().unwrap();
    let dir = package("graph-named.onnx", 1, out.path());
    let path = dir.join("model.json");
    let mut manifest = manifest(&dir);
    manifest["canary"] = json!({"loss": 0.5, "tolerance": 1e-6});
    std::fs::write(&path, manifest.to_string()).unwrap();
    let engine = EngineHandle::load(&dir, &config(&[]), Arc::default())
        .await
        .unwrap();
    let error = engine.turn().await.warm().await.unwrap_err();
    assert_eq!(
        error.detail,
        scorer::protocol::state::Detail::CanaryMismatch
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_the_graph_does_not_have_is_named() {
    let out = tempfile::tempdir().unwrap();
    let dir = package("graph-named.onnx", 1, out.path());
    let path = dir.join("model.json");
    let mut manifest = manifest(&dir);
    // The graph still has the old initializer; the place named here is an input nobody reads.
    let places = manifest["tensors"]["model.norm.weight"]["places"]
        .as_array_mut()
        .unwrap();
    places[0]["initializer"] = json!("nowhere");
    std::fs::write(&path, manifest.to_string()).unwrap();
    let error = EngineHandle::load(&dir, &config(&[]), Arc::default())
        .await
        .unwrap_err();
    assert!(error.message.contains("nowhere"), "{error}");
}

/// The package of `tests/model/hazard`; its README section says what the model is for.
fn hazard_package(out: &Path) -> PathBuf {
    let source = model_dir().join("hazard");
    let out = out.join("hazard");
    let recipe = Recipe {
        exclude: Vec::new(),
        graph: source.join("graph.onnx"),
        weights: Some(source.join("checkpoint.safetensors")),
        shards: source.join("shards"),
        name: "hazard".into(),
        version: 1,
        out: out.clone(),
        objective: Objective::causal_lm(16),
    };
    build(&recipe).unwrap();
    out
}

/// A `param_diff` candidate that adds `value` to `size.weight`, as `binary_v2`.
fn resized(value: f32) -> Vec<u8> {
    let mut packed = ZlibEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&value.to_le_bytes()).unwrap();
    packed.write_all(&0_i32.to_le_bytes()).unwrap();
    let data = BASE64.encode(packed.finish().unwrap());
    serde_json::to_vec(&json!({"size.weight": {"shape": [1], "k": 1, "data": data}})).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harmless_candidate_of_the_hazard_package_is_scored() {
    let out = tempfile::tempdir().unwrap();
    let pipeline = pipeline(&hazard_package(out.path())).await;
    let job = json!({
        "v": 1, "kind": "score", "submission_id": "harmless", "model_version": 1,
        "candidate": {
            "format": "binary_v2", "semantics": "param_diff", "data": BASE64.encode(resized(2.0)),
        },
    });
    let result = judge(&pipeline, &serde_json::to_vec(&job).unwrap()).await;
    assert_eq!(result["status"], "scored", "{result}");
    assert_eq!(result["windows"], 2, "{result}");
    assert_eq!(result["candidate"]["effective_entries"], 1, "{result}");
    assert_ne!(result["delta"], 0.0, "{result}");
}

#[test]
fn a_result_body_is_told_apart_when_it_is_read_back() {
    let text = json!({"error": {"code": "out_of_memory", "message": "x", "retryable": true, "detail": {}}});
    assert!(matches!(
        serde_json::from_value::<Body>(text).unwrap(),
        Body::Error { .. }
    ));
}
