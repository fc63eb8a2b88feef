//! The only place that knows ONNX Runtime: loading the library, making a session on exactly the
//! provider that was asked for, writing weights in place, running, and naming its errors.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use half::{bf16, f16};
use ort::ep;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{NoSelectedOutputs, RunOptions, SessionInputValue};
use ort::value::{DynTensor, PrimitiveTensorElementType, Tensor};

use super::graph::OUTPUT;
use crate::config::{EngineConfig, Provider};
use crate::package::Dtype;
use crate::package::plan::Elem;

/// What went wrong in ONNX Runtime, as a decision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The library, the provider or the device is not there.
    #[error("{0}")]
    Unavailable(String),
    /// The model cannot be made into a session.
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

/// ONNX Runtime has no error code for these two: its texts are matched, as measured for 1.31.
fn classify(error: &ort::Error) -> SessionError {
    let text = error.to_string();
    let memory = [
        "Failed to allocate memory",
        "bad_alloc",
        "out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY",
    ];
    if text.contains("terminate flag being set") {
        SessionError::Terminated
    } else if memory.iter().any(|m| text.contains(m)) {
        SessionError::OutOfMemory(text)
    } else {
        SessionError::Other(text)
    }
}

/// A weight as the graph wants it.
#[derive(Debug)]
pub struct WeightSpec<'a> {
    /// Name of the graph's input.
    pub input: String,
    /// In the graph's layout.
    pub shape: Vec<i64>,
    /// Element type.
    pub dtype: Dtype,
    /// Little-endian, in the graph's layout.
    pub bytes: std::borrow::Cow<'a, [u8]>,
}

impl WeightSpec<'_> {
    /// The same for a session that holds it as a constant.
    pub fn constant(&self) -> super::graph::Constant<'_> {
        super::graph::Constant {
            name: &self.input,
            shape: &self.shape,
            dtype: self.dtype,
            bytes: &self.bytes,
        }
    }
}

enum Values {
    F32(Tensor<f32>),
    F16(Tensor<f16>),
    Bf16(Tensor<bf16>),
}

struct Weight {
    input: String,
    numel: usize,
    values: Values,
}

/// Ends the runs of one command from another thread, for good: a run that has not begun yet is
/// ended too, so no moment between two runs is missed.
#[derive(Clone, Default)]
pub struct Terminator(Arc<Mutex<Runs>>);

#[derive(Default)]
struct Runs {
    ended: bool,
    current: Option<Arc<RunOptions<NoSelectedOutputs>>>,
}

impl std::fmt::Debug for Terminator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Terminator")
    }
}

impl Terminator {
    /// Ends the run that is going on, if any, at its next node, and every later one.
    pub fn terminate(&self) {
        let mut runs = self.runs();
        runs.ended = true;
        let told = runs.current.as_ref().map(|options| options.terminate());
        if let Some(Err(error)) = told {
            tracing::warn!(%error, "the run could not be terminated");
        }
    }

    fn begin(&self) -> Result<Arc<RunOptions<NoSelectedOutputs>>, SessionError> {
        let mut runs = self.runs();
        if runs.ended {
            return Err(SessionError::Terminated);
        }
        let options = Arc::new(RunOptions::new().map_err(|e| classify(&e))?);
        runs.current = Some(Arc::clone(&options));
        Ok(options)
    }

    fn end(&self) {
        self.runs().current = None;
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the scratch weights live and how entries get into them.
enum Memory {
    Host,
    Device {
        info: MemoryInfo<'static>,
        id: i32,
        scatter: Vec<(Dtype, ort::session::Session)>,
    },
}

/// A session whose weights are inputs, with one scratch tensor per weight.
pub struct Session {
    inner: ort::session::Session,
    weights: Vec<Weight>,
    memory: Memory,
    /// Ends the runs of the command that is worked on.
    pub terminator: Terminator,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("weights", &self.weights.len())
            .finish_non_exhaustive()
    }
}

/// The library's path: configuration, else `ORT_DYLIB_PATH`, else beside the binary.
fn library(config: &EngineConfig) -> Result<PathBuf, SessionError> {
    if let Some(path) = &config.onnxruntime {
        return Ok(path.clone());
    }
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH") {
        return Ok(path.into());
    }
    let binary = std::env::current_exe().unwrap_or_default();
    let beside = binary.parent().and_then(|dir| {
        let entries = std::fs::read_dir(dir).ok()?;
        let is_library = |path: &PathBuf| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            name.starts_with("libonnxruntime.so")
        };
        entries
            .filter_map(|e| Some(e.ok()?.path()))
            .find(is_library)
    });
    beside.ok_or_else(|| {
        SessionError::Unavailable(
            "ONNX Runtime was not found: set engine.onnxruntime or ORT_DYLIB_PATH to libonnxruntime.so, \
             or put it beside the binary (ops/setup fetches it)"
                .into(),
        )
    })
}

