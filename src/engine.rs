//! The engine: one session, one baseline, one scratch copy. A candidate's new values are computed
//! and checked on the host, written as absolute values, measured, and restored by copying; the
//! scratch equals the baseline before and after every call, whatever happened in between.

pub mod graph;
pub mod session;
#[cfg(test)]
mod tests;
pub mod thread;
mod warmup;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use half::{bf16, f16};

use crate::candidate::{TensorUpdate, Update};
use crate::config::EngineConfig;
use crate::failure::{Code, Failure};
use crate::job::Rule;
use crate::lifecycle::Detail;
use crate::package::plan::{Plan, Window};
use crate::package::weights::{TensorInfo, Weights, round_to, transpose};
use crate::package::{Dtype, Objective, Package, Place};
use crate::score::{self, Paired};
use graph::Graph;
use session::{Session, SessionError, Terminator, WeightSpec};
use warmup::Proven;
pub use warmup::Warm;

/// Baselines kept; a fresh nonce for every job must not grow the process.
const BASELINES: usize = 64;

/// What the computing thread tells about itself; everybody else only reads.
#[derive(Debug, Default)]
pub struct Progress {
    /// Micro-batches done since the start.
    pub counter: AtomicU64,
    /// When the last one was done, unix milliseconds.
    pub at_ms: AtomicU64,
    /// When the computation going on began, unix milliseconds; 0 = idle.
    pub busy_since_ms: AtomicU64,
    /// The slowest micro-batch since the last warm-up began, milliseconds.
    pub slowest_ms: AtomicU64,
    /// Baselines kept.
    pub baselines: AtomicU64,
    /// Time the computing thread has worked, microseconds.
    pub worked_us: AtomicU64,
}

impl Progress {
    fn step(&self) {
        self.counter.fetch_add(1, Ordering::Relaxed);
        self.at_ms.store(crate::clock::unix_ms(), Ordering::Relaxed);
    }
}

/// Why a model cannot be served: the word for the heartbeat and the sentence for a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    /// The `state_detail`.
    pub detail: Detail,
    /// What is wrong and what to do.
    pub message: String,
}

impl EngineError {
    /// Puts the two together.
    pub fn new(detail: Detail, message: impl Into<String>) -> Self {
        Self {
            detail,
            message: message.into(),
        }
    }

    fn from_session(error: &SessionError, otherwise: Detail) -> Self {
        let detail = match error {
            SessionError::Unavailable(_) => Detail::EpUnavailable,
            SessionError::OutOfMemory(_) => Detail::OutOfMemory,
            SessionError::Model(_) | SessionError::Terminated | SessionError::Other(_) => otherwise,
        };
        Self::new(detail, error.to_string())
    }
}

/// Milliseconds spent in each stage of an evaluation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StageTimes {
    /// Computing and writing the new values.
    pub apply: f64,
    /// Running the model, the baseline's pass included where it was needed.
    pub forward: f64,
    /// Copying the baseline back.
    pub restore: f64,
}

/// A candidate's effect.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Losses before and after, and what to make of them.
    pub paired: Paired,
    /// Entries whose weight really changed after rounding.
    pub effective_entries: u64,
    /// Where the time went.
    pub times: StageTimes,
}

/// How a session holds the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// As inputs, to be patched.
    Inputs,
    /// As constants.
    Constants,
}

/// One weight of the graph and the checkpoint tensor it holds.
#[derive(Debug)]
struct Slot {
    tensor: usize,
    weight: usize,
    place: String,
    transposed: bool,
}

/// The new values of one tensor, checked, not yet written, and what the baseline has in their
/// place: read once, so that restoring need not look for it all over memory again.
struct Patch {
    tensor: usize,
    indices: Vec<u32>,
    values: Vec<f32>,
    originals: Vec<f32>,
}

/// A loaded model.
#[derive(Debug)]
pub struct Engine {
    /// What it was made of.
    pub package: Arc<Package>,
    session: Session,
    slots: Vec<Slot>,
    micro_batch: usize,
    fixed_batch: bool,
    ignore_index: i64,
    /// By plan and micro-batch: the bits of a loss depend on both.
    baselines: HashMap<([u8; 32], usize), Arc<Vec<f64>>>,
    /// What the last warm-up proved.
    proven: Option<Proven>,
    /// False once the weights could not be restored: no score may be taken any more.
    sound: bool,
    progress: Arc<Progress>,
}

