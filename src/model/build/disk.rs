//! Writing the files of a package, each with its digest.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::model::manifest::{FileDigest, Manifest, PackageError};
use crate::model::package::MANIFEST;
use crate::model::tensor::Dtype;
use crate::model::weights_file::{self, Stored};

/// Names of a package's files, and of the folder of its shards.
pub(super) const GRAPH: &str = "model.onnx";
pub(super) const WEIGHTS: &str = "weights.safetensors";
pub(super) const SHARDS: &str = "shards";

/// Creates a folder, but not its parents: a removed staging folder must not come back.
pub(super) fn make_folder(folder: &Path) -> Result<(), PackageError> {
    match std::fs::create_dir(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(PackageError::at(folder, e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

pub(super) fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Writes a file of a package.
///
/// # Errors
/// On an I/O error.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<FileDigest, PackageError> {
    if let Some(parent) = path.parent() {
        make_folder(parent)?;
    }
    std::fs::write(path, bytes).map_err(|e| PackageError::at(path, e))?;
    Ok(FileDigest {
        file: name_of(path),
        sha256: hex::encode(Sha256::digest(bytes)),
    })
}

/// A file's SHA-256, read in parts: a mapped file would count as memory.
pub(super) fn digest(path: &Path) -> Result<String, PackageError> {
    let mut file = File::open(path).map_err(|e| PackageError::at(path, e))?;
    let (mut hash, mut part) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file
            .read(&mut part)
            .map_err(|e| PackageError::at(path, e))?
        {
            0 => return Ok(hex::encode(hash.finalize())),
            read => hash.update(&part[..read]),
        }
    }
}

/// Writes the manifest, which says that the package is complete.
///
/// # Errors
/// On an I/O error.
pub(crate) fn write_manifest(folder: &Path, manifest: &Manifest) -> Result<(), PackageError> {
    let json = serde_json::to_vec_pretty(manifest).map_err(|e| PackageError(e.to_string()))?;
    write(&folder.join(MANIFEST), &json).map(drop)
}

/// Writes weights as a safetensors file.
///
/// # Errors
/// On an I/O error.
pub(crate) fn write_tensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>,
) -> Result<FileDigest, PackageError> {
    let stored = tensors.map(|(name, dtype, shape, bytes)| {
        let stored = Stored {
            dtype,
            wanted: dtype,
            shape,
            bytes,
        };
        (name, stored)
    });
    weights_file::write(path, stored).map_err(|e| PackageError::at(path, e))?;
    Ok(FileDigest {
        file: name_of(path),
        sha256: digest(path)?,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The names of what a folder holds.
    pub(in crate::model::build) fn holds(folder: &Path) -> BTreeSet<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|e| name_of(&e.unwrap().path())).collect()
    }
}
