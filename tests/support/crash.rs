//! Processes that die at a given change to their files: `tests/shim` is preloaded into them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::Folder;
use super::worker::Settings;

/// The shared library; cargo builds it beside the test.
pub(crate) fn shim() -> PathBuf {
    let test = std::env::current_exe().expect("a running test is a file");
    let shim = test.with_file_name("libcrash_shim.so");
    assert!(shim.is_file(), "{} was not built", shim.display());
    shim
}

/// When a process is to die, and what it did until then to the files below a folder. What does
/// several processes' work, as a shell does, counts each by itself.
pub(crate) struct Crash {
    dir: PathBuf,
    at: u64,
    when: &'static str,
    log: Folder,
}

/// One change: a call of the C library. A call that fails is a change, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    /// `open`, `write`, `copy`, `truncate`, `fsync`, `fdatasync`, `rename`, `link`, `unlink` or `mkdir`.
    pub(crate) name: String,
    /// What is changed, below the folder; the folder itself is empty. A renamed file is where it is after.
    pub(crate) path: String,
}

impl Crash {
    /// Nothing dies; the changes are recorded all the same.
    pub(crate) fn never(dir: &Path) -> Self {
        Self::new(dir, 0, "")
    }

    /// Dies in place of the n-th change, from 1.
    pub(crate) fn before(dir: &Path, n: u64) -> Self {
        Self::new(dir, n, "before")
    }

    /// Dies right after the n-th change.
    pub(crate) fn after(dir: &Path, n: u64) -> Self {
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
            ("LD_PRELOAD", shim().display().to_string()),
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
    pub(crate) fn fill(&self, full: bool) {
        let done = match full {
            true => std::fs::write(self.full(), ""),
            false => std::fs::remove_file(self.full()),
        };
        done.expect("a folder of our own");
    }

    /// Puts it on a command.
    pub(crate) fn rig<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.envs(self.environment())
    }

    /// Puts it on a worker.
    pub(crate) fn settings(&self, settings: Settings) -> Settings {
        let environment = self.environment();
        let put = |settings: Settings, (key, value): &(&str, String)| settings.env(key, value);
        environment.iter().fold(settings, put)
    }

    /// The changes that were begun so far, the fatal one too.
    pub(crate) fn changes(&self) -> Vec<Change> {
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

/// A wall clock that can be set while a process runs.
pub(crate) struct Clock(Folder);

impl Clock {
    pub(crate) fn right() -> Self {
        let clock = Self(Folder::new("clock"));
        clock.set_off(0);
        clock
    }

    /// From now on it is off by so many seconds.
    pub(crate) fn set_off(&self, seconds: i64) {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.0.join("step"));
        // In place: the process has it mapped.
        let set = file.and_then(|mut file| file.write_all(&seconds.to_le_bytes()));
        set.expect("a folder of our own");
    }

    /// Puts it on a worker.
    pub(crate) fn settings(&self, settings: Settings) -> Settings {
        settings
            .env("LD_PRELOAD", &shim().display().to_string())
            .env("CLOCK_STEP", &self.0.join("step").display().to_string())
    }
}