impl Engine {
    /// Builds the session and fills the scratch weights.
    ///
    /// # Errors
    /// What is missing or wrong, with its `state_detail`.
    pub fn load(
        package: Arc<Package>,
        config: &EngineConfig,
        progress: Arc<Progress>,
    ) -> Result<Self, EngineError> {
        Self::build(package, config, progress, Hold::Inputs)
    }

    /// The same model as a bare session that nobody can patch, to compare with.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load_bare(package: Arc<Package>, config: &EngineConfig) -> Result<Self, EngineError> {
        Self::build(package, config, Arc::default(), Hold::Constants)
    }

    fn build(
        package: Arc<Package>,
        config: &EngineConfig,
        progress: Arc<Progress>,
        hold: Hold,
    ) -> Result<Self, EngineError> {
        let broken = |message: String| EngineError::new(Detail::ModelLoadFailed, message);
        let manifest = &package.manifest;
        let graph = Graph::decode(&package.graph).map_err(|e| broken(e.to_string()))?;
        check_vocabulary(&package, &graph).map_err(broken)?;
        let fixed = check_input(&package, &graph).map_err(broken)?;
        let Objective::CausalLm { ignore_index, .. } = manifest.objective;
        let (mut slots, mut specs) = layout(&package);
        let (logits, dir) = (&manifest.outputs.logits, &package.dir);
        let prepared = match hold {
            Hold::Inputs => {
                let names: Vec<&str> = specs.iter().map(|s| s.input.as_str()).collect();
                graph.prepare(&names, logits, dir)
            }
            Hold::Constants => {
                slots.clear();
                let specs = std::mem::take(&mut specs);
                graph.with_constants(
                    specs.iter().map(WeightSpec::constant).collect(),
                    logits,
                    dir,
                )
            }
        };
        let prepared = prepared.map_err(|e| broken(e.to_string()))?;
        let session = Session::new(config, &prepared, &manifest.inputs.tokens, specs)
            .map_err(|e| EngineError::from_session(&e, Detail::ModelLoadFailed))?;
        Ok(Self {
            session,
            slots,
            micro_batch: fixed.unwrap_or(config.micro_batch),
            fixed_batch: fixed.is_some(),
            ignore_index,
            baselines: HashMap::new(),
            proven: None,
            sound: true,
            progress,
            package,
        })
    }

    /// What is done from now on can be ended by this terminator.
    pub fn obey(&mut self, terminator: Terminator) {
        self.session.terminator = terminator;
    }

    /// Adds to the time worked.
    fn worked(&self, time: std::time::Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.progress.worked_us.fetch_add(micros, Ordering::Relaxed);
    }

    /// Whether the scratch weights are known to equal the baseline.
    pub fn is_sound(&self) -> bool {
        self.sound
    }

    /// The per-window losses of the unchanged model.
    ///
    /// # Errors
    /// When the model does not run or a loss is not finite.
    pub fn validate(&mut self, plan: &Plan) -> Result<Arc<Vec<f64>>, Failure> {
        self.while_memory_lasts(plan, |engine, batch| engine.baseline(plan, batch))
    }

    /// Measures a candidate and leaves the weights as they were.
    ///
    /// # Errors
    /// A typed refusal; the weights are restored then too.
    pub fn score(
        &mut self,
        update: &Update,
        rule: Rule,
        plan: &Plan,
    ) -> Result<Evaluation, Failure> {
        self.while_memory_lasts(plan, |engine, batch| {
            engine.evaluate(update, rule, plan, batch)
        })
    }

    /// Tries again with half the micro-batch when memory runs out, down to one window. Only for
    /// this job: the bits of the next one's score must not depend on what ran before it.
    fn while_memory_lasts<T>(
        &mut self,
        plan: &Plan,
        mut work: impl FnMut(&mut Self, usize) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut batch = self.batch_of(plan);
        loop {
            match work(self, batch) {
                Err(failure)
                    if failure.code == Code::OutOfMemory
                        && batch > 1
                        && !self.fixed_batch
                        && self.sound =>
                {
                    batch /= 2;
                    tracing::warn!(%failure, micro_batch = batch, "out of memory; trying this job again with fewer windows at a time");
                }
                done => return done,
            }
        }
    }

    /// The windows of a plan that run at once, where memory suffices.
    fn batch_of(&self, plan: &Plan) -> usize {
        if self.fixed_batch {
            self.micro_batch
        } else {
            self.micro_batch.min(plan.windows.len())
        }
    }

    /// The per-window losses of the unchanged model, computed once per plan and micro-batch.
    fn baseline(&mut self, plan: &Plan, batch: usize) -> Result<Arc<Vec<f64>>, Failure> {
        if let Some(known) = self.baselines.get(&(plan.hash, batch)) {
            return Ok(Arc::clone(known));
        }
        let losses = Arc::new(self.losses(plan, batch)?);
        if losses.iter().any(|l| !l.is_finite()) {
            let message = "the current model's own loss is not finite on these windows";
            return Err(Failure::new(Code::InferenceFailed, message));
        }
        if self.baselines.len() >= BASELINES {
            self.baselines.clear();
        }
        self.baselines
            .insert((plan.hash, batch), Arc::clone(&losses));
        self.progress
            .baselines
            .store(self.baselines.len() as u64, Ordering::Relaxed);
        Ok(losses)
    }

    fn evaluate(
        &mut self,
        update: &Update,
        rule: Rule,
        plan: &Plan,
        batch: usize,
    ) -> Result<Evaluation, Failure> {
        let began = Instant::now();
        let before = self.baseline(plan, batch)?;
        let baseline_ms = millis(began);
        let began = Instant::now();
        let (patches, effective_entries) = self.patches(update, rule)?;
        let written = patches.iter().try_for_each(|patch| self.write(patch));
        let apply = millis(began);
        let began = Instant::now();
        let after = written
            .map_err(|e| failure(&e))
            .and_then(|()| self.losses(plan, batch));
        let forward = millis(began) + baseline_ms;
        let began = Instant::now();
        self.restore(&patches)?;
        let times = StageTimes {
            apply,
            forward,
            restore: millis(began),
        };
        let after = after?;
        if let Some(window) = after.iter().position(|l| !l.is_finite()) {
            let message = format!("the candidate makes the loss of window {window} non-finite");
            return Err(Failure::new(Code::NonFiniteLoss, message));
        }
        Ok(Evaluation {
            paired: score::paired(&before, &after),
            effective_entries,
            times,
        })
    }

    /// Computes the new values; also how many differ from the old ones.
    fn patches(&self, update: &Update, rule: Rule) -> Result<(Vec<Patch>, u64), Failure> {
        let mut effective = 0;
        let mut patches = Vec::with_capacity(update.tensors.len());
        for touched in &update.tensors {
            let patch = patch(&self.package.weights, touched, rule)?;
            let pairs = patch.values.iter().zip(&patch.originals);
            let changed = pairs.filter(|(new, old)| new.to_bits() != old.to_bits());
            effective += changed.count() as u64;
            patches.push(patch);
        }
        Ok((patches, effective))
    }

    /// Writes into every place of the tensor.
    fn write(&mut self, patch: &Patch) -> Result<(), SessionError> {
        self.write_all(patch, &patch.values)
    }

    fn write_all(&mut self, patch: &Patch, values: &[f32]) -> Result<(), SessionError> {
        for slot in 0..self.slots.len() {
            if self.slots[slot].tensor == patch.tensor {
                self.write_place(slot, patch, values)?;
            }
        }
        Ok(())
    }

    fn write_place(
        &mut self,
        slot: usize,
        patch: &Patch,
        values: &[f32],
    ) -> Result<(), SessionError> {
        let slot = &self.slots[slot];
        if !slot.transposed {
            return self.session.write(slot.weight, &patch.indices, values);
        }
        let info = &self.package.weights.tensors[patch.tensor];
        let positions = transposed_positions(&patch.indices, info);
        self.session.write(slot.weight, &positions, values)
    }

    /// Copies the baseline back, never subtracts. Unless all of it succeeds the engine is unsound.
    fn restore(&mut self, patches: &[Patch]) -> Result<(), Failure> {
        self.sound = false;
        for patch in patches {
            // Whatever the device says, it says nothing about the candidate.
            self.write_all(patch, &patch.originals).map_err(|e| {
                Failure::new(Code::InferenceFailed, format!("weights not restored: {e}"))
            })?;
        }
        self.sound = true;
        Ok(())
    }

    /// The per-window losses as the weights are now: one pass, nothing cached.
    ///
    /// # Errors
    /// When the model does not run.
    pub fn pass(&mut self, plan: &Plan) -> Result<Vec<f64>, Failure> {
        self.losses(plan, self.batch_of(plan))
    }

    fn losses(&mut self, plan: &Plan, batch: usize) -> Result<Vec<f64>, Failure> {
        self.progress
            .busy_since_ms
            .store(crate::clock::unix_ms(), Ordering::Relaxed);
        let losses = plan
            .windows
            .chunks(batch)
            .map(|windows| self.micro_batch_losses(windows, plan))
            .collect::<Result<Vec<_>, _>>();
        self.progress.busy_since_ms.store(0, Ordering::Relaxed);
        Ok(losses?.concat())
    }

    fn micro_batch_losses(&mut self, windows: &[Window], plan: &Plan) -> Result<Vec<f64>, Failure> {
        let began = Instant::now();
        let (length, shift) = (plan.cut.window, plan.cut.label_shift);
        // A graph with a fixed batch gets its last batch filled up; the surplus is not looked at.
        let batch = if self.fixed_batch {
            self.micro_batch
        } else {
            windows.len()
        };
        let filled = windows.iter().cycle().take(batch);
        let mut tokens = Vec::with_capacity(batch * length);
        let mut labels = Vec::with_capacity(batch * length);
        for window in filled {
            tokens.extend(window.chunk[..length].iter().map(|t| i64::from(*t)));
            let targets = window.chunk[shift..]
                .iter()
                .map(|t| i64::from(*t))
                .map(|t| if t == self.ignore_index { 0 } else { t });
            labels.extend(targets.chain(std::iter::repeat(0)).take(length));
        }
        let log_probs = self
            .session
            .log_probs(tokens, labels, batch)
            .map_err(|e| failure(&e))?;
        if log_probs.len() != batch * length {
            let message = format!(
                "the graph gave {} log-probabilities for {} targets",
                log_probs.len(),
                batch * length
            );
            return Err(Failure::new(Code::InferenceFailed, message));
        }
        self.progress.step();
        self.progress
            .slowest_ms
            .fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
        let rows = log_probs.chunks_exact(length);
        Ok(windows
            .iter()
            .zip(rows)
            .map(|(window, row)| self.window_loss(window, row, shift))
            .collect())
    }

    /// Mean negative log-likelihood over the targets that count.
    #[expect(
        clippy::cast_precision_loss,
        reason = "target counts are far below 2^52"
    )]
    fn window_loss(&self, window: &Window, log_probs: &[f32], shift: usize) -> f64 {
        let targets = window.chunk[shift..].iter().zip(log_probs);
        let counted = targets.filter(|(target, _)| i64::from(**target) != self.ignore_index);
        let (sum, count) = counted.fold((0.0, 0_u64), |(sum, n), (_, p)| {
            (sum - f64::from(*p), n + 1)
        });
        sum / count as f64
    }
}

