//! A private RabbitMQ node: ports, data, cookie and port mapper of its own. It is the installed RabbitMQ, or one that
//! `ops/brokers` fetched: `TEST_RABBITMQ=4.3` names it, for the whole run.

use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::folder::Folder;
use crate::package::repository;
use crate::port::{free_port, listening};
use crate::process::Group;
use crate::program::program;
use crate::wait::{eventually, eventually_some, secs};

/// A node may take this long on a machine that is busy compiling.
const NODE_START: Duration = secs(90);

/// Where a fetched RabbitMQ sees the node's folder.
const INSIDE: &str = "/srv";

/// Enters a fetched Debian. The mounts are in a name space that `unshare` made, and end with the last process in it.
const ENTER: &str = r#"
root=$1
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind "$2" "$root/srv"
shift 2
exec chroot "$root" "$@"
"#;

/// A dead letter that was not confirmed, because the queue it goes to lost its leader, is sent again after one to two
/// times this. RabbitMQ's own three minutes are longer than a test should take.
const RESEND: &str = "{dead_letter_worker_publisher_confirm_timeout, 5000}";

/// What a consumer holds on a node that is gone is delivered again after this, from 4.3 on; by default after a minute.
const RETURN: &str = "{consumer_disconnected_timeout, 3000}";

/// What `ops/rabbitmq/cluster.conf` sets for a key.
pub(crate) fn recommended(key: &str) -> String {
    let file = repository().join("ops/rabbitmq/cluster.conf");
    let text = std::fs::read_to_string(file).expect("the settings of a cluster");
    let mut pairs = text.lines().filter_map(|line| line.split_once(" = "));
    let found = pairs.find(|(name, _)| *name == key);
    found
        .map(|(_, value)| value.to_owned())
        .unwrap_or_else(|| panic!("cluster.conf has no {key}"))
}

/// A RabbitMQ node that can be stopped, killed, restarted on its data, and frozen.
pub struct Rabbit {
    name: String,
    port: u16,
    dist_port: u16,
    mapper: Arc<Mapper>,
    /// Before the folder: the node goes first, then what it writes to.
    running: Mutex<Option<Group>>,
    home: Folder,
}

/// Erlang's port mapper, epmd. The daemon that Erlang starts by itself would outlive the tests, so this one is started
/// here. Nodes of one cluster share it, and it runs on while they are killed and restarted.
pub(crate) struct Mapper {
    port: u16,
    running: OnceLock<Group>,
}

impl Mapper {
    pub(crate) fn new() -> Self {
        Self {
            port: free_port(),
            running: OnceLock::new(),
        }
    }
}

