//! What one test has to itself: a namespace on a broker and a Redis, and the settings for both.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::Signal;
use redis::Commands as _;
use serde_json::Value;

use crate::aggregator::Aggregator;
use crate::broker::Rabbit;
use crate::case::Case;
use crate::folder::Folder;
use crate::package::{self, MODEL, VERSION};
use crate::program::scorer;
use crate::redis_server::Redis;
use crate::wait::{SOON, eventually};
use crate::worker::{Settings, Worker};

/// A namespace of its own on a broker and a Redis.
pub struct Stack {
    /// The broker.
    pub rabbit: Arc<Rabbit>,
    /// The Redis.
    pub redis: Arc<Redis>,
    /// The namespace on both.
    pub namespace: String,
    folder: Folder,
}

/// What a finished command left.
pub struct Answer {
    /// The exit code; -1 where a signal ended it.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Stack {
    /// On the services that all tests share.
    pub fn shared() -> Self {
        Self::on(Rabbit::shared(), Redis::shared())
    }

    /// On services of the test's own.
    pub fn on(rabbit: Arc<Rabbit>, redis: Arc<Redis>) -> Self {
        let namespace = format!("t{}", &uuid::Uuid::new_v4().simple().to_string()[..10]);
        Self {
            rabbit,
            redis,
            namespace,
            folder: Folder::new("test"),
        }
    }

    /// The settings every process of this test has in common.
    pub fn settings(&self) -> Settings {
        Settings::new(&[
            ("SCORER_AMQP__URL", &self.rabbit.url()),
            ("SCORER_AMQP__NAMESPACE", &self.namespace),
            ("SCORER_REDIS__URL", &self.redis.url()),
            ("SCORER_REDIS__NAMESPACE", &self.namespace),
        ])
        .set("model.dir", package::sound().display())
        .set("model.state_dir", self.state_dir().display())
        // Tests give one candidate to many jobs, and mean to have it fetched.
        .set("candidates.cache_bytes", 0)
        .set("engine.execution_provider", "cpu")
        .set("engine.threads", 1)
        .set("heartbeat.interval", "250ms")
        .set("heartbeat.ttl", "3s")
    }

    /// Starts a worker with nothing unusual about it.
    pub fn worker(&self, id: &str) -> Worker {
        self.worker_with(id, |settings| settings)
    }

    /// Starts a worker on another package.
    pub fn worker_on(&self, id: &str, package: &Path) -> Worker {
        self.worker_with(id, |settings| settings.set("model.dir", package.display()))
    }

    /// Starts a worker whose settings differ.
    pub fn worker_with(&self, id: &str, change: impl FnOnce(Settings) -> Settings) -> Worker {
        let settings = change(self.settings().set("worker.id", id));
        Worker::spawn(id, &settings, self)
    }

    /// An aggregator on this namespace.
    #[track_caller]
    pub fn aggregator(&self) -> Aggregator {
        Aggregator::connect(&self.rabbit.url(), &self.namespace)
    }