/// One environment per process; a failed start is tried again, a good one is kept.
fn environment(
    config: &EngineConfig,
) -> Result<&'static ort::environment::Environment, SessionError> {
    static ENVIRONMENT: OnceLock<ort::environment::Environment> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = STARTING.lock();
    if let Some(environment) = ENVIRONMENT.get() {
        return Ok(environment);
    }
    let path = library(config)?;
    if !path.is_file() {
        return Err(SessionError::Unavailable(format!(
            "ONNX Runtime: {} is not a file",
            path.display()
        )));
    }
    let fail = |e: &dyn std::fmt::Display| {
        SessionError::Unavailable(format!(
            "ONNX Runtime cannot be loaded from {}: {e}",
            path.display()
        ))
    };
    let builder = ort::init_from(&path).map_err(|e| fail(&e))?;
    let environment = builder.with_name("scorer").build().map_err(|e| fail(&e))?;
    Ok(ENVIRONMENT.get_or_init(|| environment))
}

/// The version of the loaded library, once there is one.
pub fn library_version(config: &EngineConfig) -> Option<String> {
    environment(config).ok()?;
    let info = ort::info();
    // "ORT Build Info: git-branch=..., ..." is all it says besides the file's own name.
    let path = library(config).ok()?.canonicalize().ok()?;
    let name = path.file_name()?.to_string_lossy().into_owned();
    Some(
        name.strip_prefix("libonnxruntime.so.")
            .map_or_else(|| info.to_owned(), str::to_owned),
    )
}

impl Session {
    /// Makes a session and fills the scratch weights.
    ///
    /// # Errors
    /// When the provider is not there, the graph is refused or memory is short.
    pub fn new(
        config: &EngineConfig,
        graph: Source<'_>,
        weights: Vec<WeightSpec<'_>>,
    ) -> Result<Self, SessionError> {
        let mut inner = build(config, graph)?;
        let memory = match config.execution_provider {
            Provider::Cpu => Memory::Host,
            Provider::Cuda | Provider::Tensorrt => device_memory(config, &mut inner)?,
        };
        let weights = weights
            .into_iter()
            .map(|spec| fill(spec, &memory))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            inner,
            weights,
            memory,
            terminator: Terminator::default(),
        })
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
        let weight = &mut self.weights[weight];
        if positions.iter().any(|p| *p as usize >= weight.numel) {
            return Err(SessionError::Other(format!(
                "a position is outside {}",
                weight.input
            )));
        }
        match &mut self.memory {
            Memory::Host => match &mut weight.values {
                Values::F32(tensor) => put(tensor, positions, values, |v| v),
                Values::F16(tensor) => put(tensor, positions, values, f16::from_f32),
                Values::Bf16(tensor) => put(tensor, positions, values, bf16::from_f32),
            },
            Memory::Device { info, id, scatter } => {
                scatter_on_device(weight, positions, values, info, *id, scatter)?;
            }
        }
        Ok(())
    }

    /// Whether a host scratch weight equals the given bytes; a device weight is fetched first.
    ///
    /// # Errors
    /// When the device fails.
    pub fn equals(&self, weight: usize, bytes: &[u8]) -> Result<bool, SessionError> {
        let host = AllocationDevice::CPU;
        let same = match (&self.weights[weight].values, &self.memory) {
            (Values::F32(tensor), Memory::Host) => same_bytes(tensor, bytes, f32::to_le_bytes),
            (Values::F16(tensor), Memory::Host) => same_bytes(tensor, bytes, f16::to_le_bytes),
            (Values::Bf16(tensor), Memory::Host) => same_bytes(tensor, bytes, bf16::to_le_bytes),
            (Values::F32(tensor), Memory::Device { .. }) => same_bytes(
                &tensor.to(host, 0).map_err(|e| classify(&e))?,
                bytes,
                f32::to_le_bytes,
            ),
            (Values::F16(tensor), Memory::Device { .. }) => same_bytes(
                &tensor.to(host, 0).map_err(|e| classify(&e))?,
                bytes,
                f16::to_le_bytes,
            ),
            (Values::Bf16(tensor), Memory::Device { .. }) => same_bytes(
                &tensor.to(host, 0).map_err(|e| classify(&e))?,
                bytes,
                bf16::to_le_bytes,
            ),
        };
        Ok(same)
    }

    /// One forward pass: what the graph's output holds.
    ///
    /// # Errors
    /// What ONNX Runtime says.
    pub fn run(&mut self, feeds: Vec<Feed<'_>>) -> Result<Vec<f32>, SessionError> {
        let mut inputs: Vec<(&str, SessionInputValue<'_>)> =
            Vec::with_capacity(self.weights.len() + feeds.len());
        for feed in feeds {
            let name = feed.name;
            inputs.push((name, feed.tensor().map_err(|e| classify(&e))?.into()));
        }
        for weight in &self.weights {
            let value: SessionInputValue<'_> = match &weight.values {
                Values::F32(tensor) => tensor.into(),
                Values::F16(tensor) => tensor.into(),
                Values::Bf16(tensor) => tensor.into(),
            };
            inputs.push((&weight.input, value));
        }
        let options = self.terminator.begin()?;
        let result = self.inner.run_with_options(inputs, &options);
        self.terminator.end();
        let outputs = result.map_err(|e| classify(&e))?;
        let (_, values) = outputs[OUTPUT]
            .try_extract_tensor::<f32>()
            .map_err(|e| classify(&e))?;
        Ok(values.to_vec())
    }
}

