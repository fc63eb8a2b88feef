//! The matrix of architectures: models of Hugging Face in three states, as people export them, placed
//! under the checkpoint's names and scored with PyTorch's own losses; or refused with what helps.

use std::sync::LazyLock;

use scorer::engine::trial::build;
use scorer::model::build::Built;
use scorer::model::manifest::PackageError;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::*;

/// What is exported, and how: the graph, the weights, and what the page calls it.
pub(super) struct State {
    graph: &'static str,
    weights: &'static str,
    pub(super) title: &'static str,
    /// Architectures whose export in this state holds functions of weights, or parameters merged
    /// beyond telling apart.
    pub(super) refused: &'static [&'static str],
}

pub(super) const STATES: [State; 3] = [
    State {
        graph: "fresh",
        weights: "fresh",
        title: "new",
        refused: &[
            "bart",
            "bert",
            "distilbert",
            "gemma2",
            "gemma3",
            "gpt2",
            "gptneox",
            "mamba",
            "mamba2",
            "opt",
            "resnet",
            "t5",
            "vit",
        ],
    },
    State {
        graph: "trained",
        weights: "trained",
        title: "trained",
        refused: &[
            "bart",
            "bert",
            "distilbert",
            "gemma2",
            "gemma3",
            "gpt2",
            "mamba",
            "mamba2",
            "resnet",
            "t5",
        ],
    },
    State {
        graph: "unfolded",
        weights: "fresh",
        title: "new, `optimize=False`",
        refused: &[],
    },
];

const ADVICE: &str = "export with torch.onnx.export(..., optimize=False)";

static TABLE: LazyLock<Value> = LazyLock::new(|| table(&model_dir().join("architectures")));

pub(super) fn cases() -> impl Iterator<Item = (&'static str, &'static Value)> {
    let cases = TABLE["cases"].as_object().unwrap();
    cases.iter().map(|(name, case)| (name.as_str(), case))
}

