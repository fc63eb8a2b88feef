//! A manifest on this disk, and its signature beside it.

use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use crate::cli::Fault;
use crate::protocol::signature::SigningKey;
use crate::protocol::update_manifest::{self, UpdateManifest};

/// What the signature's name adds to the manifest's.
const SIGNATURE: &str = ".sig";

/// Reads a manifest; none if there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<UpdateManifest>, Fault> {
    let at = |why: &dyn std::fmt::Display| Fault::data(format!("{}: {why}", path.display()));
    match std::fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(&error)),
        Ok(bytes) => update_manifest::decode(&bytes)
            .map(Some)
            .map_err(|e| at(&e)),
    }
}

/// Reads the key that signs.
pub(super) fn key(path: &Path) -> Result<SigningKey, Fault> {
    let at = |why: &dyn std::fmt::Display| Fault::data(format!("--key {}: {why}", path.display()));
    let pem = std::fs::read(path).map_err(|e| at(&e))?;
    SigningKey::parse(&pem).map_err(|e| at(&e))
}

/// What is to be known about a manifest's signature.
#[derive(Debug)]
pub(super) enum Signature {
    /// There is none.
    None,
    /// The file is the signature of the manifest before.
    Outdated(PathBuf),
    /// The file is that of this manifest, by the key with this public part.
    Made(PathBuf, String),
}

/// Writes the manifest, if every worker could read it, and signs it.
pub(super) fn write(
    path: &Path,
    manifest: &UpdateManifest,
    key: Option<&SigningKey>,
) -> Result<Signature, Fault> {
    let mut bytes = serde_json::to_vec_pretty(manifest).map_err(Fault::internal)?;
    bytes.push(b'\n');
    let sound = update_manifest::decode(&bytes);
    sound.map_err(|why| Fault::data(format!("the manifest would be refused: {why}")))?;
    let beside = with_end(path, SIGNATURE);
    let Some(key) = key else {
        replace(path, &bytes)?;
        return Ok(match beside.exists() {
            true => Signature::Outdated(beside),
            false => Signature::None,
        });
    };
    let signature = format!("{}\n", key.sign(&bytes));
    replace(&beside, signature.as_bytes())?;
    replace(path, &bytes)?;
    Ok(Signature::Made(beside, key.public()))
}

/// Readers see the old file or the new one, whole.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    let beside = with_end(path, ".part");
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    });
    written.map_err(|error| {
        // If it was not made, there is nothing to remove.
        drop(std::fs::remove_file(&beside));
        Fault::data(format!("{}: {error}", path.display()))
    })
}

fn with_end(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}
