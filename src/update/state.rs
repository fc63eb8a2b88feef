//! The worker's own folder: the weights of the version that it serves and of the one before, partial
//! downloads, and a journal that says which is which. The journal alone decides, and is replaced
//! atomically; whatever else a crash leaves behind is swept.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::manifest::PackageError;
use crate::model::package::{Package, WeightsFile};
use crate::protocol::message::V1;
use crate::protocol::update_manifest::Canary;

const JOURNAL: &str = "journal.json";
const LOCK: &str = "lock";
/// The extension of a partial download.
const PART: &str = "part";

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process holds the folder.
    #[error("{}: another process holds it; is a worker running under the same worker.id?", .0.display())]
    Locked(PathBuf),
    /// The disk failed.
    #[error("{}: {error}", path.display())]
    Disk {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
}

impl StateError {
    fn disk(path: &Path, error: std::io::Error) -> Self {
        Self::Disk {
            path: path.to_owned(),
            error,
        }
    }
}

/// A version that was tried and did not prove itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The version.
    pub version: u64,
    /// Why.
    pub why: String,
    /// When, unix milliseconds.
    pub at_ms: u64,
    /// SHA-256 of the manifest that named it; when the manifest changes, it is tried again.
    pub manifest_sha256: String,
}

/// Weights that are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Kept {
    version: u64,
    file: String,
    sha256: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    canary: Option<Canary>,
}

/// `journal.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Journal {
    v: V1,
    /// The root of the package that these weights derive from; empty before the first.
    root: String,
    /// The weights that are served; none for the package's own.
    current: Option<Kept>,
    previous: Option<Kept>,
    refused: Option<Refused>,
}

/// A worker's folder, locked as long as this value lives.
#[derive(Debug)]
pub struct StateDir {
    folder: PathBuf,
    _lock: File,
    journal: Mutex<Journal>,
}

