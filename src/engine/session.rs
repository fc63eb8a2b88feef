//! The only place that knows ONNX Runtime: loading the library, making a session on exactly the
//! provider that was asked for, writing weights in place, running, and naming its errors.

mod scratch;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use half::f16;
use ort::ep;
use ort::memory::AllocationDevice;
use ort::session::{NoSelectedOutputs, RunOptions, SessionInputValue};
use ort::value::{DynTensor, PrimitiveTensorElementType, Tensor};

use crate::config::{EngineConfig, Provider};
use crate::model::onnx::OUTPUT;
use crate::model::tensor::Dtype;
use crate::model::tensor::Elem;
use scratch::{Device, Memory, Names, Scratch};

/// `kOrtSessionOptionsModelExternalInitializersFileFolderPath`.
const EXTERNAL_FOLDER: &str = "session.model_external_initializers_file_folder_path";

/// What went wrong in ONNX Runtime, as a decision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The library, the provider or the device is not there.
    #[error("{0}")]
    Unavailable(String),
    /// The provider lacks a kernel that the graph needs; another may have it.
    #[error("{0}")]
    NoKernel(String),
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

/// ONNX Runtime has no error code for the first two, and ort none for the third: its texts are
/// matched, as measured for 1.31.
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
    } else if text.contains("Could not find an implementation") {
        SessionError::NoKernel(text)
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
    pub fn constant(&self) -> crate::model::onnx::Constant<'_> {
        crate::model::onnx::Constant {
            name: &self.input,
            shape: &self.shape,
            dtype: self.dtype,
            bytes: &self.bytes,
        }
    }
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

/// A session whose weights are inputs, with one scratch tensor per weight.
pub struct Session {
    inner: ort::session::Session,
    weights: Vec<Scratch>,
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
    let environment = builder
        .with_name("scorer")
        .with_telemetry(false)
        .build()
        .map_err(|e| fail(&e))?;
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
        let inner = build(config, graph)?;
        let mut memory = match config.execution_provider {
            Provider::Cpu => Memory::Host,
            Provider::Cuda | Provider::Tensorrt => device(config, &inner, &weights)?,
        };
        let weights = weights
            .into_iter()
            .map(|spec| memory.fill(spec))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            inner,
            weights,
            memory,
            terminator: Terminator::default(),
        })
    }

    /// Keeps the weights in memory that stands in for a device's, to be filled anew; each of the graphs
    /// that write and read it is replaced.
    #[cfg(test)]
    pub(super) fn stand_in(
        &mut self,
        config: &EngineConfig,
        dtypes: &[Dtype],
        replaced: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Result<(), SessionError> {
        let make = |graph: &[u8]| build(config, Source::Bytes(&replaced(graph)));
        let names = Names::stand_in();
        let device = Device::new(&self.inner, &names, dtypes.iter().copied(), make)?;
        self.memory = Memory::Device(Box::new(device));
        Ok(())
    }

    /// Fills a scratch weight with other bytes, as many as it holds.
    ///
    /// # Errors
    /// When the device fails or memory is short; the weight holds what it held then.
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

    /// Whether a scratch weight holds exactly the given bytes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn equals(&mut self, weight: usize, bytes: &[u8]) -> Result<bool, SessionError> {
        self.memory.equals(&self.weights[weight], bytes)
    }

    /// Whether a scratch weight holds exactly the given values, already rounded to its type.
    ///
    /// # Errors
    /// When the device fails.
    pub fn holds(&mut self, weight: usize, values: &[f32]) -> Result<bool, SessionError> {
        self.memory.holds(&self.weights[weight], values)
    }

    /// Where the weights are and how they are written, in words.
    pub fn memory(&self) -> &'static str {
        self.memory.describe()
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
            inputs.push((&weight.input, weight.feed()));
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
    /// In memory, with its external data in this folder.
    Beside(&'a [u8], &'a std::path::Path),
    /// In a file, beside its external data.
    File(&'a std::path::Path),
}

fn build(config: &EngineConfig, graph: Source<'_>) -> Result<ort::session::Session, SessionError> {
    let environment = environment(config)?;
    let model = |e: ort::Error| match classify(&e) {
        SessionError::OutOfMemory(text) => SessionError::OutOfMemory(text),
        SessionError::NoKernel(text) => SessionError::NoKernel(text),
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
                let why = "TensorRT builds the weights into its engine, and here a candidate must be able to change them; use cuda";
                return Err(unavailable(provider, why));
            }
            strict().map_err(|e| unavailable(provider, &e.to_string()))?
        }
    };
    let session = match graph {
        Source::Bytes(bytes) => builder.commit_from_memory(bytes),
        // Without the folder, files would be looked for in the working directory.
        Source::Beside(bytes, folder) => builder
            .with_config_entry(EXTERNAL_FOLDER, folder.to_string_lossy())
            .map_err(|e| model(e.into()))?
            .commit_from_memory(bytes),
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
    if config.deterministic {
        // The search by trial may choose another algorithm in every process.
        cuda = cuda.with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Default);
    }
    if let Some(limit) = config
        .gpu_memory_limit
        .and_then(|bytes| usize::try_from(bytes).ok())
    {
        cuda = cuda.with_memory_limit(limit);
    }
    cuda.build().error_on_failure()
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
    let make = |graph: &[u8]| build(config, Source::Bytes(graph));
    let device = Device::new(session, &names, dtypes, make)?;
    Ok(Memory::Device(Box::new(device)))
}
