//! Making a package: finding, by comparing contents, where the exporter put each checkpoint
//! tensor, and refusing by name what cannot be placed beyond doubt, or what no worker would serve.

mod files;
mod interface;
mod naming;
mod place;
pub(super) mod precision;
mod source;
mod unshare;

use std::path::PathBuf;

use super::checkpoint::Tensor;
use super::{Dtype, MANIFEST, Manifest, Objective, Package, PackageError};
use crate::job::message::V1;
use files::Staging;
pub(super) use files::{write, write_tensors};
pub(super) use place::is_uniform;
use source::Source;

/// What `scorer package` is told.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The exported graph.
    pub graph: PathBuf,
    /// The checkpoint; without it the graph's own initializers are the tensors.
    pub weights: Option<PathBuf>,
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
        super::check_name(&self.name)?;
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

/// Makes a package; copies, never links. What every worker would refuse by looking at the files is
/// refused, and nothing is left behind then.
///
/// # Errors
/// Names the file, tensor or initializer and what to do.
pub fn build(recipe: &Recipe) -> Result<Built, PackageError> {
    build_and_try(recipe, |package| {
        crate::engine::check(&package).map_err(|e| PackageError(e.to_string()))?;
        Ok(Vec::new())
    })
}

/// As [`build`]; before the package is put in its place, `tried` loads it as a worker does, and
/// says what the operator should know of that.
///
/// # Errors
/// As [`build`], and what `tried` says.
pub fn build_and_try(
    recipe: &Recipe,
    tried: impl FnOnce(Package) -> Result<Vec<String>, PackageError>,
) -> Result<Built, PackageError> {
    recipe.check()?;
    files::check_free(&recipe.out)?;
    let mut source = Source::open(recipe)?;
    let mut graph = source.graph.clone();
    let placed = place::place(&source.tensors, &source.pool, &mut graph, |t| {
        source.elsewhere(t)
    });
    let (placed, rewritten) = placed.map_err(|error| match source.naming.note() {
        Some(note) => PackageError(format!("{error}\n  ({note})")),
        None => error,
    })?;
    let moved = placed.iter().filter(|(name, tensor)| {
        let mut places = tensor.places.iter();
        places.any(|place| place.transposed || place.initializer != **name)
    });
    let moved = moved.count();
    let inputs = interface::inputs(&graph, &placed, recipe.objective)?;
    let outputs = interface::outputs(&graph, recipe.objective)?;
    // An export that is good as it is goes into the package byte for byte.
    let bytes = if rewritten {
        graph.encode().into()
    } else {
        source.bytes.clone()
    };
    let staging = Staging::begin(&recipe.out)?;
    let (shards, others) = staging.shards(&recipe.shards, recipe.objective)?;
    let naming = source.naming.clone();
    let named = |name: &str| naming.in_checkpoint(name);
    source
        .tensors
        .iter_mut()
        .for_each(|t| t.name = named(&t.name));
    let aliases = source
        .aliases
        .iter()
        .map(|(alias, name)| (named(alias), named(name)));
    let manifest = Manifest {
        v: V1,
        name: recipe.name.clone(),
        version: recipe.version,
        graph: staging.graph(bytes, &source.dir)?,
        weights: Some(staging.weights(&source.tensors)?),
        inputs,
        outputs,
        objective: recipe.objective,
        precision: source.tensors.first().map_or(Dtype::F32, |t| t.dtype),
        tensors: placed
            .into_iter()
            .map(|(name, tensor)| (named(&name), tensor))
            .collect(),
        trainable: None,
        aliases: (!source.aliases.is_empty()).then(|| aliases.collect()),
        shards,
        canary: None,
    };
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| PackageError(e.to_string()))?;
    write(&staging.dir().join(MANIFEST), &json)?;
    let mut notes = [source.notes, others].concat();
    notes.extend(tried(Package::load(&staging.dir(), false, &[])?)?);
    staging.finish()?;
    Ok(Built {
        manifest,
        moved,
        notes,
    })
}