/// f32 arithmetic on the baseline, rounded once to the weight's type.
fn patch(weights: &Weights, touched: &TensorUpdate, rule: Rule) -> Result<Patch, Failure> {
    let info = &weights.tensors[touched.tensor];
    let bytes = weights.bytes(info);
    let f16_of = |b: [u8; 2]| f16::from_le_bytes(b).to_f32();
    let bf16_of = |b: [u8; 2]| bf16::from_le_bytes(b).to_f32();
    let round = |value| round_to(info.dtype, value);
    let (values, originals) = match info.dtype {
        Dtype::F32 => stepped(
            bytes.as_chunks().0,
            f32::from_le_bytes,
            |v| v,
            touched,
            rule,
        ),
        Dtype::F16 => stepped(bytes.as_chunks().0, f16_of, round, touched, rule),
        Dtype::Bf16 => stepped(bytes.as_chunks().0, bf16_of, round, touched, rule),
    };
    let indices: Vec<u32> = touched.entries.iter().map(|(index, _)| *index).collect();
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        let (name, index) = (&info.name, indices[at]);
        let message = format!("{name}: the updated weight at index {index} is not finite");
        return Err(Failure::new(Code::CandidateNonFinite, message).with("tensor", name.clone()));
    }
    Ok(Patch {
        tensor: touched.tensor,
        indices,
        values,
        originals,
    })
}

