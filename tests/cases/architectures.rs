//! Hugging Face models at their first version, as people export them: placed under the checkpoint's
//! names, with PyTorch's own losses before and after a change to every tensor; or refused with what
//! helps.

use scorer::engine::trial::build;

use super::*;

/// Architectures whose folding export holds functions of weights, or parameters merged beyond
/// telling apart.
const FOLDED: [&str; 6] = ["gemma2", "gemma3", "gpt2", "gptneox", "mamba", "opt"];

/// The committed update, under the names that the wrapped model gives its parameters, or others.
fn update(dir: &Path, prefix: &str) -> Vec<u8> {
    let bytes = std::fs::read(dir.join("update.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let renamed = tensors
        .iter()
        .map(|(name, view)| (format!("{prefix}{name}"), view));
    safetensors::serialize(renamed.collect::<Vec<_>>(), None).unwrap()
}

async fn score(pipeline: &Pipeline, candidate: &[u8]) -> Value {
    let body = json!({
        "v": 1, "kind": "score", "submission_id": "architecture", "model_version": 1,
        "candidate": {
            "format": "safetensors", "semantics": "param_diff", "data": BASE64.encode(candidate),
        },
    });
    judge(pipeline, &serde_json::to_vec(&body).unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn models_at_their_first_version_have_pytorch_s_losses_before_and_after() {
    let table = table(&model_dir().join("architectures"));
    let cases = table["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 19);
    for (name, case) in cases {
        let dir = model_dir().join("architectures").join(name);
        for graph in ["graph.onnx", "graph-folded.onnx"] {
            let out = tempfile::tempdir().unwrap();
            let objective = Objective::causal_lm(16);
            let mut recipe = recipe(&dir, graph, "checkpoint.safetensors", objective, out.path());
            recipe.shards = model_dir().join("architectures/shards");
            let built = build(&recipe);
            if graph == "graph-folded.onnx" && FOLDED.contains(&name.as_str()) {
                let error = built.unwrap_err().0;
                let advice = "export with torch.onnx.export(..., optimize=False)";
                let first: String = error.lines().take(2).collect();
                assert!(first.contains(advice), "{name}: {error}");
                continue;
            }
            let built = built.unwrap_or_else(|e| panic!("{name}, {graph}: {e}"));
            let tensors = built.manifest.tensors.len()
                + built.manifest.aliases.map_or(0, |aliases| aliases.len());
            assert_eq!(json!(tensors), case["tensors"], "{name}");
            let pipeline = pipeline(out.path()).await;
            for prefix in ["", "m.", "module._orig_mod."] {
                let result = score(&pipeline, &update(&dir, prefix)).await;
                assert_eq!(result["status"], "scored", "{name}: {result}");
                close(name, "loss_before", &result["loss_before"], &case["before"]);
                close(name, "loss_after", &result["loss_after"], &case["after"]);
            }
        }
    }
}
