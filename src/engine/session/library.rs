//! Loading the ONNX Runtime library.

use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use super::SessionError;
use crate::config::EngineConfig;

/// The library's path: from the configuration, else `ORT_DYLIB_PATH`, else beside the binary.
fn library(config: &EngineConfig) -> Result<PathBuf, SessionError> {
    if let Some(path) = &config.onnxruntime {
        return Ok(path.clone());
    }
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH") {
        return Ok(path.into());
    }
    let binary = std::env::current_exe().unwrap_or_default();
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libonnxruntime.so")
    };
    let beside = binary.parent().and_then(|dir| {
        let mut paths = std::fs::read_dir(dir).ok()?.flatten().map(|e| e.path());
        paths.find(is_library)
    });
    beside.ok_or_else(|| {
        SessionError::Unavailable(
            "ONNX Runtime was not found: set engine.onnxruntime or ORT_DYLIB_PATH to libonnxruntime.so, \
             or put it beside the binary (ops/setup fetches it)"
                .into(),
        )
    })
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
    let environment = builder.build().map_err(|e| fail(&e))?;
    Ok(ENVIRONMENT.get_or_init(|| environment))
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