/// New values and old ones; the compiler makes a loop of its own for each type.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the contract computes the update in f32"
)]
fn stepped<const N: usize>(
    weights: &[[u8; N]],
    widen: impl Fn([u8; N]) -> f32,
    round: impl Fn(f32) -> f32,
    touched: &TensorUpdate,
    rule: Rule,
) -> (Vec<f32>, Vec<f32>) {
    // No decoder lets such an index through; if one did, it would not be finite.
    let old = |index: u32| weights.get(index as usize).map_or(f32::NAN, |b| widen(*b));
    let entries = touched.entries.iter();
    match rule {
        Rule::Gradient { learning_rate } => {
            let rate = learning_rate as f32;
            entries
                .map(|(index, value)| (round(old(*index) - rate * value), old(*index)))
                .unzip()
        }
        Rule::ParamDiff => entries
            .map(|(index, value)| (round(old(*index) + value), old(*index)))
            .unzip(),
    }
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn failure(error: &SessionError) -> Failure {
    let code = match error {
        SessionError::OutOfMemory(_) => Code::OutOfMemory,
        SessionError::Terminated => Code::ScoreTimeout,
        SessionError::Unavailable(_) | SessionError::Model(_) | SessionError::Other(_) => {
            Code::InferenceFailed
        }
    };
    Failure::new(code, error.to_string())
}

fn layout(package: &Package) -> (Vec<Slot>, Vec<WeightSpec<'_>>) {
    let mut slots = Vec::new();
    let mut specs = Vec::new();
    for (tensor, info) in package.weights.tensors.iter().enumerate() {
        let places: &[Place] = package
            .manifest
            .tensors
            .get(&info.name)
            .map_or(&[], |entry| &entry.places);
        for place in places {
            slots.push(Slot {
                tensor,
                weight: specs.len(),
                place: place.initializer.clone(),
                transposed: place.transposed,
            });
            let mut shape: Vec<i64> = info
                .shape
                .iter()
                .filter_map(|d| i64::try_from(*d).ok())
                .collect();
            if place.transposed {
                shape.reverse();
            }
            specs.push(WeightSpec {
                input: place.initializer.clone(),
                shape,
                dtype: info.dtype,
                bytes: graph_bytes(package, info, place.transposed),
            });
        }
    }
    (slots, specs)
}

fn graph_bytes<'a>(
    package: &'a Package,
    info: &TensorInfo,
    transposed: bool,
) -> std::borrow::Cow<'a, [u8]> {
    let bytes = package.weights.bytes(info);
    match (transposed, info.shape.as_slice()) {
        (true, [rows, columns]) => transpose(bytes, *rows, *columns, info.dtype.size()).into(),
        (_, _) => bytes.into(),
    }
}

