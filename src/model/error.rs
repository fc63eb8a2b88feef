//! Errors in packages.

use std::fmt::Display;
use std::path::Path;

use super::onnx::GraphError;

/// An error in a package: names the file or field, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PackageError(pub String);

impl PackageError {
    /// Something that is wrong with a file or a folder.
    pub(super) fn at(path: &Path, why: impl Display) -> Self {
        Self(format!("{}: {why}", path.display()))
    }
}

impl From<GraphError> for PackageError {
    fn from(error: GraphError) -> Self {
        Self(error.to_string())
    }
}

pub(super) fn require(sound: bool, problem: String) -> Result<(), PackageError> {
    sound.then_some(()).ok_or(PackageError(problem))
}
