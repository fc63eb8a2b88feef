//! A private RabbitMQ node: ports, data, cookie and port mapper of its own.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::process::{Folder, Group, free_port, listening, program};
use super::wait::{eventually, eventually_some, secs};

/// A node may take this long on a machine that is busy compiling.
const NODE_START: Duration = secs(90);

/// A RabbitMQ node that can be stopped, killed, restarted on its data, and frozen.
pub(crate) struct Rabbit {
    name: String,
    port: u16,
    dist_port: u16,
    epmd_port: u16,
    /// Before the folder: the node goes first, then what it writes to.
    running: Mutex<Option<Processes>>,
    home: Folder,
}

/// The port mapper is ours as well: the daemon that Erlang starts by itself would outlive us.
struct Processes {
    node: Group,
    _epmd: Group,
}

impl Rabbit {
    /// The one that tests share which do not break it.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Rabbit>> = OnceLock::new();
        Arc::clone(SHARED.get_or_init(|| Arc::new(Self::started())))
    }

    /// Ports and a folder without a node on them yet.
    pub(crate) fn stopped() -> Self {
        let port = free_port();
        let node = Self {
            name: format!("scorer{port}@localhost"),
            port,
            dist_port: free_port(),
            epmd_port: free_port(),
            home: Folder::new("rabbit"),
            running: Mutex::new(None),
        };
        let config = format!(
            "listeners.tcp.1 = 127.0.0.1:{port}\ndisk_free_limit.absolute = 50MB\nlog.file.level = warning\n"
        );
        for (file, content) in [
            ("rabbitmq.conf", config.as_str()),
            ("plugins", "[].\n"),
            ("env.conf", ""),
        ] {
            std::fs::write(node.home.join(file), content).expect("a file in the node's folder");
        }
        node
    }

    /// A node of one's own.
    pub(crate) fn started() -> Self {
        let node = Self::stopped();
        node.start();
        node
    }

    /// Starts, or starts again on the same data and ports.
    #[track_caller]
    pub(crate) fn start(&self) {
        // The node is a grandchild: after a kill it may hold its ports a moment longer than its parent lives.
        let ports = [self.port, self.dist_port, self.epmd_port];
        eventually(secs(10), "the node's ports are free", || {
            !ports.into_iter().any(listening)
        });
        let epmd = Group::spawn(self.quiet(&mut Command::new(program(&["epmd"]))));
        eventually(secs(10), "epmd listens", || listening(self.epmd_port));
        let node = Group::spawn(self.quiet(&mut Command::new(installed("rabbitmq-server"))));
        *self.running() = Some(Processes { node, _epmd: epmd });
        eventually(NODE_START, "rabbitmq-server accepts connections", || {
            let ended = self.running().as_mut().and_then(|p| p.node.ended());
            assert!(
                ended.is_none(),
                "rabbitmq-server ended ({ended:?}):\n{}",
                self.last_words()
            );
            listening(self.port)
        });
    }

    /// Shuts down in order.
    #[track_caller]
    pub(crate) fn stop(&self) {
        self.signal(Signal::SIGTERM);
        let gone = self.running().as_mut().and_then(|p| p.node.wait(secs(60)));
        assert!(
            gone.is_some(),
            "rabbitmq-server did not stop:\n{}",
            self.last_words()
        );
        *self.running() = None;
    }

    /// Dies without a word.
    pub(crate) fn kill(&self) {
        *self.running() = None;
    }

    /// Holds still: connections stay open and nothing answers.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Goes on after [`Rabbit::freeze`].
    pub(crate) fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }

    /// How many consumers the broker itself lists on a queue; cancelled ones do not count.
    #[track_caller]
    pub(crate) fn list_consumers(&self, queue: &str) -> usize {
        let rows = self.list("list_consumers", &["queue_name"]);
        rows.iter().filter(|row| row["queue_name"] == queue).count()
    }

    /// The rows of one of `rabbitmqctl`'s list commands.
    #[track_caller]
    pub(crate) fn list(&self, command: &str, columns: &[&str]) -> Vec<Value> {
        // Right after a start the node may refuse for a moment, so an error is asked again.
        eventually_some(secs(30), &format!("rabbitmqctl {command}"), || {
            let arguments: Vec<&str> = [&[command], columns].concat();
            self.control(&arguments)?.as_array().cloned()
        })
    }

    /// What `rabbitmqctl` answers, as JSON; none if it fails.
    pub(crate) fn control(&self, arguments: &[&str]) -> Option<Value> {
        let mut ctl = Command::new(installed("rabbitmqctl"));
        ctl.args(["-n", &self.name, "-q"])
            .args(arguments)
            .args(["--formatter", "json"]);
        let output = self
            .environment(&mut ctl)
            .stdin(Stdio::null())
            .output()
            .expect("rabbitmqctl runs");
        let answer = serde_json::from_slice(&output.stdout)
            .ok()
            .filter(|_| output.status.success());
        if answer.is_none() {
            eprintln!(
                "rabbitmqctl {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        answer
    }

    fn quiet<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.home.join("console.log"));
        let log = log.expect("a log file");
        let copy = log.try_clone().expect("a second handle");
        self.environment(command)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(copy)
    }

    fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let inherited = std::env::vars_os().map(|(key, _)| key);
        for key in inherited.filter(|k| k.to_string_lossy().starts_with("RABBITMQ_")) {
            command.env_remove(key);
        }
        command
            .env("HOME", self.home.path())
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODENAME", &self.name)
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("RABBITMQ_MNESIA_BASE", self.home.join("data"))
            .env("RABBITMQ_LOG_BASE", self.home.join("log"))
            .env("RABBITMQ_PID_FILE", self.home.join("pid"))
            .env("RABBITMQ_CONF_ENV_FILE", self.home.join("env.conf"))
            .env("RABBITMQ_CONFIG_FILE", self.home.join("rabbitmq.conf"))
            .env(
                "RABBITMQ_ADVANCED_CONFIG_FILE",
                self.home.join("advanced.config"),
            )
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", self.home.join("plugins"))
            // Idle schedulers must not spin: the tests share two cores with the node.
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+sbwt none +sbwtdcpu none +sbwtdio none",
            )
    }

    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(self.home.join("console.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn signal(&self, signal: Signal) {
        self.running()
            .as_ref()
            .expect("a running node")
            .node
            .signal(signal);
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Option<Processes>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Debian's commands on the path change to the `rabbitmq` user first; these are the ones behind them.
#[track_caller]
fn installed(name: &str) -> PathBuf {
    let debian = PathBuf::from("/usr/lib/rabbitmq/bin").join(name);
    if debian.is_file() {
        debian
    } else {
        program(&[name])
    }
}
