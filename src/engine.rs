//! The engine: one session, one baseline, one scratch copy of the weights. New values are computed and
//! checked on the host, written as absolute values, measured, and undone by copying the baseline back.
//! The scratch copy equals the baseline before and after every call, even one that failed.

mod class;
pub mod coalition;
mod load;
mod measured;
pub mod merge;
mod objective;
pub mod patch;
mod probe;
pub mod sequential;
pub mod session;
pub mod shares;
pub mod statistics;
#[cfg(test)]
pub(crate) mod tests;
pub mod thread;
pub mod trial;
mod warmup;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::config::EngineConfig;
use crate::model::onnx::Graph;
use crate::model::package::Package;
use crate::model::plan::{Plan, Window};
use crate::model::tensor::Elem;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::heartbeat::{EngineFacts, PlacementFacts};
use crate::protocol::state::Detail;
use crate::protocol::stop::{Stop, Stopped};
use crate::telemetry::progress::Progress;
use crate::util::clock::Lap;
pub use load::check;
use measured::{Measured, Watch};
use objective::Measure;
use patch::{Patch, Patches};
use sequential::SequentialTest;
use session::{
    Feed, Lookup, Partition, Pass, Placement, Reuse, Session, SessionError, Source, Terminator,
};
use statistics::Paired;
use warmup::Proven;
pub use warmup::Warm;

/// Cached baselines. Each new nonce adds one, so the cache needs a bound.
const BASELINES: usize = 64;

/// Why a model cannot be served: a code for the heartbeat and a message for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    /// The `state_detail`.
    pub detail: Detail,
    /// What is wrong and what to do.
    pub message: String,
}

impl EngineError {
    /// Creates the error.
    pub fn new(detail: Detail, message: impl Into<String>) -> Self {
        Self {
            detail,
            message: message.into(),
        }
    }

    fn from_session(error: &SessionError, otherwise: Detail) -> Self {
        let detail = match error {
            SessionError::Unavailable(_) | SessionError::NoKernel(_) => Detail::EpUnavailable,
            SessionError::OutOfMemory(_) => Detail::OutOfMemory,
            SessionError::Lost(_) => Detail::EngineLost,
            SessionError::Model(_) | SessionError::Terminated | SessionError::Other(_) => otherwise,
        };
        Self::new(detail, error.to_string())
    }
}

/// The stages of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Laps {
    /// Running the unchanged model, unless its losses were cached.
    pub baseline: Option<Lap>,
    /// Writing the new values.
    pub apply: Lap,
    /// Running the model with them.
    pub forward: Lap,
    /// Copying the baseline back.
    pub restore: Lap,
}

impl Laps {
    /// Milliseconds spent in forward passes, the baseline included.
    pub fn running(&self) -> f64 {
        self.baseline.map_or(0.0, |lap| lap.millis()) + self.forward.millis()
    }
}

/// A candidate's effect.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Losses before and after, and their statistics; of one that was stopped, of the windows that ran.
    pub paired: Paired,
    /// Windows that these are from.
    pub windows: u64,
    /// Targets counted in them.
    pub tokens: u64,
    /// How it was decided before the plan's end, if it was.
    pub stopped: Option<Stopped>,
    /// See [`sequential::gain_ratio`]; only of a plan that was measured whole.
    pub gain_ratio: Option<f64>,
    /// The first part of the graph with another weight; none if no weight differs.
    pub from: Option<usize>,
    /// Where the time went.
    pub laps: Laps,
}

impl Evaluation {
    /// Whether the whole graph ran, on all windows.
    pub fn is_whole(&self) -> bool {
        let all = self
            .stopped
            .is_none_or(|stopped| stopped.finished.is_some());
        all && self.from == Some(0)
    }
}

/// Lets an evaluation end early.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Early {
    /// What the job allows.
    pub stop: Stop,
    /// Measure the plan to its end all the same, to check the decision.
    pub finish: bool,
}

/// Makes a new session allocate four petabytes and returns its failure.
///
/// # Errors
/// When the session cannot be built, or the allocation succeeds.
pub fn exhaust(config: &EngineConfig) -> Result<Failure, EngineError> {
    let graph = crate::model::onnx::synthetic::greedy();
    let graph = Graph::decode(graph.into());
    let source = Source {
        graph: graph.map_err(|e| EngineError::new(Detail::WarmFailed, e.to_string()))?,
        folder: std::path::PathBuf::new(),
        made: None,
    };
    let size = std::iter::once(1 << 50);
    let feeds = vec![Feed::integers("size", vec![1], Elem::I64, size)];
    let session = Session::new(config, source, &feeds, Vec::new(), 1);
    let unexpected = |e| EngineError::from_session(&e, Detail::WarmFailed);
    let mut session = session.map_err(unexpected)?;
    match session.run(feeds, None) {
        Err(error) => Ok(error.into()),
        Ok(_) => {
            let message = "an allocation of four petabytes succeeded";
            Err(EngineError::new(Detail::WarmFailed, message))
        }
    }
}

