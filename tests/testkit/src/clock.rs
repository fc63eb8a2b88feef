//! A worker's clock, set by the test: `tests/shim` is preloaded into the process.

use std::io::Write as _;

use crate::folder::Folder;
use crate::shim;
use crate::worker::Settings;

/// A wall clock that can be set while a process runs.
pub struct Clock(Folder);

impl Clock {
    /// A clock that is right until it is set.
    pub fn right() -> Self {
        let clock = Self(Folder::new("clock"));
        clock.set_off(0);
        clock
    }

    /// From now on it is off by so many seconds.
    pub fn set_off(&self, seconds: i64) {
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
    pub fn settings(&self, settings: Settings) -> Settings {
        settings
            .env("LD_PRELOAD", &shim::path().display().to_string())
            .env("CLOCK_STEP", &self.0.join("step").display().to_string())
    }
}
