//! Small models: images whose graph gives the loss itself, weights of 16 bits, and inputs besides
//! the tokens.

use scorer::engine::trial::build;

use super::*;

/// Judges every case and baseline of the folder that `takes` lets through.
async fn check(dir: &Path, pipeline: &Pipeline, takes: impl Fn(&Value) -> bool) {
    let table = table(dir);
    let mut largest: f64 = 0.0;
    let of = |key: &str| {
        let all = table[key].as_array().unwrap().clone();
        all.into_iter().filter(&takes).collect::<Vec<_>>()
    };
    let (cases, baselines) = (of("cases"), of("baselines"));
    assert!(cases.len() >= 4 && !baselines.is_empty());
    for case in cases {
        let name = case["name"].to_string();
        let result = judge(pipeline, &body(dir, &case)).await;
        largest = largest.max(compare(&name, &result, &case["expect"]));
        if case["kind"] == "zero" {
            assert_eq!(result["delta"], 0.0, "{result}");
        }
    }
    for baseline in baselines {
        let mut validation = json!({ "nonce": baseline["nonce"] });
        if !baseline["shards"].is_null() {
            validation["shards"] = baseline["shards"].clone();
        }
        let job =
            json!({"v": 1, "kind": "validate", "submission_id": "b", "validation": validation});
        let result = judge(pipeline, &serde_json::to_vec(&job).unwrap()).await;
        for field in ["plan", "windows", "tokens"] {
            assert_eq!(result[field], baseline[field], "{result}");
        }
        close("baseline", "loss", &result["loss"], &baseline["loss"]);
    }
    assert!(largest > 0.0, "f32 and f64 cannot agree in every bit");
}

fn made(dir: &Path, graph: &str, weights: &str, objective: Objective) -> tempfile::TempDir {
    let out = tempfile::tempdir().unwrap();
    build(&recipe(dir, graph, weights, objective, out.path())).unwrap();
    out
}

