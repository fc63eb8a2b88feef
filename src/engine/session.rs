//! The only module that knows ONNX Runtime: it loads the library, builds a session on exactly the
//! configured provider, writes weights in place, runs the graph and classifies errors.

mod build;
mod feed;
mod library;
#[cfg(test)]
mod rewriting;
mod scratch;
mod terminator;

use ort::memory::AllocationDevice;
use ort::session::SessionInputValue;

use crate::config::{EngineConfig, Provider};
use crate::model::onnx::{OUTPUT, WeightSpec};
pub use build::GraphSource;
use build::build;
pub use feed::Feed;
pub use library::library_version;
pub use scratch::Entries;
use scratch::{Device, Memory, Names, Scratch};
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
        let memory = [
            "Failed to allocate memory",
            "bad_alloc",
            "out of memory",
            "CUDA_ERROR_OUT_OF_MEMORY",
        ];
        if text.contains("terminate flag being set") {
            Self::Terminated
        } else if memory.iter().any(|m| text.contains(m)) {
            Self::OutOfMemory(text)
        } else if text.contains("Could not find an implementation") {
            Self::NoKernel(text)
        } else {
            Self::Other(text)
        }
    }
}

/// A session whose weights are inputs, with one scratch tensor per weight.
pub struct Session {
    inner: ort::session::Session,
    weights: Vec<Scratch>,
    memory: Memory,
    /// Ends the runs of the current command.
    pub terminator: Terminator,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("weights", &self.weights.len())
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Builds a session and fills the scratch weights.
    ///
    /// # Errors
    /// When the provider is missing, the graph is refused or memory runs out.
    pub fn new(
        config: &EngineConfig,
        graph: GraphSource<'_>,
        weights: Vec<WeightSpec<'_>>,
    ) -> Result<Self, SessionError> {
        let inner = build(config, graph)?;
        let mut memory = match config.execution_provider {
            Provider::Cpu => Memory::Host,
            Provider::Cuda | Provider::Tensorrt => device(config, &inner, &weights)?,
        };
        let weights = weights.into_iter().map(|spec| memory.fill(spec));
        let weights = weights.collect::<Result<_, _>>()?;
        Ok(Self {
            inner,
            weights,
            memory,
            terminator: Terminator::default(),
        })
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
        let make = |graph: &[u8]| build(config, GraphSource::Bytes(&replaced(graph)));
        let names = Names::stand_in();
        let device = Device::new(&self.inner, &names, dtypes.iter().copied(), make)?;
        self.memory = Memory::Device(Box::new(device));
        Ok(())
    }

    /// Fills a scratch weight with new bytes, exactly as many as it holds.
    ///
    /// # Errors
    /// When the device fails or memory runs out; the weight is then unchanged.
    pub fn fill(&mut self, weight: usize, bytes: &[u8]) -> Result<(), SessionError> {
        self.memory.refill(&mut self.weights[weight], bytes)
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
        self.memory
            .write(&mut self.weights[weight], positions, values)
    }

    /// Whether a scratch weight holds exactly these entries.
    ///
    /// # Errors
    /// When the device fails.
    pub fn holds(&mut self, weight: usize, entries: Entries<'_>) -> Result<bool, SessionError> {
        self.memory.holds(&self.weights[weight], entries)
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
        let fed = feeds
            .into_iter()
            .map(|feed| Ok((feed.name, feed.tensor()?.into())));
        let mut inputs: Vec<(&str, SessionInputValue<'_>)> = fed.collect::<ort::Result<_>>()?;
        let weights = self.weights.iter();
        inputs.extend(weights.map(|weight| (weight.input.as_str(), weight.feed())));
        let options = self.terminator.begin()?;
        let result = self.inner.run_with_options(inputs, &options);
        self.terminator.end();
        let outputs = result?;
        let (_, values) = outputs[OUTPUT].try_extract_tensor::<f32>()?;
        Ok(values.to_vec())
    }
}

/// Weights in the memory of the provider's device.
fn device(
    config: &EngineConfig,
    session: &ort::session::Session,
    weights: &[WeightSpec<'_>],
) -> Result<Memory, SessionError> {
    let names = Names {
        memory: AllocationDevice::CUDA,
        staging: AllocationDevice::CUDA_PINNED,
        id: config.device_id,
    };
    let dtypes = weights.iter().map(|weight| weight.dtype);
    let make = |graph: &[u8]| build(config, GraphSource::Bytes(graph));
    let device = Device::new(session, &names, dtypes, make)?;
    Ok(Memory::Device(Box::new(device)))
}
