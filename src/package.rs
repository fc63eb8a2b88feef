//! The model package: a directory with `model.json` that says which graph, weights and held-out
//! shards belong together and where each checkpoint tensor lives in the graph. Every file is
//! checked against its digest before it is used.

pub mod build;
pub mod checkpoint;
pub(crate) mod fit;
pub mod plan;
pub mod prefix;
mod shard;
pub mod synthetic;
pub mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;
use schemars::{JsonSchema, Schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::config::is_model_name;
use crate::engine::graph::{External, externals, plain_location};
use crate::job::Encoding;
use crate::job::document::from_document;
use crate::job::message::V1;
use crate::schema::{given, says};
use plan::{Cut, Plan, Shard, TokenCut, Window};
use shard::parse_shard;
use weights::Weights;

/// The file every package has.
pub const MANIFEST: &str = "model.json";

/// `model.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "model_package.v1", transform = names_of_the_objective)]
pub struct Manifest {
    /// Always 1.
    pub v: V1,
    /// The model's name: queue, routing key and Redis keys carry it.
    #[schemars(regex(pattern = r"^[a-z0-9][a-z0-9_-]{0,63}$"))]
    pub name: String,
    /// The version of the weights.
    pub version: u64,
    /// The ONNX graph.
    pub graph: GraphFile,
    /// The checkpoint; without it the graph's own initializers are the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<FileDigest>,
    /// Names of the graph's inputs.
    pub inputs: Inputs,
    /// Names of the graph's outputs.
    pub outputs: Outputs,
    /// What is measured.
    pub objective: Objective,
    /// Checkpoint tensors and their places in the graph.
    #[schemars(extend("minProperties" = 1))]
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Globs of the tensors a candidate may touch; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable: Option<Vec<String>>,
    /// Other names of tensors, as of a tied head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aliases: Option<BTreeMap<String, String>>,
    /// Element type of the weights.
    pub precision: Dtype,
    /// Held-out data, ascending by id.
    #[schemars(length(min = 1))]
    pub shards: Vec<ShardFile>,
    /// A known answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
}

/// What `check_objective` checks of inputs and outputs.
fn names_of_the_objective(schema: &mut Schema) {
    let part = |part: &str, rule: Value| json!({ "properties": { part: rule } });
    let absent = |name: &str| json!({ "not": given(name) });
    let rules = json!([
        {
            "if": part("objective", says("kind", "causal_lm")),
            "then": { "allOf": [
                part("inputs", given("tokens")),
                part("outputs", given("logits")),
                part("outputs", absent("loss")),
            ] },
            "else": { "allOf": [
                part("inputs", absent("tokens")),
                part("inputs", absent("attention_mask")),
                part("inputs", absent("position_ids")),
                part("outputs", absent("logits")),
                part("outputs", given("loss")),
            ] },
        },
    ]);
    schema.insert("allOf".into(), rules);
}

/// What `check` checks of a tensor's shape.
fn only_matrices_are_transposed(schema: &mut Schema) {
    let transposed =
        json!({ "required": ["transposed"], "properties": { "transposed": { "const": true } } });
    let some =
        json!({ "required": ["places"], "properties": { "places": { "contains": transposed } } });
    let matrix = json!({
        "required": ["shape"],
        "properties": { "shape": { "minItems": 2, "maxItems": 2 } },
    });
    schema.insert("if".into(), some);
    schema.insert("then".into(), matrix);
}

/// A file of the package and its SHA-256 in hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileDigest {
    /// Path inside the package.
    pub file: String,
    /// SHA-256, 64 hex digits.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: String,
}

/// The graph and the files its external data is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GraphFile {
    /// Path inside the package.
    pub file: String,
    /// SHA-256, 64 hex digits.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: String,
    /// Files of external data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub external: Option<Vec<FileDigest>>,
}

/// Names of the graph's inputs. The inputs of `graph_loss` are named by its shards.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// int64 or int32 `[batch, seq]`; required for `causal_lm`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<String>,
    /// `[batch, seq]`, fed with ones: every token of a window is a real one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_mask: Option<String>,
    /// int64 or int32 `[batch, seq]`, fed with 0, 1, 2, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position_ids: Option<String>,
}