impl StateDir {
    /// Locks the folder, and creates it if it is missing.
    ///
    /// # Errors
    /// When another process holds it, or the disk fails.
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        let disk = |e| StateError::disk(folder, e);
        std::fs::create_dir_all(folder).map_err(disk)?;
        let lock = File::create(folder.join(LOCK)).map_err(disk)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StateError::Locked(folder.to_owned())),
            Err(TryLockError::Error(e)) => return Err(disk(e)),
        }
        Ok(Self {
            journal: Mutex::new(read_journal(folder).map_err(disk)?),
            folder: folder.to_owned(),
            _lock: lock,
        })
    }

    /// Loads a package with the weights that were committed last and are sound, or with its own.
    ///
    /// # Errors
    /// Names the bad file, in the package or in this folder.
    pub fn load(&self, package: &Path, subset: bool) -> Result<Package, PackageError> {
        let (manifest, package_id) = Package::read_manifest(package)?;
        let based = self.base_on(&Package::root(&manifest, &package_id));
        based.map_err(|e| PackageError(format!("model.state_dir: {e}")))?;
        Package::load(package, subset, &self.kept())
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops what was kept for another package, and what a crash left behind.
    fn base_on(&self, root: &str) -> Result<(), StateError> {
        let before = self.journal().root.clone();
        if before != root {
            if !before.is_empty() {
                tracing::warn!(
                    "the package has changed: versions based on the old one are dropped"
                );
            }
            let empty = Journal {
                root: root.to_owned(),
                ..Journal::default()
            };
            self.rewrite(|journal| *journal = empty)?;
        }
        self.sweep();
        Ok(())
    }

    /// Weights to serve instead of the package's own, the best first.
    pub fn kept(&self) -> Vec<WeightsFile> {
        let journal = self.journal();
        let previous = journal.previous.iter();
        let kept = journal
            .current
            .iter()
            .flat_map(|current| std::iter::once(current).chain(previous.clone()));
        kept.map(|kept| self.locate(kept)).collect()
    }

    /// The weights of the version before, if they are kept.
    pub fn previous(&self) -> Option<WeightsFile> {
        let journal = self.journal();
        let previous = journal.previous.as_ref().map(|kept| self.locate(kept));
        previous.filter(|file| file.path.exists())
    }

    fn locate(&self, kept: &Kept) -> WeightsFile {
        WeightsFile {
            version: kept.version,
            path: self.folder.join(&kept.file),
            sha256: kept.sha256.clone(),
            canary: kept.canary,
        }
    }

    /// The version that was refused last, if none was accepted since.
    pub fn refused(&self) -> Option<Refused> {
        self.journal().refused.clone()
    }

    /// A new path for the weights of a version. They count only once they are [committed](Self::commit).
    pub fn new_file(&self, version: u64) -> PathBuf {
        let unique = Uuid::new_v4().simple().to_string();
        self.folder
            .join(format!("v{version}-{unique:.8}.safetensors"))
    }

    /// The path that a file with this digest is downloaded to.
    pub fn part(&self, sha256: &str) -> PathBuf {
        self.folder.join(format!("{sha256}.{PART}"))
    }

    /// Makes these weights the ones that are served, also by the next process; none for the package's
    /// own. All others but the previous ones are deleted.
    ///
    /// # Errors
    /// When the disk fails; the next process then serves what was served before.
    pub fn commit(&self, weights: Option<&WeightsFile>) -> Result<(), StateError> {
        let kept = weights.map(|weights| Kept {
            version: weights.version,
            file: file_name(&weights.path),
            sha256: weights.sha256.clone(),
            canary: weights.canary,
        });
        // The file is synced already; its name must be, too, before the journal relies on it.
        self.sync_folder()?;
        self.rewrite(|journal| {
            let before = journal.current.take();
            // After a step back, the previous version is the newer one.
            journal.previous = before.filter(|before| Some(before) != kept.as_ref());
            journal.current = kept;
        })?;
        self.sweep();
        Ok(())
    }

    /// Notes that a version was refused, or that none is.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn refuse(&self, refused: Option<Refused>) -> Result<(), StateError> {
        self.rewrite(|journal| journal.refused = refused)
    }

    /// Makes room by deleting the previous version. True = something was deleted.
    pub fn make_room(&self) -> bool {
        let Some(previous) = self.previous() else {
            return false;
        };
        tracing::warn!(
            version = previous.version,
            "the disk is full: the previous version is deleted"
        );
        if let Err(error) = std::fs::remove_file(&previous.path) {
            tracing::warn!(%error, path = %previous.path.display(), "cannot be deleted");
            return false;
        }
        // Only now is there room for the journal. If even that fails, it names a missing file, which
        // nothing relies on.
        if let Err(error) = self.rewrite(|journal| journal.previous = None) {
            tracing::warn!(%error, "the journal still names the deleted version");
        }
        true
    }

    /// Replaces the journal: writes a new one beside it, syncs it, and renames it.
    fn rewrite(&self, change: impl FnOnce(&mut Journal)) -> Result<(), StateError> {
        let disk = |e| StateError::disk(&self.folder.join(JOURNAL), e);
        let mut journal = self.journal();
        let mut changed = journal.clone();
        change(&mut changed);
        if changed == *journal {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(&changed).map_err(|e| disk(e.into()))?;
        let beside = self.folder.join(format!("{JOURNAL}.new"));
        let mut file = File::create(&beside).map_err(disk)?;
        file.write_all(&text).map_err(disk)?;
        file.sync_all().map_err(disk)?;
        std::fs::rename(&beside, self.folder.join(JOURNAL)).map_err(disk)?;
        // From now on the next process may find the new one, so this process uses it, too.
        *journal = changed;
        self.sync_folder()
    }

    fn sync_folder(&self) -> Result<(), StateError> {
        let synced = File::open(&self.folder).and_then(|folder| folder.sync_all());
        synced.map_err(|e| StateError::disk(&self.folder, e))
    }

    /// Deletes partial downloads that are no longer useful.
    pub fn sweep_parts(&self, useful: impl Fn(&str) -> bool) {
        self.remove(|name| {
            let digest = name
                .strip_suffix(PART)
                .and_then(|name| name.strip_suffix('.'));
            digest.is_some_and(|digest| !useful(digest))
        });
    }

    /// Deletes every file that the journal does not name, except partial downloads.
    fn sweep(&self) {
        let journal = self.journal().clone();
        let kept = [journal.current, journal.previous];
        let named = |name: &str| kept.iter().flatten().any(|kept| kept.file == name);
        self.remove(|name| {
            name != JOURNAL && name != LOCK && !name.ends_with(PART) && !named(name)
        });
    }

    fn remove(&self, useless: impl Fn(&str) -> bool) {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        for path in entries.filter_map(|entry| entry.ok().map(|e| e.path())) {
            if useless(&file_name(&path))
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::warn!(%error, path = %path.display(), "cannot be deleted");
            }
        }
    }
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// A journal that cannot be parsed was not written by us: that is logged, and the package is served.
fn read_journal(folder: &Path) -> std::io::Result<Journal> {
    let text = match std::fs::read(folder.join(JOURNAL)) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Journal::default()),
        Err(e) => return Err(e),
    };
    Ok(serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::error!(%error, folder = %folder.display(), "{JOURNAL} cannot be read; the package's own weights are served");
        Journal::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [u64; 0] = [];

    fn open(folder: &Path, root: &str) -> StateDir {
        let state = StateDir::open(folder).unwrap();
        state.base_on(root).unwrap();
        state
    }

    fn put(state: &StateDir, version: u64) -> WeightsFile {
        let path = state.new_file(version);
        std::fs::write(&path, version.to_string()).unwrap();
        WeightsFile {
            version,
            path,
            sha256: "0".repeat(64),
            canary: None,
        }
    }

    fn versions(state: &StateDir) -> Vec<u64> {
        state.kept().iter().map(|kept| kept.version).collect()
    }

    fn files(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries.map(|e| file_name(&e.unwrap().path())).collect();
        names.retain(|name| name != LOCK && name != JOURNAL);
        names.sort();
        names
    }

    #[test]
    fn the_version_served_and_the_one_before_outlive_the_process_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let state = open(folder.path(), "root");
        assert_eq!(versions(&state), NONE);
        for version in 8..11 {
            state.commit(Some(&put(&state, version))).unwrap();
        }
        let _never_committed = put(&state, 11);
        std::fs::write(state.part("abc"), "half").unwrap();
        drop(state);
        let state = open(folder.path(), "root");
        assert_eq!(versions(&state), [10, 9]);
        let left = files(folder.path());
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(left.contains(&"abc.part".to_owned()));
        state.sweep_parts(|digest| digest != "abc");
        assert_eq!(files(folder.path()).len(), 2);
    }

    #[test]
    fn going_back_keeps_what_was_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let state = open(folder.path(), "root");
        state.commit(Some(&put(&state, 8))).unwrap();
        state.commit(Some(&put(&state, 9))).unwrap();
        let before = state.previous().unwrap();
        state.commit(Some(&before)).unwrap();
        assert_eq!(versions(&state), [8, 9]);
        assert!(state.kept().iter().all(|kept| kept.path.exists()));
        // The package's own weights are never in the folder.
        state.commit(None).unwrap();
        assert_eq!(versions(&state), NONE);
        assert_eq!(state.previous().unwrap().version, 8);
        assert!(state.make_room());
        assert!(!state.make_room());
        assert_eq!(files(folder.path()), [""; 0]);
    }

    #[test]
    fn another_package_or_a_foreign_journal_starts_over() {
        let folder = tempfile::tempdir().unwrap();
        let state = open(folder.path(), "root");
        state.commit(Some(&put(&state, 8))).unwrap();
        drop(state);
        let state = open(folder.path(), "other");
        assert_eq!(versions(&state), NONE);
        assert_eq!(files(folder.path()), [""; 0]);
        state.commit(Some(&put(&state, 8))).unwrap();
        state.base_on("third").unwrap();
        assert_eq!(versions(&state), NONE);
        drop(state);
        std::fs::write(folder.path().join(JOURNAL), "{").unwrap();
        assert_eq!(versions(&open(folder.path(), "third")), NONE);
    }

    #[test]
    fn one_process_holds_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = open(folder.path(), "root");
        let second = StateDir::open(folder.path());
        assert!(matches!(second, Err(StateError::Locked(_))));
        drop(first);
        assert!(StateDir::open(folder.path()).is_ok());
    }

    #[test]
    fn a_refusal_is_remembered_until_it_is_withdrawn() {
        let folder = tempfile::tempdir().unwrap();
        let refused = Refused {
            version: 9,
            why: "canary".into(),
            at_ms: 1,
            manifest_sha256: "m".into(),
        };
        let state = open(folder.path(), "root");
        state.refuse(Some(refused.clone())).unwrap();
        drop(state);
        let state = open(folder.path(), "root");
        assert_eq!(state.refused(), Some(refused));
        state.refuse(None).unwrap();
        assert_eq!(state.refused(), None);
    }
}
