//! What `scorer package` makes of exports that hold tensors in unusual places, and what it refuses
//! because every worker would: run as a user runs it.

use std::process::{Command, Output};

use nix::sys::signal::Signal;
use safetensors::tensor::{Dtype, TensorView};

use super::*;

/// A folder with inputs and outputs of its own.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.path("out/package")
    }

    /// Packages with these arguments.
    fn package(&self, arguments: &[(&str, &Path)], more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_scorer"));
        command.arg("package");
        for (flag, path) in arguments {
            command.arg(flag).arg(path);
        }
        if !more.contains(&"--name") {
            command.args(["--name", "model"]);
        }
        command
            .args(more)
            .args(["--version", "1", "--out"])
            .arg(self.out());
        command.output().unwrap()
    }

    /// Packages one of the committed models with a window of 16.
    fn model(&self, dir: &Path, graph: &str) -> Output {
        let (graph, weights) = (dir.join(graph), dir.join("checkpoint.safetensors"));
        let arguments = [
            ("--graph", &*graph),
            ("--weights", &weights),
            ("--shards", &dir.join("shards")),
        ];
        self.package(&arguments, &["--window", "16"])
    }

    /// Packages the hazard model with these shards.
    fn hazard(&self, shards: &Path, more: &[&str]) -> Output {
        let dir = model_dir().join("hazard");
        let (graph, weights) = (dir.join("graph.onnx"), dir.join("checkpoint.safetensors"));
        let arguments = [
            ("--graph", &*graph),
            ("--weights", &weights),
            ("--shards", shards),
        ];
        self.package(&arguments, more)
    }

    /// A refusal says all of this, and leaves nothing behind.
    #[track_caller]
    fn refused(&self, output: &Output, said: &[&str]) {
        let text = said_by(output);
        assert_eq!(output.status.code(), Some(65), "{text}");
        for part in said {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
        let left: Vec<_> = std::fs::read_dir(self.0.path()).unwrap().collect();
        let names: Vec<_> = left.into_iter().map(|e| e.unwrap().file_name()).collect();
        let foreign = names
            .iter()
            .filter(|n| !n.to_string_lossy().starts_with("in-"));
        assert_eq!(foreign.count(), 0, "{names:?}");
    }
}

fn said_by(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn made(output: &Output) -> String {
    let text = said_by(output);
    assert!(output.status.success(), "{text}");
    text
}

/// The loss of a package, measured by a process that works in `cwd`.
fn loss_from(package: &Path, cwd: &Path) -> f64 {
    let output = Command::new(env!("CARGO_BIN_EXE_scorer"))
        .args([
            "validate",
            "--set",
            "engine.execution_provider=cpu",
            "--model",
        ])
        .arg(package)
        .current_dir(cwd)
        .output()
        .unwrap();
    let said: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said_by(&output)));
    said["loss"].as_f64().unwrap()
}

#[test]
fn external_data_is_the_package_s_own_wherever_the_graph_has_it_and_whatever_the_working_directory()
{
    let dir = model_dir().join("external");
    let whole = Bench::new();
    made(&whole.model(&dir, "inline.onnx"));
    let expected = loss_from(&whole.out(), Path::new("/"));
    let bench = Bench::new();
    made(&bench.model(&dir, "graph.onnx"));
    let manifest = manifest(&bench.out());
    let files = manifest["graph"]["external"].as_array().unwrap();
    assert_eq!(files.len(), 6, "{files:?}");
    // Files of the same names with other contents, as another version of the model has them.
    let decoy = Bench::new();
    for name in [
        "weights.safetensors",
        "model.onnx",
        "model.json",
        "small.data",
        "parts/function.data",
        "parts/constant.data",
    ] {
        for name in [name.to_owned(), format!("external/{name}")] {
            let path = decoy.path(&name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, [0_u8; 140_000]).unwrap();
        }
    }
    for cwd in [Path::new("/"), &bench.out(), decoy.0.path()] {
        assert_eq!(
            loss_from(&bench.out(), cwd).to_bits(),
            expected.to_bits(),
            "{}",
            cwd.display()
        );
    }
    // What candidates cannot touch stays in its file, however large it is.
    let graph = std::fs::read(bench.out().join("model.onnx")).unwrap();
    let graph = scorer::model::onnx::Graph::decode(graph.into()).unwrap();
    let head = scorer::model::onnx::Head::LogProbs("logits");
    let prepared = graph.prepare(&["embed.weight", "head.weight"], head, &[], &bench.out());
    let (prepared, frozen) = (prepared.unwrap().len(), 6 * 66_560);
    assert!(
        prepared < 20_000,
        "{prepared} bytes with {frozen} of frozen weights"
    );
    // The session that `scorer bench` compares with has the weights in files of its own.
    let package =
        Arc::new(scorer::model::package::Package::load(&bench.out(), false, &[]).unwrap());
    let plan = scorer::model::plan::Plan::new(&package.shards, None, "", package.cut()).unwrap();
    let mut bare = scorer::engine::Engine::load_bare(package, &config(&[]).engine).unwrap();
    let losses = bare.pass(&plan).unwrap();
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    assert!((mean - expected).abs() < 1e-6, "{mean}");
    // Each of the files is covered by a digest.
    for file in files {
        let path = bench.out().join(file["file"].as_str().unwrap());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[0] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = scorer::model::package::Package::load(&bench.out(), false, &[])
            .unwrap_err()
            .0;
        assert!(error.contains("SHA-256"), "{error}");
        bytes[0] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
    }
    // A file that model.json does not know is not loaded.
    let mut bent = manifest.clone();
    bent["graph"]["external"].as_array_mut().unwrap().remove(4);
    std::fs::write(bench.out().join("model.json"), bent.to_string()).unwrap();
    let error = scorer::model::package::Package::load(&bench.out(), false, &[])
        .unwrap_err()
        .0;
    assert!(
        error.contains("parts/function.data") && error.contains("package it again"),
        "{error}"
    );
}

