//! A private Redis without persistence.

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::sys::signal::Signal;

use super::process::{Folder, Group, free_port, program};
use super::wait::{SOON, eventually, secs};

/// A Redis server on a port of its own that can be killed, restarted and frozen.
pub(crate) struct Redis {
    port: u16,
    /// Further arguments.
    more: Vec<String>,
    /// Before the folder: the server goes first, then where it writes to.
    running: Mutex<Option<Group>>,
    folder: Folder,
}

impl Redis {
    /// The one that tests share which do not break it.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Redis>> = OnceLock::new();
        Arc::clone(SHARED.get_or_init(|| Arc::new(Self::started())))
    }

    /// A port without a server on it yet.
    pub(crate) fn stopped() -> Self {
        Self {
            port: free_port(),
            more: Vec::new(),
            folder: Folder::new("redis"),
            running: Mutex::new(None),
        }
    }

    /// With further arguments.
    pub(crate) fn with(self, more: &[&str]) -> Self {
        let more = more.iter().map(|argument| (*argument).to_owned()).collect();
        Self { more, ..self }
    }

    /// A server of one's own.
    pub(crate) fn started() -> Self {
        let server = Self::stopped();
        server.start();
        server
    }

    /// Starts, or starts again, empty, on the same port.
    #[track_caller]
    pub(crate) fn start(&self) {
        let log = std::fs::File::create(self.folder.join("log")).expect("a log file");
        let mut command = Command::new(program(&["redis-server"]));
        command
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(self.folder.path())
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(Stdio::null());
        *self.running() = Some(Group::spawn(&mut command));
        eventually(SOON, "redis-server answers PING", || {
            self.try_connection()
                .is_some_and(|mut c| redis::cmd("PING").exec(&mut c).is_ok())
        });
    }

    /// Dies without a word.
    pub(crate) fn kill(&self) {
        *self.running() = None;
    }

    /// Holds still: connections stay open and nothing answers.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Goes on after [`Redis::freeze`].
    pub(crate) fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// A connection that gives up rather than hang.
    #[track_caller]
    pub(crate) fn connection(&self) -> redis::Connection {
        self.try_connection().expect("redis accepts a connection")
    }

    pub(crate) fn try_connection(&self) -> Option<redis::Connection> {
        let client = redis::Client::open(self.url()).expect("a well-formed url");
        let connection = client.get_connection_with_timeout(secs(2)).ok()?;
        connection.set_read_timeout(Some(secs(5))).ok()?;
        Some(connection)
    }

    fn signal(&self, signal: Signal) {
        self.running()
            .as_ref()
            .expect("a running server")
            .signal(signal);
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Option<Group>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
