//! A package's files: opened, mapped, and compared with their digests.

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::manifest::PackageError;

/// Metadata that changes with every write to a file and with every replacement.
pub(super) type Seen = (u64, u64, i64, i64, i64, i64);

/// A file's metadata when it was read.
#[derive(Debug, Clone)]
pub(super) struct Stamp {
    pub(super) path: PathBuf,
    pub(super) sha256: String,
    pub(super) seen: Seen,
}

/// Joins a file name of the manifest to the package's folder; a path that leaves it is refused.
pub(super) fn inside(dir: &Path, file: &str) -> Result<PathBuf, PackageError> {
    let relative = Path::new(file);
    let plain = !file.is_empty()
        && relative
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
    if plain {
        Ok(dir.join(relative))
    } else {
        Err(PackageError(format!("{file:?}: leads out of the package")))
    }
}

pub(super) fn look(path: &Path) -> Result<Seen, PackageError> {
    use std::os::unix::fs::MetadataExt;
    let found =
        std::fs::metadata(path).map_err(|e| PackageError(format!("{}: {e}", path.display())))?;
    Ok((
        found.ino(),
        found.len(),
        found.mtime(),
        found.mtime_nsec(),
        found.ctime(),
        found.ctime_nsec(),
    ))
}

/// Checks that this is a regular file: opening a pipe could block forever.
pub(crate) fn check_regular(path: &Path, found: &std::fs::Metadata) -> Result<(), PackageError> {
    if found.is_file() {
        return Ok(());
    }
    let kind = if found.is_dir() {
        "a folder"
    } else {
        "a pipe, a socket or a device"
    };
    let message = format!("{}: is {kind}; give a regular file", path.display());
    Err(PackageError(message))
}

/// Opens a regular file.
pub(crate) fn open(path: &Path) -> Result<File, PackageError> {
    let fail = |e: std::io::Error| PackageError(format!("{}: {e}", path.display()));
    check_regular(path, &std::fs::metadata(path).map_err(fail)?)?;
    File::open(path).map_err(fail)
}

/// Maps a file read-only.
pub(crate) fn map(path: &Path) -> Result<Bytes, PackageError> {
    let fail = |e: std::io::Error| PackageError(format!("{}: {e}", path.display()));
    let file = open(path)?;
    if file.metadata().map_err(fail)?.len() == 0 {
        return Ok(Bytes::new());
    }
    #[expect(
        unsafe_code,
        reason = "packages are immutable by contract; a later change is package_changed"
    )]
    // SAFETY: the mapping is only read; a package's files are never written in place.
    let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
    Ok(Bytes::from_owner(map))
}

pub(super) fn map_checked(path: &Path, sha256: &str) -> Result<Bytes, PackageError> {
    let bytes = map(path)?;
    compare_digests(path, &hex::encode(Sha256::digest(&bytes)), sha256)?;
    Ok(bytes)
}

pub(super) fn compare_digests(
    path: &Path,
    found: &str,
    expected: &str,
) -> Result<(), PackageError> {
    if found == expected {
        return Ok(());
    }
    Err(PackageError(format!(
        "{}: its SHA-256 is {found}, it should be {expected}; copy it again",
        path.display()
    )))
}