/// Copies a graph and its files of external data.
fn copy_export(dir: &Path, copy: &Path) {
    std::fs::create_dir_all(copy.join("parts")).unwrap();
    for file in [
        "graph.onnx",
        "weights.safetensors",
        "model.onnx",
        "model.json",
        "small.data",
        "parts/function.data",
        "parts/constant.data",
    ] {
        std::fs::copy(dir.join(file), copy.join(file)).unwrap();
    }
}

#[test]
fn external_data_that_is_missing_or_cut_off_is_refused_by_the_name_of_the_tensor() {
    let dir = model_dir().join("external");
    let bench = Bench::new();
    let copy = bench.path("in-export");
    copy_export(&dir, &copy);
    let weights = dir.join("checkpoint.safetensors");
    let shards = dir.join("shards");
    let graph = copy.join("graph.onnx");
    let arguments = [
        ("--graph", &*graph),
        ("--weights", &*weights),
        ("--shards", &*shards),
    ];
    let package = || bench.package(&arguments, &["--window", "16"]);
    std::fs::remove_file(copy.join("parts/function.data")).unwrap();
    bench.refused(
        &package(),
        &[
            "function Shift",
            "function_table",
            "keep the export's files together",
        ],
    );
    std::fs::write(copy.join("parts/function.data"), [0; 66_559]).unwrap();
    bench.refused(
        &package(),
        &["function_table", "has 66559 bytes", "0 to 66560"],
    );
    for file in ["parts/function.data", "small.data", "graph.onnx"] {
        std::fs::remove_file(copy.join(file)).unwrap();
        let made = Command::new("mkfifo").arg(copy.join(file)).status();
        assert!(made.unwrap().success());
        bench.refused(&package(), &[file, "is a pipe"]);
        std::fs::remove_file(copy.join(file)).unwrap();
        std::fs::copy(dir.join(file), copy.join(file)).unwrap();
    }
}