/// What a run with new values gave.
#[derive(Debug)]
struct Patched {
    /// The losses, in the order of the plan.
    after: Vec<f64>,
    /// The first part of the graph with another weight; none if no weight differs.
    from: Option<usize>,
    /// Where the time went, without the baseline.
    laps: Laps,
}

/// One weight of the graph and the checkpoint tensor it holds.
#[derive(Debug)]
struct Slot {
    tensor: usize,
    weight: usize,
    place: String,
    transposed: bool,
}

/// How many windows run at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MicroBatch {
    /// As many as the graph was exported for.
    Fixed(usize),
    /// At most so many.
    Most(usize),
}

impl MicroBatch {
    /// The size for a plan of so many windows: equal batches, so that little is filled up in the last one.
    fn of(self, windows: usize) -> usize {
        match self {
            Self::Fixed(size) => size,
            Self::Most(most) => windows.div_ceil(windows.div_ceil(most).max(1)).max(1),
        }
    }

    /// The largest size for a plan of at most so many windows: a shorter plan may have larger batches.
    fn largest(self, windows: usize) -> usize {
        match self {
            Self::Fixed(size) => size,
            Self::Most(most) => windows.clamp(1, most.max(1)),
        }
    }
}

/// A loaded model.
#[derive(Debug)]
pub struct Engine {
    /// The package it was loaded from.
    pub package: Arc<Package>,
    session: Session,
    slots: Vec<Slot>,
    micro_batch: MicroBatch,
    /// The micro-batch of the default plan.
    usual_batch: usize,
    measure: Measure,
    /// By plan and micro-batch, because the bits of a loss depend on both.
    baselines: HashMap<([u8; 32], usize), Arc<Vec<f64>>>,
    /// What the last warm-up proved.
    proven: Option<Proven>,
    /// False once the weights could not be restored; the engine must not score any more.
    sound: bool,
    progress: Arc<Progress>,
}

impl Engine {
    /// Notes progress beside the runs, of work that may take long.
    ///
    /// # Errors
    /// When it was ended from outside.
    fn goes_on(&self) -> Result<(), Failure> {
        self.progress.moved();
        match self.session.terminator.is_terminated() {
            true => Err(Failure::new(Code::InferenceFailed, "the work was ended")),
            false => Ok(()),
        }
    }

    /// Lets this terminator end all runs from now on.
    pub fn obey(&mut self, terminator: Terminator) {
        self.session.terminator = terminator;
    }

