//! `model.json`: what it contains, and the checks that need no other file.

mod schema;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use super::error::PackageError;
use super::error::require;
use super::glob::matches_glob;
pub use super::objective::Objective;
use super::tensor::Dtype;
use crate::protocol::document::from_document;
use crate::protocol::encoding::Encoding;
use crate::protocol::message::V1;
use crate::protocol::names::{is_digest, is_model_name};
use crate::protocol::update_manifest::Canary;
use schema::{names_of_the_objective, only_matrices_are_transposed};

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
    /// Checkpoint tensors and their locations in the graph.
    #[schemars(extend("minProperties" = 1))]
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Globs of the tensors that a candidate may change; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable: Option<Vec<String>>,
    /// Aliases of tensors, such as a tied head.
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

/// A checkpoint tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = only_matrices_are_transposed)]
pub struct TensorEntry {
    /// The initializers that hold it; all of them are patched.
    #[schemars(length(min = 1))]
    pub places: Vec<GraphLocation>,
    /// In the checkpoint.
    pub shape: Vec<usize>,
    /// Its type in the checkpoint and in the graph.
    pub dtype: Dtype,
}

/// An initializer that holds a checkpoint tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Place")]
pub struct GraphLocation {
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

impl Manifest {
    /// Whether candidates may change the tensor.
    pub fn is_trainable(&self, name: &str) -> bool {
        self.trainable
            .as_ref()
            .is_none_or(|globs| globs.iter().any(|glob| matches_glob(glob, name)))
    }

    /// Reads `model.json`; also returns the package's id. The file is the operator's own, so its
    /// size is not limited.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn decode(text: &[u8]) -> Result<(Self, String), PackageError> {
        let document = Encoding::Json.decode_within(text, usize::MAX);
        let document = document.map_err(PackageError)?;
        let manifest: Self = from_document(&document).map_err(PackageError)?;
        manifest.check()?;
        let document = serde_json::to_value(&document);
        let document = document.map_err(|e| PackageError(e.to_string()))?;
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

    /// The field of the weights.
    pub(super) const WEIGHTS: &str = "weights";

    /// Field, name and digest of each file.
    pub(super) fn files(&self) -> impl Iterator<Item = (&'static str, &str, &str)> {
        let graph = ("graph", &self.graph.file, &self.graph.sha256);
        let external = self.graph.external.iter().flatten();
        let external = external.map(|f| ("graph.external", &f.file, &f.sha256));
        let weights = self.weights.iter();
        let weights = weights.map(|f| (Self::WEIGHTS, &f.file, &f.sha256));
        let shards = self.shards.iter().map(|f| ("shards", &f.file, &f.sha256));
        let all = std::iter::once(graph).chain(external);
        let all = all.chain(weights).chain(shards);
        all.map(|(field, file, sha256)| (field, file.as_str(), sha256.as_str()))
    }

    fn check_digests(&self) -> Result<(), PackageError> {
        self.files().try_for_each(|(field, _, digest)| {
            require(
                is_digest(digest),
                format!("{field}.sha256: {digest:?} is not 64 lower-case hex digits"),
            )
        })
    }

    /// Checks the objective's bounds, and that exactly the names it uses are given; others would be
    /// ignored silently.
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
                format!("{field}: {kind} has no such field"),
            )?;
        }
        self.objective.check()
    }

    /// If two tensors shared an initializer, a candidate for one would change the other.
    fn check_places(&self) -> Result<(), PackageError> {
        let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            for place in &tensor.places {
                if let Some(owner) = owners.insert(&place.initializer, name) {
                    return Err(PackageError(format!(
                        "tensors: initializer {} is the place of both {owner} and {name}; declare one an alias, or split the initializer",
                        place.initializer
                    )));
                }
            }
        }
        Ok(())
    }
}

/// A model's name is part of the names of queues and keys.
pub(super) fn check_name(name: &str) -> Result<(), PackageError> {
    let problem = format!("name: {name:?} must match [a-z0-9][a-z0-9_-]{{0,63}}");
    require(is_model_name(name), problem)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_id_ignores_version_weights_and_canary() {
        let a = serde_json::json!({"v": 1, "name": "m", "version": 1, "canary": {"loss": 1.0}, "b": [1], "a": 2});
        let b =
            serde_json::json!({"a": 2, "b": [1], "name": "m", "v": 1, "version": 9, "weights": {}});
        assert_eq!(package_id(a), package_id(b));
    }
}