/// Names of the graph's outputs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Outputs {
    /// float `[batch, seq, vocab]`; required for `causal_lm`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits: Option<String>,
    /// float `[batch]`; required for `graph_loss`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<String>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Negative log-likelihood of tokens to come.
    CausalLm {
        /// Input tokens of a window, L.
        #[schemars(range(min = 1, max = 1_048_576))]
        window: usize,
        /// Windows taken from each row of a shard.
        #[serde(default = "one")]
        #[schemars(range(min = 1, max = 1_048_576))]
        windows_per_row: usize,
        /// 1 = the next token; 2 = two ahead. At most the window.
        #[serde(default = "one")]
        #[schemars(range(min = 1, max = 255))]
        label_shift: usize,
        /// Targets with this value do not count.
        #[serde(default = "ignore_index")]
        ignore_index: i64,
    },
    /// What the graph itself computes, one loss for each example.
    GraphLoss {},
}

/// What either kind of objective may have. Read as one struct: what serde derives for an enum with a
/// tag knows neither that null is absent nor which field is wrong.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ObjectiveFields {
    kind: ObjectiveKind,
    window: Option<usize>,
    windows_per_row: Option<usize>,
    label_shift: Option<usize>,
    ignore_index: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ObjectiveKind {
    CausalLm,
    GraphLoss,
}

impl<'de> Deserialize<'de> for Objective {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = ObjectiveFields::deserialize(deserializer)?;
        match fields {
            ObjectiveFields {
                kind: ObjectiveKind::GraphLoss,
                window: None,
                windows_per_row: None,
                label_shift: None,
                ignore_index: None,
            } => Ok(Self::GraphLoss {}),
            ObjectiveFields {
                kind: ObjectiveKind::GraphLoss,
                ..
            } => Err(D::Error::custom("graph_loss has no fields but kind")),
            ObjectiveFields {
                kind: ObjectiveKind::CausalLm,
                window,
                windows_per_row,
                label_shift,
                ignore_index: ignored,
            } => Ok(Self::CausalLm {
                window: window.ok_or_else(|| D::Error::missing_field("window"))?,
                windows_per_row: windows_per_row.unwrap_or_else(one),
                label_shift: label_shift.unwrap_or_else(one),
                ignore_index: ignored.unwrap_or_else(ignore_index),
            }),
        }
    }
}

impl Objective {
    /// The next token, one window of this length from each row.
    pub fn causal_lm(window: usize) -> Self {
        Self::CausalLm {
            window,
            windows_per_row: one(),
            label_shift: one(),
            ignore_index: ignore_index(),
        }
    }

    /// The bounds of its numbers.
    fn check(&self) -> Result<(), PackageError> {
        let Objective::CausalLm {
            window,
            windows_per_row,
            label_shift,
            ignore_index: _,
        } = *self
        else {
            return Ok(());
        };
        require(
            (1..=1 << 20).contains(&window),
            "objective.window: must be 1 to 1048576".into(),
        )?;
        require(
            (1..=1 << 20).contains(&windows_per_row),
            "objective.windows_per_row: must be 1 to 1048576".into(),
        )?;
        require(
            (1..=window.min(255)).contains(&label_shift),
            "objective.label_shift: must be at least 1 and at most the window".into(),
        )
    }
}

fn one() -> usize {
    1
}

fn ignore_index() -> i64 {
    -100
}

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The word of the manifest and of results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// A checkpoint tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = only_matrices_are_transposed)]
pub struct TensorEntry {
    /// Where it lives in the graph; all of them are patched.
    #[schemars(length(min = 1))]
    pub places: Vec<Place>,
    /// In the checkpoint.
    pub shape: Vec<usize>,
    /// In the checkpoint and in the graph.
    pub dtype: Dtype,
}

/// One initializer that holds a checkpoint tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Its name in the graph.
    pub initializer: String,
    /// Whether it holds the transpose.
    pub transposed: bool,
}

/// A shard of held-out data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ShardFile {
    /// The number in the file name.
    pub id: u64,
    /// Path inside the package.
    pub file: String,
    /// SHA-256, 64 hex digits.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: String,
}

/// The loss a healthy worker measures on all windows with an empty nonce.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Canary {
    /// Nats per target.
    pub loss: f64,
    /// Largest accepted difference.
    #[schemars(range(min = 0.0))]
    pub tolerance: f64,
}

