//! Making a package: finding out, by comparing contents, where the exporter put each checkpoint
//! tensor. A tensor that cannot be located with certainty is refused by name, and so is a package
//! that no worker would serve.

mod aliases;
mod contents;
mod destination;
mod disk;
mod export;
mod external;
mod files;
mod interface;
mod live_names;
mod name_mapping;
mod owners;
mod place;
mod precision;
mod recipe;
mod saved_names;
mod shards;
mod split_shared;
mod staging;

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;

use super::checkpoint::Tensor;
use super::manifest::{Manifest, PackageError, ShardFile, TensorEntry};
use super::onnx::Graph;
use super::package::Package;
use super::tensor::Dtype;
use crate::protocol::message::V1;
pub(crate) use disk::{write, write_manifest, write_tensors};
use export::{Export, is_excluded};
use live_names::live_names;
pub use recipe::Recipe;
use staging::Staging;
pub use staging::Unfinished;

/// A package that was made.
#[derive(Debug, Clone)]
pub struct Built {
    /// The package's manifest.
    pub manifest: Manifest,
    /// Checkpoint tensors that the graph holds under another name or transposed.
    pub moved: usize,
    /// Notes for the operator.
    pub notes: Vec<String>,
}

/// Makes a package by copying, never by linking. Before the package is moved to its destination,
/// `tried` loads it as a worker does and returns notes for the operator; if it refuses, nothing is
/// left behind. Until then `unfinished` can remove the package.
///
/// # Errors
/// Names the file, tensor or initializer and what to do; or the error of `tried`.
pub fn build(
    recipe: &Recipe,
    unfinished: &Unfinished,
    tried: impl FnOnce(Package) -> Result<Vec<String>, PackageError>,
) -> Result<Built, PackageError> {
    recipe.check()?;
    // First, so that a destination that cannot be written is reported at once.
    let staging = Staging::begin(&recipe.out, unfinished)?;
    let export = Export::open(recipe)?;
    let placed = Placement::find(&export)?;
    let moved = placed.moved();
    let (shards, others) = staging.shards(&recipe.shards, recipe.objective)?;
    let mut notes = [
        export.notes.clone(),
        export.left(&placed.graph, &placed.tensors),
        others,
    ]
    .concat();
    let manifest = write_package(recipe, &staging, export, placed, shards)?;
    notes.extend(tried(Package::load(staging.dir(), false, &[])?)?);
    staging.finish()?;
    Ok(Built {
        manifest,
        moved,
        notes,
    })
}

/// Where the tensors are in the graph that goes into the package.
struct Placement {
    /// By their names in the graph.
    tensors: BTreeMap<String, TensorEntry>,
    /// Other names of tensors, in the graph.
    live_names: BTreeMap<String, String>,
    graph: Graph,
    bytes: Bytes,
}

impl Placement {
    fn find(export: &Export) -> Result<Self, PackageError> {
        let mut graph = export.graph.clone();
        let unlifted = |tensor: &Tensor| export.unlifted(tensor);
        let called = |name: &str| export.names.in_checkpoint(name);
        let placed = place::place(&export.tensors, &export.pool, &mut graph, unlifted, called);
        let (tensors, rewritten) = placed.map_err(|error| match export.names.note() {
            Some(note) => PackageError(format!("{error}\n  ({note})")),
            None => error,
        })?;
        let exported = export.graph.initializers();
        let exported = exported.into_iter().map(|i| i.name).collect();
        let wiring = graph.wiring().map_err(|e| PackageError(e.to_string()))?;
        let live_names = live_names(&export.tensors, &tensors, &exported, &wiring);
        // An export that needs no change goes into the package byte for byte.
        let bytes = if rewritten {
            graph.encode().into()
        } else {
            export.bytes.clone()
        };
        Ok(Self {
            tensors,
            live_names,
            graph,
            bytes,
        })
    }

    /// How many tensors have another name in the graph, or are transposed there.
    fn moved(&self) -> usize {
        let moved = self.tensors.iter().filter(|(name, tensor)| {
            let mut places = tensor.places.iter();
            places.any(|place| place.transposed || place.initializer != **name)
        });
        moved.count()
    }
}

/// The other names of tensors, as candidates may use them: of tied ones, of the live module, and of
/// adapters in it.
fn aliases(recipe: &Recipe, export: &Export, placed: &Placement) -> BTreeMap<String, String> {
    let names = &export.names;
    let own = || placed.tensors.keys();
    let saved: HashSet<String> = own().map(|name| names.in_checkpoint(name)).collect();
    let tied = export.aliases.iter();
    let tied = tied.map(|(alias, name)| (names.in_checkpoint(alias), name));
    let live = placed.live_names.iter();
    let live = live.map(|(alias, name)| (names.in_module(alias), name));
    let unsaved = own().map(|name| (names.in_module(name), name));
    let all = live.chain(unsaved).chain(tied);
    // A tensor that was left out is not another one.
    let free = |alias: &String| !saved.contains(alias) && !is_excluded(&recipe.exclude, alias);
    let all = all.filter(|(alias, _)| free(alias));
    all.map(|(alias, name)| (alias, names.in_checkpoint(name)))
        .collect()
}

/// Writes all files except the shards, under the checkpoint's names.
fn write_package(
    recipe: &Recipe,
    staging: &Staging,
    mut export: Export,
    placed: Placement,
    shards: Vec<ShardFile>,
) -> Result<Manifest, PackageError> {
    let names = &export.names;
    let named = |name: &str| names.in_checkpoint(name);
    let inputs = interface::inputs(&placed.graph, &placed.tensors, recipe.objective)?;
    let outputs = interface::outputs(&placed.graph, recipe.objective)?;
    let aliases = aliases(recipe, &export, &placed);
    let tensors = placed.tensors.into_iter();
    let tensors = tensors
        .map(|(name, tensor)| (named(&name), tensor))
        .collect();
    for tensor in &mut export.tensors {
        tensor.name = named(&tensor.name);
    }
    let manifest = Manifest {
        v: V1,
        name: recipe.name.clone(),
        version: recipe.version,
        graph: staging.graph(placed.bytes, &export.dir)?,
        weights: Some(staging.weights(&export.tensors)?),
        inputs,
        outputs,
        objective: recipe.objective,
        precision: export.tensors.first().map_or(Dtype::F32, |t| t.dtype),
        tensors,
        trainable: None,
        aliases: (!aliases.is_empty()).then_some(aliases),
        shards,
        canary: None,
    };
    write_manifest(staging.dir(), &manifest)?;
    Ok(manifest)
}