fn digits() -> (PathBuf, tempfile::TempDir) {
    let dir = model_dir().join("digits");
    let objective = Objective::GraphLoss {};
    let out = made(&dir, "graph.onnx", "checkpoint.safetensors", objective);
    (dir, out)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graph_that_gives_its_own_loss_agrees_with_the_table() {
    let (dir, out) = digits();
    let pipeline = pipeline(out.path()).await;
    let weights_id = &table(&dir)["model"]["weights_id"];
    assert_eq!(pipeline.origin().weights_id, weights_id.as_str().unwrap());
    check(&dir, &pipeline, |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_does_not_fit_the_graph_is_refused_by_the_name_of_the_input() {
    let (_, out) = digits();
    let model = out.path().join("model.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&model).unwrap()).unwrap();
    manifest["outputs"] = json!({});
    std::fs::write(&model, manifest.to_string()).unwrap();
    let load = async || EngineHandle::load(out.path(), &config(&[]), Arc::default()).await;
    let error = load().await.unwrap_err().message;
    assert!(error.contains("outputs.loss: missing"), "{error}");

    // Labels of another type than the graph takes.
    manifest["outputs"] = json!({"loss": "loss"});
    let path = out.path().join("shards/shard_000002.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let views = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let image = views.tensor("image").unwrap();
    let rows = image.shape()[0];
    let labels = vec![0; 4 * rows];
    let label = safetensors::tensor::TensorView::new(safetensors::Dtype::I32, vec![rows], &labels);
    let changed = safetensors::serialize([("image", image), ("label", label.unwrap())], None);
    let changed = changed.unwrap();
    manifest["shards"][1]["sha256"] = json!(sha256(&changed));
    std::fs::write(&path, changed).unwrap();
    std::fs::write(&model, manifest.to_string()).unwrap();
    let error = load().await.unwrap_err().message;
    assert!(error.contains("shard 2: label is I32"), "{error}");
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(bytes))
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_of_16_bits_are_rounded_once() {
    let dir = model_dir().join("half");
    for precision in ["f16", "bf16"] {
        let graph = format!("graph-{precision}.onnx");
        let weights = format!("checkpoint-{precision}.safetensors");
        let out = made(&dir, &graph, &weights, Objective::causal_lm(16));
        let pipeline = pipeline(out.path()).await;
        check(&dir, &pipeline, |case| case["precision"] == precision).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mask_and_positions_are_fed_as_for_whole_windows() {
    let dir = model_dir().join("inputs");
    let weights = "checkpoint.safetensors";
    let out = made(&dir, "graph.onnx", weights, Objective::causal_lm(16));
    check(&dir, &pipeline(out.path()).await, |_| true).await;
}

#[test]
fn an_input_that_nothing_feeds_is_refused_by_name() {
    let dir = model_dir().join("inputs");
    let out = tempfile::tempdir().unwrap();
    let (weights, objective) = ("checkpoint.safetensors", Objective::causal_lm(16));
    let recipe = recipe(&dir, "graph-unknown.onnx", weights, objective, out.path());
    let error = build(&recipe).unwrap_err().0;
    assert!(error.contains("past_key_values.0.key"), "{error}");
}

/// The graph has its weights as inputs already, as an export may leave them.
#[tokio::test(flavor = "multi_thread")]
async fn weights_that_are_inputs_of_the_graph_are_placed_by_name() {
    let source = tempfile::tempdir().unwrap();
    let out = tempfile::tempdir().unwrap();
    let shape = scorer::model::onnx::synthetic::Decoder {
        layers: 1,
        width: 8,
        heads: 2,
        vocabulary: 32,
        window: 16,
    };
    scorer::selftest::synthetic_model::make(shape, source.path()).unwrap();
    let weights = "weights.safetensors";
    let recipe = recipe(
        source.path(),
        "model.onnx",
        weights,
        Objective::causal_lm(16),
        out.path(),
    );
    let built = build(&recipe).unwrap();
    assert_eq!(built.moved, 0);
    pipeline(out.path()).await;
}

/// More than a protobuf can hold, so that the weights must be external data. Two gigabytes and a
/// half are written, mapped and copied: `cargo test --test cases -- --ignored`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes a model of 2.4 GB and needs 8 GB of memory"]
async fn a_model_above_two_gigabytes_is_packaged_and_scored() {
    use scorer::model::onnx::{Graph, WeightSpec};
    let source = tempfile::tempdir().unwrap();
    let out = tempfile::tempdir().unwrap();
    let large = scorer::selftest::synthetic_model::SIX_HUNDRED_MILLION;
    scorer::selftest::synthetic_model::make(large, source.path()).unwrap();
    let weights = std::fs::File::open(source.path().join("weights.safetensors")).unwrap();
    assert!(weights.metadata().unwrap().len() > 1 << 31);
    {
        let bytes = std::fs::read(source.path().join("weights.safetensors")).unwrap();
        let views = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let held: Vec<_> = views.iter().collect();
        let size = |d: &usize| i64::try_from(*d).unwrap();
        let constants: Vec<WeightSpec> = held
            .iter()
            .map(|(name, view)| WeightSpec {
                input: (*name).to_owned(),
                shape: view.shape().iter().map(size).collect(),
                dtype: scorer::model::tensor::Dtype::F32,
                bytes: view.data().to_vec().into(),
            })
            .collect();
        let graph = std::fs::read(source.path().join("model.onnx")).unwrap();
        let graph = Graph::decode(graph.into()).unwrap();
        let data = source.path().join("model.onnx.data");
        let external = graph.with_external(&constants, &data).unwrap();
        std::fs::write(source.path().join("large.onnx"), external).unwrap();
    }
    let objective = Objective::causal_lm(128);
    let weights = "weights.safetensors";
    build(&recipe(
        source.path(),
        "large.onnx",
        weights,
        objective,
        out.path(),
    ))
    .unwrap();
    let engine = EngineHandle::load(out.path(), &config(&[]), Arc::default())
        .await
        .unwrap();
    let fetcher = Fetcher::new(config(&[]).candidates, None).unwrap();
    let pipeline = Pipeline::new(engine, &config(&[]), fetcher, "test", None);
    let candidate = json!({"head.weight": {"shape": [1536, 10_000], "k": 1,
        "data": BASE64.encode(zlib(&[1.0_f32.to_le_bytes(), 7_i32.to_le_bytes()].concat()))}});
    let job = json!({
        "v": 1, "kind": "score", "submission_id": "large", "model_version": 1,
        "candidate": {
            "format": "binary_v2", "semantics": "param_diff",
            "data": BASE64.encode(candidate.to_string()),
        },
    });
    let result = judge(&pipeline, &serde_json::to_vec(&job).unwrap()).await;
    assert_eq!(result["status"], "scored", "{result}");
    assert_eq!(result["candidate"]["effective_entries"], 1, "{result}");
    assert_ne!(result["delta"], 0.0, "{result}");
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut writer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}