impl Canary {
    /// Whether it can be met at all.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(self) -> Result<(), String> {
        match self.tolerance >= 0.0 {
            true => Ok(()),
            false => Err("canary.tolerance: must be at least 0".into()),
        }
    }
}

/// Whether the text is a SHA-256 as packages and manifests write it.
pub fn is_digest(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// What is wrong with a package: the file or field, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PackageError(pub String);

impl PackageError {
    fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// Weights of another version for the package's graph, kept outside of it.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightsFile {
    /// The version they are.
    pub version: u64,
    /// A safetensors file.
    pub path: PathBuf,
    /// SHA-256 of the file in hex.
    pub sha256: String,
    /// A known answer of this version.
    pub canary: Option<Canary>,
}

/// A package whose every file has been checked.
#[derive(Debug)]
pub struct Package {
    /// Where it is.
    pub dir: PathBuf,
    /// What it says.
    pub manifest: Manifest,
    /// SHA-256 of what the package measures: everything but version, weights and canary.
    pub package_id: String,
    /// What later versions grow from; see [`Package::root`].
    pub root: String,
    /// The graph, mapped: its own copy of the weights need never be in memory.
    pub graph: Bytes,
    /// The baseline, in checkpoint layout.
    pub weights: Weights,
    /// Held-out data, ascending by id.
    pub shards: Arc<Vec<Shard>>,
    stamps: Vec<Stamp>,
    weights_stamp: Option<Stamp>,
}

/// What the file system said of a file when it was read.
#[derive(Debug, Clone)]
struct Stamp {
    path: PathBuf,
    sha256: String,
    seen: Seen,
}

/// Changes with every write to a file and with every file put in its place.
type Seen = (u64, u64, i64, i64, i64, i64);

/// What a candidate needs to know of a tensor.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    /// Its position in [`Weights::tensors`].
    pub index: usize,
    /// Its shape in the checkpoint.
    pub shape: &'a [usize],
    /// Its number of elements.
    pub numel: usize,
}

impl Package {
    /// Reads only the manifest.
    ///
    /// # Errors
    /// When it is missing, unreadable or breaks the schema.
    pub fn read_manifest(dir: &Path) -> Result<(Manifest, String), PackageError> {
        let path = dir.join(MANIFEST);
        let text = std::fs::read(&path)
            .map_err(|e| PackageError::new(format!("{}: {e}", path.display())))?;
        let broken =
            |e: &dyn std::fmt::Display| PackageError::new(format!("{}: {e}", path.display()));
        Manifest::decode(&text).map_err(|e| broken(&e))
    }

    /// Names a package with its weights and their version: SHA-256 in hex.
    pub fn root(manifest: &Manifest, package_id: &str) -> String {
        let weights = manifest.weights.as_ref().map_or("", |w| w.sha256.as_str());
        let identity = format!("{package_id} {} {weights}", manifest.version);
        hex::encode(Sha256::digest(identity))
    }