    /// Describes where the weights are and how they are written.
    pub fn memory(&self) -> &'static str {
        self.session.memory()
    }

    /// Where the nodes of the graph run.
    pub fn placement(&self) -> &Placement {
        self.session.placement()
    }

    /// Where the graph is cut into parts, with the names that candidates use.
    pub fn partition(&self) -> Partition {
        let Partition { cuts, size } = self.session.partition().clone();
        let tensors = &self.package.weights.tensors;
        let told = |name: String| {
            let slot = self.slots.iter().find(|slot| slot.place == name);
            slot.map_or(name, |slot| tensors[slot.tensor].name.clone())
        };
        Partition {
            cuts: cuts.into_iter().map(told).collect(),
            size,
        }
    }

    /// How many parts the graph runs in.
    pub fn parts(&self) -> usize {
        self.session.parts()
    }

    /// The first part that reads each tensor of the package; none of one that the graph does not have.
    pub fn parts_of_tensors(&self) -> Vec<Option<usize>> {
        let first = |tensor: usize| {
            let slots = self.slots.iter().filter(|slot| slot.tensor == tensor);
            slots.map(|slot| self.session.part_of(slot.weight)).min()
        };
        (0..self.package.weights.tensors.len()).map(first).collect()
    }

    /// Bytes of the values between the parts that are kept.
    pub fn activation_bytes(&self) -> u64 {
        self.session.activation_bytes()
    }

    /// What computes, for the heartbeat.
    fn facts(&self, config: &EngineConfig) -> EngineFacts {
        let hardware = session::hardware(config);
        let placement = self.placement();
        EngineFacts {
            execution_provider: config.execution_provider.execution_provider().into(),
            device: config.device_name(),
            precision: Some(self.package.manifest.precision.as_str().into()),
            onnxruntime: session::library_version(config),
            software_device: hardware.is_software,
            micro_batch: Some(self.usual_batch as u64),
            placement: Some(PlacementFacts {
                device: placement.device as u64,
                host: placement.host_nodes.len() as u64,
            }),
            parts: Some(self.session.parts() as u64),
            class: Some(class::digest(
                config,
                &hardware,
                &self.package,
                self.usual_batch,
                self.session.cuts(),
            )),
        }
    }

    /// Adds to the time worked.
    fn worked(&self, time: std::time::Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.progress.worked_us.fetch_add(micros, Ordering::Relaxed);
    }

    /// Whether the device is gone; the engine must not score any more.
    pub fn is_lost(&self) -> bool {
        self.session.is_lost()
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
    /// A typed failure; the weights are restored in that case too.
    pub fn score(
        &mut self,
        patches: &Patches,
        plan: &Plan,
        early: Option<Early>,
    ) -> Result<Evaluation, Failure> {
        self.while_memory_lasts(plan, |engine, batch| {
            engine.evaluate(patches, plan, batch, early)
        })
    }

    /// Halves the micro-batch when memory runs out, down to one window. This lasts for one job only: the
    /// bits of the next score must not depend on what ran before it.
    fn while_memory_lasts<T>(
        &mut self,
        plan: &Plan,
        mut work: impl FnMut(&mut Self, usize) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut batch = self.batch_of(plan);
        loop {
            match work(self, batch) {
                Err(failure) if failure.code == Code::OutOfMemory && self.sound => {
                    // What the sessions have reserved would be missing in the next attempt.
                    self.session.forget_compiled();
                    self.note_activations();
                    if batch == 1 || matches!(self.micro_batch, MicroBatch::Fixed(_)) {
                        return Err(failure);
                    }
                    batch /= 2;
                    tracing::warn!(%failure, micro_batch = batch, "out of memory; trying this job again with fewer windows at a time");
                }
                done => return done,
            }
        }
    }

    /// The micro-batch for a plan, if memory suffices.
    fn batch_of(&self, plan: &Plan) -> usize {
        self.micro_batch.of(plan.windows.len())
    }

    /// The per-window losses of the unchanged model, computed once per plan and micro-batch.
    fn baseline(&mut self, plan: &Plan, batch: usize) -> Result<Arc<Vec<f64>>, Failure> {
        if let Some(known) = self.baselines.get(&(plan.hash, batch)) {
            return Ok(Arc::clone(known));
        }
        let untouched = Some(self.session.parts());
        let losses = Arc::new(self.losses(plan, batch, untouched, None)?);
        if let Some(window) = losses.iter().position(|l| !l.is_finite()) {
            let message = format!(
                "the current model's own loss is not finite on these windows: window {window} of {} is the first",
                losses.len()
            );
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
        patches: &Patches,
        plan: &Plan,
        batch: usize,
        early: Option<Early>,
    ) -> Result<Evaluation, Failure> {
        let _busy = self.progress.begin();
        let began = Instant::now();
        let known = self.baselines.contains_key(&(plan.hash, batch));
        let before = self.baseline(plan, batch)?;
        let baseline = (!known).then(|| Lap::since(began));
        let mut watch = early.map(|early| self.watch(early, &before, plan));
        let run = self.run_patched(patches, plan, batch, &before, watch.as_mut())?;
        let measured = Measured {
            plan,
            batch: self.batch_of(plan),
            before: &before,
            after: &run.after,
        };
        let laps = Laps {
            baseline,
            ..run.laps
        };
        let end = watch.and_then(|watch| watch.end());
        measured.evaluation(end, run.from, laps)
    }

    /// Writes the new values, measures them, and copies the baseline back, whatever happened before.
    fn run_patched(
        &mut self,
        patches: &Patches,
        plan: &Plan,
        batch: usize,
        before: &[f64],
        watch: Option<&mut Watch>,
    ) -> Result<Patched, Failure> {
        let from = self.first_touched(patches);
        let began = Instant::now();
        let patches = &patches.patches;
        let written = self.write(patches);
        let apply = Lap::since(began);
        let began = Instant::now();
        let after = written.and_then(|()| match from {
            Some(_) => self.losses(plan, batch, from, watch),
            // Every weight has the bits it had, so every loss has.
            None => Ok(before.to_vec()),
        });
        let forward = Lap::since(began);
        let began = Instant::now();
        self.restore(patches)?;
        let laps = Laps {
            baseline: None,
            apply,
            forward,
            restore: Lap::since(began),
        };
        Ok(Patched {
            after: after?,
            from,
            laps,
        })
    }

    /// The micro-batch that memory suffices for has no say in how many windows are measured.
    fn watch(&self, early: Early, before: &[f64], plan: &Plan) -> Watch {
        let before = plan.order.iter().map(|at| before[*at]).collect();
        let (batch, may_be_negative) = (self.batch_of(plan), self.measure.may_be_negative());
        Watch {
            test: SequentialTest::new(early.stop, before, batch, may_be_negative),
            early,
        }
    }

    /// The first part that reads a weight which differs from the baseline's; none if none differs.
    fn first_touched(&self, patches: &Patches) -> Option<usize> {
        let differ = patches.patches.iter().filter(|patch| patch.is_effective());
        let touched: HashSet<usize> = differ.map(|patch| patch.tensor).collect();
        let slots = self
            .slots
            .iter()
            .filter(|slot| touched.contains(&slot.tensor));
        slots.map(|slot| self.session.part_of(slot.weight)).min()
    }

    /// Writes the new values and copies the baseline back, without a pass in between.
    ///
    /// # Errors
    /// When the device fails.
    pub fn rehearse(&mut self, patches: &Patches) -> Result<(), Failure> {
        let written = self.write(&patches.patches);
        self.restore(&patches.patches)?;
        written
    }

    /// Writes the new values wherever the graph holds the tensors.
    fn write(&mut self, patches: &[Patch]) -> Result<(), Failure> {
        let mut patches = patches.iter();
        Ok(patches.try_for_each(|patch| self.write_all(patch, &patch.values))?)
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
        let positions = match slot.transposed {
            true => &patch.transposed,
            false => &patch.indices,
        };
        self.progress.moved();
        self.session.write(slot.weight, positions, values)
    }

    /// Copies the baseline back; subtracting would not restore the bits. If any write fails, the engine
    /// is unsound.
    fn restore(&mut self, patches: &[Patch]) -> Result<(), Failure> {
        self.sound = false;
        for patch in patches {
            // A device error here is never the fault of the candidate.
            self.write_all(patch, &patch.originals).map_err(|e| {
                Failure::new(Code::InferenceFailed, format!("weights not restored: {e}"))
            })?;
        }
        self.sound = true;
        Ok(())
    }

    /// Computes the per-window losses of the current weights, and nothing of it is cached.
    ///
    /// # Errors
    /// When the model does not run.
    pub fn pass(&mut self, plan: &Plan) -> Result<Vec<f64>, Failure> {
        self.losses(plan, self.batch_of(plan), None, None)
    }

    /// The losses in the order of the plan; they are measured in its order of measuring. With `from`, the weights
    /// of all parts before that one are the baseline's, and what these make is kept for the plan. Without, the
    /// whole graph runs and nothing is kept. The watch may end it early: the losses of the other windows are NaN.
    fn losses(
        &mut self,
        plan: &Plan,
        batch: usize,
        from: Option<usize>,
        mut watch: Option<&mut Watch>,
    ) -> Result<Vec<f64>, Failure> {
        let _busy = self.progress.begin();
        let mut losses = vec![f64::NAN; plan.windows.len()];
        let pass = Pass {
            plan: plan.hash,
            batch,
        };
        for (number, places) in plan.order.chunks(batch).enumerate() {
            let windows: Vec<&Window> = places.iter().map(|at| &plan.windows[*at]).collect();
            let reuse = from.map(|from| Reuse { pass, number, from });
            let measured = self.micro_batch_losses(&windows, batch, reuse)?;
            for (at, loss) in places.iter().zip(&measured) {
                losses[*at] = *loss;
            }
            if watch.as_mut().is_some_and(|watch| watch.ends(&measured)) {
                break;
            }
        }
        Ok(losses)
    }

    fn micro_batch_losses(
        &mut self,
        windows: &[&Window],
        batch: usize,
        reuse: Option<Reuse>,
    ) -> Result<Vec<f64>, Failure> {
        let began = Instant::now();
        let feeds = self.measure.feeds(&self.package, windows, batch);
        let fresh = !self.session.is_compiled(&feeds);
        let _patient = fresh.then(|| self.progress.compiling());
        let output = self.session.run(feeds, reuse)?;
        self.progress.step();
        self.note_activations();
        // Only warm-ups set the pace that the watchdog compares with; a slow job must not relax it.
        if self.proven.is_none() && !fresh {
            self.progress.note_pace(began.elapsed());
        }
        self.measure.losses(windows, batch, &output)
    }

    /// Notes what is kept between the parts, and what the last run found of it.
    fn note_activations(&self) {
        let (noted, order) = (&self.progress.activations, Ordering::Relaxed);
        noted.bytes.store(self.session.activation_bytes(), order);
        // Patches of a warm-up are no candidates.
        let lookup = self.session.lookup().filter(|_| self.proven.is_some());
        match lookup {
            Some(Lookup::Hit) => drop(noted.hits.fetch_add(1, order)),
            Some(Lookup::Miss) => drop(noted.misses.fetch_add(1, order)),
            None => {}
        }
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        let code = match error {
            SessionError::OutOfMemory(_) => Code::OutOfMemory,
            SessionError::Terminated => Code::ScoreTimeout,
            SessionError::Unavailable(_)
            | SessionError::NoKernel(_)
            | SessionError::Model(_)
            | SessionError::Lost(_)
            | SessionError::Other(_) => Code::InferenceFailed,
        };
        Self::new(code, error.to_string())
    }
}
