//! Warm-up: proves that a session computes correctly before it scores. Its loss is finite and repeats
//! bit for bit, it meets the canary, and every trainable tensor changes the loss when patched and leaves
//! no trace when restored.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::load::graph_bytes;
use super::session::Entries;
use super::{Engine, EngineError};
use crate::config::{EngineConfig, Provider};
use crate::engine::statistics;
use crate::model::manifest::PackageError;
use crate::model::plan::{Plan, Window};
use crate::model::tensor::Dtype;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::state::Detail;

/// The measurements of a warm-up.
#[derive(Debug, Clone, PartialEq)]
pub struct Warm {
    /// Loss on all windows with an empty nonce.
    pub baseline_loss: f64,
    /// Hash of the plan of these windows.
    pub plan: [u8; 32],
    /// The number of windows.
    pub windows: usize,
    /// The duration of one pass over them.
    pub pass: Duration,
    /// Tensors that never changed the loss in some place of the graph, although the graph leads from there
    /// to the loss. Usually harmless, but worth checking.
    pub inert: Vec<String>,
}

/// The most tensors without effect that are named.
const INERT_NAMED: usize = 32;

/// The most that a window's loss may change with its place or with the provider, relative to the loss and 1.
/// It is the order of additions that changes.
const ALIKE: f64 = 1e-4;
/// The same for weights of 16 bits.
const ALIKE_IN_HALF: f64 = 1e-2;

impl Warm {
    /// The tensors without effect that records and reports name.
    pub fn named_inert(&self) -> &[String] {
        &self.inert[..self.inert.len().min(INERT_NAMED)]
    }

    /// A message that names the tensors without effect, if there are any.
    pub fn inert_in_words(&self) -> Option<String> {
        let named = self.named_inert();
        let names = format!("no effect on the loss was seen of {}", named.join(", "));
        match (named.len(), self.inert.len() - named.len()) {
            (0, _) => None,
            (_, 0) => Some(names),
            (_, more) => Some(format!("{names} and {more} more")),
        }
    }
}

