//! A private Redis without persistence.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::sys::signal::Signal;

use crate::folder::Folder;
use crate::port::free_port;
use crate::process::Group;
use crate::program::program;
use crate::wait::{SOON, eventually, secs};

/// A Redis server on a port of its own that can be killed, restarted and frozen.
pub struct Redis {
    port: u16,
    /// A file of settings, which some servers write to.
    file: Option<PathBuf>,
    /// Further arguments.
    more: Vec<String>,
    /// Before the folder: the server goes first, then where it writes to.
    running: Mutex<Option<Group>>,
    folder: Folder,
}

impl Redis {
    /// The Redis of all tests that do not break it.
    pub fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Redis>> = OnceLock::new();
        Arc::clone(SHARED.get_or_init(|| Arc::new(Self::started())))
    }

    /// A port without a server on it yet.
    pub fn stopped() -> Self {
        Self {
            port: free_port(),
            file: None,
            more: Vec::new(),
            folder: Folder::new("redis"),
            running: Mutex::new(None),
        }
    }

    /// With further arguments.
    pub fn with(self, more: &[&str]) -> Self {
        let more = more.iter().map(|argument| (*argument).to_owned()).collect();
        Self { more, ..self }
    }

    /// With a file of settings, which the server may write to.
    pub fn with_file(self, settings: &str) -> Self {
        let file = self.folder.join("redis.conf");
        std::fs::write(&file, settings).expect("a writable folder");
        Self {
            file: Some(file),
            ..self
        }
    }

    /// A server of the test's own, running.
    pub fn started() -> Self {
        let server = Self::stopped();
        server.start();
        server
    }

    /// Starts, or starts again, empty, on the same port.
    #[track_caller]
    pub fn start(&self) {
        let log = std::fs::File::create(self.folder.join("log")).expect("a log file");
        let mut command = Command::new(server());
        command
            .args(&self.file)
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

    /// Kills the server.
    pub fn kill(&self) {
        *self.running() = None;
    }

    /// Stops the process: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Goes on after [`Redis::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Asks it one thing; none where it does not answer or refuses.
    pub fn ask<T: redis::FromRedisValue>(&self, words: &[&str]) -> Option<T> {
        let mut command = redis::cmd(words.first()?);
        command.arg(&words[1..]);
        command.query(&mut self.try_connection()?).ok()
    }

    /// Tells it to do something.
    #[track_caller]
    pub fn tell(&self, words: &[&str]) {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        let done = command.query::<redis::Value>(&mut self.connection());
        assert!(done.is_ok(), "{words:?}: {done:?}");
    }

    /// The URL of database 0.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// A connection that gives up rather than hang.
    #[track_caller]
    pub fn connection(&self) -> redis::Connection {
        self.try_connection().expect("redis accepts a connection")
    }

    /// The same, or none where the server does not answer.
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

/// The program of the tests: `TEST_REDIS`, such as the path of a Valkey, else the one that is installed.
fn server() -> PathBuf {
    let chosen = std::env::var_os("TEST_REDIS").map(PathBuf::from);
    chosen.unwrap_or_else(|| program(&["redis-server"]))
}
