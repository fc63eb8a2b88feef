//! Temporary folders that do not outlive the tests.

use std::path::{Path, PathBuf};

use crate::reaper;

/// A folder that goes when dropped, or with the test process if that never happens.
pub struct Folder(tempfile::TempDir);

impl Folder {
    /// Makes a folder whose name tells its purpose.
    pub fn new(purpose: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("scorer-{purpose}-"))
            .tempdir();
        let dir = dir.expect("a temporary folder");
        reaper::add_folder(dir.path());
        Self(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The path of a file in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
