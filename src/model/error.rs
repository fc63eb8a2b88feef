//! Errors in packages.

/// An error in a package: names the file or field, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PackageError(pub String);

pub(super) fn require(sound: bool, problem: String) -> Result<(), PackageError> {
    if sound {
        Ok(())
    } else {
        Err(PackageError(problem))
    }
}