/// What each tensor's change does to the loss.
async fn effects(package: &Path) -> Vec<(String, Value)> {
    let pipeline = pipeline(package).await;
    let mut found = Vec::new();
    for (name, tensor) in manifest(package)["tensors"].as_object().unwrap() {
        let shape: Vec<usize> = serde_json::from_value(tensor["shape"].clone()).unwrap();
        let count: usize = shape.iter().product();
        let values: Vec<u8> = (0..count)
            .flat_map(|i| (0.1 + 0.01 * i as f32).to_le_bytes())
            .collect();
        let view = TensorView::new(Dtype::F32, shape, &values).unwrap();
        let candidate = safetensors::serialize([(name.as_str(), view)], None).unwrap();
        let body = json!({
            "v": 1, "kind": "score", "submission_id": "c", "model_version": 1,
            "candidate": {"format": "safetensors", "semantics": "param_diff", "data": BASE64.encode(candidate)},
        });
        let result = judge(&pipeline, &serde_json::to_vec(&body).unwrap()).await;
        assert_eq!(result["status"], "scored", "{result}");
        found.push((name.clone(), result["delta"].clone()));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_in_constants_and_bodies_are_weights() {
    let dir = model_dir().join("elsewhere");
    let (plain, lifted) = (Bench::new(), Bench::new());
    made(&plain.model(&dir, "initializers.onnx"));
    let said = made(&lifted.model(&dir, "graph.onnx"));
    assert!(
        said.contains("made initializers") && said.contains("If choose, tensor bias"),
        "{said}"
    );
    let expected = effects(&plain.out()).await;
    assert_eq!(effects(&lifted.out()).await, expected);
    let without = |name: &str| name == "else.bias" || name == "scale.b";
    for (name, delta) in &expected {
        assert_eq!(*delta == json!(0.0), without(name), "{name}: {delta}");
    }
}

#[test]
fn weights_where_nobody_can_patch_them_are_named_with_their_place() {
    let dir = model_dir().join("elsewhere");
    let bench = Bench::new();
    let place = "function Head, Constant constant_table";
    bench.refused(
        &bench.model(&dir, "in-function.onnx"),
        &["head.weight [8, 16]: the graph holds it in", place],
    );
    let (graph, shards) = (dir.join("in-function.onnx"), dir.join("shards"));
    let own = bench.package(
        &[("--graph", &graph), ("--shards", &shards)],
        &["--window", "16"],
    );
    let said = made(&own);
    assert!(
        said.contains(place) && said.contains("not in the package"),
        "{said}"
    );
}

/// The shards of the hazard model with one token changed.
fn shards_with(bench: &Bench, token: i32, at: usize) -> PathBuf {
    let bytes = std::fs::read(model_dir().join("hazard/shards/shard_000001.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor("tokens").unwrap();
    let mut data = view.data().to_vec();
    data[4 * at..4 * at + 4].copy_from_slice(&token.to_le_bytes());
    let view = TensorView::new(view.dtype(), view.shape().to_vec(), &data).unwrap();
    let folder = bench.path("in-shards");
    std::fs::create_dir_all(&folder).unwrap();
    let changed = safetensors::serialize([("tokens", view)], None).unwrap();
    std::fs::write(folder.join("shard_000007.safetensors"), changed).unwrap();
    folder
}

#[test]
fn no_token_that_the_model_does_not_have_reaches_the_graph() {
    for token in [-100, -1, 16, i32::MAX, i32::MIN] {
        let bench = Bench::new();
        let shards = shards_with(&bench, token, 43);
        let output = bench.hazard(&shards, &["--window", "16"]);
        bench.refused(
            &output,
            &[&format!(
                "shard 7: row 1, position 3: token {token} is outside"
            )],
        );
    }
    // The last of the vocabulary is one; so is it where targets of its kind do not count.
    let bench = Bench::new();
    let shards = shards_with(&bench, 15, 43);
    made(&bench.hazard(&shards, &["--window", "16"]));
    let model = bench.out().join("model.json");
    let before = loss_from(&bench.out(), Path::new("/"));
    let mut bent = manifest(&bench.out());
    bent["objective"]["ignore_index"] = json!(15);
    std::fs::write(&model, bent.to_string()).unwrap();
    assert_ne!(loss_from(&bench.out(), Path::new("/")), before);
    // At the load of a package that was made otherwise, too.
    let shard = "shards/shard_000007.safetensors";
    let shards = shards_with(&bench, -100, 43);
    std::fs::copy(
        shards.join("shard_000007.safetensors"),
        bench.out().join(shard),
    )
    .unwrap();
    bent["shards"][0]["sha256"] = json!(sha256(&std::fs::read(bench.out().join(shard)).unwrap()));
    bent["objective"]["ignore_index"] = json!(-100);
    std::fs::write(&model, bent.to_string()).unwrap();
    let package = scorer::model::package::Package::load(&bench.out(), false, &[]).unwrap();
    let error = scorer::engine::check(&package).unwrap_err().message;
    assert!(error.contains("row 1, position 3: token -100"), "{error}");
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(bytes))
}

#[test]
fn a_package_that_lets_strangers_decide_shapes_is_refused_at_load() {
    let dir = model_dir().join("digits");
    let bench = Bench::new();
    let (graph, weights) = (dir.join("graph.onnx"), dir.join("checkpoint.safetensors"));
    let arguments = [
        ("--graph", &*graph),
        ("--weights", &*weights),
        ("--shards", &dir.join("shards")),
    ];
    made(&bench.package(&arguments, &["--objective", "graph_loss"]));
    let mut bent = manifest(&bench.out());
    bent["tensors"]["nothing"] = json!({
        "places": [{"initializer": "nothing", "transposed": false}], "shape": [0], "dtype": "f32",
    });
    let mut weights = std::fs::read(bench.out().join("weights.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let empty = TensorView::new(Dtype::F32, vec![0], &[]).unwrap();
    let all = tensors
        .iter()
        .map(|(name, view)| (name.to_owned(), view))
        .chain([("nothing".to_owned(), empty)]);
    weights = safetensors::serialize(all.collect::<Vec<_>>(), None).unwrap();
    bent["weights"]["sha256"] = json!(sha256(&weights));
    std::fs::write(bench.out().join("weights.safetensors"), weights).unwrap();
    std::fs::write(bench.out().join("model.json"), bent.to_string()).unwrap();
    let package = scorer::model::package::Package::load(&bench.out(), false, &[]).unwrap();
    let error = scorer::engine::check(&package).unwrap_err().message;
    assert!(
        error.contains("tensors.nothing") && error.contains("package it again"),
        "{error}"
    );
}

#[test]
fn what_no_worker_would_serve_is_refused_and_leaves_nothing() {
    let hazard = model_dir().join("hazard");
    let folder = model_dir();
    let lm = |graph: &Path, window: &str| {
        let bench = Bench::new();
        let weights = hazard.join("checkpoint.safetensors");
        let shards = hazard.join("shards");
        let arguments = [
            ("--graph", graph),
            ("--weights", &*weights),
            ("--shards", &*shards),
        ];
        let output = bench.package(&arguments, &["--window", window]);
        (bench, output)
    };
    let (bench, output) = lm(&hazard.join("graph.onnx"), "64");
    bench.refused(&output, &["no row with the 65 tokens of a window"]);
    let (bench, output) = lm(&folder.join("README.md"), "16");
    bench.refused(&output, &["README.md", "not an ONNX file", "text"]);
    // A shape that the graph fixes to another window.
    let bench = Bench::new();
    let (graph, weights) = (
        folder.join("graph-named.onnx"),
        folder.join("checkpoint.safetensors"),
    );
    let arguments = [
        ("--graph", &*graph),
        ("--weights", &*weights),
        ("--shards", &folder.join("shards")),
    ];
    bench.refused(
        &bench.package(&arguments, &["--window", "64"]),
        &["input tokens takes 128 tokens, the window has 64"],
    );
    // Shards of another objective, and an output that is no loss of each example.
    let unlike: [(_, &[&str]); 2] = [
        (
            folder.join("digits"),
            &["shard 1", "the graph has no input tokens"],
        ),
        (hazard.clone(), &["tokens"]),
    ];
    for (model, words) in unlike {
        let bench = Bench::new();
        let arguments = [
            ("--graph", &*model.join("graph.onnx")),
            ("--weights", &*model.join("checkpoint.safetensors")),
            ("--shards", &*hazard.join("shards")),
        ];
        let output = bench.package(&arguments, &["--objective", "graph_loss"]);
        bench.refused(&output, words);
    }
    // A model in training mode.
    let bench = Bench::new();
    let elsewhere = folder.join("elsewhere");
    let (graph, shards) = (elsewhere.join("random.onnx"), elsewhere.join("shards"));
    let output = bench.package(
        &[("--graph", &graph), ("--shards", &shards)],
        &["--window", "16"],
    );
    bench.refused(&output, &["different losses", "evaluation mode"]);
    // Outputs of another shape.
    for (graph, objective, said) in [
        (
            "flat.onnx",
            "causal_lm",
            "output logits has 2 dimensions, [batch, seq, vocab]",
        ),
        (
            "mean.onnx",
            "graph_loss",
            "output loss is a single number, [batch] is needed",
        ),
    ] {
        let bench = Bench::new();
        let (graph, shards) = (elsewhere.join(graph), elsewhere.join("shards"));
        let arguments = [("--graph", &*graph), ("--shards", &*shards)];
        let more = ["--window", "16", "--objective", objective];
        bench.refused(&bench.package(&arguments, &more), &[said]);
    }
    // Arguments are looked at before anything is read.
    for (arguments, said) in [
        (
            ["--name", "Model", "--window", "16"],
            "name: \"Model\" must match",
        ),
        (
            ["--name", "model", "--window", "0"],
            "objective.window: must be 1 to",
        ),
    ] {
        let nowhere = [
            ("--graph", Path::new("nowhere.onnx")),
            ("--shards", Path::new("nowhere")),
        ];
        let output = Bench::new().package(&nowhere, &arguments);
        assert_eq!(output.status.code(), Some(64), "{}", said_by(&output));
        assert!(said_by(&output).contains(said), "{}", said_by(&output));
    }
}

#[test]
fn a_second_try_with_other_arguments_finds_a_free_place() {
    let dir = model_dir().join("hazard");
    let bench = Bench::new();
    let shards = dir.join("shards");
    bench.refused(&bench.hazard(&shards, &["--window", "64"]), &[]);
    let said = made(&bench.hazard(&shards, &["--window", "16"]));
    assert!(said.contains("tried on the CPU: loss"), "{said}");
    let again = bench.hazard(&shards, &["--window", "16"]);
    assert!(
        said_by(&again).contains("is not empty"),
        "{}",
        said_by(&again)
    );
}

#[test]
fn where_onnx_runtime_is_missing_the_package_is_made_and_the_note_says_so() {
    let dir = model_dir().join("hazard");
    let bench = Bench::new();
    let shards = dir.join("shards");
    let missing = [
        "--window",
        "16",
        "--set",
        "engine.onnxruntime=/nowhere/libonnxruntime.so",
    ];
    let said = made(&bench.hazard(&shards, &missing));
    assert!(
        said.contains("was not tried") && said.contains("/nowhere/libonnxruntime.so"),
        "{said}"
    );
}

#[test]
fn what_only_the_cpu_lacks_is_a_note_at_packaging_and_said_in_these_words_by_a_worker() {
    let dir = model_dir().join("elsewhere");
    let bench = Bench::new();
    let (graph, shards) = (dir.join("bfloat16.onnx"), dir.join("shards"));
    let arguments = [("--graph", &*graph), ("--shards", &*shards)];
    let words = "CPUExecutionProvider cannot compute bfloat16";
    let said = made(&bench.package(&arguments, &["--window", "16"]));
    assert!(
        said.contains("was not tried") && said.contains(words),
        "{said}"
    );
    let checked = Command::new(env!("CARGO_BIN_EXE_scorer"))
        .args(["check", "--set", "engine.execution_provider=cpu", "--set"])
        .arg(format!("model.dir={}", bench.out().display()))
        .output()
        .unwrap();
    assert_eq!(checked.status.code(), Some(69), "{}", said_by(&checked));
    let report = String::from_utf8_lossy(&checked.stdout);
    assert!(report.contains(words), "{report}");
}

#[test]
fn buffers_that_the_model_does_not_use_can_be_left_out_by_name() {
    let dir = model_dir().join("hazard");
    let bench = Bench::new();
    let bytes = std::fs::read(dir.join("checkpoint.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let frequencies = [0_u8; 32];
    let buffer = TensorView::new(Dtype::F32, vec![8], &frequencies).unwrap();
    let all = tensors
        .iter()
        .map(|(name, view)| (name.to_owned(), view))
        .chain([("rotary.inv_freq".to_owned(), buffer)]);
    let weights = bench.path("in-weights.safetensors");
    std::fs::write(
        &weights,
        safetensors::serialize(all.collect::<Vec<_>>(), None).unwrap(),
    )
    .unwrap();
    let (graph, shards) = (dir.join("graph.onnx"), dir.join("shards"));
    let arguments = [
        ("--graph", &*graph),
        ("--weights", &*weights),
        ("--shards", &*shards),
    ];
    let output = bench.package(&arguments, &["--window", "16"]);
    bench.refused(&output, &["rotary.inv_freq [8]", "--exclude NAME"]);
    let unknown = bench.package(&arguments, &["--window", "16", "--exclude", "*.nothing"]);
    bench.refused(&unknown, &["--exclude *.nothing", "no such tensor"]);
    let said = made(&bench.package(&arguments, &["--window", "16", "--exclude", "*.inv_freq"]));
    assert!(
        said.contains("left out (--exclude): rotary.inv_freq"),
        "{said}"
    );
}

#[test]
fn few_windows_are_a_warning_that_says_why_and_how_to_get_more() {
    let bench = Bench::new();
    let tokens = [1_u8, 0, 0, 0].repeat(600);
    let view = TensorView::new(Dtype::I32, vec![600], &tokens).unwrap();
    let folder = bench.path("in-shards");
    std::fs::create_dir_all(&folder).unwrap();
    let flat = safetensors::serialize([("tokens", view)], None).unwrap();
    std::fs::write(folder.join("shard_1.safetensors"), flat).unwrap();
    let said = made(&bench.hazard(&folder, &["--window", "16"]));
    for part in [
        "scorer: warning: few windows (1)",
        "a tensor [n] is one row",
        "--windows-per-row 32 or more",
        "600 tokens as [rows, 17], which are up to 35 rows",
    ] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    let more = ["--window", "16", "--windows-per-row", "32"];
    let said = made(&Bench::new().hazard(&folder, &more));
    assert!(!said.contains("warning"), "{said}");
}

#[test]
fn shards_that_collide_are_named_with_the_rule_and_other_files_are_said() {
    let bench = Bench::new();
    let folder = shards_with(&bench, 1, 0);
    for name in ["._shard_000007.safetensors", "README"] {
        std::fs::write(folder.join(name), "x").unwrap();
    }
    let said = made(&bench.hazard(&folder, &["--window", "16"]));
    assert!(
        said.contains("not taken for shards: ._shard_000007.safetensors, README"),
        "{said}"
    );
    let other = Bench::new();
    let folder = shards_with(&other, 1, 0);
    let (first, second) = (
        folder.join("shard_000007.safetensors"),
        folder.join("7_of_9.safetensors"),
    );
    std::fs::copy(first, second).unwrap();
    let output = other.hazard(&folder, &["--window", "16"]);
    other.refused(
        &output,
        &[
            "7_of_9.safetensors and shard_000007.safetensors are both shard 7",
            "first number",
        ],
    );
}

/// An export with a file so large that copying it takes longer than anything here: it is all hole.
fn large_export(bench: &Bench) -> PathBuf {
    let from = model_dir().join("external");
    let export = bench.path("in-export");
    copy_export(&from, &export);
    let large = std::fs::File::options()
        .write(true)
        .open(export.join(LARGE));
    large.unwrap().set_len(2 << 30).unwrap();
    export.join("graph.onnx")
}

const LARGE: &str = "parts/function.data";

/// A packaging that was stopped while it copied the large file, in a hidden folder in `beside`.
fn copying(graph: &Path, out: &Path, beside: &Path, ignored: &str) -> std::process::Child {
    let dir = model_dir().join("external");
    // Whoever runs the tests under `nohup` has them ignore SIGHUP.
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP", "sh"]);
    command.args(["-c", &format!("{ignored} exec \"$@\""), "sh"]);
    command.arg(env!("CARGO_BIN_EXE_scorer")).arg("package");
    command.arg("--graph").arg(graph);
    let weights = dir.join("checkpoint.safetensors");
    command.arg("--weights").arg(weights);
    command.arg("--shards").arg(dir.join("shards"));
    command.args(["--name", "model", "--version", "1", "--window", "16"]);
    command.arg("--out").arg(out);
    let mut child = command.spawn().unwrap();
    let copies = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        hidden && entry.path().join("package").join(LARGE).exists()
    };
    while !std::fs::read_dir(beside).unwrap().any(copies) {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it has ended by itself"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    send(&child, Signal::SIGSTOP);
    child
}

fn send(child: &std::process::Child, signal: Signal) {
    let id = i32::try_from(child.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), signal).unwrap();
}

#[test]
fn a_signal_ends_packaging_as_any_process_and_leaves_nothing() {
    use std::os::unix::process::ExitStatusExt;
    let bench = Bench::new();
    let empty = bench.path("in-empty");
    std::fs::create_dir(&empty).unwrap();
    let graph = large_export(&bench);
    let new = bench.path("new/package");
    let names = |folder: &Path| {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    for (out, beside) in [(&empty, &*empty), (&new, bench.0.path())] {
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            let mut child = copying(&graph, out, beside, "");
            send(&child, signal);
            send(&child, Signal::SIGCONT);
            assert_eq!(child.wait().unwrap().signal(), Some(signal as i32));
            assert_eq!(names(bench.0.path()), ["in-empty", "in-export"]);
            assert!(names(&empty).is_empty());
        }
    }
    // As under `nohup`.
    let mut child = copying(&graph, &empty, &empty, "trap '' HUP;");
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
    assert!(
        ignored & (1 << (Signal::SIGHUP as u32 - 1)) != 0,
        "{status}"
    );
    send(&child, Signal::SIGHUP);
    send(&child, Signal::SIGTERM);
    send(&child, Signal::SIGCONT);
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::SIGTERM as i32));
    assert!(names(&empty).is_empty());
}