/// What one input that is no weight gets.
#[derive(Debug)]
pub struct Feed<'a> {
    /// Name of the input.
    pub name: &'a str,
    /// Batch first.
    pub shape: Vec<usize>,
    /// Element type.
    pub elem: Elem,
    /// Little-endian, row-major.
    pub bytes: Vec<u8>,
}

impl<'a> Feed<'a> {
    /// Whole numbers, as whatever the input takes.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "positions and flags, far below 2^24"
    )]
    pub fn integers(
        name: &'a str,
        shape: Vec<usize>,
        elem: Elem,
        values: impl Iterator<Item = i64>,
    ) -> Self {
        let bytes = match elem {
            Elem::I64 => values.flat_map(i64::to_le_bytes).collect(),
            Elem::I32 => values.flat_map(|v| (v as i32).to_le_bytes()).collect(),
            Elem::F32 => values.flat_map(|v| (v as f32).to_le_bytes()).collect(),
            Elem::F16 => {
                let half = |v: i64| f16::from_f32(v as f32).to_le_bytes();
                values.flat_map(half).collect()
            }
            Elem::U8 | Elem::Bool => values.map(|v| v as u8).collect(),
        };
        Self {
            name,
            shape,
            elem,
            bytes,
        }
    }

    fn tensor(self) -> ort::Result<DynTensor> {
        let (shape, bytes) = (self.shape, self.bytes);
        match self.elem {
            Elem::F32 => typed(shape, &bytes, f32::from_le_bytes),
            Elem::F16 => typed(shape, &bytes, f16::from_le_bytes),
            Elem::I64 => typed(shape, &bytes, i64::from_le_bytes),
            Elem::I32 => typed(shape, &bytes, i32::from_le_bytes),
            Elem::U8 => typed(shape, &bytes, u8::from_le_bytes),
            Elem::Bool => typed(shape, &bytes, |b: [u8; 1]| b != [0]),
        }
    }
}

fn typed<T: PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static, const N: usize>(
    shape: Vec<usize>,
    bytes: &[u8],
    read: impl Fn([u8; N]) -> T,
) -> ort::Result<DynTensor> {
    let values: Vec<T> = bytes.as_chunks().0.iter().map(|b| read(*b)).collect();
    Ok(Tensor::from_array((shape, values))?.upcast())
}

