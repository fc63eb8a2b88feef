//! Warm-up: the proofs that a session computes what it must, before anybody relies on a score.
//! Its loss is finite and repeats bit for bit, the known answer is met, and every trainable tensor
//! moves the loss when it is patched and leaves no trace when it is restored.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Engine, EngineError, Patch, failure, graph_bytes};
use crate::failure::{Code, Failure};
use crate::lifecycle::Detail;
use crate::package::plan::Plan;
use crate::package::weights::{read_element, round_to};
use crate::package::{Package, PackageError};
use crate::score;

/// What a warm-up measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warm {
    /// Loss on all windows with an empty nonce.
    pub baseline_loss: f64,
    /// How many windows that were.
    pub windows: usize,
    /// What one pass over them took.
    pub pass: std::time::Duration,
}

/// Losses that were proven to repeat, kept for the audit.
#[derive(Debug)]
pub(super) struct Proven {
    plan: Plan,
    losses: Arc<Vec<f64>>,
}

impl Engine {
    /// Proves the session: the baseline is finite and repeats bit for bit, the canary is met, and
    /// every trainable tensor moves the loss when it is patched and leaves no trace when restored.
    ///
    /// # Errors
    /// The first proof that fails.
    pub fn warm(&mut self) -> Result<Warm, EngineError> {
        let warm = self.prove();
        let over = self.progress.counter.load(Ordering::Relaxed);
        self.progress.warm_from.store(over, Ordering::Relaxed);
        self.progress.warm_until.store(over, Ordering::Relaxed);
        warm
    }

    /// Says how much there is to do: three passes, and one window for each place and before them.
    fn announce(&self, plan: &Plan, batch: usize) {
        let package = &self.package;
        let trainable = self.slots.iter().filter(|slot| {
            let name = &package.weights.tensors[slot.tensor].name;
            package.manifest.is_trainable(name)
        });
        let pass = plan.windows.len().div_ceil(batch);
        let all = u64::try_from(3 * pass + 1 + trainable.count()).unwrap_or(u64::MAX);
        let from = self.progress.counter.load(Ordering::Relaxed);
        self.progress.warm_from.store(from, Ordering::Relaxed);
        self.progress
            .warm_until
            .store(from + all, Ordering::Relaxed);
    }

    fn prove(&mut self) -> Result<Warm, EngineError> {
        let failed = |f: &Failure| {
            let detail = if f.code == Code::OutOfMemory {
                Detail::OutOfMemory
            } else {
                Detail::WarmFailed
            };
            EngineError::new(detail, f.message.clone())
        };
        self.baselines.clear();
        self.proven = None;
        self.progress.slowest_ms.store(0, Ordering::Relaxed);
        let plan = Plan::new(&self.package.shards, None, "", self.package.cut())
            .map_err(|f| failed(&f))?;
        let batch = self.batch_of(&plan);
        self.announce(&plan, batch);
        let first = self.baseline(&plan, batch).map_err(|f| failed(&f))?;
        let began = std::time::Instant::now();
        let again = self.losses(&plan, batch).map_err(|f| failed(&f))?;
        let pass = began.elapsed();
        if !same_bits(&first, &again) {
            let message = "two runs of the same windows gave different losses; the provider is not deterministic";
            return Err(EngineError::new(Detail::WarmFailed, message));
        }
        let baseline_loss = score::mean(&first);
        self.check_canary(baseline_loss)?;
        self.probe(&plan, &again)?;
        let windows = first.len();
        self.proven = Some(Proven {
            plan,
            losses: first,
        });
        Ok(Warm {
            baseline_loss,
            windows,
            pass,
        })
    }

    fn check_canary(&self, baseline_loss: f64) -> Result<(), EngineError> {
        let Some(canary) = self.package.manifest.canary else {
            return Ok(());
        };
        if (baseline_loss - canary.loss).abs() <= canary.tolerance {
            return Ok(());
        }
        let message = format!(
            "canary: the package says loss {} +- {}, this worker measures {baseline_loss}",
            canary.loss, canary.tolerance
        );
        Err(EngineError::new(Detail::CanaryMismatch, message))
    }

