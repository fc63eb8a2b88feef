//! The training side: it makes versions of the model that workers are to follow, and says what
//! they must come to. Nothing here is the crate's own code: the sums, the digests and the files
//! are made once more, from the contract.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::archive::zlib;
use crate::package::{Package, VERSION, fixtures, sound};

/// All tensors of one version, row-major, by name.
pub type Weights = BTreeMap<String, Vec<f32>>;

/// What one version changes: per tensor, some elements, ascending, and what is added to each.
pub type Step = BTreeMap<String, Vec<(usize, f32)>>;

/// How much a step adds to an element, up or down.
const SMALLEST: f32 = 0.0005;
const LARGEST: f32 = 0.0015;

/// Every version so far, and what led to it.
pub struct Trainer {
    rng: StdRng,
    shapes: BTreeMap<String, Vec<usize>>,
    versions: BTreeMap<u64, Weights>,
    /// By the version a step starts from.
    steps: BTreeMap<u64, Step>,
}

impl Trainer {
    /// Starts from the checkpoint of the tests, which is version [`VERSION`].
    pub fn new(seed: u64) -> Self {
        let bytes = std::fs::read(fixtures().join("checkpoint.safetensors"));
        let bytes = bytes.expect("the committed checkpoint");
        let views = SafeTensors::deserialize(&bytes).expect("a checkpoint is safetensors");
        let (mut shapes, mut weights) = (BTreeMap::new(), Weights::new());
        for (name, view) in views.tensors() {
            assert_eq!(view.dtype(), Dtype::F32, "{name}: the sums here are f32");
            shapes.insert(name.clone(), view.shape().to_vec());
            let (elements, _) = view.data().as_chunks();
            weights.insert(
                name,
                elements.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            );
        }
        // Otherwise the steps and the id would have to leave out what is not trainable.
        let everything = manifest(sound())["trainable"].is_null();
        assert!(everything, "the package lets candidates touch every tensor");
        Self {
            rng: StdRng::seed_from_u64(seed),
            shapes,
            versions: BTreeMap::from([(VERSION, weights)]),
            steps: BTreeMap::new(),
        }
    }

    /// Makes the next version by a few hundred small steps in a few tensors; its number.
    pub fn advance(&mut self) -> u64 {
        let (version, mut weights) = self.versions.last_key_value().map_or_else(
            || unreachable!("there is always the first version"),
            |(version, weights)| (*version, weights.clone()),
        );
        let step = draw_step(&mut self.rng, &weights);
        for (name, changes) in &step {
            let tensor = weights.get_mut(name).expect("a step names our own tensors");
            for (index, d) in changes {
                tensor[*index] += d;
            }
        }
        self.versions.insert(version + 1, weights);
        self.steps.insert(version, step);
        version + 1
    }

    /// The latest version.
    pub fn version(&self) -> u64 {
        self.versions.keys().last().copied().unwrap_or(VERSION)
    }

    /// What, added to one version, gives its neighbour, the next or the last one: by tensor, in the
    /// order of their names, index and value.
    pub fn difference(&self, from: u64, to: u64) -> Step {
        assert_eq!(from.abs_diff(to), 1, "only neighbours have a difference");
        let mut step = self
            .steps
            .get(&from.min(to))
            .expect("both were made")
            .clone();
        if from < to {
            return step;
        }
        let (old, new) = (self.weights(from), self.weights(to));
        for (name, changes) in &mut step {
            for (index, d) in changes {
                // `large_elements` sees to it that it is exact.
                *d = new[name][*index] - old[name][*index];
            }
        }
        step
    }

    /// The difference as a `binary_v2` file.
    pub fn delta(&self, from: u64, to: u64) -> Vec<u8> {
        let entry = |(name, changes): (String, Vec<(usize, f32)>)| {
            let shape = self.shape(&name);
            let data = pack(&changes);
            (
                name,
                json!({"shape": shape, "k": changes.len(), "data": data}),
            )
        };
        let tensors: Map<String, Value> =
            self.difference(from, to).into_iter().map(entry).collect();
        Value::Object(tensors).to_string().into_bytes()
    }

