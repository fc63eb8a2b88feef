//! The only module that knows ONNX Runtime: it loads the library, builds a session on exactly the
//! configured provider, writes weights in place, runs the graph and classifies errors.

mod activations;
mod arena;
mod build;
mod compiled;
mod cut;
mod devices;
mod feed;
mod library;
mod partition;
mod placement;
mod places;
mod provider;
#[cfg(test)]
mod rewriting;
mod scratch;
mod terminator;
#[cfg(test)]
mod tests;
mod vulkan;

use std::collections::HashMap;
use std::path::PathBuf;

use crate::config::EngineConfig;
use crate::model::onnx::{DATA, Graph, Rewrite, WeightSpec};
pub use activations::Pass;
use activations::{Activations, Entered};
use build::{GraphSource, Terms, build};
use compiled::{Compiled, Demands, Run, shapes};
use cut::Cut;
pub use devices::{Seen, Sight, devices};
pub use feed::Feed;
pub use library::{Plugin, library_build, library_version, plugin, threads};
pub use partition::Partition;
pub use placement::Placement;
use provider::row;
pub use provider::{Hardware, hardware, rewrites};
pub use scratch::Entries;
use scratch::{Device, Memory, Scratch};
pub use terminator::Terminator;

/// A failure of ONNX Runtime, by what it means for the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The library, the provider or the device is missing.
    #[error("{0}")]
    Unavailable(String),
    /// The provider lacks a kernel that the graph needs; another may have it.
    #[error("{0}")]
    NoKernel(String),
    /// ONNX Runtime refuses the graph.
    #[error("{0}")]
    Model(String),
    /// The device ran out of memory.
    #[error("{0}")]
    OutOfMemory(String),
    /// The device is gone, and with it everything in its memory.
    #[error("{0}")]
    Lost(String),
    /// The run was terminated from outside.
    #[error("the run was terminated")]
    Terminated,
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// ONNX Runtime has no error codes for termination and memory, and ort has none for a missing kernel,
/// so this matches the message texts of 1.31.
impl From<ort::Error> for SessionError {
    fn from(error: ort::Error) -> Self {
        let text = error.to_string();
        let ended = ["terminate flag being set", "canceled due to user request"];
        if ended.iter().any(|part| text.contains(part)) {
            Self::Terminated
        } else if let Some(known) = provider::classify(&text) {
            known(text)
        } else if text.contains("Could not find an implementation") {
            Self::NoKernel(text)
        } else {
            Self::Other(text)
        }
    }
}

/// How many compiled graphs are kept: that of the default plan, one for a single window, and one more.
const KEPT: usize = 3;

/// One graph, compiled for each size of its inputs that it is run with, and one scratch tensor per weight,
/// which all of them read.
pub struct Session {
    config: EngineConfig,
    source: Source,
    cut: Cut,
    partition: Partition,
    /// The first part that reads each weight.
    readers: Vec<usize>,
    activations: Activations,
    lookup: Option<Lookup>,
    /// The last one was used last.
    compiled: Vec<Compiled>,
    /// Names of the weights, for the look at where nodes run.
    patched: Vec<String>,
    placement: Placement,
    weights: Vec<Scratch>,
    memory: Memory,
    lost: bool,
    /// Ends the runs of the current command, and the compilations before them.
    pub terminator: Terminator,
}

/// Which values between the parts a run may start from, and leaves for later ones.
#[derive(Debug, Clone, Copy)]
pub struct Reuse {
    /// The pass that it belongs to.
    pub pass: Pass,
    /// The position of the micro-batch in it.
    pub number: usize,
    /// The first part whose weights differ from the baseline's; the number of parts, if none do.
    pub from: usize,
}

/// Whether a run that could leave the first part out began where it could.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// At the first part whose weights differ from the baseline's.
    Hit,
    /// Before it, because what enters it was not kept.
    Miss,
}

