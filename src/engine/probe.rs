//! The probe patches every place of every trainable tensor alone, expects the loss to change, and
//! restores it. If the loss does not change, either the place is wrong (the session reads something
//! else), or it has no effect with these weights: an adapter whose other half is zero, a bias before a
//! normalisation, an expert that no token reaches. Reading the patched values back from the session
//! tells the two apart; loading has checked that the graph leads from there to the loss.

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::patch::Patch;
use super::warmup::same_bits;
use crate::engine::session::Entries;
use crate::engine::{Engine, EngineError, MicroBatch};
use crate::model::package::Package;
use crate::model::plan::{Plan, Window};
use crate::model::tensor::{read_element, round_to};
use crate::model::weights::TensorInfo;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::state::Detail;
use crate::telemetry::progress::Progress;

/// Step sizes to try until the loss changes, as shares of the tensor's root mean square.
const SHARES: [f32; 3] = [0.01, 0.1, 1.0];
/// Windows to try when the first shows no effect. More would reach rarer experts, but add minutes to the
/// warm-up of a large model.
const WINDOWS: usize = 64;
/// Distances to scatter uniform tensors by, relative to the usual size of weights, until the loss is
/// finite.
const DISTANCES: [f32; 3] = [1.0, 0.125, 0.015_625];

/// What stands for the hash of the probe's plans.
const PROBE: [u8; 32] = [0; 32];

/// The point in weight space at which places are patched.
#[derive(Debug, Clone, Copy)]
enum Point {
    /// The weights of the package.
    Baseline,
    /// The same, except that entries of uniform tensors are randomly moved by about this distance.
    Scattered(f32),
}

impl Engine {
    /// Patches each place of each trainable tensor alone until the loss changes; a tensor in two places
    /// must have an effect in both. Returns the tensors that have none in some place.
    pub(super) fn probe(
        &mut self,
        plan: &Plan,
        baseline: &[f64],
    ) -> Result<Vec<String>, EngineError> {
        let mut slots = self.unmoved(plan)?;
        if !slots.is_empty() {
            self.look_elsewhere(plan, &mut slots).map_err(broken)?;
        }
        self.session.forget_activations(Some(&PROBE));
        self.compare_weights()?;
        let restored = self.pass(plan);
        if !same_bits(&restored.map_err(broken)?, baseline) {
            let message = "the loss is not what it was before the probe";
            return Err(EngineError::new(Detail::RestoreMismatch, message));
        }
        let tensors = slots.into_iter().map(|slot| self.slots[slot].tensor);
        let names = tensors.map(|tensor| self.package.weights.tensors[tensor].name.clone());
        let mut inert: Vec<String> = names.collect();
        // The places of a tensor are adjacent.
        inert.dedup();
        Ok(inert)
    }

    /// The places that do not change the loss of the first window.
    fn unmoved(&mut self, plan: &Plan) -> Result<Vec<usize>, EngineError> {
        let first = short(&plan.windows[..1]);
        let still = self.unpatched(&first).map_err(broken)?;
        let mut unmoved = Vec::new();
        for slot in self.probed() {
            if !self.moves(slot, &first, &still)? {
                unmoved.push(slot);
            }
        }
        Ok(unmoved)
    }

    /// The places that candidates can change.
    pub(super) fn probed(&self) -> Vec<usize> {
        let trainable = |slot: &usize| self.is_trainable(self.slots[*slot].tensor);
        (0..self.slots.len()).filter(trainable).collect()
    }

    fn is_trainable(&self, tensor: usize) -> bool {
        let name = &self.package.weights.tensors[tensor].name;
        self.package.manifest.is_trainable(name)
    }

    /// Whether patching one place by any of `SHARES` changes the loss. Always restores.
    fn moves(&mut self, slot: usize, plan: &Plan, still: &[f64]) -> Result<bool, EngineError> {
        let package = Arc::clone(&self.package);
        for share in SHARES {
            let patch = Point::Baseline.patch(&package, self.slots[slot].tensor, share);
            let losses = self.losses_with(slot, &patch, plan);
            self.restore(&[patch]).map_err(broken)?;
            if !same_bits(&losses?, still) {
                return Ok(true);
            }
            self.foresee(1);
        }
        Ok(false)
    }

