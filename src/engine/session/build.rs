//! Building a session on the configured execution provider.

use ort::ep;
use ort::session::builder::SessionBuilder;

use super::SessionError;
use super::library::environment;
use crate::config::{EngineConfig, Provider};

/// `kOrtSessionOptionsModelExternalInitializersFileFolderPath`.
const EXTERNAL_FOLDER: &str = "session.model_external_initializers_file_folder_path";

/// Where a session reads its graph.
#[derive(Debug, Clone, Copy)]
pub(super) enum GraphSource<'a> {
    /// Memory; the graph has no external data.
    Bytes(&'a [u8]),
    /// Memory, with the external data in this folder.
    Beside(&'a [u8], &'a std::path::Path),
}

pub(super) fn build(
    config: &EngineConfig,
    graph: GraphSource<'_>,
) -> Result<ort::session::Session, SessionError> {
    let mut builder = builder(config)?;
    let session = match graph {
        GraphSource::Bytes(bytes) => builder.commit_from_memory(bytes),
        // Without the folder, ONNX Runtime looks for the files in the working directory.
        GraphSource::Beside(bytes, folder) => builder
            .with_config_entry(EXTERNAL_FOLDER, folder.to_string_lossy())
            .map_err(|e| refused(e.into()))?
            .commit_from_memory(bytes),
    };
    session.map_err(refused)
}

fn refused(error: ort::Error) -> SessionError {
    let text = format!("ONNX Runtime refuses the graph: {error}");
    match SessionError::from(error) {
        kept @ (SessionError::OutOfMemory(_) | SessionError::NoKernel(_)) => kept,
        SessionError::Unavailable(_)
        | SessionError::Model(_)
        | SessionError::Terminated
        | SessionError::Other(_) => SessionError::Model(text),
    }
}

/// A builder for the configured provider, and no other.
fn builder(config: &EngineConfig) -> Result<SessionBuilder, SessionError> {
    let environment = environment(config)?;
    let threads = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        n => n,
    };
    let prepare = || -> ort::Result<SessionBuilder> {
        Ok(ort::session::Session::builder(environment)?
            .with_intra_threads(threads)?
            // Spinning made no pass faster, and takes cores from fetching and decoding.
            .with_intra_op_spinning(false)?
            .with_deterministic_compute(config.deterministic)?)
    };
    // Without these two settings a session would silently run on the CPU.
    let strict = || -> ort::Result<SessionBuilder> {
        Ok(prepare()?
            .with_execution_providers([cuda(config)])?
            .with_disable_cpu_fallback()?)
    };
    match config.execution_provider {
        Provider::Cpu => prepare().map_err(refused),
        Provider::Cuda => strict().map_err(|e| unavailable(Provider::Cuda, &e.to_string())),
        Provider::Tensorrt => {
            let why = "TensorRT builds the weights into its engine, and here a candidate must be able to change them; use cuda";
            Err(unavailable(Provider::Tensorrt, why))
        }
    }
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
        // The exhaustive search may choose a different algorithm in every process.
        cuda = cuda.with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Default);
    }
    let limit = config.gpu_memory_limit;
    if let Some(limit) = limit.and_then(|bytes| usize::try_from(bytes).ok()) {
        cuda = cuda.with_memory_limit(limit);
    }
    cuda.build().error_on_failure()
}
