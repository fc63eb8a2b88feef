//! A package's files: opened, mapped, and compared with their digests.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::error::{PackageError, require};

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
    let problem = format!("{file:?}: leads out of the package");
    require(is_plain(file), problem).map(|()| dir.join(file))
}

/// Whether a path consists of names alone.
pub(super) fn is_plain(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    !path.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
}

pub(super) fn look(path: &Path) -> Result<Seen, PackageError> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path).map_err(|e| PackageError::at(path, e))?;
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
    let kind = match found.is_dir() {
        true => "a folder",
        false => "a pipe, a socket or a device",
    };
    let why = format!("is {kind}; give a regular file");
    Err(PackageError::at(path, why))
}

/// The names of what a folder holds, in order.
pub(super) fn names_in(folder: &Path) -> Result<Vec<OsString>, PackageError> {
    let entries = std::fs::read_dir(folder).and_then(|entries| {
        let names = entries.map(|entry| Ok(entry?.file_name()));
        names.collect::<std::io::Result<Vec<_>>>()
    });
    let mut names = entries.map_err(|e| PackageError::at(folder, e))?;
    names.sort();
    Ok(names)
}

/// Opens a regular file.
pub(crate) fn open(path: &Path) -> Result<File, PackageError> {
    let fail = |e: std::io::Error| PackageError::at(path, e);
    check_regular(path, &std::fs::metadata(path).map_err(fail)?)?;
    File::open(path).map_err(fail)
}

/// Maps a file read-only.
pub(crate) fn map(path: &Path) -> Result<Bytes, PackageError> {
    let fail = |e: std::io::Error| PackageError::at(path, e);
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
    let path = path.display();
    let problem = format!("{path}: its SHA-256 is {found}, it should be {expected}; copy it again");
    require(found == expected, problem)
}