    /// Reads and checks the whole package. With `subset`, shards whose files are missing are left
    /// out; one that is there and wrong is refused all the same. The first of the `newer` weights
    /// that is sound takes the place of the package's own.
    ///
    /// # Errors
    /// Names the file or field that is wrong.
    pub fn load(dir: &Path, subset: bool, newer: &[WeightsFile]) -> Result<Self, PackageError> {
        let (manifest, package_id) = Self::read_manifest(dir)?;
        // Before the files are read: a change while they are is noticed by the first audit.
        let stamps = manifest.stamps(dir)?;
        let graph = map_checked(&inside(dir, &manifest.graph.file)?, &manifest.graph.sha256)?;
        for external in manifest.graph.external.iter().flatten() {
            map_checked(&inside(dir, &external.file)?, &external.sha256)?;
        }
        manifest.check_external(&graph)?;
        let shards = load_shards(dir, &manifest.shards, manifest.objective, subset)?;
        let root = Self::root(&manifest, &package_id);
        let opened = newer.iter().find_map(|file| {
            let opened = open_weights(&file.path, &file.sha256, &manifest);
            let refused = |error: &PackageError| {
                tracing::error!(%error, version = file.version, "weights that were kept are not used");
            };
            opened.inspect_err(refused).ok().map(|opened| (file, opened))
        });
        let (manifest, weights, weights_stamp) = match opened {
            Some((file, (weights, stamp))) => (manifest.at(file), weights, Some(stamp)),
            None => {
                let (weights, stamp) = own_weights(dir, &manifest, &graph)?;
                (manifest, weights, stamp)
            }
        };
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            package_id,
            root,
            graph,
            weights,
            shards: Arc::new(shards),
            stamps,
            weights_stamp,
        })
    }

    /// The same package with other weights, which are checked.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn with_weights(&self, file: &WeightsFile) -> Result<Self, PackageError> {
        let (weights, stamp) = open_weights(&file.path, &file.sha256, &self.manifest)?;
        Ok(self.replaced(file, weights, stamp))
    }

    /// The same package with weights that were just made, whose digest nobody knows yet.
    ///
    /// # Errors
    /// As [`Package::with_weights`].
    pub fn with_new_weights(
        &self,
        version: u64,
        path: PathBuf,
        canary: Option<Canary>,
    ) -> Result<(Self, WeightsFile), PackageError> {
        let (weights, stamp) = read_weights(&path, &self.manifest)?;
        let file = WeightsFile {
            version,
            path,
            sha256: stamp.sha256.clone(),
            canary,
        };
        Ok((self.replaced(&file, weights, stamp), file))
    }

    fn replaced(&self, file: &WeightsFile, weights: Weights, stamp: Stamp) -> Self {
        Self {
            dir: self.dir.clone(),
            manifest: self.manifest.at(file),
            package_id: self.package_id.clone(),
            root: self.root.clone(),
            graph: self.graph.clone(),
            weights,
            shards: Arc::clone(&self.shards),
            stamps: self.stamps.clone(),
            weights_stamp: Some(stamp),
        }
    }

    /// Looks whether the files are still those that were loaded. Only a file that was touched is
    /// read again.
    ///
    /// # Errors
    /// Names the file that has other contents now, or none.
    pub fn verify(&self) -> Result<(), PackageError> {
        for stamp in self.stamps.iter().chain(&self.weights_stamp) {
            if look(&stamp.path)? != stamp.seen {
                map_checked(&stamp.path, &stamp.sha256)?;
            }
        }
        Ok(())
    }

    /// How windows are cut.
    pub fn cut(&self) -> Cut {
        match self.manifest.objective {
            Objective::CausalLm {
                window,
                windows_per_row,
                label_shift,
                ignore_index: _,
            } => Cut::Tokens(TokenCut {
                window,
                windows_per_row,
                label_shift,
            }),
            Objective::GraphLoss {} => Cut::Examples,
        }
    }

    /// Where in [`Weights::tensors`] the tensor of this checkpoint name or alias is.
    pub fn position(&self, name: &str) -> Option<usize> {
        let aliases = self.manifest.aliases.as_ref();
        let canonical = aliases.and_then(|aliases| aliases.get(name));
        let canonical = canonical.map_or(name, String::as_str);
        let tensors = &self.weights.tensors;
        let found = tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(canonical));
        found.ok()
    }

    /// Looks a tensor up by its checkpoint name or an alias, if candidates may touch it.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let index = self.position(name)?;
        let tensor = &self.weights.tensors[index];
        let trainable = self.manifest.is_trainable(&tensor.name);
        trainable.then_some(TensorRef {
            index,
            shape: &tensor.shape,
            numel: tensor.numel,
        })
    }

    /// Targets that count in a plan.
    pub fn targets(&self, plan: &Plan) -> u64 {
        let counts = |window: &Window| match (window, self.manifest.objective) {
            (
                Window::Tokens(chunk),
                Objective::CausalLm {
                    label_shift,
                    ignore_index,
                    ..
                },
            ) => chunk[label_shift..]
                .iter()
                .filter(|t| i64::from(**t) != ignore_index)
                .count() as u64,
            (Window::Tokens(_) | Window::Example { .. }, _) => 1,
        };
        plan.windows.iter().map(counts).sum()
    }
}