    /// Patches each place of each trainable tensor by itself until the first window's loss moves:
    /// a tensor that lives in two places must be seen in both.
    fn probe(&mut self, plan: &Plan, baseline: &[f64]) -> Result<(), EngineError> {
        let broken =
            |f: &Failure| EngineError::new(Detail::WarmFailed, format!("probe: {}", f.message));
        let short = Plan {
            hash: [0; 32],
            windows: plan.windows[..1].to_vec(),
        };
        let still = self
            .losses(&short, self.batch_of(&short))
            .map_err(|f| broken(&f))?;
        for slot in 0..self.slots.len() {
            let package = Arc::clone(&self.package);
            let tensor = self.slots[slot].tensor;
            let name = &package.weights.tensors[tensor].name;
            if package.manifest.is_trainable(name)
                && !self.moves(slot, &short, &still).map_err(|f| broken(&f))?
            {
                let place = &self.slots[slot].place;
                let message = format!(
                    "probe: patching {name} in {place} does not move the loss; the package places it wrongly, \
                     or it has no effect and belongs out of trainable"
                );
                return Err(EngineError::new(Detail::WarmFailed, message));
            }
        }
        self.compare_weights()?;
        let restored = self.losses(plan, self.batch_of(plan));
        if same_bits(&restored.map_err(|f| broken(&f))?, baseline) {
            return Ok(());
        }
        let message = "the loss is not what it was before the probe";
        Err(EngineError::new(Detail::RestoreMismatch, message))
    }

    /// Whether the loss moves when one place is patched, by a hundredth, a tenth or all of what its
    /// weights are; restored in every case.
    fn moves(&mut self, slot: usize, plan: &Plan, still: &[f64]) -> Result<bool, Failure> {
        let package = Arc::clone(&self.package);
        for share in [0.01, 0.1, 1.0] {
            let patch = probe_patch(&package, self.slots[slot].tensor, share);
            let written = self.write_place(slot, &patch, &patch.values);
            let written = written.map_err(|e| failure(&e));
            let losses = written.and_then(|()| self.losses(plan, self.batch_of(plan)));
            self.restore(std::slice::from_ref(&patch))?;
            if !same_bits(&losses?, still) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Looks whether package, weights and losses are still what the last warm-up proved.
    ///
    /// # Errors
    /// `package_changed` naming the file, `restore_mismatch` naming the tensor, or
    /// `canary_mismatch` when the weights are the same and their losses are not.
    pub fn audit(&mut self) -> Result<(), EngineError> {
        let changed = |e: PackageError| EngineError::new(Detail::PackageChanged, e.to_string());
        self.package.verify().map_err(changed)?;
        self.compare_weights()?;
        let Some(proven) = self.proven.take() else {
            return Ok(());
        };
        let now = self.losses(&proven.plan, self.batch_of(&proven.plan));
        let same = now.map(|now| same_bits(&now, &proven.losses));
        self.proven = Some(proven);
        match same {
            Ok(true) => Ok(()),
            Ok(false) => {
                let message = "the same weights and windows give other losses than at the warm-up";
                Err(EngineError::new(Detail::CanaryMismatch, message))
            }
            Err(failure) => Err(EngineError::new(Detail::WarmFailed, failure.message)),
        }
    }

    /// Compares every scratch weight with the baseline, byte for byte.
    ///
    /// # Errors
    /// `restore_mismatch`, naming the tensor.
    pub fn compare_weights(&mut self) -> Result<(), EngineError> {
        for slot in &self.slots {
            let bytes = graph_bytes(&self.package, slot.tensor, slot.transposed);
            let same = self.session.equals(slot.weight, &bytes);
            if !same.map_err(|e| EngineError::from_session(&e, Detail::RestoreMismatch))? {
                let message = format!(
                    "{} differs from the baseline after restoring",
                    self.package.weights.tensors[slot.tensor].name
                );
                return Err(EngineError::new(Detail::RestoreMismatch, message));
            }
        }
        Ok(())
    }
}

fn same_bits(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Every entry moves by `share` of the tensor's root mean square, signs fixed but irregular: a
/// regular shift could cancel in a softmax or a norm, and a few entries could miss the window.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a perturbation need not be exact"
)]
fn probe_patch(package: &Package, tensor: usize, share: f32) -> Patch {
    let info = &package.weights.tensors[tensor];
    let bytes = package.weights.bytes(tensor);
    let element = |i: usize| read_element(bytes, info.dtype, i);
    let squares: f64 = (0..info.numel).map(|i| f64::from(element(i)).powi(2)).sum();
    let rms = (squares / info.numel.max(1) as f64).sqrt() as f32;
    let step = share * rms.max(1e-2);
    let indices: Vec<u32> = (0..info.numel as u32).collect();
    let sign = |i: u32| {
        if (i.wrapping_mul(0x9E37_79B9) >> 16)
            .count_ones()
            .is_multiple_of(2)
        {
            step
        } else {
            -step
        }
    };
    let originals: Vec<f32> = (0..info.numel).map(element).collect();
    let moved = indices.iter().zip(&originals);
    let values = moved
        .map(|(i, old)| round_to(info.dtype, old + sign(*i)))
        .collect();
    Patch::at(package, tensor, indices, values, originals)
}
