//! Warm-up: the proofs that a session computes what it must, before anybody relies on a score.
//! Its loss is finite and repeats bit for bit, the known answer is met, and every trainable tensor
//! moves the loss when it is patched and leaves no trace when it is restored.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::load::graph_bytes;
use super::{Engine, EngineError};
use crate::engine::statistics;
use crate::model::manifest::PackageError;
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::state::Detail;

/// What a warm-up measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Warm {
    /// Loss on all windows with an empty nonce.
    pub baseline_loss: f64,
    /// Names them.
    pub plan: [u8; 32],
    /// How many windows that were.
    pub windows: usize,
    /// What one pass over them took.
    pub pass: Duration,
    /// Tensors of which a place moved the loss at no point that was tried, though a way leads from
    /// there to it: sound as a rule, and worth a look.
    pub inert: Vec<String>,
}

/// Tensors without effect that are told by their names.
const INERT_NAMED: usize = 32;

impl Warm {
    /// Those of the tensors without effect that records and reports name.
    pub fn named_inert(&self) -> &[String] {
        &self.inert[..self.inert.len().min(INERT_NAMED)]
    }

    /// In words, which tensors have no effect, if there are any.
    pub fn inert_in_words(&self) -> Option<String> {
        let named = self.named_inert();
        let more = match self.inert.len() - named.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let names = || {
            format!(
                "no effect on the loss was seen of {}{more}",
                named.join(", ")
            )
        };
        (!named.is_empty()).then(names)
    }
}

/// Losses that were proven to repeat, kept for the audit.
#[derive(Debug)]
pub(super) struct Proven {
    plan: Plan,
    losses: Arc<Vec<f64>>,
}

impl Engine {
    /// Proves the session: the baseline is finite and repeats bit for bit, the canary is met, and
    /// every trainable tensor moves the loss when it is patched, or is known to have no effect, and
    /// leaves no trace when restored.
    ///
    /// # Errors
    /// The first proof that fails.
    pub fn warm(&mut self) -> Result<Warm, EngineError> {
        let _busy = self.progress.begin_proof();
        let warm = self.prove();
        if warm.is_ok() {
            self.progress.settle_pace();
        }
        let over = self.progress.counter.load(Ordering::Relaxed);
        self.progress.warm_from.store(over, Ordering::Relaxed);
        self.progress.warm_until.store(over, Ordering::Relaxed);
        warm
    }

    /// Says how much there is to do: three passes, and one window for each place and before them.
    /// The probe says what comes on top.
    fn announce(&self, plan: &Plan, batch: usize) {
        let pass = plan.windows.len().div_ceil(batch);
        let all = u64::try_from(3 * pass + 1 + self.probed().len()).unwrap_or(u64::MAX);
        let from = self.progress.counter.load(Ordering::Relaxed);
        self.progress.warm_from.store(from, Ordering::Relaxed);
        self.progress
            .warm_until
            .store(from + all, Ordering::Relaxed);
    }

    fn prove(&mut self) -> Result<Warm, EngineError> {
        self.baselines.clear();
        self.proven = None;
        let plan = Plan::new(&self.package.shards, None, "", self.package.cut());
        let plan = plan.map_err(|f| failed(&f))?;
        self.announce(&plan, self.batch_of(&plan));
        let (first, pass) = self.measured_twice(&plan)?;
        let baseline_loss = statistics::mean(&first);
        self.check_canary(baseline_loss)?;
        let inert = self.probe(&plan, &first)?;
        let (hash, windows) = (plan.hash, first.len());
        self.proven = Some(Proven {
            plan,
            losses: first,
        });
        Ok(Warm {
            baseline_loss,
            plan: hash,
            windows,
            pass,
            inert,
        })
    }

    /// The losses of the unchanged model, seen twice, and what the second pass took.
    pub(super) fn measured_twice(
        &mut self,
        plan: &Plan,
    ) -> Result<(Arc<Vec<f64>>, Duration), EngineError> {
        let batch = self.batch_of(plan);
        let first = self.baseline(plan, batch).map_err(|f| failed(&f))?;
        let began = std::time::Instant::now();
        let again = self.losses(plan, batch).map_err(|f| failed(&f))?;
        if same_bits(&first, &again) {
            return Ok((first, began.elapsed()));
        }
        let message = "two runs of the same windows gave different losses: the graph draws random numbers \
                       (export it in evaluation mode), or the provider is not deterministic";
        Err(EngineError::new(Detail::WarmFailed, message))
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

    /// Looks whether package, weights and losses are still what the last warm-up proved.
    ///
    /// # Errors
    /// `package_changed` naming the file, `restore_mismatch` naming the tensor, or
    /// `canary_mismatch` when the weights are the same and their losses are not.
    pub fn audit(&mut self) -> Result<(), EngineError> {
        let changed = |e: PackageError| EngineError::new(Detail::PackageChanged, e.to_string());
        self.package.verify().map_err(changed)?;
        // From here on it is the device that is waited for.
        let _busy = self.progress.begin_proof();
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
            self.progress.moved();
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

fn failed(failure: &Failure) -> EngineError {
    let detail = if failure.code == Code::OutOfMemory {
        Detail::OutOfMemory
    } else {
        Detail::WarmFailed
    };
    EngineError::new(detail, failure.message.clone())
}

pub(super) fn same_bits(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