impl Manifest {
    /// The files whose digests the manifest has, but for the weights, as they are now; those that are
    /// missing are the loader's to judge.
    fn stamps(&self, dir: &Path) -> Result<Vec<Stamp>, PackageError> {
        let graph = (&self.graph.file, &self.graph.sha256);
        let external = self.graph.external.iter().flatten();
        let files = std::iter::once(graph)
            .chain(external.map(|e| (&e.file, &e.sha256)))
            .chain(self.shards.iter().map(|s| (&s.file, &s.sha256)));
        let mut stamps = Vec::new();
        for (file, sha256) in files {
            let path = inside(dir, file)?;
            if let Ok(seen) = look(&path) {
                let sha256 = sha256.clone();
                stamps.push(Stamp { path, sha256, seen });
            }
        }
        Ok(stamps)
    }

    /// Whether every file that the graph has tensors in is one whose digest was compared.
    fn check_external(&self, graph: &Bytes) -> Result<(), PackageError> {
        let files = self.graph.external.iter().flatten();
        let files: BTreeSet<&str> = files.map(|external| external.file.as_str()).collect();
        for External { location, at, .. } in
            externals(graph).map_err(|e| PackageError(e.to_string()))?
        {
            let known = plain_location(&location).is_some_and(|l| files.contains(l.as_str()));
            let problem = format!(
                "graph: {at}: its external data {location:?} is not among graph.external, so nobody compared its digest; package it again"
            );
            require(known, problem)?;
        }
        Ok(())
    }

    /// What the package says, with weights of another version.
    fn at(&self, file: &WeightsFile) -> Self {
        Self {
            version: file.version,
            canary: file.canary,
            ..self.clone()
        }
    }

    /// Whether candidates may touch the tensor.
    pub fn is_trainable(&self, name: &str) -> bool {
        self.trainable
            .as_ref()
            .is_none_or(|globs| globs.iter().any(|glob| matches_glob(glob, name)))
    }

    /// Reads `model.json`, and gives the package's id with it. It is the operator's own file, so it
    /// may be of any size.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn decode(text: &[u8]) -> Result<(Self, String), PackageError> {
        let document = Encoding::Json.decode_within(text, usize::MAX);
        let document = document.map_err(PackageError)?;
        let manifest: Self = from_document(&document).map_err(PackageError)?;
        manifest.check()?;
        let document = serde_json::to_value(&document);
        let document = document.map_err(|e| PackageError::new(e.to_string()))?;
        Ok((manifest, package_id(document)))
    }

    fn check(&self) -> Result<(), PackageError> {
        check_name(&self.name)?;
        require(
            !self.shards.is_empty(),
            "shards: empty, a score needs held-out data".into(),
        )?;
        require(
            self.shards.windows(2).all(|pair| pair[0].id < pair[1].id),
            "shards: ids must ascend, none twice".into(),
        )?;
        require(
            !self.tensors.is_empty(),
            "tensors: empty, there is nothing to patch".into(),
        )?;
        self.check_objective()?;
        self.check_digests()?;
        if let Some(canary) = self.canary {
            canary.check().map_err(PackageError)?;
        }
        for (name, tensor) in &self.tensors {
            require(
                !tensor.places.is_empty(),
                format!("tensors.{name}.places: empty, it would never be patched"),
            )?;
            require(
                tensor.shape.len() == 2 || tensor.places.iter().all(|p| !p.transposed),
                format!("tensors.{name}.places: only a matrix can be transposed"),
            )?;
        }
        for (alias, name) in self.aliases.iter().flatten() {
            require(
                self.tensors.contains_key(name),
                format!("aliases.{alias}: there is no tensor {name}"),
            )?;
            require(
                !self.tensors.contains_key(alias),
                format!("aliases.{alias}: is a tensor itself"),
            )?;
        }
        self.check_places()
    }

    fn check_digests(&self) -> Result<(), PackageError> {
        let graph = [("graph", &self.graph.sha256)].into_iter();
        let external = self.graph.external.iter().flatten();
        let external = external.map(|file| ("graph.external", &file.sha256));
        let weights = self.weights.iter().map(|file| ("weights", &file.sha256));
        let shards = self.shards.iter().map(|file| ("shards", &file.sha256));
        let mut all = graph.chain(external).chain(weights).chain(shards);
        all.try_for_each(|(field, digest)| {
            require(
                is_digest(digest),
                format!("{field}.sha256: {digest:?} is not 64 lower-case hex digits"),
            )
        })
    }

    /// The objective's own bounds, and the names it needs; others would silently mean nothing.
    fn check_objective(&self) -> Result<(), PackageError> {
        let named = [
            ("inputs.tokens", self.inputs.tokens.is_some()),
            (
                "inputs.attention_mask",
                self.inputs.attention_mask.is_some(),
            ),
            ("inputs.position_ids", self.inputs.position_ids.is_some()),
            ("outputs.logits", self.outputs.logits.is_some()),
            ("outputs.loss", self.outputs.loss.is_some()),
        ];
        let (kind, needed, refused): (_, &[&str], &[&str]) = match self.objective {
            Objective::CausalLm { .. } => (
                "causal_lm",
                &["inputs.tokens", "outputs.logits"],
                &["outputs.loss"],
            ),
            Objective::GraphLoss {} => (
                "graph_loss",
                &["outputs.loss"],
                &[
                    "inputs.tokens",
                    "inputs.attention_mask",
                    "inputs.position_ids",
                    "outputs.logits",
                ],
            ),
        };
        for (field, there) in named {
            require(
                there || !needed.contains(&field),
                format!("{field}: missing, {kind} needs it"),
            )?;
            require(
                !there || !refused.contains(&field),
                format!("{field}: {kind} has no such thing"),
            )?;
        }
        self.objective.check()
    }

    /// An initializer that two tensors share would let a candidate for one change the other.
    fn check_places(&self) -> Result<(), PackageError> {
        let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            for place in &tensor.places {
                if let Some(owner) = owners.insert(&place.initializer, name) {
                    return Err(PackageError(format!(
                        "tensors: initializer {} is the place of both {owner} and {name}; declare one an alias or un-share it",
                        place.initializer
                    )));
                }
            }
        }
        Ok(())
    }
}