    /// A tensor's shape.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.shapes[name].clone()
    }

    /// A safetensors file of all tensors of a version.
    pub fn full(&self, version: u64) -> Vec<u8> {
        let bytes: BTreeMap<&String, Vec<u8>> = self
            .weights(version)
            .iter()
            .map(|(name, elements)| (name, little_endian(elements)))
            .collect();
        let views = bytes.iter().map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F32, self.shapes[*name].clone(), bytes);
            (*name, view.expect("as many bytes as the shape says"))
        });
        serialize(views, None).expect("f32 tensors are safetensors")
    }

    /// What a version is.
    #[track_caller]
    pub fn weights(&self, version: u64) -> &Weights {
        let weights = self.versions.get(&version);
        weights.unwrap_or_else(|| panic!("version {version} was not made"))
    }

    /// The id that a worker must give these weights, by the contract.
    pub fn weights_id(&self, version: u64) -> String {
        let mut id = Sha256::new();
        for (name, elements) in self.weights(version) {
            id.update(Sha256::digest(name));
            id.update(Sha256::digest(little_endian(elements)));
        }
        hex::encode(id.finalize())
    }

    /// The sound package with the weights of another version, to compute scores by.
    pub fn package(&self, version: u64) -> Package {
        let package = Package::copy();
        package.replace_weights(version, &self.full(version));
        package
    }

    /// The graph that all versions are for.
    pub fn graph_sha256(&self) -> String {
        let graph = &manifest(sound())["graph"]["sha256"];
        graph
            .as_str()
            .expect("a package names its graph")
            .to_owned()
    }
}

fn draw_step(rng: &mut StdRng, weights: &Weights) -> Step {
    let names: Vec<&String> = weights.keys().collect();
    let chosen = rand::seq::index::sample(rng, names.len(), 4);
    let mut step = Step::new();
    for name in chosen.iter().map(|n| names[n]) {
        let large = large_elements(&weights[name]);
        let k = rng.random_range(50..=500).min(large.len());
        let drawn = rand::seq::index::sample(rng, large.len(), k);
        let mut indices: Vec<usize> = drawn.iter().map(|n| large[n]).collect();
        indices.sort_unstable();
        let change = |index: usize| (index, draw_change(rng));
        step.insert(name.clone(), indices.into_iter().map(change).collect());
    }
    step
}

/// About a thousandth, up or down: enough to be seen in the loss.
fn draw_change(rng: &mut StdRng) -> f32 {
    let d = rng.random_range(SMALLEST..LARGEST);
    if rng.random() { d } else { -d }
}

/// Where a weight more than halves or doubles by no step: there the difference of old and new is
/// exact in f32, so that a step leads back to the very bits. The sum itself is rounded all the same.
fn large_elements(tensor: &[f32]) -> Vec<usize> {
    let large = |n: &usize| tensor[*n].abs() > 4.0 * LARGEST;
    (0..tensor.len()).filter(large).collect()
}

/// base64 of zlib of the values and then the indices.
fn pack(changes: &[(usize, f32)]) -> String {
    let values = changes.iter().flat_map(|(_, d)| d.to_le_bytes());
    let index = |n: usize| i32::try_from(n).expect("a small tensor").to_le_bytes();
    let indices = changes.iter().flat_map(|(n, _)| index(*n));
    let packed: Vec<u8> = values.chain(indices).collect();
    BASE64.encode(zlib(&packed))
}

fn little_endian(elements: &[f32]) -> Vec<u8> {
    elements.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn manifest(package: &Path) -> Value {
    let text = std::fs::read(package.join("model.json")).expect("a package has a model.json");
    serde_json::from_slice(&text).expect("model.json is JSON")
}