    /// Writes the patch into one place, checks that it arrived, and measures.
    fn losses_with(
        &mut self,
        slot: usize,
        patch: &Patch,
        plan: &Plan,
    ) -> Result<Vec<f64>, EngineError> {
        let written = self.write_place(slot, patch, &patch.values);
        written.map_err(|e| broken(e.into()))?;
        self.check_arrival(slot, patch)?;
        self.patched(plan, &[slot]).map_err(broken)
    }

    /// The losses of some windows at a point, which [`Engine::patched`] starts from.
    fn unpatched(&mut self, plan: &Plan) -> Result<Vec<f64>, Failure> {
        self.session.forget_activations(Some(&plan.hash));
        let untouched = self.session.parts();
        self.losses(
            plan,
            self.probe_batch(plan.windows.len()),
            Some(untouched),
            None,
        )
    }

    /// The losses of the same windows with patches in these places.
    fn patched(&mut self, plan: &Plan, slots: &[usize]) -> Result<Vec<f64>, Failure> {
        let parts = slots
            .iter()
            .map(|slot| self.session.part_of(self.slots[*slot].weight));
        let from = parts.min();
        self.losses(plan, self.probe_batch(plan.windows.len()), from, None)
    }

    /// Windows run alone unless they fill half of the usual micro-batch, because each size needs sessions of its
    /// own.
    fn probe_batch(&self, windows: usize) -> usize {
        match self.micro_batch {
            MicroBatch::Most(_) if 2 * windows <= self.usual_batch => 1,
            MicroBatch::Most(_) | MicroBatch::Fixed(_) => self.usual_batch,
        }
    }

    /// Reads the whole place back. A device may drop entries, as software Vulkan does beyond 128 MiB of a
    /// tensor, while those it keeps still change the loss.
    fn check_arrival(&mut self, slot: usize, patch: &Patch) -> Result<(), EngineError> {
        let slot = &self.slots[slot];
        let info = &self.package.weights.tensors[slot.tensor];
        let expected = in_graph_order(info, &patch.values, slot.transposed);
        let arrived = self.session.holds(slot.weight, Entries::Values(&expected));
        if arrived.map_err(|e| broken(e.into()))? {
            return Ok(());
        }
        let message = format!(
            "probe: what was written into {} for {} is not what the session's memory holds; the device or its \
             driver drops entries, and no score that touches this tensor would be right",
            slot.place, info.name
        );
        Err(EngineError::new(Detail::WarmFailed, message))
    }