/// A model's name is part of names of queues and keys.
fn check_name(name: &str) -> Result<(), PackageError> {
    let problem = format!("name: {name:?} must match [a-z0-9][a-z0-9_-]{{0,63}}");
    require(is_model_name(name), problem)
}

fn require(sound: bool, problem: String) -> Result<(), PackageError> {
    if sound {
        Ok(())
    } else {
        Err(PackageError(problem))
    }
}

/// `*` stands for any run of characters, everything else for itself.
fn matches_glob(glob: &str, name: &str) -> bool {
    let mut parts = glob.split('*');
    let Some(rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let mut rest = rest;
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

fn package_id(mut document: Value) -> String {
    if let Some(fields) = document.as_object_mut() {
        for field in ["version", "canary", "weights"] {
            fields.remove(field);
        }
    }
    document.sort_all_objects();
    hex::encode(Sha256::digest(document.to_string()))
}

/// Joins a file name of the manifest to the package, refusing every way out of it.
fn inside(dir: &Path, file: &str) -> Result<PathBuf, PackageError> {
    let relative = Path::new(file);
    let plain = !file.is_empty()
        && relative
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
    if plain {
        Ok(dir.join(relative))
    } else {
        Err(PackageError(format!("{file:?}: leads out of the package")))
    }
}

fn look(path: &Path) -> Result<Seen, PackageError> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path)
        .map_err(|e| PackageError::new(format!("{}: {e}", path.display())))?;
    Ok((
        found.ino(),
        found.len(),
        found.mtime(),
        found.mtime_nsec(),
        found.ctime(),
        found.ctime_nsec(),
    ))
}

/// Whether this is a file: a pipe would be waited for, and for ever.
fn check_regular(path: &Path, found: &std::fs::Metadata) -> Result<(), PackageError> {
    if found.is_file() {
        return Ok(());
    }
    let kind = if found.is_dir() {
        "a folder"
    } else {
        "a pipe, a socket or a device"
    };
    let message = format!("{}: is {kind}; give a regular file", path.display());
    Err(PackageError(message))
}

/// Opens a regular file.
fn open(path: &Path) -> Result<File, PackageError> {
    let fail = |e: std::io::Error| PackageError(format!("{}: {e}", path.display()));
    check_regular(path, &std::fs::metadata(path).map_err(fail)?)?;
    File::open(path).map_err(fail)
}

