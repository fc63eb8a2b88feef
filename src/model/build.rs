//! Making a package: finding, by comparing contents, where the exporter put each checkpoint
//! tensor, and refusing by name what cannot be placed beyond doubt, or what no worker would serve.

mod files;
mod interface;
mod naming;
mod place;
pub(crate) mod precision;
mod source;
mod split_shared;

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;

use super::checkpoint::Tensor;
use crate::model::manifest::{Manifest, Objective, PackageError, ShardFile, TensorEntry};
use crate::model::onnx::Graph;
use crate::model::package::{MANIFEST, Package};
use crate::model::tensor::Dtype;
use crate::protocol::message::V1;
use files::Staging;
pub use files::Unfinished;
pub(crate) use files::{write, write_tensors};
pub(super) use place::is_uniform;
use source::Source;

/// What `scorer package` is told.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The exported graph.
    pub graph: PathBuf,
    /// The checkpoint; without it the graph's own initializers are the tensors.
    pub weights: Option<PathBuf>,
    /// Globs of checkpoint tensors that are left out.
    pub exclude: Vec<String>,
    /// Directory of `*.safetensors` shards.
    pub shards: PathBuf,
    /// The model's name.
    pub name: String,
    /// The version of the weights.
    pub version: u64,
    /// Where the package goes; must not exist yet or be empty.
    pub out: PathBuf,
    /// What is measured.
    pub objective: Objective,
}

impl Recipe {
    /// Looks at what can be judged without reading anything.
    ///
    /// # Errors
    /// Names the value that is wrong and its bounds.
    pub fn check(&self) -> Result<(), PackageError> {
        super::manifest::check_name(&self.name)?;
        let nothing =
            || PackageError("--exclude: there is no checkpoint to leave anything out of".into());
        if self.weights.is_none() && !self.exclude.is_empty() {
            return Err(nothing());
        }
        self.objective.check()
    }
}

/// What was made.
#[derive(Debug, Clone)]
pub struct Built {
    /// The package's manifest.
    pub manifest: Manifest,
    /// Checkpoint tensors that live in the graph under another name or transposed.
    pub moved: usize,
    /// What the operator should know of it.
    pub notes: Vec<String>,
}

/// Makes a package; copies, never links. Before the package is put in its place, `tried` loads it as
/// a worker does, and says what the operator should know of that; where it refuses, nothing is left
/// behind. What is `unfinished` can be removed meanwhile.
///
/// # Errors
/// Names the file, tensor or initializer and what to do; and what `tried` says.
pub fn build(
    recipe: &Recipe,
    unfinished: &Unfinished,
    tried: impl FnOnce(Package) -> Result<Vec<String>, PackageError>,
) -> Result<Built, PackageError> {
    recipe.check()?;
    // Before all that takes time: what cannot be written is said at once.
    let staging = Staging::begin(&recipe.out, unfinished)?;
    let source = Source::open(recipe)?;
    let placed = Placed::find(&source)?;
    let moved = placed.moved();
    let (shards, others) = staging.shards(&recipe.shards, recipe.objective)?;
    let mut notes = [
        source.notes.clone(),
        source.left(&placed.graph, &placed.tensors),
        others,
    ]
    .concat();
    let manifest = write_package(recipe, &staging, source, placed, shards)?;
    notes.extend(tried(Package::load(staging.dir(), false, &[])?)?);
    staging.finish()?;
    Ok(Built {
        manifest,
        moved,
        notes,
    })
}

/// Where the tensors are, in the graph as it goes into the package.
struct Placed {
    /// By their names in the graph.
    tensors: BTreeMap<String, TensorEntry>,
    graph: Graph,
    bytes: Bytes,
}

impl Placed {
    fn find(source: &Source) -> Result<Self, PackageError> {
        let mut graph = source.graph.clone();
        let elsewhere = |tensor: &Tensor| source.elsewhere(tensor);
        let called = |name: &str| source.naming.in_checkpoint(name);
        let placed = place::place(&source.tensors, &source.pool, &mut graph, elsewhere, called);
        let (tensors, rewritten) = placed.map_err(|error| match source.naming.note() {
            Some(note) => PackageError(format!("{error}\n  ({note})")),
            None => error,
        })?;
        // An export that is good as it is goes into the package byte for byte.
        let bytes = if rewritten {
            graph.encode().into()
        } else {
            source.bytes.clone()
        };
        Ok(Self {
            tensors,
            graph,
            bytes,
        })
    }

    /// How many tensors are not where their names say, as they are.
    fn moved(&self) -> usize {
        let moved = self.tensors.iter().filter(|(name, tensor)| {
            let mut places = tensor.places.iter();
            places.any(|place| place.transposed || place.initializer != **name)
        });
        moved.count()
    }
}

/// Writes all files but the shards, under the checkpoint's names.
fn write_package(
    recipe: &Recipe,
    staging: &Staging,
    mut source: Source,
    placed: Placed,
    shards: Vec<ShardFile>,
) -> Result<Manifest, PackageError> {
    let naming = &source.naming;
    let named = |name: &str| naming.in_checkpoint(name);
    let inputs = interface::inputs(&placed.graph, &placed.tensors, recipe.objective)?;
    let outputs = interface::outputs(&placed.graph, recipe.objective)?;
    let aliases = source.aliases.iter();
    let aliases: BTreeMap<String, String> = aliases.map(|(a, n)| (named(a), named(n))).collect();
    let tensors = placed.tensors.into_iter();
    let tensors = tensors
        .map(|(name, tensor)| (named(&name), tensor))
        .collect();
    for tensor in &mut source.tensors {
        tensor.name = named(&tensor.name);
    }
    let manifest = Manifest {
        v: V1,
        name: recipe.name.clone(),
        version: recipe.version,
        graph: staging.graph(placed.bytes, &source.dir)?,
        weights: Some(staging.weights(&source.tensors)?),
        inputs,
        outputs,
        objective: recipe.objective,
        precision: source.tensors.first().map_or(Dtype::F32, |t| t.dtype),
        tensors,
        trainable: None,
        aliases: (!aliases.is_empty()).then_some(aliases),
        shards,
        canary: None,
    };
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| PackageError(e.to_string()))?;
    write(&staging.dir().join(MANIFEST), &json)?;
    Ok(manifest)
}