/// Where a graph is.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// In memory, complete.
    Bytes(&'a [u8]),
    /// In a file, beside its external data.
    File(&'a std::path::Path),
}

fn build(config: &EngineConfig, graph: Source<'_>) -> Result<ort::session::Session, SessionError> {
    let environment = environment(config)?;
    let model = |e: ort::Error| match classify(&e) {
        SessionError::OutOfMemory(text) => SessionError::OutOfMemory(text),
        SessionError::Unavailable(_)
        | SessionError::Model(_)
        | SessionError::Terminated
        | SessionError::Other(_) => {
            SessionError::Model(format!("ONNX Runtime refuses the graph: {e}"))
        }
    };
    let threads = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        n => n,
    };
    let prepare = || -> ort::Result<ort::session::builder::SessionBuilder> {
        Ok(ort::session::Session::builder(environment)?
            .with_intra_threads(threads)?
            // Spinning made no pass faster, and takes the cores from whoever fetches and decodes.
            .with_intra_op_spinning(false)?
            .with_deterministic_compute(config.deterministic)?)
    };
    let mut builder = match config.execution_provider {
        Provider::Cpu => prepare().map_err(model)?,
        provider @ (Provider::Cuda | Provider::Tensorrt) => {
            // Without these two a session would quietly run on the CPU.
            let strict = || -> ort::Result<ort::session::builder::SessionBuilder> {
                Ok(prepare()?
                    .with_execution_providers([cuda(config)])?
                    .with_disable_cpu_fallback()?)
            };
            if provider == Provider::Tensorrt {
                return Err(unavailable(provider, "this build has no TensorRT support"));
            }
            strict().map_err(|e| unavailable(provider, &e.to_string()))?
        }
    };
    let session = match graph {
        Source::Bytes(bytes) => builder.commit_from_memory(bytes),
        Source::File(path) => builder.commit_from_file(path),
    };
    session.map_err(model)
}

fn unavailable(provider: Provider, reason: &str) -> SessionError {
    SessionError::Unavailable(format!(
        "{} is not available: {reason}. It needs an NVIDIA driver, the GPU build of ONNX Runtime (PyPI onnxruntime-gpu) \
         and its CUDA 13 and cuDNN 9 libraries on LD_LIBRARY_PATH; to run on the CPU say engine.execution_provider = \"cpu\"",
        provider.execution_provider()
    ))
}

fn cuda(config: &EngineConfig) -> ep::ExecutionProviderDispatch {
    let mut cuda = ep::CUDA::default()
        .with_device_id(config.device_id)
        .with_tf32(config.tf32);
    if let Some(limit) = config
        .gpu_memory_limit
        .and_then(|bytes| usize::try_from(bytes).ok())
    {
        cuda = cuda.with_memory_limit(limit);
    }
    cuda.build().error_on_failure()
}

fn device_memory(
    config: &EngineConfig,
    session: &mut ort::session::Session,
) -> Result<Memory, SessionError> {
    let info = || {
        MemoryInfo::new(
            AllocationDevice::CUDA,
            config.device_id,
            AllocatorType::Device,
            MemoryType::Default,
        )
    };
    // Proves the allocator before the weights need it.
    let _allocator =
        Allocator::new(session, info().map_err(|e| classify(&e))?).map_err(|e| classify(&e))?;
    let mut scatter = Vec::new();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        scatter.push((
            dtype,
            build(config, Source::Bytes(&super::graph::scatter_graph(dtype)))?,
        ));
    }
    Ok(Memory::Device {
        info: info().map_err(|e| classify(&e))?,
        id: config.device_id,
        scatter,
    })
}

fn fill(spec: WeightSpec<'_>, memory: &Memory) -> Result<Weight, SessionError> {
    let (shape, bytes) = (spec.shape, spec.bytes);
    let values = match spec.dtype {
        Dtype::F32 => Values::F32(place(
            shape,
            bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)),
            memory,
        )?),
        Dtype::F16 => Values::F16(place(
            shape,
            bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)),
            memory,
        )?),
        Dtype::Bf16 => Values::Bf16(place(
            shape,
            bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)),
            memory,
        )?),
    };
    Ok(Weight {
        input: spec.input,
        numel: bytes.len() / spec.dtype.size(),
        values,
    })
}