/// Losses that repeated bit for bit, kept for the audit.
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

    /// Announces the amount of work: three passes, one window before the probe and one per probed place, and
    /// three for the checks of a device that may drop values.
    /// The probe announces what it needs beyond that.
    fn announce(&self, plan: &Plan, batch: usize) {
        let pass = plan.windows.len().div_ceil(batch);
        let runs = 3 * pass + 1 + self.probed().len() + 3 * usize::from(self.session.may_drop());
        let all = u64::try_from(runs).unwrap_or(u64::MAX);
        let from = self.progress.counter.load(Ordering::Relaxed);
        self.progress.warm_from.store(from, Ordering::Relaxed);
        self.progress
            .warm_until
            .store(from + all, Ordering::Relaxed);
    }

    fn prove(&mut self) -> Result<Warm, EngineError> {
        self.session.forget_activations(None);
        self.baselines.clear();
        self.proven = None;
        let plan = Plan::new(&self.package.shards, None, "", self.package.cut());
        let plan = plan.map_err(failed)?;
        self.announce(&plan, self.batch_of(&plan));
        let (first, pass) = self.measured_twice(&plan)?;
        let baseline_loss = statistics::mean(&first);
        self.check_canary(baseline_loss)?;
        if self.session.may_drop() {
            self.check_last_place(&plan)?;
            self.compare_with_cpu(&Plan::excerpt([0; 32], &plan.windows[..1]))?;
        }
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

    /// Measures the unchanged model twice; its losses and the duration of the second pass.
    pub(super) fn measured_twice(
        &mut self,
        plan: &Plan,
    ) -> Result<(Arc<Vec<f64>>, Duration), EngineError> {
        let batch = self.batch_of(plan);
        let first = self.baseline(plan, batch).map_err(failed)?;
        let began = std::time::Instant::now();
        let again = self.losses(plan, batch, None, None).map_err(failed)?;
        if same_bits(&first, &again) {
            return Ok((first, began.elapsed()));
        }
        let message = "two runs of the same windows gave different losses: the graph draws random numbers \
                       (export it in evaluation mode), or the provider is not deterministic";
        Err(EngineError::new(Detail::WarmFailed, message))
    }

    /// Measures the window in the last place of the largest micro-batch in the first one, too. What layers
    /// make of a whole batch may be larger than the device's largest buffer; some operators then drop the end
    /// of it, without an error and the same in every run.
    fn check_last_place(&mut self, plan: &Plan) -> Result<(), EngineError> {
        let batch = self.micro_batch.largest(plan.windows.len());
        let places = plan.order.iter().take(batch);
        let windows: Vec<Window> = places.map(|at| plan.windows[*at].clone()).collect();
        let mut last_loss = |windows: &[Window]| {
            let losses = self.losses(&Plan::excerpt([0; 32], windows), batch, None, None);
            losses.map(|all| all.last().copied().unwrap_or_default())
        };
        let last = last_loss(&windows).map_err(failed)?;
        let first = last_loss(&windows[windows.len().saturating_sub(1)..]).map_err(failed)?;
        if self.are_alike(first, last) {
            return Ok(());
        }
        let message = format!(
            "a window's loss is {first} in the first place of a batch of {batch} and {last} in the last: the device or \
             its driver drops values; lower engine.micro_batch"
        );
        Err(EngineError::new(Detail::WarmFailed, message))
    }

    /// Measures a window on the device and with the provider `cpu`: what drops values gives the same wrong loss
    /// in every run. A machine on which the CPU cannot run the model only says so.
    fn compare_with_cpu(&mut self, window: &Plan) -> Result<(), EngineError> {
        self.progress.moved();
        let known = match self.loss_on_cpu(window) {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(%error, "the device could not be compared with the CPU");
                return Ok(());
            }
        };
        self.progress.moved();
        let found = statistics::mean(&self.pass(window).map_err(failed)?);
        if self.are_alike(found, known) {
            return Ok(());
        }
        let message = format!(
            "a window's loss is {known} on the CPU and {found} on the device: the device or its driver computes wrongly; \
             use another one"
        );
        Err(EngineError::new(Detail::WarmFailed, message))
    }

    fn loss_on_cpu(&self, window: &Plan) -> Result<f64, EngineError> {
        let config = EngineConfig {
            execution_provider: Provider::Cpu,
            micro_batch: 1,
            ..self.session.config().clone()
        };
        let mut cpu = Self::load(Arc::clone(&self.package), &config, Arc::default())?;
        Ok(statistics::mean(&cpu.pass(window).map_err(failed)?))
    }

    fn are_alike(&self, one: f64, other: f64) -> bool {
        let alike = match self.package.manifest.precision {
            Dtype::F32 => ALIKE,
            Dtype::F16 | Dtype::Bf16 => ALIKE_IN_HALF,
        };
        (one - other).abs() <= alike * (1.0 + one.abs())
    }

    fn check_canary(&self, baseline_loss: f64) -> Result<(), EngineError> {
        let Some(canary) = self.package.manifest.canary else {
            return Ok(());
        };
        if canary.is_met_by(baseline_loss) {
            return Ok(());
        }
        let whose = match self.package.is_updated() {
            true => "update manifest",
            false => "package",
        };
        let message = format!(
            "canary: the {whose} says loss {} +- {}, this worker measures {baseline_loss}",
            canary.loss, canary.tolerance
        );
        Err(EngineError::new(Detail::CanaryMismatch, message))
    }

    /// Checks that package, weights and losses are still those of the last warm-up.
    ///
    /// # Errors
    /// `package_changed` naming the file, `restore_mismatch` naming the tensor, or
    /// `canary_mismatch` when the weights are the same and their losses are not.
    pub fn audit(&mut self) -> Result<(), EngineError> {
        let changed = |e: PackageError| EngineError::new(Detail::PackageChanged, e.to_string());
        self.package.verify().map_err(changed)?;
        // Only from here on does the watchdog time the device.
        let _busy = self.progress.begin_proof();
        self.compare_weights()?;
        // What is kept between the parts is no older than the last audit.
        self.session.forget_activations(None);
        let Some(proven) = self.proven.take() else {
            return Ok(());
        };
        let now = self.losses(&proven.plan, self.batch_of(&proven.plan), None, None);
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
            let same = self.session.holds(slot.weight, Entries::Bytes(&bytes));
            if !same.map_err(|e| EngineError::from_session(&e, Detail::RestoreMismatch))? {
                let name = &self.package.weights.tensors[slot.tensor].name;
                let message = format!("{name} differs from the baseline after restoring");
                return Err(EngineError::new(Detail::RestoreMismatch, message));
            }
        }
        Ok(())
    }
}

fn failed(failure: Failure) -> EngineError {
    let detail = match failure.code == Code::OutOfMemory {
        true => Detail::OutOfMemory,
        false => Detail::WarmFailed,
    };
    EngineError::new(detail, failure.message)
}

pub(super) fn same_bits(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
