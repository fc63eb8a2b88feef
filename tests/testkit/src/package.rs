//! The model package of the tests: made once with `scorer package`, then only copied and changed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::digest::digest;
use crate::folder::Folder;
use crate::program::scorer;

/// The model's name in every test; it is part of queue and key names.
pub const MODEL: &str = "tinylm";
/// The version every package here has.
pub const VERSION: u64 = 7;

/// The root of the repository.
pub(crate) fn repository() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.ancestors().nth(2);
    root.expect("tests/testkit is in the repository")
}

/// Where the committed model and its candidates are.
pub fn fixtures() -> PathBuf {
    repository().join("tests/model")
}

/// The sound package. Tests that change it take a [`copy`](Package::copy).
#[track_caller]
pub fn sound() -> &'static Path {
    static MADE: OnceLock<(Folder, PathBuf)> = OnceLock::new();
    let (_, path) = MADE.get_or_init(|| {
        let folder = Folder::new("package");
        let path = folder.join(MODEL);
        make(&path);
        (folder, path)
    });
    path
}

fn make(out: &Path) {
    build(&fixtures(), "graph-named.onnx", 128, 1, out);
}

/// Runs `scorer package` on a folder with a graph, a checkpoint and shards.
fn build(from: &Path, graph: &str, window: u32, windows_per_row: u32, out: &Path) {
    let (window, windows_per_row) = (window.to_string(), windows_per_row.to_string());
    let objective = ["--window", &window, "--windows-per-row", &windows_per_row];
    build_for(from, graph, "checkpoint.safetensors", &objective, out);
}

fn build_for(from: &Path, graph: &str, weights: &str, objective: &[&str], out: &Path) {
    let output = Command::new(scorer())
        .arg("package")
        .arg("--graph")
        .arg(from.join(graph))
        .arg("--weights")
        .arg(from.join(weights))
        .arg("--shards")
        .arg(from.join("shards"))
        .args(["--name", MODEL, "--version", &VERSION.to_string()])
        .args(objective)
        .arg("--out")
        .arg(out)
        .output()
        .expect("the binary runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && out.join("model.json").is_file(),
        "scorer package failed:\n{said}"
    );
}

/// A package that a test may change.
pub struct Package(Folder);

impl Package {
    /// A copy of the sound package.
    pub fn copy() -> Self {
        let folder = Folder::new("copy");
        copy_all(sound(), &folder.join(MODEL));
        Self(folder)
    }

    /// A model whose `size.weight` says how much its one large node computes: see
    /// `tests/model/README.md`.
    pub fn hazard() -> Self {
        Self::hazard_of(1)
    }

    /// The same with so many windows of each of its two rows.
    pub fn hazard_of(windows_per_row: u32) -> Self {
        let folder = Folder::new("hazard");
        build(
            &fixtures().join("hazard"),
            "graph.onnx",
            16,
            windows_per_row,
            &folder.join(MODEL),
        );
        Self(folder)
    }

    /// A model of which one expert is never chosen, `experts.2.weight`.
    pub fn with_an_idle_expert() -> Self {
        let (from, objective) = (fixtures().join("inert"), ["--objective", "graph_loss"]);
        Self::made(&from, "experts.onnx", "experts.safetensors", &objective)
    }

    /// The model of the sound package with another of its graphs.
    pub fn of_graph(graph: &str) -> Self {
        Self::made(
            &fixtures(),
            graph,
            "checkpoint.safetensors",
            &["--window", "128"],
        )
    }

    /// What `scorer package` makes of a folder, for an objective in its words.
    pub fn made(from: &Path, graph: &str, weights: &str, objective: &[&str]) -> Self {
        let folder = Folder::new("made");
        build_for(from, graph, weights, objective, &folder.join(MODEL));
        Self(folder)
    }

    /// The package's folder.
    pub fn path(&self) -> PathBuf {
        self.0.join(MODEL)
    }

    /// Changes `model.json`.
    pub fn edit(&self, change: impl FnOnce(&mut Value)) {
        let file = self.path().join("model.json");
        let text = std::fs::read(&file).expect("a package has a model.json");
        let mut manifest = serde_json::from_slice(&text).expect("model.json is JSON");
        change(&mut manifest);
        std::fs::write(&file, serde_json::to_vec_pretty(&manifest).expect("JSON"))
            .expect("a writable package");
    }

    /// Puts other weights in, a safetensors file, and makes `model.json` say so.
    pub fn replace_weights(&self, version: u64, bytes: &[u8]) {
        self.edit(|manifest| {
            let file = manifest["weights"]["file"].as_str();
            let file = self.path().join(file.expect("a package names its weights"));
            std::fs::write(file, bytes).expect("a writable package");
            manifest["weights"]["sha256"] = json!(digest(bytes));
            manifest["version"] = json!(version);
        });
    }

    /// Flips one byte in the last shard, so that its digest is wrong; returns the file's name.
    pub fn spoil_a_shard(&self) -> String {
        let name = self.last_shard();
        let file = self.path().join(&name);
        let mut bytes = std::fs::read(&file).expect("the shard is there");
        *bytes.last_mut().expect("a shard has bytes") ^= 1;
        std::fs::write(&file, bytes).expect("a writable package");
        Path::new(&name)
            .file_name()
            .expect("a file name")
            .to_string_lossy()
            .into_owned()
    }

    /// Puts the spoilt shard back.
    pub fn repair(&self) {
        let name = self.last_shard();
        std::fs::copy(sound().join(&name), self.path().join(&name)).expect("a writable package");
    }

    fn last_shard(&self) -> String {
        let text =
            std::fs::read(self.path().join("model.json")).expect("a package has a model.json");
        let manifest: Value = serde_json::from_slice(&text).expect("model.json is JSON");
        let shard = manifest["shards"]
            .as_array()
            .and_then(|s| s.last())
            .expect("a package lists its shards");
        let file = shard["file"]
            .as_str()
            .expect("a shard names its file")
            .to_owned();
        if self.path().join(&file).is_file() {
            file
        } else {
            format!("shards/{file}")
        }
    }
}

fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a writable folder");
    for entry in std::fs::read_dir(from).expect("a readable package") {
        let entry = entry.expect("a readable package");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_all(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a writable folder");
        }
    }
}
