//! A manifest on this disk, and its signature beside it.

use std::fs::{File, Permissions, TryLockError};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::cli::{Fault, complain};
use crate::protocol::signature::SigningKey;
use crate::protocol::update_manifest::{self, MAX_BYTES, UpdateManifest};

/// What the signature's name adds to the manifest's.
const SIGNATURE: &str = ".sig";

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

/// A manifest's file. No other command changes it while this lives.
#[derive(Debug)]
pub(super) struct Published {
    path: PathBuf,
    _lock: File,
}

impl Published {
    /// Opens the manifest at this path and reads it, if there is one.
    pub(super) fn open(path: &Path) -> Result<(Self, Option<UpdateManifest>), Fault> {
        let at = |why: &dyn std::fmt::Display| Fault::data(format!("{}: {why}", path.display()));
        let locked = lock(folder(path))
            .map_err(|error| Fault::data(format!("{}: {error}", folder(path).display())))?;
        let manifest = match std::fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(at(&error)),
            Ok(bytes) => Some(update_manifest::decode(&bytes).map_err(|e| at(&e))?),
        };
        let (path, _lock) = (path.to_owned(), locked);
        Ok((Self { path, _lock }, manifest))
    }

    /// Writes the manifest, if every worker could read it, and signs it.
    pub(super) fn write(
        self,
        manifest: &UpdateManifest,
        key: Option<&SigningKey>,
    ) -> Result<Signature, Fault> {
        let bytes = encode(manifest)?;
        let mut beside = self.path.as_os_str().to_owned();
        beside.push(SIGNATURE);
        let beside = PathBuf::from(beside);
        let Some(key) = key else {
            Staged::write(&self.path, &bytes)?.publish()?;
            return Ok(match beside.exists() {
                true => Signature::Outdated(beside),
                false => Signature::None,
            });
        };
        // Both are on the disk before either is seen.
        let signature = Staged::write(&beside, format!("{}\n", key.sign(&bytes)).as_bytes())?;
        let staged = Staged::write(&self.path, &bytes)?;
        signature.publish()?;
        staged.publish().map_err(|fault| {
            let (exit, why) = (fault.exit, fault.message);
            let beside = beside.display();
            Fault::new(exit, format!("{why}; {beside} belongs to the manifest that could not be written: run this again"))
        })?;
        Ok(Signature::Made(beside, key.public()))
    }
}

/// Waits until no other command changes what is in a folder.
fn lock(folder: &Path) -> std::io::Result<File> {
    let file = File::open(folder)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            complain(&format!(
                "note: waiting for another command that writes in {}",
                folder.display()
            ));
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    Ok(file)
}

/// The folder that a file is in.
pub(super) fn folder(path: &Path) -> &Path {
    let folder = path.parent();
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// As people read it, unless no worker would read so much.
fn encode(manifest: &UpdateManifest) -> Result<Vec<u8>, Fault> {
    let mut bytes = serde_json::to_vec_pretty(manifest).map_err(Fault::internal)?;
    if bytes.len() as u64 >= MAX_BYTES {
        bytes = serde_json::to_vec(manifest).map_err(Fault::internal)?;
    }
    bytes.push(b'\n');
    let sound = update_manifest::decode(&bytes);
    sound.map_err(|why| Fault::data(format!("the manifest would be refused: {why}")))?;
    Ok(bytes)
}

/// A file that is complete, and not yet in its place.
struct Staged {
    file: NamedTempFile,
    place: PathBuf,
}

impl Staged {
    fn write(path: &Path, bytes: &[u8]) -> Result<Self, Fault> {
        let written = || -> std::io::Result<Self> {
            // A link stays one.
            let place = match path.is_symlink() {
                true => path.canonicalize()?,
                false => path.to_owned(),
            };
            // As the umask has it, or as the file was.
            let permissions = Permissions::from_mode(0o666);
            let mut made = tempfile::Builder::new();
            let mut file = made.permissions(permissions).tempfile_in(folder(&place))?;
            if let Ok(before) = place.metadata() {
                file.as_file().set_permissions(before.permissions())?;
            }
            file.write_all(bytes)?;
            file.as_file().sync_all()?;
            Ok(Self { file, place })
        };
        written().map_err(|error| Fault::data(format!("{}: {error}", path.display())))
    }

    /// Readers see the old file or the new one, whole.
    fn publish(self) -> Result<(), Fault> {
        let place = self.place.display().to_string();
        let moved = self.file.persist(&self.place);
        moved.map_err(|e| Fault::data(format!("{place}: {}", e.error)))?;
        Ok(())
    }
}