    /// Where workers keep newer weights.
    pub fn state_dir(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// What `scorer score` says of a case on a package, on this machine's CPU.
    #[track_caller]
    pub fn offline(&self, case: &Case, package: &Path) -> Value {
        let file = case.path().display().to_string();
        let rate = case.learning_rate.map(|rate| rate.to_string());
        let mut arguments = vec!["score", "--candidate", &file, "--format", "binary_v2"];
        arguments.extend([
            "--semantics",
            case.semantics.as_deref().expect("a score case"),
        ]);
        if let Some(rate) = &rate {
            arguments.extend(["--learning-rate", rate]);
        }
        let package = package.display().to_string();
        arguments.extend(["--model", &package]);
        self.command(&arguments).expect_code(0).value()
    }

    /// Runs one of the other commands to its end.
    pub fn command(&self, arguments: &[&str]) -> Answer {
        self.command_with(self.settings(), arguments, "")
    }

    /// Runs a command with other settings and something to read.
    pub fn command_with(&self, settings: Settings, arguments: &[&str], input: &str) -> Answer {
        let file = self.folder.join(&format!("input-{}", uuid::Uuid::new_v4()));
        std::fs::write(&file, input).expect("a writable folder");
        let mut command = Command::new(scorer());
        command
            .args(arguments)
            .stdin(Stdio::from(std::fs::File::open(&file).expect("the input")));
        let output = settings
            .apply(&mut command)
            .output()
            .expect("the binary runs");
        Answer {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The name of an exchange or queue of this namespace.
    pub fn object(&self, rest: &str) -> String {
        format!("{}.{rest}", self.namespace)
    }

    /// The jobs queue.
    pub fn jobs_queue(&self) -> String {
        self.object(&format!("jobs.{MODEL}"))
    }

    /// A key of this namespace in Redis.
    pub fn key(&self, rest: &str) -> String {
        format!("{}:{{{MODEL}}}:{rest}", self.namespace)
    }

    /// The heartbeat record under a worker's id, if there is one.
    pub fn record(&self, id: &str) -> Option<Value> {
        let text: Option<String> = self
            .redis
            .try_connection()?
            .get(self.key(&format!("worker:{id}")))
            .ok()?;
        Some(serde_json::from_str(&text?).expect("a heartbeat record is JSON"))
    }

    /// The keys that match a pattern, in any order.
    pub fn keys(&self, pattern: &str) -> Vec<String> {
        self.redis
            .connection()
            .keys(self.key(pattern))
            .expect("redis lists keys")
    }

    /// Whether a worker is at this job: it is marked from before it is computed until its attempt ends.
    pub fn is_begun(&self, submission_id: &str) -> bool {
        let key = self.key(&format!("crash:{submission_id}:{VERSION}"));
        let marks: u64 = self.redis.connection().hlen(key).expect("a hash of marks");
        marks > 0
    }

    /// Stops a worker, by SIGSTOP, amid this job.
    #[track_caller]
    pub fn stop_amid(&self, worker: &Worker, submission_id: &str) {
        eventually(SOON, &format!("{submission_id} is begun"), || {
            self.is_begun(submission_id)
        });
        worker.signal(Signal::SIGSTOP);
        assert!(
            self.is_begun(submission_id),
            "{submission_id} ended before the worker was stopped"
        );
    }

    /// The state changes of a worker, oldest first: the entries of the stream as they are.
    pub fn events(&self, id: &str) -> Vec<HashMap<String, String>> {
        let mut range = redis::cmd("XRANGE");
        let entries: Vec<(String, HashMap<String, String>)> = range
            .arg(self.key("events"))
            .arg("-")
            .arg("+")
            .query(&mut self.redis.connection())
            .expect("redis reads a stream");
        let events = entries.into_iter().map(|(_, fields)| fields);
        events
            .filter(|e| e.get("worker_id").is_some_and(|w| w == id))
            .collect()
    }

    /// The states a worker went to, in order.
    pub fn states(&self, id: &str) -> Vec<String> {
        self.events(id).iter().map(|e| e["to"].clone()).collect()
    }
}

impl Answer {
    /// Checks the exit code, showing what was said.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "exit code; stdout:\n{}\nstderr:\n{}",
            self.stdout, self.stderr
        );
        self
    }

    /// The JSON values on standard output; a list counts as its items.
    #[track_caller]
    pub fn values(&self) -> Vec<Value> {
        let stream = serde_json::Deserializer::from_str(&self.stdout).into_iter::<Value>();
        let values = stream
            .map(|v| v.unwrap_or_else(|e| panic!("stdout is not JSON ({e}):\n{}", self.stdout)));
        values
            .flat_map(|value| {
                if let Value::Array(items) = value {
                    items
                } else {
                    vec![value]
                }
            })
            .collect()
    }

    /// The one JSON value on standard output.
    #[track_caller]
    pub fn value(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("stdout is not JSON ({e}):\n{}", self.stdout))
    }
}
