//! An export and its checkpoint, brought into one form: weights are initializers, wherever the
//! exporter put them, and tensors have the names and types that the graph has for them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::aliases::split_aliases;
use super::interface;
use super::name_mapping::NameMapping;
use super::precision::as_in_graph;
use super::recipe::Recipe;
use super::saved_names::saved_names;
use crate::model::checkpoint::{Checkpoint, Tensor};
use crate::model::compare::{Initializer, agrees, is_uniform};
use crate::model::files;
use crate::model::glob::matches_glob;
use crate::model::manifest::{PackageError, TensorEntry};
use crate::model::names::list;
use crate::model::onnx::{Graph, GraphError, Lifted, UnliftedTensor, Untrainable, lift};
use crate::model::tensor::Dtype;

/// An initializer that cannot be trained, and why.
type UntrainableWeight = (Initializer, Untrainable);

/// What goes into a package.
pub(super) struct Export {
    /// The graph's folder, which has its external data files.
    pub(super) dir: PathBuf,
    /// The graph as a file.
    pub(super) bytes: Bytes,
    pub(super) graph: Graph,
    /// The initializers that can be weights.
    pub(super) pool: Vec<Initializer>,
    /// The tensors, ascending by name, under the graph's names.
    pub(super) tensors: Vec<Tensor>,
    /// Aliases of tensors, under the graph's names.
    pub(super) aliases: BTreeMap<String, String>,
    pub(super) names: NameMapping,
    pub(super) notes: Vec<String>,
    /// Tensors that could be weights, where they cannot be patched.
    unlifted: Vec<UnliftedTensor>,
}

impl Export {
    /// Reads the files that the recipe names.
    ///
    /// # Errors
    /// Names the file or the tensor and what to do.
    pub(super) fn open(recipe: &Recipe) -> Result<Self, PackageError> {
        let dir = recipe.graph.parent().unwrap_or(Path::new("."));
        let given = recipe.weights.as_deref();
        let checkpoint = given.map(Checkpoint::open).transpose()?;
        let bytes = files::map(&recipe.graph)?;
        let broken = |e: GraphError| PackageError::at(&recipe.graph, e);
        // First, so that a file that is not a graph is reported as such.
        Graph::decode(bytes.clone()).map_err(broken)?;
        let lifted = lifted(&bytes, dir, checkpoint.as_ref()).map_err(broken)?;
        let bytes = lifted.model.map_or(bytes, Bytes::from);
        let graph = Graph::decode(bytes.clone()).map_err(broken)?;
        let output = interface::output(&graph, recipe.objective)?;
        let (pool, untrainable) = weights(&graph, dir, &output)?;
        let mut export = Self {
            dir: dir.to_owned(),
            bytes,
            graph,
            pool,
            tensors: Vec::new(),
            aliases: BTreeMap::new(),
            names: NameMapping::default(),
            notes: note_lifted(&lifted.moved).into_iter().collect(),
            unlifted: lifted.unlifted,
        };
        match checkpoint {
            Some(checkpoint) => {
                let checkpoint = without(checkpoint, &recipe.exclude, &mut export.notes)?;
                export.take(checkpoint, &untrainable, &recipe.exclude)?;
            }
            None => export.take_own(&untrainable),
        }
        let tensors = std::mem::take(&mut export.tensors);
        (export.tensors, export.aliases) = split_aliases(tensors, &export.pool, &export.graph)?;
        Ok(export)
    }

