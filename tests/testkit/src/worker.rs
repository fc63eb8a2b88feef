//! The real binary as a child process.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::process::Group;
use crate::program::scorer;
use crate::stack::Stack;
use crate::wait::{DRAIN, SOON, START, eventually, eventually_some};

/// Environment and `--set` of one process.
#[derive(Clone)]
pub struct Settings {
    environment: Vec<(String, String)>,
    set: Vec<(String, String)>,
}

impl Settings {
    /// Environment variables, and no `--set` yet.
    pub fn new(environment: &[(&str, &str)]) -> Self {
        let environment = environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Self {
            environment,
            set: Vec::new(),
        }
    }

    /// Adds a `--set`; the last one for a key is the only one.
    pub fn set(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        self.set.retain(|(k, _)| k != key);
        self.set.push((key.to_owned(), value.to_string()));
        self
    }

    /// Adds a variable of the environment.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Puts them on a command; nothing of the test runner's own `SCORER_` environment gets through.
    pub fn apply<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let inherited = std::env::vars_os().map(|(key, _)| key);
        for key in inherited.filter(|k| k.to_string_lossy().starts_with("SCORER_")) {
            command.env_remove(key);
        }
        for (key, value) in &self.set {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        command.envs(self.environment.iter().map(|(k, v)| (k, v)))
    }
}

/// A running `scorer run`. Its log is shown when the test fails.
pub struct Worker {
    id: String,
    process: Mutex<Group>,
    log: Arc<Mutex<Vec<String>>>,
    records: Records,
}

/// Where the worker's heartbeat is read.
struct Records {
    redis: Arc<crate::redis_server::Redis>,
    key: String,
}

impl Worker {
    /// Starts `scorer run`, without waiting for it.
    #[track_caller]
    pub fn spawn(id: &str, settings: &Settings, stack: &Stack) -> Self {
        let mut command = Command::new(scorer());
        command
            .arg("run")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = Group::spawn(settings.apply(&mut command));
        let log = Arc::new(Mutex::new(Vec::new()));
        collect(process.child().stdout.take(), "out", &log);
        collect(process.child().stderr.take(), "err", &log);
        let records = Records {
            redis: Arc::clone(&stack.redis),
            key: stack.key(&format!("worker:{id}")),
        };
        Self {
            id: id.to_owned(),
            process: Mutex::new(process),
            log,
            records,
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process().child().id()
    }

    /// The record under the worker's id, if it is there.
    pub fn try_heartbeat(&self) -> Option<Value> {
        let text: Option<String> =
            redis::Commands::get(&mut self.records.redis.try_connection()?, &self.records.key)
                .ok()?;
        Some(serde_json::from_str(&text?).expect("a heartbeat record is JSON"))
    }

    /// The record under the worker's id.
    #[track_caller]
    pub fn heartbeat(&self) -> Value {
        self.try_heartbeat()
            .unwrap_or_else(|| panic!("{} has no heartbeat record", self.id))
    }

    /// Waits until this very process writes a record that satisfies the condition.
    #[track_caller]
    pub fn heartbeat_when(
        &self,
        deadline: Duration,
        what: &str,
        condition: impl Fn(&Value) -> bool,
    ) -> Value {
        let pid = self.pid();
        let mut last = Last(None);
        let probe = || {
            let ended = self.ended();
            assert!(
                ended.is_none(),
                "{} ended ({ended:?}) while the test waited for: {what}",
                self.id
            );
            last.0 = self.try_heartbeat();
            last.0.clone().filter(|r| r["pid"] == pid && condition(r))
        };
        eventually_some(deadline, &format!("worker {}: {what}", self.id), probe)
    }

    /// Waits until it says that it is ready; returns the record.
    #[track_caller]
    pub fn ready(&self) -> Value {
        self.heartbeat_when(START, "ready", |r| {
            r["ready"] == true && r["state"] == "ready"
        })
    }

    /// Waits for a state and its detail.
    #[track_caller]
    pub fn state(&self, state: &str, detail: &str) -> Value {
        let what = format!("{state} / {detail}");
        self.heartbeat_when(START, &what, |r| {
            r["state"] == state && r["state_detail"] == detail
        })
    }

    /// A record written after now, so that it knows all that has happened.
    #[track_caller]
    pub fn next_heartbeat(&self) -> Value {
        let seen = self.heartbeat()["seq"].as_u64().expect("seq is a number");
        // The beat under way may have been put together before: the one after it was not.
        self.heartbeat_when(SOON, "two more beats", |r| {
            r["seq"].as_u64() > Some(seen + 1)
        })
    }

    /// How the process ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.process().ended()
    }

    /// Sends a signal to it and its children.
    pub fn signal(&self, signal: Signal) {
        self.process().signal(signal);
    }

    /// Asks it to drain.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Kills it and waits for its end.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
        self.process().wait(SOON);
    }

    /// Waits for the process to end; the exit code.
    #[track_caller]
    pub fn exit_code(&self, deadline: Duration) -> i32 {
        let status = self.process().wait(deadline);
        let status = status.unwrap_or_else(|| panic!("{} still runs after {deadline:?}", self.id));
        status
            .code()
            .unwrap_or_else(|| panic!("{} did not exit by itself: {status}", self.id))
    }

    /// Drains it and checks its exit code.
    #[track_caller]
    pub fn drain(&self) {
        self.terminate();
        assert_eq!(self.exit_code(DRAIN), 0, "exit code of a clean drain");
    }

    /// Waits until it computes.
    #[track_caller]
    pub fn computes(&self) {
        self.heartbeat_when(SOON, "it computes", |r| {
            r["progress"]["busy_ms"].as_u64() > Some(0)
        });
    }

    /// Ends a drain that was asked for: signals that come close together count as one, so it is told until it has heard.
    #[track_caller]
    pub fn end_now(&self) {
        eventually(SOON, "it ends its drain", || {
            self.signal(Signal::SIGQUIT);
            self.log().contains("ending the drain now")
        });
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    }

    fn process(&self) -> std::sync::MutexGuard<'_, Group> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            eprintln!("--- log of worker {} (last lines)\n{tail}\n---", self.id);
        }
    }
}

fn collect(
    stream: Option<impl Read + Send + 'static>,
    name: &'static str,
    log: &Arc<Mutex<Vec<String>>>,
) {
    let log = Arc::clone(log);
    let reader = BufReader::new(stream.expect("a piped stream"));
    std::thread::spawn(move || {
        for line in reader.lines().map_while(Result::ok) {
            log.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(format!("{name}| {line}"));
        }
    });
}

/// Shows the last record that was seen, should the test fail.
struct Last(Option<Value>);

impl Drop for Last {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the last record: {:?}", self.0);
        }
    }
}