fn place<T: PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static>(
    shape: Vec<i64>,
    values: impl Iterator<Item = T>,
    memory: &Memory,
) -> Result<Tensor<T>, SessionError> {
    let host = Tensor::from_array((shape, values.collect::<Vec<T>>())).map_err(|e| classify(&e))?;
    match memory {
        Memory::Host => Ok(host),
        Memory::Device { id, .. } => host
            .to(AllocationDevice::CUDA, *id)
            .map_err(|e| classify(&e)),
    }
}

fn put<T: PrimitiveTensorElementType + std::fmt::Debug>(
    tensor: &mut Tensor<T>,
    positions: &[u32],
    values: &[f32],
    narrow: impl Fn(f32) -> T,
) {
    let (_, slots) = tensor.extract_tensor_mut();
    for (position, value) in positions.iter().zip(values) {
        slots[*position as usize] = narrow(*value);
    }
}

fn same_bytes<T: PrimitiveTensorElementType + Copy + std::fmt::Debug, const N: usize>(
    tensor: &Tensor<T>,
    bytes: &[u8],
    to_bytes: impl Fn(T) -> [u8; N],
) -> bool {
    let (_, values) = tensor.extract_tensor();
    values.len() * N == bytes.len()
        && values
            .iter()
            .zip(bytes.as_chunks::<N>().0)
            .all(|(v, b)| to_bytes(*v) == *b)
}

/// A tiny session on the device writes the entries; its output becomes the new scratch weight.
fn scatter_on_device(
    weight: &mut Weight,
    positions: &[u32],
    values: &[f32],
    info: &MemoryInfo<'static>,
    id: i32,
    sessions: &mut [(Dtype, ort::session::Session)],
) -> Result<(), SessionError> {
    let dtype = match &weight.values {
        Values::F32(_) => Dtype::F32,
        Values::F16(_) => Dtype::F16,
        Values::Bf16(_) => Dtype::Bf16,
    };
    let Some((_, session)) = sessions.iter_mut().find(|(d, _)| *d == dtype) else {
        return Err(SessionError::Other(format!(
            "no scatter session for {}",
            dtype.as_str()
        )));
    };
    match &mut weight.values {
        Values::F32(tensor) => scatter_into(session, tensor, positions, values.to_vec(), info, id),
        Values::F16(tensor) => scatter_into(
            session,
            tensor,
            positions,
            values.iter().map(|v| f16::from_f32(*v)).collect(),
            info,
            id,
        ),
        Values::Bf16(tensor) => scatter_into(
            session,
            tensor,
            positions,
            values.iter().map(|v| bf16::from_f32(*v)).collect(),
            info,
            id,
        ),
    }
}

fn scatter_into<T: PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static>(
    session: &mut ort::session::Session,
    tensor: &mut Tensor<T>,
    positions: &[u32],
    values: Vec<T>,
    info: &MemoryInfo<'static>,
    _id: i32,
) -> Result<(), SessionError> {
    let shape: Vec<i64> = tensor.shape().iter().copied().collect();
    let indices = coordinates(positions, &shape);
    let count = positions.len();
    let mut run = || -> ort::Result<Tensor<T>> {
        let indices = Tensor::from_array(([count, shape.len()], indices.clone()))?;
        let updates = Tensor::from_array(([count], values.clone()))?;
        let mut binding = session.create_binding()?;
        binding.bind_input("data", tensor)?;
        binding.bind_input("indices", &indices)?;
        binding.bind_input("updates", &updates)?;
        binding.bind_output_to_device("output", info)?;
        let mut outputs = session.run_binding(&binding)?;
        let output = outputs
            .remove("output")
            .ok_or_else(|| ort::Error::new("scatter gave no output"))?;
        output.downcast()
    };
    let written = run().map_err(|e| classify(&e))?;
    *tensor = written;
    Ok(())
}

/// Row-major positions as coordinates, one row each.
fn coordinates(positions: &[u32], shape: &[i64]) -> Vec<i64> {
    let mut coordinates = vec![0; positions.len() * shape.len()];
    for (row, position) in coordinates
        .chunks_exact_mut(shape.len().max(1))
        .zip(positions)
    {
        let mut rest = i64::from(*position);
        for (slot, dimension) in row.iter_mut().zip(shape).rev() {
            *slot = rest % dimension;
            rest /= dimension;
        }
    }
    coordinates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_become_coordinates() {
        assert_eq!(coordinates(&[0, 5, 7], &[2, 4]), [0, 0, 1, 1, 1, 3]);
    }
}
