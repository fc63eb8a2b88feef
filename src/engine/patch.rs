//! The effect of a candidate on the weights, computed on the host before it needs the device: the new
//! values, the values they replace, and how many differ. Computed in f32 and rounded once.

use half::{bf16, f16};

use crate::candidate::sketch::Sketch;
use crate::candidate::{TensorUpdate, Update};
use crate::model::package::Package;
use crate::model::tensor::Dtype;
use crate::model::tensor::round_to;
use crate::model::weights::TensorInfo;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::Rule;

/// The checked new values of one tensor and the baseline's values that they replace. Those are read
/// once, since gathering them again would be slow.
#[derive(Debug)]
pub(super) struct Patch {
    pub(super) tensor: usize,
    /// Row-major in the checkpoint's layout.
    pub(super) indices: Vec<u32>,
    /// The same entries in the transposed layout; empty if the graph never transposes the tensor.
    pub(super) transposed: Vec<u32>,
    pub(super) values: Vec<f32>,
    pub(super) originals: Vec<f32>,
}

/// A candidate, ready to be written.
#[derive(Debug)]
pub struct Patches {
    pub(super) patches: Vec<Patch>,
    /// Entries whose weight differs after rounding.
    pub effective_entries: u64,
}

impl Patches {
    /// Computes and checks the new values against the package's baseline.
    ///
    /// # Errors
    /// `candidate_non_finite` when an updated weight is not finite.
    pub fn new(package: &Package, update: Update, rule: Rule) -> Result<Self, Failure> {
        let patches = update.tensors.into_iter();
        let patches: Vec<Patch> = patches
            .map(|touched| Patch::new(package, touched, rule))
            .collect::<Result<_, _>>()?;
        let effective = patches.iter().map(|patch| patch.effective().count() as u64);
        Ok(Self {
            effective_entries: effective.sum(),
            patches,
        })
    }

    /// A sketch of the entries whose weight differs, salted with the hash of a plan.
    pub fn sketch(&self, package: &Package, plan: &[u8; 32]) -> Sketch {
        let mut sketch = Sketch::salted(plan);
        for patch in &self.patches {
            let name = &package.weights.tensors[patch.tensor].name;
            sketch.note(name, patch.effective());
        }
        sketch
    }
}

impl Patch {
    fn new(package: &Package, touched: TensorUpdate, rule: Rule) -> Result<Self, Failure> {
        let info = &package.weights.tensors[touched.tensor];
        let TensorUpdate {
            tensor,
            indices,
            values,
        } = touched;
        let originals = originals(package, tensor, &indices);
        let values = stepped(values, &originals, rule, info.dtype);
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(not_finite(info, indices[at]));
        }
        Ok(Self::at(package, tensor, indices, values, originals))
    }

    /// A patch of checked values, in the layouts that the package needs.
    pub(super) fn at(
        package: &Package,
        tensor: usize,
        indices: Vec<u32>,
        values: Vec<f32>,
        originals: Vec<f32>,
    ) -> Self {
        let info = &package.weights.tensors[tensor];
        let entry = package.manifest.tensors.get(&info.name);
        let flipped = entry.is_some_and(|entry| entry.places.iter().any(|p| p.transposed));
        let transposed = if flipped {
            transposed_positions(&indices, info)
        } else {
            Vec::new()
        };
        Self {
            tensor,
            indices,
            transposed,
            values,
            originals,
        }
    }

    /// Whether a weight differs.
    pub(super) fn is_effective(&self) -> bool {
        self.effective().next().is_some()
    }

    /// The entries whose weight differs.
    fn effective(&self) -> impl Iterator<Item = u32> {
        let pairs = self.values.iter().zip(&self.originals);
        let entries = self.indices.iter().zip(pairs);
        let changed = entries.filter(|(_, (new, old))| new.to_bits() != old.to_bits());
        changed.map(|(index, _)| *index)
    }
}

/// The failure for an updated weight that is NaN or infinite.
pub(super) fn not_finite(info: &TensorInfo, index: u32) -> Failure {
    let name = &info.name;
    let message = format!("{name}: the updated weight at index {index} is not finite");
    Failure::new(Code::CandidateNonFinite, message).with("tensor", name.clone())
}

/// The baseline's values. Decoders reject indices out of range; if one slipped through, its value would be NaN.
pub(super) fn originals(package: &Package, tensor: usize, indices: &[u32]) -> Vec<f32> {
    let bytes = package.weights.bytes(tensor);
    match package.weights.tensors[tensor].dtype {
        Dtype::F32 => gather(bytes, indices, f32::from_le_bytes),
        Dtype::F16 => gather(bytes, indices, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::Bf16 => gather(bytes, indices, |b| bf16::from_le_bytes(b).to_f32()),
    }
}

/// Generic, so that the compiler specialises the loop for each type.
fn gather<const N: usize>(
    bytes: &[u8],
    indices: &[u32],
    widen: impl Fn([u8; N]) -> f32,
) -> Vec<f32> {
    let weights = bytes.as_chunks().0;
    let element = |index: &u32| weights.get(*index as usize).map_or(f32::NAN, |b| widen(*b));
    indices.iter().map(element).collect()
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the contract computes the update in f32"
)]
fn stepped(mut values: Vec<f32>, originals: &[f32], rule: Rule, dtype: Dtype) -> Vec<f32> {
    let pairs = values.iter_mut().zip(originals);
    match rule {
        Rule::Gradient { learning_rate } => {
            let rate = learning_rate as f32;
            pairs.for_each(|(value, old)| *value = old - rate * *value);
        }
        Rule::ParamDiff => pairs.for_each(|(value, old)| *value += old),
    }
    if dtype != Dtype::F32 {
        values.iter_mut().for_each(|v| *v = round_to(dtype, *v));
    }
    values
}

/// Maps (row, column) of the checkpoint to (column, row) of a transposed weight.
fn transposed_positions(indices: &[u32], info: &TensorInfo) -> Vec<u32> {
    let [rows, columns] = info.shape.as_slice() else {
        return indices.to_vec();
    };
    let size = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (rows, columns) = (size(*rows), size(*columns));
    indices
        .iter()
        .map(|i| (i % columns) * rows + i / columns)
        .collect()
}