/// Where sessions read the graph.
#[derive(Debug)]
pub struct Source {
    /// The graph, its inputs of any size.
    pub graph: Graph,
    /// The folder of its external data.
    pub folder: PathBuf,
    /// Deletes that folder in the end, if it was made for this.
    pub made: Option<tempfile::TempDir>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("weights", &self.weights.len())
            .field("compiled", &self.compiled.len())
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Compiles the graph for inputs of these sizes and fills the scratch weights. A usual pass has so many
    /// micro-batches.
    ///
    /// # Errors
    /// When the provider is missing, the graph is refused or memory runs out.
    pub fn new(
        config: &EngineConfig,
        source: Source,
        feeds: &[Feed<'_>],
        weights: Vec<WeightSpec>,
        micro_batches: usize,
    ) -> Result<Self, SessionError> {
        let row = row(config.execution_provider);
        row.accepts(&weights, &source.graph)?;
        let _turn = row.turn();
        let patched = patched(&source.graph, &weights);
        let terminator = Terminator::default();
        let inputs = if weights.is_empty() {
            &[]
        } else {
            patched.as_slice()
        };
        let budget = config.activation_cache / micro_batches.max(1) as u64;
        let (cut, known) = Cut::find(config, &source, feeds, inputs, budget, &terminator)?;
        let demands = Demands {
            config,
            weights: &patched,
            harmless: &[],
            terminator: &terminator,
        };
        let parts = cut.apply(&source, &known)?;
        let size = partition::entering(&parts, &known);
        let (first, placement) = Compiled::new(demands, &source, feeds, parts)?;
        let mut memory = memory(config, &weights)?;
        let weights = weights.into_iter().map(|spec| memory.fill(spec));
        let weights: Vec<Scratch> = weights.collect::<Result<_, _>>()?;
        let readers = first.first_readers(weights.len());
        let (places, graph) = (cut.places(), &source.graph);
        let partition = Partition::of(graph, places, &patched, &readers, size)?;
        Ok(Self {
            config: config.clone(),
            source,
            readers,
            cut,
            partition,
            lookup: None,
            activations: Activations::within(config.activation_cache),
            compiled: vec![first],
            patched,
            placement,
            weights,
            memory,
            lost: false,
            terminator,
        })
    }

    fn turn(&self) -> Option<std::sync::MutexGuard<'static, ()>> {
        row(self.config.execution_provider).turn()
    }

    /// Whether the graph is compiled for feeds of these sizes.
    pub fn is_compiled(&self, feeds: &[Feed<'_>]) -> bool {
        let wanted = shapes(feeds);
        self.compiled.iter().any(|c| c.shapes == wanted)
    }

    /// Whether the graph is compiled for any size.
    #[cfg(test)]
    pub(super) fn is_compiled_at_all(&self) -> bool {
        !self.compiled.is_empty()
    }

    /// Compiles the graph for feeds of these sizes, unless it is; of those not used for long, it forgets, and then
    /// the values between the parts, too.
    fn compile(&mut self, feeds: &[Feed<'_>]) -> Result<(), SessionError> {
        let wanted = shapes(feeds);
        let known = self.compiled.iter().position(|c| c.shapes == wanted);
        let found = match known {
            Some(at) => self.compiled.remove(at),
            None => {
                let surplus = (self.compiled.len() + 1).saturating_sub(KEPT);
                if surplus > 0 {
                    // On some devices a value does not outlive the session that made it.
                    self.activations.clear();
                }
                self.compiled.drain(..surplus);
                let (config, source) = (&self.config, &self.source);
                let demands = Demands {
                    config,
                    weights: &self.patched,
                    harmless: &self.placement.host_nodes,
                    terminator: &self.terminator,
                };
                let known = self.cut.known(config, source, feeds, &self.terminator)?;
                let parts = self.cut.apply(source, &known)?;
                Compiled::new(demands, source, feeds, parts)?.0
            }
        };
        self.compiled.push(found);
        Ok(())
    }

    /// Gives back the memory of all compiled graphs and of the values between their parts, which are made
    /// again when they are needed. The weights stay.
    pub fn forget_compiled(&mut self) {
        let _turn = self.turn();
        self.activations.clear();
        self.compiled.clear();
    }

    /// Forgets the values between the parts that belong to a plan, or all of them.
    pub fn forget_activations(&mut self, plan: Option<&[u8; 32]>) {
        let _turn = self.turn();
        match plan {
            Some(plan) => self.activations.forget(plan),
            None => self.activations.clear(),
        }
    }

    /// Bytes of the values between the parts that are kept.
    pub fn activation_bytes(&self) -> u64 {
        self.activations.bytes()
    }

    /// What the last run found of the values between the parts; none if it had to compute all of them.
    pub fn lookup(&self) -> Option<Lookup> {
        self.lookup
    }

    /// Where the graph is cut.
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// How many parts the graph runs in.
    pub fn parts(&self) -> usize {
        self.cut.parts()
    }

    /// The nodes before which the graph is cut.
    pub fn cuts(&self) -> &[usize] {
        self.cut.places()
    }

    /// The first part that reads a weight.
    pub fn part_of(&self, weight: usize) -> usize {
        self.readers[weight]
    }

    /// Behaves as after a run in which the device was lost.
    #[cfg(test)]
    pub(super) fn lose(&mut self) {
        self.lost = true;
    }

    /// Keeps the weights in host memory that stands in for a device. They must be filled again, and
    /// `replaced` edits each graph that reads or writes them.
    #[cfg(test)]
    pub(super) fn stand_in(
        &mut self,
        config: &EngineConfig,
        dtypes: &[crate::model::tensor::Dtype],
        replaced: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Result<(), SessionError> {
        let make = |graph: &[u8]| kernel(config, &replaced(graph));
        let device = Device::new(
            &provider::Storage::stand_in(),
            0,
            dtypes.iter().copied(),
            make,
        )?;
        self.memory = Memory::Device(Box::new(device));
        Ok(())
    }

    /// Fills a scratch weight with new bytes, exactly as many as it holds.
    ///
    /// # Errors
    /// When the device fails or memory runs out; the weight is then unchanged.
    pub fn fill(&mut self, weight: usize, bytes: &[u8]) -> Result<(), SessionError> {
        self.in_turn(|s| s.memory.refill(&mut s.weights[weight], bytes))
    }

    /// Writes absolute values (already rounded to the weight's type) into a scratch weight.
    ///
    /// # Errors
    /// When a position is outside the weight (nothing is written then) or the device fails.
    pub fn write(
        &mut self,
        weight: usize,
        positions: &[u32],
        values: &[f32],
    ) -> Result<(), SessionError> {
        self.in_turn(|s| {
            let scratch = &mut s.weights[weight];
            s.memory.write(scratch, positions, values)
        })
    }

    /// Whether a scratch weight holds exactly these entries.
    ///
    /// # Errors
    /// When the device fails.
    pub fn holds(&mut self, weight: usize, entries: Entries<'_>) -> Result<bool, SessionError> {
        self.in_turn(|s| s.memory.holds(&s.weights[weight], entries))
    }

    /// Where the nodes of the graph run.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// What it was made with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Whether the device may drop what does not fit into its largest buffer.
    pub fn may_drop(&self) -> bool {
        (row(self.config.execution_provider).largest_tensor)().is_some()
    }

    /// Describes where the weights are and how they are written.
    pub fn memory(&self) -> &'static str {
        self.memory.describe()
    }

    /// Runs one micro-batch and returns the graph's output. Without `reuse`, all parts run.
    ///
    /// # Errors
    /// The classified error of ONNX Runtime.
    pub fn run(
        &mut self,
        feeds: Vec<Feed<'_>>,
        reuse: Option<Reuse>,
    ) -> Result<Vec<f32>, SessionError> {
        self.in_turn(|s| s.run_once(feeds, reuse))
    }

    /// Works on the device when no other session does, and notes that the device is gone.
    fn in_turn<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, SessionError>,
    ) -> Result<T, SessionError> {
        let _turn = self.turn();
        let worked = work(self);
        self.lost |= matches!(worked, Err(SessionError::Lost(_)));
        worked
    }

    /// Whether the device is gone; what follows would compute nothing, and some of it without an error.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    fn run_once(
        &mut self,
        feeds: Vec<Feed<'_>>,
        reuse: Option<Reuse>,
    ) -> Result<Vec<f32>, SessionError> {
        self.lookup = None;
        self.compile(&feeds)?;
        let mut tensors = HashMap::new();
        for feed in feeds {
            tensors.insert(feed.name, feed.tensor()?);
        }
        let run = Run {
            feeds: tensors,
            weights: &self.weights,
            memory: &self.memory.info()?,
            terminator: &self.terminator,
        };
        let Some(compiled) = self.compiled.last_mut() else {
            return Err(SessionError::Other("no graph is compiled".into()));
        };
        let Some(Reuse { pass, number, from }) = reuse else {
            return compiled.run(&run, 0, &mut Entered::default());
        };
        let mut entered = self.activations.take(pass, number);
        self.lookup =
            (1..self.cut.parts())
                .contains(&from)
                .then_some(match entered.parts >= from {
                    true => Lookup::Hit,
                    false => Lookup::Miss,
                });
        let result = compiled.run(&run, from, &mut entered);
        // Also after an error: it has what parts before the first touched one made, and nothing else.
        self.activations.put(pass, number, entered);
        result
    }
}

