//! Processes that die at a given change to their files: `tests/shim` is preloaded into them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::folder::Folder;
use crate::shim;
use crate::worker::Settings;

/// When a process is to die, and what it did until then to the files below a folder. What does
/// several processes' work, as a shell does, counts each by itself.
pub struct Crash {
    dir: PathBuf,
    at: u64,
    when: &'static str,
    log: Folder,
}

/// One change: a call of the C library. A call that fails is a change, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// `open`, `write`, `copy`, `truncate`, `fsync`, `fdatasync`, `rename`, `link`, `unlink` or `mkdir`.
    pub name: String,
    /// What is changed, below the folder; the folder itself is empty. A renamed file is where it is after.
    pub path: String,
}

impl Crash {
    /// Nothing dies; the changes are recorded all the same.
    pub fn never(dir: &Path) -> Self {
        Self::new(dir, 0, "")
    }

    /// Dies in place of the n-th change, from 1.
    pub fn before(dir: &Path, n: u64) -> Self {
        Self::new(dir, n, "before")
    }

    /// Dies right after the n-th change.
    pub fn after(dir: &Path, n: u64) -> Self {
        Self::new(dir, n, "after")
    }

    fn new(dir: &Path, at: u64, when: &'static str) -> Self {
        Self {
            // The shim compares texts, and the kernel's have no links in them.
            dir: dir.canonicalize().expect("a folder that is there"),
            at,
            when,
            log: Folder::new("crash"),
        }
    }

    fn log(&self) -> PathBuf {
        self.log.join("changes")
    }

    fn environment(&self) -> [(&'static str, String); 6] {
        [
            ("LD_PRELOAD", shim::path().display().to_string()),
            ("CRASH_DIR", self.dir.display().to_string()),
            ("CRASH_AT", self.at.to_string()),
            ("CRASH_WHEN", self.when.to_owned()),
            ("CRASH_FULL", self.full().display().to_string()),
            ("CRASH_LOG", self.log().display().to_string()),
        ]
    }

    fn full(&self) -> PathBuf {
        self.log.join("full")
    }

    /// From now on there is no space for what is written below the folder, or there is again.
    pub fn fill(&self, full: bool) {
        let done = match full {
            true => std::fs::write(self.full(), ""),
            false => std::fs::remove_file(self.full()),
        };
        done.expect("a folder of our own");
    }

    /// Puts it on a command.
    pub fn rig<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.envs(self.environment())
    }

    /// Puts it on a worker.
    pub fn settings(&self, settings: Settings) -> Settings {
        let environment = self.environment();
        let put = |settings: Settings, (key, value): &(&str, String)| settings.env(key, value);
        environment.iter().fold(settings, put)
    }

    /// The changes that were begun so far, the fatal one too.
    pub fn changes(&self) -> Vec<Change> {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        log.lines().map(|line| self.change(line)).collect()
    }

    fn change(&self, line: &str) -> Change {
        let mut words = line.splitn(3, ' ').skip(1);
        let (name, path) = words.next().zip(words.next()).expect("number, name, path");
        let path = Path::new(path).strip_prefix(&self.dir);
        Change {
            name: name.to_owned(),
            path: path.expect("below the folder").display().to_string(),
        }
    }
}
