//! A package under construction: written into a hidden folder beside or inside its destination, and
//! moved when it is complete. Neither an error nor a signal leaves anything behind.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;

use super::destination::Destination;
use super::disk::make_folder;
use crate::model::manifest::PackageError;

/// How the names of the hidden folders begin.
pub(super) const STAGING: &str = ".scorer-package-";

/// The folder of an unfinished package, for removing it when the process is interrupted.
#[derive(Debug, Clone, Default)]
pub struct Unfinished(Arc<Mutex<Option<TempDir>>>);

impl Unfinished {
    /// Removes the folder. Until the returned guard is dropped the package cannot proceed; one that
    /// is being moved to its destination is moved first.
    #[must_use]
    pub fn remove(&self) -> impl Sized {
        let mut folder = self.lock();
        if let Some(folder) = folder.take().map(TempDir::keep) {
            // Under another name, nothing writes into it or recreates it while it is removed.
            let gone = folder.with_extension("gone");
            if std::fs::rename(&folder, &gone).is_ok() {
                // A file that was just being created can make the first attempt fail.
                let _removed = (0..3).any(|_| std::fs::remove_dir_all(&gone).is_ok());
            }
        }
        folder
    }

    fn lock(&self) -> MutexGuard<'_, Option<TempDir>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A package under construction.
pub(super) struct Staging {
    dir: PathBuf,
    destination: Destination,
    unfinished: Unfinished,
}

impl Staging {
    /// Creates the hidden folder on the file system of `out`.
    ///
    /// # Errors
    /// When `out` is not empty, or cannot be written to.
    pub(super) fn begin(out: &Path, unfinished: &Unfinished) -> Result<Self, PackageError> {
        let destination = Destination::find(out)?;
        let mut begun = unfinished.lock();
        let folder = tempfile::Builder::new()
            .prefix(STAGING)
            .tempdir_in(destination.folder());
        let folder = folder.map_err(|e| {
            let (out, at) = (out.display(), destination.folder().display());
            PackageError(format!("--out {out}: nothing can be written in {at}: {e}"))
        })?;
        // The outer folder is private; this one has the usual permissions.
        let dir = folder.path().join("package");
        make_folder(&dir)?;
        *begun = Some(folder);
        drop(begun);
        Ok(Self {
            dir,
            destination,
            unfinished: unfinished.clone(),
        })
    }

    /// Where the files are until the package is finished.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Moves the package to its destination.
    ///
    /// # Errors
    /// When the destination is taken by now, or on an I/O error.
    pub(super) fn finish(self) -> Result<(), PackageError> {
        // A signal waits until everything is moved.
        let folder = self.unfinished.lock();
        let staging = self.dir.parent().unwrap_or(&self.dir);
        let filled = self.destination.fill(&self.dir, staging);
        drop(folder);
        filled
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        drop(self.unfinished.lock().take());
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::tests::holds;
    use super::super::disk::{GRAPH, SHARDS, write};
    use super::*;
    use crate::model::package::MANIFEST;

    fn begin(out: &Path) -> Result<Staging, PackageError> {
        Staging::begin(out, &Unfinished::default())
    }

    #[test]
    fn what_is_not_finished_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b/package");
        let staging = begin(&out).unwrap();
        write(&staging.dir().join("shards/x"), b"x").unwrap();
        drop(staging);
        assert!(holds(folder.path()).is_empty());
        let staging = begin(&out).unwrap();
        write(&staging.dir().join("x"), b"x").unwrap();
        staging.finish().unwrap();
        assert_eq!(std::fs::read(out.join("x")).unwrap(), b"x");
        assert_eq!(holds(folder.path()).len(), 1);
        let refusal = begin(&out).err().unwrap().0;
        assert!(refusal.contains("is not empty, it holds x"), "{refusal}");
    }

    #[test]
    fn an_empty_folder_is_filled_where_it_is_however_it_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty");
        let link = folder.path().join("link");
        std::fs::create_dir(&empty).unwrap();
        std::os::unix::fs::symlink("empty", &link).unwrap();
        for out in [
            &empty,
            &link,
            &empty.join("."),
            &link.join(""),
            &empty.join("../empty"),
        ] {
            // It may be a mount point, and nothing may be writable beside it.
            let inside = Destination::Inside(empty.canonicalize().unwrap());
            assert_eq!(Destination::find(out).unwrap(), inside);
            let before = begin(out).unwrap();
            write(&before.dir().join("shards/x"), b"x").unwrap();
            assert!(begin(out).is_err(), "another is being made there");
            drop(before);
            assert!(holds(&empty).is_empty());
            let staging = begin(out).unwrap();
            for file in [MANIFEST, GRAPH, "shards/x"] {
                write(&staging.dir().join(file), b"x").unwrap();
            }
            assert_eq!(holds(&empty).len(), 1);
            staging.finish().unwrap();
            assert_eq!(
                holds(&empty),
                [MANIFEST, GRAPH, SHARDS].map(String::from).into()
            );
            std::fs::remove_dir_all(&empty).unwrap();
            std::fs::create_dir(&empty).unwrap();
        }
        // What somebody else has put there meanwhile stays, and is all that does.
        let staging = begin(&empty).unwrap();
        write(&staging.dir().join(GRAPH), b"x").unwrap();
        write(&empty.join("theirs"), b"x").unwrap();
        let refusal = staging.finish().unwrap_err().0;
        assert!(refusal.contains("it holds theirs"), "{refusal}");
        assert_eq!(holds(&empty), ["theirs".to_owned()].into());
    }

    #[test]
    fn what_cannot_be_a_package_s_place_is_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        for (out, said) in [
            ("file", "is a file"),
            ("file/", "is a file"),
            ("file/package", "file is a file"),
            ("dangling", "dangling is a symbolic link to nowhere"),
            ("dangling/.", "dangling is a symbolic link to nowhere"),
            ("dangling/package", "dangling is a symbolic link to nowhere"),
            ("new/..", "names no folder"),
            ("new/../package", "names no folder"),
        ] {
            let refusal = begin(&at(out)).err().unwrap().0;
            assert!(refusal.contains(said), "{out}: {refusal}");
        }
        assert!(begin(Path::new("")).is_err());
        let new = |out: &str| Destination::find(&at(out)).unwrap();
        let expected = Destination::New {
            out: at("a2"),
            above: folder.path().to_owned(),
        };
        for out in ["a2", "a2/", "a2/."] {
            assert_eq!(new(out), expected);
        }
        let here = Destination::New {
            out: "a2".into(),
            above: ".".into(),
        };
        assert_eq!(Destination::find(Path::new("a2")).unwrap(), here);
        assert_eq!(holds(folder.path()).len(), 2);
    }
}