/// The committed update, of the tensors whose names become some others.
fn update(name: &str, called: impl Fn(&str) -> Option<String>) -> Vec<u8> {
    let bytes = unpacked(name, "update.safetensors.gz");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let renamed = tensors.iter().filter_map(|(key, view)| {
        let (tensor, part) = key.split_once("::").unwrap();
        Some((format!("{}::{part}", called(tensor)?), view))
    });
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

/// The three candidates of a model: all tensors under the checkpoint's names, the same under those
/// of the live model within wrappers, and one tensor as the exported model calls it.
fn candidates(name: &str, case: &Value) -> [(&'static str, Vec<u8>); 3] {
    let live = case["live"].as_object().unwrap();
    let in_module = |tensor: &str| {
        // Of several tied ones, the graph has the name of the head, which is the shortest.
        let others = live.iter().filter(|(_, checkpoint)| **checkpoint == tensor);
        let other = others.min_by_key(|(called, _)| called.len());
        let called = other.map_or(tensor, |(called, _)| called);
        Some(format!("module._orig_mod.{called}"))
    };
    let one = |tensor: &str| (case["one"] == tensor).then(|| format!("m.{tensor}"));
    [
        ("all", update(name, |tensor| Some(tensor.to_owned()))),
        ("all", update(name, in_module)),
        ("one", update(name, one)),
    ]
}

/// Packages one model in one state.
pub(super) fn packaged(
    name: &str,
    case: &Value,
    state: &State,
) -> Result<(Built, tempfile::TempDir), PackageError> {
    let (files, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (file, packed) in [
        ("graph.onnx", format!("{}.onnx.gz", state.graph)),
        ("weights", format!("{}.safetensors.gz", state.weights)),
    ] {
        std::fs::write(files.path().join(file), unpacked(name, &packed)).unwrap();
    }
    let objective = match case["objective"].as_str().unwrap() {
        "causal_lm" => Objective::causal_lm(16),
        _ => Objective::GraphLoss {},
    };
    let mut recipe = recipe(files.path(), "graph.onnx", "weights", objective, out.path());
    let shards = model_dir().join("architectures/shards");
    recipe.shards = shards.join(case["data"].as_str().unwrap());
    Ok((build(&recipe)?, out))
}

/// Scores the candidates of one model in one state; or sees it refused.
async fn prove(name: &str, case: &Value, state: &State) {
    let label = format!("{name}, {}", state.title);
    let built = packaged(name, case, state);
    if state.refused.contains(&name) {
        let error = built
            .err()
            .unwrap_or_else(|| panic!("{label}: not refused"))
            .0;
        let first: String = error.lines().take(2).collect();
        assert!(first.contains(ADVICE), "{label}: {error}");
        return;
    }
    let (built, out) = built.unwrap_or_else(|e| panic!("{label}: {e}"));
    assert_eq!(
        json!(built.manifest.tensors.len()),
        case["tensors"],
        "{label}"
    );
    let pipeline = pipeline_with(out.path(), &config(&["engine.threads=1"])).await;
    let expected = &case["losses"][state.weights];
    for (which, candidate) in candidates(name, case) {
        let result = score(&pipeline, &candidate).await;
        assert_eq!(result["status"], "scored", "{label}, {which}: {result}");
        close(
            &label,
            "loss_before",
            &result["loss_before"],
            &expected["before"],
        );
        close(&label, which, &result["loss_after"], &expected[which]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn architectures_have_pytorch_s_losses_before_and_after() {
    assert!(cases().count() >= 24);
    let cores = std::thread::available_parallelism().unwrap().get();
    let cores = Arc::new(Semaphore::new(cores));
    let mut proofs = JoinSet::new();
    for (name, case) in cases() {
        for state in &STATES {
            let cores = Arc::clone(&cores);
            proofs.spawn(async move {
                let _core = cores.acquire_owned().await.unwrap();
                prove(name, case, state).await;
            });
        }
    }
    let mut failed = 0;
    while let Some(proof) = proofs.join_next().await {
        failed += usize::from(proof.is_err());
    }
    assert_eq!(failed, 0, "each has said above what it is");
}

/// The checkpoint's `embed_out.weight` is `lm_head.weight` in the live GPT-NeoX. A checkpoint that has a tensor of that
/// name, too, which was left out, means another one.
#[test]
fn a_name_that_was_left_out_is_no_other_name_of_a_tensor() {
    let weights = unpacked("gptneox", "fresh.safetensors.gz");
    let tensors = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let zeros = [0; 4];
    let other = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &zeros);
    let own = || {
        let own = tensors.iter();
        own.map(|(name, view)| (name.to_owned(), view))
    };
    let other = ("lm_head.weight".to_owned(), other.unwrap());
    let aliases = |tensors: Vec<_>, exclude: &[&str]| {
        let (files, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let graph = unpacked("gptneox", "unfolded.onnx.gz");
        std::fs::write(files.path().join("graph.onnx"), graph).unwrap();
        let weights = safetensors::serialize(tensors, None).unwrap();
        std::fs::write(files.path().join("weights"), weights).unwrap();
        let objective = Objective::causal_lm(16);
        let mut recipe = recipe(files.path(), "graph.onnx", "weights", objective, out.path());
        recipe.shards = model_dir().join("architectures/shards/causal");
        recipe.exclude = exclude.iter().map(|name| (*name).to_owned()).collect();
        build(&recipe).unwrap().manifest.aliases.unwrap_or_default()
    };
    let known = aliases(own().collect(), &[]);
    assert_eq!(
        known.get("lm_head.weight").map(String::as_str),
        Some("embed_out.weight")
    );
    let left_out = aliases(own().chain([other]).collect(), &["lm_head.weight"]);
    assert_eq!(left_out.get("lm_head.weight"), None);
}

/// The page's table: `UPDATE=1 cargo test --test cases architectures` writes it anew.
#[test]
fn the_page_says_what_is_proven() {
    let exporter = TABLE["exporter"].as_object().unwrap();
    let versions = exporter.iter();
    let versions = versions.map(|(name, version)| format!("{name} {}", version.as_str().unwrap()));
    let versions: Vec<String> = versions.collect();
    let [fresh, trained, unfolded] = STATES.map(|state| state.title);
    let mut page = format!(
        "<!-- Generated from the tests: UPDATE=1 cargo test --test cases architectures -->\n\n\
         # Architectures\n\n\
         Models of these architectures, tiny and made by the libraries themselves, are packaged, warmed up and scored by \
         every run of\n[the tests](../../tests/cases/architectures.rs): losses before, after an update of every tensor, \
         and after an update of one tensor,\nwithin 2e-6 of PyTorch's. *yes*: proven. *no*: `scorer package` refuses \
         the export and says what to do, because the exporter\nfolded or merged weights. All were exported by \
         `torch.onnx.export(dynamo=True)`, with `optimize=True` unless the table says\notherwise, with {}.\n\n\
         | model | class | what it shows | {fresh} | {trained} | {unfolded} |\n\
         | --- | --- | --- | --- | --- | --- |\n",
        versions.join(", ")
    );
    for (name, case) in cases() {
        let word = |key: &str| case[key].as_str().unwrap();
        let [fresh, trained, unfolded] = STATES.map(|state| {
            if state.refused.contains(&name) {
                "no"
            } else {
                "yes"
            }
        });
        let (class, shows) = (word("class"), word("shows"));
        page += &format!("| {name} | `{class}` | {shows} | {fresh} | {trained} | {unfolded} |\n");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/architectures.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(page, committed, "run UPDATE=1 cargo test --test cases");
}