    /// Removes slots that change the loss of another window, or with uniform tensors scattered.
    fn look_elsewhere(&mut self, plan: &Plan, slots: &mut Vec<usize>) -> Result<(), Failure> {
        let most = plan.windows.len().min(WINDOWS);
        self.search(Point::Baseline, &plan.windows[1..most.max(1)], slots)?;
        let uniform = self.scattered();
        if uniform.is_empty() {
            return Ok(());
        }
        let usual = usual_size(&self.package, &self.progress);
        for distance in DISTANCES {
            if slots.is_empty() {
                break;
            }
            let point = Point::Scattered(distance * usual);
            match self.visit(point, &uniform, &plan.windows[..most], slots) {
                Ok(true) => break,
                Err(failure) if failure.code == Code::ScoreTimeout || !self.sound => {
                    return Err(failure);
                }
                // With such weights the loss is not finite, or the graph cannot run at all.
                Ok(false) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Searches at another point and always returns to the baseline.
    fn visit(
        &mut self,
        point: Point,
        uniform: &[usize],
        windows: &[Window],
        slots: &mut Vec<usize>,
    ) -> Result<bool, Failure> {
        let package = Arc::clone(&self.package);
        let mut tensors = uniform.iter();
        let written = tensors.try_for_each(|tensor| self.write(&[point.way(&package, *tensor)]));
        let searched = written.and_then(|()| self.search(point, windows, slots));
        for tensor in uniform {
            self.restore(&[point.way(&package, *tensor)])?;
        }
        searched
    }

    /// Removes the slots that change the loss of one of these windows at this point. False if the loss is
    /// not finite, which makes the search meaningless.
    ///
    /// Batches of windows grow, and all slots are first patched together: if that changes nothing, none
    /// needs to be tried alone.
    fn search(
        &mut self,
        point: Point,
        windows: &[Window],
        slots: &mut Vec<usize>,
    ) -> Result<bool, Failure> {
        for windows in growing(windows) {
            if slots.is_empty() {
                break;
            }
            let plan = short(windows);
            let runs = windows.len().div_ceil(self.probe_batch(windows.len()));
            self.foresee(2 * runs);
            let still = self.unpatched(&plan)?;
            if still.iter().any(|loss| !loss.is_finite()) {
                return Ok(false);
            }
            if same_bits(&self.losses_at(point, slots, &plan)?, &still) {
                continue;
            }
            self.foresee(slots.len() * runs);
            let mut unmoved = Vec::new();
            for slot in std::mem::take(slots) {
                if same_bits(&self.losses_at(point, &[slot], &plan)?, &still) {
                    unmoved.push(slot);
                }
            }
            *slots = unmoved;
        }
        Ok(true)
    }

    /// The losses at a point with these places patched by a full step, then undone. Only one patch is in
    /// memory at a time, since those of a large model would not fit.
    fn losses_at(
        &mut self,
        point: Point,
        slots: &[usize],
        plan: &Plan,
    ) -> Result<Vec<f64>, Failure> {
        let package = Arc::clone(&self.package);
        let patch = |tensor: usize| point.patch(&package, tensor, 1.0);
        let written = slots.iter().try_for_each(|slot| {
            let patch = patch(self.slots[*slot].tensor);
            self.write_place(*slot, &patch, &patch.values)
        });
        let losses = written
            .map_err(Failure::from)
            .and_then(|()| self.patched(plan, slots));
        for slot in slots {
            self.restore(&[patch(self.slots[*slot].tensor)])?;
        }
        losses
    }

    /// The tensors that a scattered point moves. Frozen tensors stay: what they make ineffective can never
    /// have an effect.
    fn scattered(&self) -> Vec<usize> {
        let placed = |tensor: &usize| self.slots.iter().any(|slot| slot.tensor == *tensor);
        let moves = |tensor: &usize| {
            self.progress.moved();
            is_scattered(&self.package, *tensor, &elements(&self.package, *tensor))
        };
        let all = 0..self.package.weights.tensors.len();
        all.filter(placed).filter(moves).collect()
    }

    /// Announces additional runs.
    fn foresee(&self, runs: usize) {
        let runs = u64::try_from(runs).unwrap_or(0);
        self.progress.warm_until.fetch_add(runs, Ordering::Relaxed);
    }
}

impl Point {
    /// The tensor's weights at this point.
    fn weights(self, package: &Package, tensor: usize) -> Vec<f32> {
        let baseline = elements(package, tensor);
        match self {
            Self::Scattered(distance) if is_scattered(package, tensor, &baseline) => {
                let dtype = package.weights.tensors[tensor].dtype;
                // Seeded by the tensor, so that all workers find the same.
                let mut random = StdRng::seed_from_u64(tensor as u64);
                let scatter = |value| round_to(dtype, scatter(value, distance, &mut random));
                baseline.into_iter().map(scatter).collect()
            }
            Self::Baseline | Self::Scattered(_) => baseline,
        }
    }

    /// The patch from the baseline to this point.
    fn way(self, package: &Package, tensor: usize) -> Patch {
        let there = self.weights(package, tensor);
        every_entry(package, tensor, there, elements(package, tensor))
    }

    /// Moves every entry by about `share` of the tensor's root mean square; a few entries might not affect
    /// the window.
    fn patch(self, package: &Package, tensor: usize, share: f32) -> Patch {
        let dtype = package.weights.tensors[tensor].dtype;
        let here = self.weights(package, tensor);
        let step = share * root_mean_square(&here).max(1e-2);
        let moved = (0..).zip(&here);
        let moved = moved.map(|(i, old)| round_to(dtype, old + step * irregular(i)));
        let moved = moved.collect();
        every_entry(package, tensor, moved, here)
    }
}

/// A different number for each entry, of either sign and with a size between 1/2 and 3/2: equal steps of
/// some entries, such as two classes, would cancel in a softmax or a norm.
#[expect(
    clippy::cast_precision_loss,
    reason = "24 bits are exact, and any would do"
)]
fn irregular(entry: u32) -> f32 {
    let mixed = entry.wrapping_mul(0x9E37_79B9);
    let size = 0.5 + (mixed >> 8) as f32 / 16_777_216.0;
    let up = (mixed >> 16).count_ones().is_multiple_of(2);
    if up { size } else { -size }
}

/// Moves a value away from zero, so that a scale or an epsilon keeps its sign; a zero moves either way.
/// Every step is at least half the distance.
fn scatter(value: f32, distance: f32, random: &mut StdRng) -> f32 {
    let step = distance * random.random_range(0.5..1.0);
    let up = value > 0.0 || value == 0.0 && random.random();
    if up { value + step } else { value - step }
}

fn is_scattered(package: &Package, tensor: usize, weights: &[f32]) -> bool {
    let name = &package.weights.tensors[tensor].name;
    let mut entries = weights.iter().map(|w| w.to_bits());
    let first = entries.next();
    first.is_some() && package.manifest.is_trainable(name) && entries.all(|e| Some(e) == first)
}

/// The usual size of weights: the median over the tensors that are not uniform.
fn usual_size(package: &Package, progress: &Progress) -> f32 {
    const UNKNOWN: f32 = 0.1;
    let all = (0..package.weights.tensors.len()).map(|tensor| {
        progress.moved();
        elements(package, tensor)
    });
    let varied = all.filter(|weights| weights.iter().any(|w| *w != weights[0]));
    let mut sizes: Vec<f32> = varied.map(|w| root_mean_square(&w)).collect();
    sizes.retain(|size| size.is_finite());
    sizes.sort_by(f32::total_cmp);
    sizes.get(sizes.len() / 2).copied().unwrap_or(UNKNOWN)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "the size of a perturbation need not be exact"
)]
fn root_mean_square(weights: &[f32]) -> f32 {
    let squares: f64 = weights.iter().map(|w| f64::from(*w).powi(2)).sum();
    (squares / weights.len().max(1) as f64).sqrt() as f32
}