impl Drop for Session {
    /// Gives back the device's memory in its turn, too.
    fn drop(&mut self) {
        let _turn = self.turn();
        self.activations.clear();
        self.compiled.clear();
        self.weights.clear();
        self.memory = Memory::Host;
    }
}

/// The weights that candidates change; of a graph that holds them all as constants, every one.
fn patched(graph: &Graph, weights: &[WeightSpec]) -> Vec<String> {
    match weights {
        [] => graph.initializers().into_iter().map(|i| i.name).collect(),
        inputs => inputs.iter().map(|weight| weight.input.clone()).collect(),
    }
}

/// Where the provider keeps these weights.
fn memory(config: &EngineConfig, weights: &[WeightSpec]) -> Result<Memory, SessionError> {
    let row = row(config.execution_provider);
    let Some(storage) = row.storage.as_ref().filter(|_| !weights.is_empty()) else {
        return Ok(Memory::Host);
    };
    let dtypes = weights.iter().map(|weight| weight.dtype);
    let make = |graph: &[u8]| kernel(config, graph);
    let device = Device::new(storage, config.device_id, dtypes, make)?;
    if row.rewrites.contains(&Rewrite::IsNan) {
        device.check_nan(make)?;
    }
    Ok(Memory::Device(Box::new(device)))
}

/// A session of a graph that works on a weight.
fn kernel(config: &EngineConfig, graph: &[u8]) -> Result<ort::session::Session, SessionError> {
    let (weights, terminator) = ([DATA.to_owned()], Terminator::default());
    let terms = Terms::new(&weights, &terminator);
    let (session, _) = build(config, GraphSource::Bytes(graph), terms)?;
    Ok(session)
}