/// Maps a file that is only read.
pub(crate) fn map(path: &Path) -> Result<Bytes, PackageError> {
    let fail = |e: std::io::Error| PackageError(format!("{}: {e}", path.display()));
    let file = open(path)?;
    if file.metadata().map_err(fail)?.len() == 0 {
        return Ok(Bytes::new());
    }
    #[expect(
        unsafe_code,
        reason = "packages are immutable by contract; a later change is package_changed"
    )]
    // SAFETY: the mapping is only read; a package's files are never written in place.
    let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
    Ok(Bytes::from_owner(map))
}

fn map_checked(path: &Path, sha256: &str) -> Result<Bytes, PackageError> {
    let bytes = map(path)?;
    compare_digests(path, &hex::encode(Sha256::digest(&bytes)), sha256)?;
    Ok(bytes)
}

fn open_weights(
    path: &Path,
    sha256: &str,
    manifest: &Manifest,
) -> Result<(Weights, Stamp), PackageError> {
    let (weights, stamp) = read_weights(path, manifest)?;
    compare_digests(path, &stamp.sha256, sha256)?;
    Ok((weights, stamp))
}

fn read_weights(path: &Path, manifest: &Manifest) -> Result<(Weights, Stamp), PackageError> {
    let seen = look(path)?;
    let (weights, digest) = Weights::open(path, manifest)?;
    let stamp = Stamp {
        path: path.to_owned(),
        sha256: hex::encode(digest),
        seen,
    };
    Ok((weights, stamp))
}

fn own_weights(
    dir: &Path,
    manifest: &Manifest,
    graph: &Bytes,
) -> Result<(Weights, Option<Stamp>), PackageError> {
    let Some(file) = &manifest.weights else {
        return Ok((Weights::from_graph(dir, graph, manifest)?, None));
    };
    let (weights, stamp) = open_weights(&inside(dir, &file.file)?, &file.sha256, manifest)?;
    Ok((weights, Some(stamp)))
}

fn compare_digests(path: &Path, found: &str, expected: &str) -> Result<(), PackageError> {
    if found == expected {
        return Ok(());
    }
    Err(PackageError(format!(
        "{}: its SHA-256 is {found}, it should be {expected}; copy it again",
        path.display()
    )))
}

fn load_shards(
    dir: &Path,
    files: &[ShardFile],
    objective: Objective,
    subset: bool,
) -> Result<Vec<Shard>, PackageError> {
    let mut shards = Vec::with_capacity(files.len());
    for file in files {
        if subset && !inside(dir, &file.file)?.exists() {
            tracing::warn!(
                shard = file.id,
                "missing, left out (model.allow_shards_subset)"
            );
            continue;
        }
        let bytes = map_checked(&inside(dir, &file.file)?, &file.sha256)?;
        shards.push(parse_shard(file.id, &file.file, &bytes, objective)?);
    }
    if shards.is_empty() {
        let dir = dir.display();
        return Err(PackageError(format!("{dir}: every shard is missing")));
    }
    Ok(shards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_names() {
        for (glob, name, expected) in [
            ("*", "a.b", true),
            ("model.*.weight", "model.layers.0.weight", true),
            ("model.*.weight", "model.layers.0.bias", false),
            ("lm_head.weight", "lm_head.weight", true),
            ("lm_head", "lm_head.weight", false),
            ("*.norm.*", "x.norm.weight", true),
            ("*.norm.*", "x.normal.weight", false),
        ] {
            assert_eq!(matches_glob(glob, name), expected, "{glob} {name}");
        }
    }

    #[test]
    fn no_file_name_leads_out_of_the_package() {
        let dir = Path::new("/models/m");
        for file in ["../x", "/etc/passwd", "a/../../x", "", "./x"] {
            assert!(inside(dir, file).is_err(), "{file}");
        }
        assert_eq!(
            inside(dir, "shards/a.safetensors").unwrap(),
            dir.join("shards/a.safetensors")
        );
    }

    #[test]
    fn the_package_id_ignores_version_weights_and_canary() {
        let a = serde_json::json!({"v": 1, "name": "m", "version": 1, "canary": {"loss": 1.0}, "b": [1], "a": 2});
        let b =
            serde_json::json!({"a": 2, "b": [1], "name": "m", "v": 1, "version": 9, "weights": {}});
        assert_eq!(package_id(a), package_id(b));
    }
}