    /// The tensors are the checkpoint's.
    fn take(
        &mut self,
        checkpoint: Checkpoint,
        untrainable: &[UntrainableWeight],
        exclude: &[String],
    ) -> Result<(), PackageError> {
        self.notes.extend(checkpoint.note());
        let initializers = self.graph.initializers();
        let inputs = self.graph.inputs();
        let held = initializers.iter().map(|i| i.name.as_str());
        let held: HashSet<&str> = held.chain(inputs.iter().map(|i| i.name.as_str())).collect();
        let modules = self.graph.modules()?;
        let modules = modules.iter().map(String::as_str).collect();
        let names: Vec<&str> = checkpoint.tensors.iter().map(|t| t.name.as_str()).collect();
        self.names = NameMapping::find(&names, &held, &modules);
        self.notes.extend(self.names.note());
        let renamed = checkpoint.tensors.into_iter().map(|tensor| Tensor {
            name: self.names.in_graph(&tensor.name),
            ..tensor
        });
        let mut tensors = as_in_graph(renamed.collect(), &self.pool, &inputs)?;
        let wiring = self
            .graph
            .wiring()
            .map_err(|e| PackageError(e.to_string()))?;
        // What was left out is in the graph under its own name, and nobody else's.
        let pool = self.pool.iter();
        let pool =
            pool.filter(|(info, _)| !is_excluded(exclude, &self.names.in_checkpoint(&info.name)));
        let changed = saved_names(&tensors, pool, &wiring);
        for tensor in &mut tensors {
            let name = changed.get(&tensor.name);
            tensor.name = name.unwrap_or(&tensor.name).clone();
        }
        self.names.change(changed);
        let mut passed_over = Vec::new();
        for tensor in tensors {
            match why_untrainable(&tensor, &self.pool, untrainable) {
                Some(why) => {
                    passed_over.push(format!("{} {why}", self.names.in_checkpoint(&tensor.name)))
                }
                None => self.tensors.push(tensor),
            }
        }
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        self.notes.extend(note(
            "not trainable, and not in the package",
            passed_over.iter().cloned(),
        ));
        if self.tensors.is_empty() {
            passed_over.insert(
                0,
                "nothing of the checkpoint can be trained in this graph".into(),
            );
            return Err(PackageError(passed_over.join("\n  ")));
        }
        Ok(())
    }

    /// The tensors are the graph's own.
    fn take_own(&mut self, untrainable: &[UntrainableWeight]) {
        let own = self.pool.iter().filter(|(info, _)| !info.shape.is_empty());
        self.tensors = own.map(own_tensor).collect();
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let barred = untrainable.iter().map(|((info, _), why)| (info, why));
        let barred = barred.filter(|(info, _)| !info.shape.is_empty());
        let barred = barred.map(|(info, why)| format!("{} {why}", info.name));
        self.notes
            .extend(note("not trainable, and not in the package", barred));
        let unlifted = self.unlifted.iter().map(|e| (&e.at, &e.info.shape));
        let matrices = unlifted.filter(|(_, s)| s.len() > 1 && s.iter().product::<usize>() > 1);
        let matrices = matrices.map(|(at, s)| format!("{at} {s:?}"));
        let what = "not in the package, because they cannot be patched where they are";
        self.notes.extend(note(what, matrices));
    }

    /// Notes matrices of the graph that are not tensors of the checkpoint; they stay as they are.
    pub(super) fn left(
        &self,
        graph: &Graph,
        placed: &BTreeMap<String, TensorEntry>,
    ) -> Vec<String> {
        // A shared one was replaced by copies.
        let there: HashSet<String> = graph.initializers().into_iter().map(|i| i.name).collect();
        let places = placed.values().flat_map(|entry| &entry.places);
        let taken: HashSet<&str> = places.map(|place| place.initializer.as_str()).collect();
        let left = self.pool.iter().filter(|(info, _)| {
            let several = info.shape.iter().filter(|size| **size > 1).count() > 1;
            several && there.contains(&info.name) && !taken.contains(info.name.as_str())
        });
        let left = left.map(|(info, _)| format!("{} {:?}", info.name, info.shape));
        let what = "matrices of the graph that are not in the checkpoint and stay unchanged";
        note(what, left).into_iter().collect()
    }

    /// Where a tensor's contents are, if they cannot be patched there.
    pub(super) fn unlifted(&self, tensor: &Tensor) -> Option<String> {
        let holds = |place: &&UnliftedTensor| match place.contents(&self.dir) {
            Some(bytes) => agrees(tensor, &(place.info.clone(), bytes), Dtype::F32).is_some(),
            None => place.info.shape == tensor.shape && place.at.ends_with(&tensor.name),
        };
        let found = self.unlifted.iter().find(holds)?;
        Some(format!(
            "the graph holds it in {}, where nobody can patch it; export it as an initializer \
             of the graph: without local functions, sparse tensors, or weights in attributes",
            found.at
        ))
    }
}

/// Whether `--exclude` leaves a name of the checkpoint out.
pub(super) fn is_excluded(globs: &[String], name: &str) -> bool {
    globs.iter().any(|glob| matches_glob(glob, name))
}

