//! The only module that knows ONNX Runtime: it loads the library, builds a session on exactly the
//! configured provider, writes weights in place, runs the graph and classifies errors.

mod build;
mod devices;
mod feed;
mod library;
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

use std::path::PathBuf;

use crate::config::EngineConfig;
use crate::model::onnx::{DATA, Graph, OUTPUT, Rewrite, WeightSpec};
pub use build::threads;
use build::{GraphSource, Terms, build};
pub use devices::{Seen, Sight, devices};
pub use feed::Feed;
pub use library::{Plugin, library_build, library_version, plugin};
pub use placement::Placement;
use provider::row;
pub use provider::{Hardware, hardware, rewrites};
pub use scratch::Entries;
use scratch::{Device, Memory, Scratch, host_memory};
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

/// A session of ONNX Runtime. The sizes of its inputs are fixed, so that no shape is computed at run time,
/// and so that the bits of a result depend on nothing but the values.
struct Compiled {
    shapes: Shapes,
    inner: ort::session::Session,
}

/// The shape of each input that is no weight, in the order in which they are fed.
type Shapes = Vec<Vec<usize>>;

fn shapes(feeds: &[Feed<'_>]) -> Shapes {
    feeds.iter().map(|feed| feed.shape.clone()).collect()
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
    /// Compiles the graph for inputs of these sizes and fills the scratch weights.
    ///
    /// # Errors
    /// When the provider is missing, the graph is refused or memory runs out.
    pub fn new(
        config: &EngineConfig,
        source: Source,
        feeds: &[Feed<'_>],
        weights: Vec<WeightSpec>,
    ) -> Result<Self, SessionError> {
        let row = row(config.execution_provider);
        row.accepts(&weights, &source.graph)?;
        let _turn = row.turn();
        let patched = patched(&source.graph, &weights);
        let terminator = Terminator::default();
        let terms = Terms::new(&patched, &terminator);
        let (first, placement) = Compiled::new(config, &source, feeds, terms)?;
        let mut memory = memory(config, &weights)?;
        let weights = weights.into_iter().map(|spec| memory.fill(spec));
        let weights = weights.collect::<Result<_, _>>()?;
        Ok(Self {
            config: config.clone(),
            source,
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

    /// Compiles the graph for feeds of these sizes, unless it is; of those not used for long, it forgets.
    fn compile(&mut self, feeds: &[Feed<'_>]) -> Result<(), SessionError> {
        let wanted = shapes(feeds);
        let known = self.compiled.iter().position(|c| c.shapes == wanted);
        let found = match known {
            Some(at) => self.compiled.remove(at),
            None => {
                let surplus = (self.compiled.len() + 1).saturating_sub(KEPT);
                self.compiled.drain(..surplus);
                let terms = Terms {
                    harmless: &self.placement.host_nodes,
                    ..Terms::new(&self.patched, &self.terminator)
                };
                Compiled::new(&self.config, &self.source, feeds, terms)?.0
            }
        };
        self.compiled.push(found);
        Ok(())
    }

    /// Gives back the memory of all compiled graphs, which are made again when they are needed. The
    /// weights stay.
    pub fn forget_compiled(&mut self) {
        let _turn = self.turn();
        self.compiled.clear();
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

    /// Runs one forward pass and returns the graph's output.
    ///
    /// # Errors
    /// The classified error of ONNX Runtime.
    pub fn run(&mut self, feeds: Vec<Feed<'_>>) -> Result<Vec<f32>, SessionError> {
        self.in_turn(|s| s.run_once(feeds))
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

    fn run_once(&mut self, feeds: Vec<Feed<'_>>) -> Result<Vec<f32>, SessionError> {
        self.compile(&feeds)?;
        let Some(Compiled { inner, .. }) = self.compiled.last_mut() else {
            return Err(SessionError::Other("no graph is compiled".into()));
        };
        let mut binding = inner.create_binding()?;
        for feed in feeds {
            binding.bind_input(feed.name, &feed.tensor()?)?;
        }
        for weight in &self.weights {
            weight.bind(&mut binding)?;
        }
        binding.bind_output_to_device(OUTPUT, &host_memory()?)?;
        let options = self.terminator.begin()?;
        let result = inner.run_binding_with_options(&binding, &options);
        self.terminator.end();
        let outputs = result?;
        let (_, values) = outputs[OUTPUT].try_extract_tensor::<f32>()?;
        Ok(values.to_vec())
    }
}

impl Drop for Session {
    /// Gives back the device's memory in its turn, too.
    fn drop(&mut self) {
        let _turn = self.turn();
        self.compiled.clear();
        self.weights.clear();
        self.memory = Memory::Host;
    }
}

impl Compiled {
    fn new(
        config: &EngineConfig,
        source: &Source,
        feeds: &[Feed<'_>],
        terms: Terms<'_>,
    ) -> Result<(Self, Placement), SessionError> {
        let sizes = feeds.iter().map(|f| (f.name, f.shape.as_slice()));
        let graph = source.graph.sized(sizes);
        let graph = GraphSource::Beside(&graph, &source.folder);
        let (inner, placement) = build(config, graph, terms)?;
        let shapes = shapes(feeds);
        Ok((Self { shapes, inner }, placement))
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