impl Rabbit {
    /// The broker of all tests that do not break it.
    pub fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Rabbit>> = OnceLock::new();
        Arc::clone(SHARED.get_or_init(|| Arc::new(Self::started())))
    }

    /// Ports and a folder without a node on them yet.
    pub fn stopped() -> Self {
        let cookie = uuid::Uuid::new_v4().simple().to_string();
        Self::with(Arc::new(Mapper::new()), &cookie)
    }

    /// The same; nodes of one cluster share a port mapper and a cookie.
    pub(crate) fn with(mapper: Arc<Mapper>, cookie: &str) -> Self {
        let port = free_port();
        let node = Self {
            name: format!("scorer{port}@localhost"),
            port,
            dist_port: free_port(),
            mapper,
            home: Folder::new("rabbit"),
            running: Mutex::new(None),
        };
        let cookie_file = std::fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o400)
            .open(node.home.join(".erlang.cookie"));
        let written = cookie_file.and_then(|mut file| file.write_all(cookie.as_bytes()));
        written.expect("a cookie in the node's folder");
        for (file, content) in [("plugins", "[].\n"), ("env.conf", "")] {
            std::fs::write(node.home.join(file), content).expect("a file in the node's folder");
        }
        node.configure("");
        node.set("");
        node
    }

    /// From the next start on, looks for consumers that are slow to acknowledge once a second, not once a minute.
    pub fn look_often_for_slow_consumers(&self) {
        self.set(", {channel_tick_interval, 1000}");
    }

    fn set(&self, more: &str) {
        // RabbitMQ before 3.10.14 does not know this key in rabbitmq.conf.
        let poll = recommended("raft.adaptive_failure_detector.poll_interval");
        let aten = format!("{{aten, [{{poll_interval, {poll}}}]}}");
        let config = format!("[{{rabbit, [{RESEND}, {RETURN}{more}]}}, {aten}].\n");
        std::fs::write(self.home.join("advanced.config"), config)
            .expect("a file in the node's folder");
    }

    /// Adds lines to the configuration, for the next start.
    pub fn configure(&self, more: &str) {
        let config = format!(
            "listeners.tcp.1 = 127.0.0.1:{}\ndisk_free_limit.absolute = 50MB\nlog.file.level = warning\n{more}",
            self.port
        );
        std::fs::write(self.home.join("rabbitmq.conf"), config)
            .expect("a file in the node's folder");
    }

    /// A node of the test's own, running.
    pub fn started() -> Self {
        let node = Self::stopped();
        node.start();
        node
    }

    /// Starts, or starts again on the same data and ports.
    #[track_caller]
    pub fn start(&self) {
        self.launch();
        self.await_start();
    }

    /// Starts without waiting for it: nodes of one cluster wait for each other.
    #[track_caller]
    pub(crate) fn launch(&self) {
        // The node is a grandchild: after a kill it may hold its ports a moment longer than its parent lives.
        let ports = [self.port, self.dist_port];
        eventually(secs(10), "the node's ports are free", || {
            !ports.into_iter().any(listening)
        });
        self.mapper
            .running
            .get_or_init(|| Group::spawn(self.quiet(&mut self.command("epmd"))));
        eventually(secs(10), "epmd listens", || listening(self.mapper.port));
        let node = Group::spawn(self.quiet(&mut self.command("rabbitmq-server")));
        *self.running() = Some(node);
    }

    /// Waits until a node that was launched accepts connections.
    #[track_caller]
    pub(crate) fn await_start(&self) {
        eventually(NODE_START, "rabbitmq-server accepts connections", || {
            let ended = self.running().as_mut().and_then(Group::ended);
            assert!(
                ended.is_none(),
                "rabbitmq-server ended ({ended:?}):\n{}",
                self.console_tail()
            );
            listening(self.port)
        });
    }

    /// Shuts down cleanly.
    #[track_caller]
    pub fn stop(&self) {
        self.signal(Signal::SIGTERM);
        let gone = self.running().as_mut().and_then(|node| node.wait(secs(60)));
        assert!(
            gone.is_some(),
            "rabbitmq-server did not stop:\n{}",
            self.console_tail()
        );
        *self.running() = None;
    }

    /// Kills the node.
    pub fn kill(&self) {
        *self.running() = None;
    }

    /// Stops the process: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Goes on after [`Rabbit::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// The URL of the default user and virtual host.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }

    /// Host and port, as `broker.node` in a heartbeat has them.
    pub fn place(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Has `rabbitmqctl` do something.
    #[track_caller]
    pub(crate) fn order(&self, arguments: &[&str]) {
        let mut ctl = self.command("rabbitmqctl");
        ctl.args(["-n", &self.name, "-q"]).args(arguments);
        let output = ctl.stdin(Stdio::null()).output().expect("rabbitmqctl runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rabbitmqctl {arguments:?}: {said}");
    }

    /// How many consumers the broker itself lists on a queue; cancelled ones do not count.
    #[track_caller]
    pub fn list_consumers(&self, queue: &str) -> usize {
        let rows = self.list("list_consumers", &["queue_name"]);
        rows.iter().filter(|row| row["queue_name"] == queue).count()
    }

    /// The rows of one of `rabbitmqctl`'s list commands.
    #[track_caller]
    pub fn list(&self, command: &str, columns: &[&str]) -> Vec<Value> {
        // Right after a start the node may refuse for a moment, so an error is asked again.
        eventually_some(secs(30), &format!("rabbitmqctl {command}"), || {
            let arguments: Vec<&str> = [&[command], columns].concat();
            self.control(&arguments)?.as_array().cloned()
        })
    }

    /// Raises or clears the memory alarm, under which the broker blocks publishers.
    #[track_caller]
    pub fn memory_alarm(&self, on: bool) {
        let watermark = if on { "0.0000001" } else { "0.8" };
        eventually(secs(30), "rabbitmqctl sets the watermark", || {
            let set = self.control(&["set_vm_memory_high_watermark", watermark]);
            set.is_some()
        });
    }

    /// What `rabbitmqctl` answers, as JSON; none if it fails.
    pub fn control(&self, arguments: &[&str]) -> Option<Value> {
        let mut ctl = self.command("rabbitmqctl");
        ctl.args(["-n", &self.name, "-q"])
            .args(arguments)
            .args(["--formatter", "json"]);
        let output = ctl.stdin(Stdio::null()).output().expect("rabbitmqctl runs");
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

    /// The first two numbers of its version.
    #[track_caller]
    pub fn version(&self) -> (u32, u32) {
        let status = eventually_some(secs(30), "the broker's status", || {
            self.control(&["status"])
        });
        let version = status["rabbitmq_version"].as_str().expect("a version");
        let mut numbers = version.split('.').map(|n| n.parse().expect("a number"));
        let mut next = || numbers.next().expect("two numbers");
        (next(), next())
    }

    /// Whether it was started and neither stopped nor killed since.
    pub(crate) fn is_running(&self) -> bool {
        self.running().is_some()
    }

    /// Waits until a quorum queue would survive the node's death. RabbitMQ writes the table that leads from a queue's name
    /// to its log some three seconds after the queue was declared; a node that is killed before finds no leader for it,
    /// ever again.
    #[track_caller]
    pub fn remembers(&self, queue: &str) {
        let node = self.home.join("data").join(&self.name);
        let table = node.join("quorum").join(&self.name).join("names.dets");
        eventually(secs(30), &format!("{queue} is on the disk"), || {
            let bytes = std::fs::read(&table).unwrap_or_default();
            bytes.windows(queue.len()).any(|w| w == queue.as_bytes())
        });
    }

    /// The name that the nodes of a cluster know each other by.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn quiet<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.home.join("console.log"));
        let log = log.expect("a log file");
        let copy = log.try_clone().expect("a second handle");
        command.stdin(Stdio::null()).stdout(log).stderr(copy)
    }

    /// A program of this RabbitMQ, told where everything of this node is.
    #[track_caller]
    fn command(&self, name: &str) -> Command {
        let mut command;
        let home;
        if let Some(root) = fetched() {
            command = Command::new(program(&["unshare"]));
            command
                .args(["--mount", "sh", "-ec", ENTER, "sh"])
                .arg(root)
                .arg(self.home.path())
                .arg(debian_path(name))
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
            home = PathBuf::from(INSIDE);
        } else {
            command = Command::new(installed(name));
            home = self.home.path().to_owned();
        }
        let inherited = std::env::vars_os().map(|(key, _)| key);
        for key in inherited.filter(|k| k.to_string_lossy().starts_with("RABBITMQ_")) {
            command.env_remove(key);
        }
        command
            .env("HOME", &home)
            .env("ERL_EPMD_PORT", self.mapper.port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODENAME", &self.name)
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("RABBITMQ_MNESIA_BASE", home.join("data"))
            .env("RABBITMQ_LOG_BASE", home.join("log"))
            .env("RABBITMQ_PID_FILE", home.join("pid"))
            .env("RABBITMQ_CONF_ENV_FILE", home.join("env.conf"))
            .env("RABBITMQ_CONFIG_FILE", home.join("rabbitmq.conf"))
            .env(
                "RABBITMQ_ADVANCED_CONFIG_FILE",
                home.join("advanced.config"),
            )
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", home.join("plugins"))
            // Idle schedulers must not spin: the tests share two cores with the node.
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+sbwt none +sbwtdcpu none +sbwtdio none",
            );
        command
    }

    fn console_tail(&self) -> String {
        let text = std::fs::read_to_string(self.home.join("console.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn signal(&self, signal: Signal) {
        self.running()
            .as_ref()
            .expect("a running node")
            .signal(signal);
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Option<Group>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The Debian that `TEST_RABBITMQ` names, if it names one.
#[track_caller]
fn fetched() -> Option<&'static Path> {
    static FETCHED: OnceLock<Option<PathBuf>> = OnceLock::new();
    let found = FETCHED.get_or_init(|| {
        let version = std::env::var("TEST_RABBITMQ").ok().filter(|v| !v.is_empty())?;
        // As ops/lib.sh has it.
        let root = repository();
        let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        let folder = root.join(target).join("brokers").join(&version);
        let server = folder.join(debian_path("rabbitmq-server").trim_start_matches('/'));
        assert!(
            server.is_file(),
            "TEST_RABBITMQ: there is no {}: run 'ops/brokers fetch {version}'",
            folder.display()
        );
        assert!(
            std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0),
            "TEST_RABBITMQ: another version is run by chroot, and only root can: run the tests as root"
        );
        Some(folder)
    });
    found.as_deref()
}

/// Where Debian has a command. Those on the path change to the `rabbitmq` user first; these are the ones behind them.
fn debian_path(name: &str) -> String {
    if name == "epmd" {
        "/usr/bin/epmd".to_owned()
    } else {
        format!("/usr/lib/rabbitmq/bin/{name}")
    }
}

#[track_caller]
fn installed(name: &str) -> PathBuf {
    let debian = PathBuf::from(debian_path(name));
    if debian.is_file() {
        debian
    } else {
        program(&[name])
    }
}