fn elements(package: &Package, tensor: usize) -> Vec<f32> {
    let info = &package.weights.tensors[tensor];
    let bytes = package.weights.bytes(tensor);
    let element = |i| read_element(bytes, info.dtype, i);
    (0..info.numel).map(element).collect()
}

fn every_entry(package: &Package, tensor: usize, values: Vec<f32>, originals: Vec<f32>) -> Patch {
    // A tensor has fewer than 2^32 elements.
    let indices = (0..=u32::MAX).take(values.len()).collect();
    Patch::at(package, tensor, indices, values, originals)
}

/// A tensor's entries in the layout of a place. It does not use the positions of patches, since it must
/// detect mistakes in them.
fn in_graph_order<'a>(info: &TensorInfo, values: &'a [f32], transposed: bool) -> Cow<'a, [f32]> {
    match (transposed, info.shape.as_slice()) {
        (true, [_, columns]) if !values.is_empty() => {
            let column = |start| values[start..].iter().step_by(*columns).copied();
            (0..*columns).flat_map(column).collect()
        }
        (_, _) => values.into(),
    }
}

/// Batches of growing size, since a few windows show most effects.
fn growing<T>(mut windows: &[T]) -> impl Iterator<Item = &[T]> {
    let mut taken = 0_usize;
    std::iter::from_fn(move || {
        let (next, rest) = windows.split_at(taken.max(1).min(windows.len()));
        windows = rest;
        taken += next.len();
        (!next.is_empty()).then_some(next)
    })
}

fn short(windows: &[Window]) -> Plan {
    Plan::excerpt(PROBE, windows)
}

fn broken(failure: Failure) -> EngineError {
    EngineError::new(Detail::WarmFailed, format!("probe: {}", failure.message))
}