/// The checkpoint without the tensors that match one of the globs.
fn without(
    mut checkpoint: Checkpoint,
    globs: &[String],
    notes: &mut Vec<String>,
) -> Result<Checkpoint, PackageError> {
    let names = |glob: &&String| {
        let mut tensors = checkpoint.tensors.iter();
        tensors.any(|tensor| matches_glob(glob, &tensor.name))
    };
    if let Some(glob) = globs.iter().find(|glob| !names(glob)) {
        let message = format!("--exclude {glob}: the checkpoint has no such tensor");
        return Err(PackageError(message));
    }
    let excluded = |tensor: &Tensor| is_excluded(globs, &tensor.name);
    let (left, kept): (Vec<_>, Vec<_>) = checkpoint.tensors.into_iter().partition(excluded);
    checkpoint.tensors = kept;
    let left = left.into_iter().map(|tensor| tensor.name);
    notes.extend(note("left out (--exclude)", left));
    Ok(checkpoint)
}

/// The graph with its weights as initializers: the checkpoint's tensors, or whatever looks like
/// weights.
fn lifted(
    bytes: &Bytes,
    dir: &Path,
    checkpoint: Option<&Checkpoint>,
) -> Result<Lifted, GraphError> {
    lift(bytes, &|info, contents| {
        let several = info.shape.iter().product::<usize>() > 1;
        let Some(checkpoint) = checkpoint else {
            return several && !info.shape.is_empty();
        };
        let reversed: Vec<usize> = info.shape.iter().rev().copied().collect();
        // A single number matches many others; only its name shows that it is a weight.
        let alike = |t: &&Tensor| {
            (t.shape == info.shape || t.shape == reversed)
                && (several || info.name.ends_with(&t.name))
        };
        let alike: Vec<&Tensor> = checkpoint.tensors.iter().filter(alike).collect();
        if alike.is_empty() {
            return false;
        }
        let held = contents(dir).map(|contents| (info, contents));
        held.is_some_and(|held| alike.iter().any(|t| agrees(t, &held, Dtype::F32).is_some()))
    })
}

/// The initializers that can be trained, and those that cannot, with the reason.
fn weights(
    graph: &Graph,
    dir: &Path,
    output: &str,
) -> Result<(Vec<Initializer>, Vec<UntrainableWeight>), PackageError> {
    let mut floats = graph.initializers();
    floats.retain(|i| i.dtype.is_some());
    let names: Vec<&str> = floats.iter().map(|i| i.name.as_str()).collect();
    let reasons = graph.untrainable(&names, output)?;
    let (mut pool, mut untrainable) = (Vec::new(), Vec::new());
    for info in floats {
        let why = if info.shape.contains(&0) {
            Some(Untrainable::Empty)
        } else {
            reasons.get(&info.name).cloned()
        };
        let bytes = graph.initializer(&info.name, dir)?;
        match why {
            Some(why) => untrainable.push(((info, bytes), why)),
            None => pool.push((info, bytes)),
        }
    }
    Ok((pool, untrainable))
}

/// Why a tensor cannot be trained, if every initializer that holds it is untrainable. If its
/// contents are uniform, or it determines a shape, the name decides.
fn why_untrainable<'a>(
    tensor: &Tensor,
    pool: &[Initializer],
    untrainable: &'a [UntrainableWeight],
) -> Option<&'a Untrainable> {
    let holds = |held: &Initializer| agrees(tensor, held, Dtype::F32).is_some();
    let holding = untrainable.iter().filter(|(held, _)| holds(held));
    let mut holding = holding.peekable();
    let (_, any) = holding.peek()?;
    let named = holding.find(|(held, _)| held.0.name == tensor.name);
    let told = named
        .map(|(_, bar)| bar)
        .filter(|bar| is_uniform(tensor) || matches!(bar, Untrainable::Decides(_)));
    told.or_else(|| (!pool.iter().any(holds)).then_some(any))
}

fn own_tensor((info, bytes): &Initializer) -> Tensor {
    Tensor {
        name: info.name.clone(),
        shape: info.shape.clone(),
        dtype: info.dtype.unwrap_or(Dtype::F32),
        bytes: bytes.clone(),
    }
}

fn note_lifted(moved: &[(String, String)]) -> Option<String> {
    let moved = moved.iter().map(|(name, at)| format!("{name} ({at})"));
    note("made initializers, so that they can be patched", moved)
}

fn note(what: &str, items: impl Iterator<Item = String>) -> Option<String> {
    let items: Vec<String> = items.collect();
    (!items.is_empty()).then(|| format!("{what}: {}", list(&items)))
}
