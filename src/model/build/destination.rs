//! Where a package is to be, and moving a finished one there.

use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use crate::model::files::names_in;
use crate::model::manifest::PackageError;
use crate::model::package::MANIFEST;

/// The advice if the destination is taken.
const CHOOSE: &str = "packages are immutable, choose a new directory";

/// The destination of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    /// An existing empty folder, which may be a mount point, or have a read-only parent.
    Inside(PathBuf),
    /// A folder that does not exist yet.
    New {
        /// The folder.
        out: PathBuf,
        /// Its nearest existing ancestor.
        above: PathBuf,
    },
}

impl Destination {
    /// # Errors
    /// When the destination is taken, or cannot be created.
    pub(super) fn find(out: &Path) -> Result<Self, PackageError> {
        let refuse = |why: String| Err(PackageError(format!("--out {}: {why}", out.display())));
        // Normalised: `a/` may be a file, and nothing can be renamed to `a/.`.
        let out: &Path = &out.components().collect::<PathBuf>();
        for above in out.ancestors() {
            let here = match above.as_os_str().is_empty() {
                true => Path::new("."),
                false => above,
            };
            match std::fs::metadata(here) {
                Ok(found) if !found.is_dir() => {
                    return refuse(format!("{} is a file; {CHOOSE}", here.display()));
                }
                Ok(_) if above == out && above == here => {
                    check_empty(out, None)?;
                    let inside = out.canonicalize().map_err(|e| PackageError::at(out, e))?;
                    return Ok(Self::Inside(inside));
                }
                Ok(_) => {
                    let below = out.strip_prefix(above).unwrap_or(out);
                    let named = |part| matches!(part, Component::Normal(_) | Component::CurDir);
                    if out.file_name().is_none() || !below.components().all(named) {
                        return refuse("names no folder that can be made".to_owned());
                    }
                    let out = out.to_owned();
                    let above = here.to_owned();
                    return Ok(Self::New { out, above });
                }
                Err(e) if is_missing(&e) => {
                    if let Ok(target) = std::fs::read_link(here) {
                        let (link, target) = (here.display(), target.display());
                        return refuse(format!(
                            "{link} is a symbolic link to {target}, which is not there; make that folder, or choose another"
                        ));
                    }
                }
                Err(e) => return refuse(format!("{}: {e}", here.display())),
            }
        }
        refuse("has no existing parent folder".to_owned())
    }

    /// Where the hidden folder is created.
    pub(super) fn folder(&self) -> &Path {
        match self {
            Self::Inside(out) => out,
            Self::New { above, .. } => above,
        }
    }

    /// Moves `made`, which is inside `staging`, here.
    pub(super) fn fill(&self, made: &Path, staging: &Path) -> Result<(), PackageError> {
        match self {
            Self::Inside(out) => {
                check_empty(out, staging.file_name())?;
                move_up(made, out)
            }
            Self::New { out, .. } => {
                let fail = |e: std::io::Error| PackageError::at(out, e);
                if let Some(parent) = out.parent() {
                    std::fs::create_dir_all(parent).map_err(fail)?;
                }
                if out.exists() {
                    check_empty(out, None)?;
                }
                std::fs::rename(made, out).map_err(fail)
            }
        }
    }
}

fn is_missing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

/// # Errors
/// When the folder holds anything except `ours`.
fn check_empty(folder: &Path, ours: Option<&OsStr>) -> Result<(), PackageError> {
    let names = names_in(folder)?;
    let (mut theirs, folder) = (
        names.iter().filter(|name| Some(&***name) != ours),
        folder.display(),
    );
    match theirs.next().map(|name| name.display()) {
        None => Ok(()),
        Some(name) => Err(PackageError(format!(
            "--out {folder}: is not empty, it holds {name}; {CHOOSE}"
        ))),
    }
}

/// Moves a folder's contents to another folder on the same file system, the manifest last: a worker
/// that finds the manifest finds everything. If this fails, everything is moved back.
fn move_up(from: &Path, to: &Path) -> Result<(), PackageError> {
    let mut names = names_in(from)?;
    names.sort_by_key(|name| name == MANIFEST);
    for (moved, name) in names.iter().enumerate() {
        if let Err(error) = std::fs::rename(from.join(name), to.join(name)) {
            for name in &names[..moved] {
                // Back into the hidden folder, which is removed.
                drop(std::fs::rename(to.join(name), from.join(name)));
            }
            return Err(PackageError::at(&to.join(name), error));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::disk::tests::holds;
    use super::*;

    #[test]
    fn where_not_all_can_be_moved_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        for name in ["from/a", "from/model.json", "from/z", "to/model.json/x"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        assert!(move_up(&from, &to).is_err());
        assert_eq!(holds(&to), [MANIFEST.to_owned()].into());
        assert_eq!(holds(&from).len(), 3);
    }
}