/// Index i = (row, column) of the checkpoint lives at (column, row) of a transposed place.
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

fn check_vocabulary(package: &Package, graph: &Graph) -> Result<(), String> {
    let Objective::CausalLm { ignore_index, .. } = package.manifest.objective;
    let logits = &package.manifest.outputs.logits;
    let Some(vocabulary) = graph.last_dimension(logits) else {
        return Err(format!(
            "graph: the last dimension of output {logits} (the vocabulary) must be fixed"
        ));
    };
    for shard in &package.shards {
        let legal = |t: &i32| {
            usize::try_from(*t).is_ok_and(|t| t < vocabulary) || i64::from(*t) == ignore_index
        };
        if let Some(token) = shard.tokens.iter().find(|t| !legal(t)) {
            return Err(format!(
                "shard {}: token {token} is outside the vocabulary of {vocabulary}",
                shard.id
            ));
        }
    }
    Ok(())
}

/// The batch size the graph is fixed to, if it is.
fn check_input(package: &Package, graph: &Graph) -> Result<Option<usize>, String> {
    let name = &package.manifest.inputs.tokens;
    let Some(shape) = graph.input_shape(name) else {
        return Err(format!(
            "graph: has no input {name}; it has {:?}",
            graph.inputs()
        ));
    };
    let window = package.cut().window;
    match shape.as_slice() {
        [batch, None] => Ok(*batch),
        [batch, Some(seq)] if *seq == window => Ok(*batch),
        [_, Some(seq)] => Err(format!(
            "graph: input {name} takes {seq} tokens, the window has {window}"
        )),
        other => Err(format!(
            "graph: input {name} has {} dimensions, [batch, seq] is needed",
            other.len()
        )),
    }
}
