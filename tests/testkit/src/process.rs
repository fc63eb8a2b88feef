//! Child processes, each in a group of its own.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::reaper;

/// A child that leads a process group; the whole group dies with this value.
pub struct Group {
    child: Child,
    group: Pid,
    status: Option<ExitStatus>,
}

impl Group {
    /// Starts it; one that cannot be started fails the test.
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Self {
        command.process_group(0);
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}; run ops/setup"));
        let id = i32::try_from(child.id()).expect("a process id");
        reaper::add_group(id);
        Self {
            child,
            group: Pid::from_raw(id),
            status: None,
        }
    }

    /// The leader of the group.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Signals every process of the group; one that is already gone is no error.
    pub fn signal(&self, signal: Signal) {
        killpg(self.group, signal).ok();
    }

    /// The exit status of the leader, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("waiting for one's own child");
        }
        self.status
    }

    /// Waits for the leader to end.
    pub fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + deadline;
        while self.ended().is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.status
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        if self.status.is_none() {
            self.child.wait().ok();
        }
        reaper::remove_group(self.group.as_raw());
    }
}
