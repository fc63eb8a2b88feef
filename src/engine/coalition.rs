//! Some members of a merge, applied together: `w + sum of weight * d`, summed in f64 in ascending order of the members'
//! ids and rounded once to the weight's type, so that the order in which they came changes no bit. A sum of 0 leaves
//! the weight as it is, a negative zero too.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use super::patch::{Patch, Patches, not_finite, originals};
use crate::candidate::{TensorUpdate, Update};
use crate::model::package::Package;
use crate::model::tensor::{Dtype, round_once};
use crate::protocol::failure::Failure;
use crate::protocol::job::{Compression, Format, Rule};

/// Entries of a tensor that are summed at a time: what they need stays in the processor's cache, and a tensor needs no
/// memory beside its own entries.
const BLOCK: usize = 1 << 12;

/// A decoded candidate with its weight in the merge.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Names it; members are summed in ascending order.
    pub id: String,
    /// What it was decoded from.
    pub source: Source,
    /// What it changes.
    pub update: Update,
    /// How its values change the weights.
    pub rule: Rule,
    /// Its weight in the merge.
    pub weight: f64,
}

/// What decides which update comes of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Of the bytes.
    pub sha256: [u8; 32],
    /// The container.
    pub format: Format,
    /// Compression of the whole body.
    pub compression: Option<Compression>,
}

impl Member {
    /// Whether the other, whatever its id, is the same candidate with the same weight. Looks at no entry: there may be many.
    pub fn equals(&self, other: &Self) -> bool {
        (self.source, self.rule, self.weight) == (other.source, other.rule, other.weight)
    }

    fn rest_of(&self, tensor: usize) -> Option<Rest<'_>> {
        let tensors = &self.update.tensors;
        let at = tensors.binary_search_by_key(&tensor, |touched| touched.tensor);
        let TensorUpdate {
            indices, values, ..
        } = &tensors[at.ok()?];
        Some(Rest {
            member: self,
            indices,
            values,
        })
    }

    /// `weight * d` of a value as it was sent.
    fn step(&self, value: f32) -> f64 {
        let value = f64::from(value);
        self.weight
            * match self.rule {
                Rule::Gradient { learning_rate } => -learning_rate * value,
                Rule::ParamDiff => value,
            }
    }
}

/// The most passes that a merge may need: each member alone, all together, and all but each, where no two of these are
/// the same.
pub fn most_passes(members: &[Member]) -> u32 {
    let is_first = |at: usize| !members[..at].iter().any(|other| other.equals(&members[at]));
    let different = (0..members.len()).filter(|at| is_first(*at)).count();
    let different = u32::try_from(different).unwrap_or(u32::MAX);
    match members.len() {
        0 | 1 => 1,
        // Without one, the other is alone.
        2 => different + 1,
        _ => different.saturating_mul(2).saturating_add(1),
    }
}

/// The entries of a member in a tensor that are not summed yet.
#[derive(Debug)]
struct Rest<'a> {
    member: &'a Member,
    indices: &'a [u32],
    values: &'a [f32],
}

/// The sums of a block of a tensor, and which of its entries anybody has.
#[derive(Debug)]
struct Block {
    base: usize,
    sums: Vec<f64>,
    touched: Vec<bool>,
}

impl Block {
    fn new() -> Self {
        Self {
            base: 0,
            sums: vec![0.0; BLOCK],
            touched: vec![false; BLOCK],
        }
    }

    /// Adds the entries of a member within the block.
    fn add(&mut self, rest: &mut Rest<'_>) {
        let end = self.base + BLOCK;
        let count = rest
            .indices
            .partition_point(|index| (*index as usize) < end);
        let (indices, later) = rest.indices.split_at(count);
        let (values, later_values) = rest.values.split_at(count);
        for (index, value) in indices.iter().zip(values) {
            let at = *index as usize - self.base;
            self.sums[at] += rest.member.step(*value);
            self.touched[at] = true;
        }
        (rest.indices, rest.values) = (later, later_values);
    }

    /// The sums that anybody has added to, with their indices. The block is empty then.
    fn take(&mut self) -> (Vec<u32>, Vec<f64>) {
        let (mut indices, mut sums) = (Vec::new(), Vec::new());
        for (at, touched) in self.touched.iter_mut().enumerate() {
            if std::mem::take(touched) {
                indices.push(u32::try_from(self.base + at).unwrap_or(u32::MAX));
                sums.push(std::mem::take(&mut self.sums[at]));
            }
        }
        (indices, sums)
    }
}

/// The weights that differ once these members, in ascending order of their ids, are applied together: at most as many
/// as they have entries.
///
/// `step` hears of each tensor before it is summed, and may end it.
///
/// # Errors
/// `candidate_non_finite` when an updated weight is not finite; that of `step`.
pub fn patches(
    package: &Package,
    members: &[&Member],
    step: &dyn Fn() -> Result<(), Failure>,
) -> Result<Patches, Failure> {
    let touched = members.iter().flat_map(|member| &member.update.tensors);
    let touched: BTreeSet<usize> = touched.map(|touched| touched.tensor).collect();
    let mut block = Block::new();
    let mut patches = Vec::new();
    for tensor in touched {
        step()?;
        let patch = patch(package, tensor, members, &mut block)?;
        patches.extend(patch.is_effective().then_some(patch));
    }
    Ok(Patches {
        effective_entries: patches.iter().map(|p| p.indices.len() as u64).sum(),
        patches,
    })
}

fn patch(
    package: &Package,
    tensor: usize,
    members: &[&Member],
    block: &mut Block,
) -> Result<Patch, Failure> {
    let info = &package.weights.tensors[tensor];
    let rests = members.iter().filter_map(|member| member.rest_of(tensor));
    let mut rests: Vec<Rest<'_>> = rests.collect();
    let (mut indices, mut values, mut replaced) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(next) = rests.iter().filter_map(|rest| rest.indices.first()).min() {
        block.base = *next as usize / BLOCK * BLOCK;
        rests.iter_mut().for_each(|rest| block.add(rest));
        let (touched, sums) = block.take();
        let olds = originals(package, tensor, &touched);
        for ((index, sum), old) in touched.into_iter().zip(sums).zip(olds) {
            let new = stepped(info.dtype, old, sum);
            if !new.is_finite() {
                return Err(not_finite(info, index));
            }
            if new.to_bits() != old.to_bits() {
                indices.push(index);
                values.push(new);
                replaced.push(old);
            }
        }
    }
    Ok(Patch::at(package, tensor, indices, values, replaced))
}

fn stepped(dtype: Dtype, old: f32, sum: f64) -> f32 {
    match sum == 0.0 {
        true => old,
        false => round_once(dtype, f64::from(old) + sum),
    }
}

/// Equal for two coalitions exactly if they leave the same weights, bit for bit: of these patches, which hold nothing
/// but what differs from the baseline.
pub fn fingerprint(patches: &Patches) -> [u8; 32] {
    let mut digest = Sha256::new();
    for patch in &patches.patches {
        digest.update((patch.tensor as u64).to_le_bytes());
        digest.update((patch.indices.len() as u64).to_le_bytes());
        for (index, value) in patch.indices.iter().zip(&patch.values) {
            digest.update(index.to_le_bytes());
            digest.update(value.to_bits().to_le_bytes());
        }
    }
    digest.finalize().into()
}

#[cfg(test)]
pub(super) mod tests;
