//! Loading the ONNX Runtime library.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::GlobalThreadPoolOptions;
use sha2::{Digest, Sha256};

use super::{SessionError, places};
use crate::config::{EngineConfig, Provider};

/// The library's path: from the configuration, else `ORT_DYLIB_PATH`, else one of [`places::runtime`].
fn library(config: &EngineConfig) -> Result<PathBuf, SessionError> {
    if let Some(path) = &config.onnxruntime {
        return Ok(path.clone());
    }
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH") {
        return Ok(path.into());
    }
    let binary = std::env::current_exe().map_err(|e| e.to_string());
    let found = binary.and_then(|path| places::runtime(path.parent().unwrap_or(&path)));
    found.map_err(|why| {
        SessionError::Unavailable(format!(
            "ONNX Runtime was not found: {why}; install the Python package onnxruntime into the same environment as \
             scorer, or set engine.onnxruntime or ORT_DYLIB_PATH to the library (ops/setup fetches it)"
        ))
    })
}

/// The threads that the sessions of a process share. With some of its own for each, a graph of many parts would
/// have more threads than a container may have.
static THREADS: OnceLock<usize> = OnceLock::new();

/// Whether the threads that sessions share are as many as this configuration wants.
pub(super) fn shares_threads(config: &EngineConfig) -> bool {
    THREADS.get() == Some(&threads(config))
}

fn pool(config: &EngineConfig) -> ort::Result<GlobalThreadPoolOptions> {
    GlobalThreadPoolOptions::default()
        .with_intra_threads(threads(config))?
        // Nodes run one after the other.
        .with_inter_threads(1)?
        // Spinning made no pass faster, and takes cores from fetching and decoding.
        .with_spin_control(false)
}

/// The threads that compute on the host.
pub fn threads(config: &EngineConfig) -> usize {
    match config.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        n => n,
    }
}

/// The environment of the process. A failed start is tried again on the next call.
pub(super) fn environment(
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
        let message = format!("ONNX Runtime: {} is not a file", path.display());
        return Err(SessionError::Unavailable(message));
    }
    let fail = |e: &dyn std::fmt::Display| {
        let path = path.display();
        SessionError::Unavailable(format!("ONNX Runtime cannot be loaded from {path}: {e}"))
    };
    let builder = ort::init_from(&path).map_err(|e| fail(&e))?;
    let builder = builder.with_name("scorer").with_telemetry(false);
    let builder = builder.with_global_thread_pool(pool(config).map_err(|e| fail(&e))?);
    let environment = builder.build().map_err(|e| fail(&e))?;
    THREADS.get_or_init(|| threads(config));
    Ok(ENVIRONMENT.get_or_init(|| environment))
}

/// The plugin library of the provider `webgpu`: from the configuration, else beside ONNX Runtime, else in
/// its Python package beside that of ONNX Runtime; nowhere else, for a library runs as the worker.
fn webgpu_plugin(config: &EngineConfig) -> Result<PathBuf, String> {
    let absolute = |path: &Path| path.canonicalize().ok().filter(|path| path.is_file());
    if let Some(path) = &config.webgpu_plugin {
        let place = path.display();
        return absolute(path)
            .ok_or_else(|| format!("engine.webgpu_plugin: {place} is not a file"));
    }
    let runtime = library(config).map_err(|e| e.to_string())?;
    let runtime =
        absolute(&runtime).ok_or_else(|| format!("{} is not a file", runtime.display()))?;
    let folder = runtime.parent().unwrap_or(&runtime);
    places::webgpu(folder)
        .find_map(|place| absolute(&place))
        .ok_or_else(|| {
            format!(
                "its plugin was not found: set engine.webgpu_plugin to {}, or put that beside {}",
                places::WEBGPU,
                runtime.display()
            )
        })
}

/// Whether a file of this name is beside ONNX Runtime.
pub(super) fn beside_runtime(config: &EngineConfig, name: &str) -> Result<bool, String> {
    let runtime = library(config).map_err(|e| e.to_string())?;
    let found = runtime.canonicalize();
    let found = found.map_err(|e| format!("{}: {e}", runtime.display()))?;
    Ok(found.with_file_name(name).exists())
}

/// Loads the plugin library of the provider `webgpu`, once for the process.
pub(super) fn register_webgpu(config: &EngineConfig) -> Result<(), String> {
    static LOADED: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let path = webgpu_plugin(config)?;
    match &*loaded {
        Some(first) if *first == path => Ok(()),
        Some(first) => Err(format!(
            "this process has its plugin from {}, and cannot load another from {}",
            first.display(),
            path.display()
        )),
        None => {
            let environment = environment(config).map_err(|e| e.to_string())?;
            let registered = environment.register_ep_library("scorer-webgpu", &path);
            registered
                .map_err(|e| format!("its plugin {} cannot be loaded: {e}", path.display()))?;
            *loaded = Some(path);
            Ok(())
        }
    }
}

/// Loads NVIDIA's libraries out of their Python packages, if they are there: the loader itself would look for them on
/// `LD_LIBRARY_PATH`. What is loaded already is not loaded again.
pub(super) fn load_cuda(config: &EngineConfig) -> Result<(), String> {
    let runtime = library(config).map_err(|e| e.to_string())?;
    let found = runtime.canonicalize();
    let runtime = found.map_err(|e| format!("{}: {e}", runtime.display()))?;
    let folder = runtime.parent().unwrap_or(&runtime);
    places::cuda(folder).iter().try_for_each(|path| {
        let loaded = ort::util::preload_dylib(path);
        loaded.map_err(|e| format!("{} cannot be loaded: {e}", path.display()))
    })
}

/// The plugin library that the configured provider comes from, if it comes from one.
pub fn plugin(config: &EngineConfig) -> Option<Plugin> {
    match config.execution_provider {
        Provider::Cpu | Provider::Cuda => None,
        Provider::WebGpu => {
            let path = webgpu_plugin(config).ok()?;
            let mut hash = Sha256::new();
            std::io::copy(&mut std::fs::File::open(&path).ok()?, &mut hash).ok()?;
            let sha256 = format!("{:x}", hash.finalize());
            Some(Plugin { path, sha256 })
        }
    }
}

/// A provider's library.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Plugin {
    /// Where it lies.
    pub path: PathBuf,
    /// Hex SHA-256 of its contents.
    pub sha256: String,
}

/// The loaded library's build, whatever its file is called; `None` if it cannot be loaded.
pub fn library_build(config: &EngineConfig) -> Option<&'static str> {
    environment(config).ok()?;
    Some(ort::info())
}

/// The loaded library's version; `None` if it cannot be loaded.
pub fn library_version(config: &EngineConfig) -> Option<String> {
    environment(config).ok()?;
    let info = ort::info();
    // The build info lacks the version, so take it from the file name if that has one.
    let path = library(config).ok()?.canonicalize().ok()?;
    let name = path.file_name()?.to_string_lossy();
    let version = name.strip_prefix("libonnxruntime.so.");
    Some(version.unwrap_or(info).to_owned())
}
