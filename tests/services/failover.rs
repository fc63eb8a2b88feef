//! Redis behind sentinels, and a Redis cluster: a master dies or freezes and a slot moves while jobs run. Scoring goes on,
//! beats resume soon after the fail-over, and whoever looks at the fleet sees it.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use redis::Commands as _;
use scorer::config::{Config, Layers};
use scorer::store::FleetStore;
use serde_json::Value;
use testkit::aggregator::{Aggregator, runtime};
use testkit::broker::Rabbit;
use testkit::case::honest_job;
use testkit::folder::Folder;
use testkit::package::MODEL;
use testkit::redis_cluster::RedisCluster;
use testkit::redis_sentinel::Sentinels;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{DRAIN, SOON, START, eventually, eventually_some, now_ms, secs};
use testkit::worker::{Settings, Worker};

/// How long after a fail-over beats may be away.
const RESUMES: Duration = secs(2);
/// Some seconds of work.
const JOBS: usize = 20;
/// What a redelivery must compute again to the last bit.
const BITS: [&str; 5] = ["status", "delta", "stderr", "loss_before", "loss_after"];

/// The users of the documentation, but the default user may do everything, as the servers among themselves.
struct Users {
    file: String,
    _folder: Folder,
}

impl Users {
    fn new() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ops/redis/users.acl");
        let users = std::fs::read_to_string(path).expect("the users");
        let all = "user default on nopass ~* &* +@all";
        let off = users.lines().next().expect("a first line");
        assert!(off.starts_with("user default off "), "{off}");
        // Every test has a namespace of its own.
        let users = users.replacen(off, all, 1).replace("~scorer", "~*");
        let folder = Folder::new("users");
        let file = folder.join("users.acl");
        std::fs::write(&file, users).expect("a writable folder");
        Self {
            file: file.display().to_string(),
            _folder: folder,
        }
    }

    fn arguments(&self) -> [&str; 2] {
        ["--aclfile", &self.file]
    }
}

/// A fleet of one worker on a Redis of several servers, with a stream of jobs.
struct Fleet {
    stack: Stack,
    settings: Vec<(&'static str, String)>,
    worker: Worker,
    aggregator: Aggregator,
    observer: FleetStore,
    python: Python,
    ids: Vec<String>,
}

impl Fleet {
    /// `first` has the model's keys; `urls` are those for a user.
    fn under_way(mode: &str, urls: impl Fn(&str) -> String, first: &Arc<Redis>) -> Self {
        let stack = Stack::on(Rabbit::shared(), Arc::clone(first));
        let of = |user| vec![("redis.mode", mode.to_owned()), ("redis.url", urls(user))];
        let settings = of("dashboard");
        let worker = stack.worker_with("w1", |common| {
            // As they are by default.
            let common = common
                .set("heartbeat.interval", "1s")
                .set("heartbeat.ttl", "5s");
            with(common, &of("worker"))
        });
        let observer = FleetStore::new(&config(&stack, &settings).redis);
        let python = Python::started(mode, &urls("aggregator"), &stack);
        worker.ready();
        let aggregator = stack.aggregator();
        aggregator.collect_results();
        let mut fleet = Self {
            stack,
            settings,
            worker,
            aggregator,
            observer,
            python,
            ids: Vec::new(),
        };
        fleet.sees_the_worker();
        fleet.stream("before");
        fleet
    }

    /// Submits jobs, and returns when some of them are answered.
    fn stream(&mut self, name: &str) {
        let ids: Vec<String> = (0..JOBS).map(|n| format!("{name}-{n}")).collect();
        for id in &ids {
            self.aggregator.submit(&honest_job(id, id));
        }
        self.aggregator.result(&ids[2]);
        self.ids.extend(ids);
    }

    /// Waits for a record that was written after the fail-over; how long after it.
    #[track_caller]
    fn beats_resume(&self, master: &Redis, failed_over_ms: u64) -> Duration {
        let key = self.stack.key("worker:w1");
        let record = eventually_some(SOON, "beats resume", || {
            let text: String = master.ask(&["GET", &key])?;
            let record: Value = serde_json::from_str(&text).ok()?;
            (record["at_ms"].as_u64()? >= failed_over_ms).then_some(record)
        });
        assert_eq!(record["worker_id"], "w1");
        Duration::from_millis(now_ms().saturating_sub(failed_over_ms))
    }

    /// Whoever looked before the fault goes on looking, whether told of the model or not, and so does a command that is
    /// started now.
    #[track_caller]
    fn sees_the_worker(&mut self) {
        for model in [Some(MODEL), None] {
            eventually(SOON, "the observer sees the worker", || {
                let looked = runtime().block_on(self.observer.live_records(model, secs(5)));
                looked.is_ok_and(|(_, records)| records.len() == 1)
            });
        }
        self.python.sees_the_worker();
        let status = self.command(&["status", "--json"]);
        assert_eq!(status["workers"][0]["worker_id"], "w1", "{status}");
    }

    fn command(&self, arguments: &[&str]) -> Value {
        let settings = with(self.stack.settings(), &self.settings);
        let answer = self.stack.command_with(settings, arguments, "");
        answer.expect_code(0).value()
    }

    /// Every job has its answer, and copies agree. A job whose stored result a fail-over has lost is computed again, to the
    /// same bits.
    #[track_caller]
    fn all_is_answered(&self, master: &Redis) {
        self.aggregator.all_results(&self.ids, secs(120));
        let mut answers: HashMap<String, Value> = HashMap::new();
        for message in self.aggregator.results() {
            let result = message.json();
            let id = result["submission_id"].as_str().expect("a submission_id");
            let first = answers.entry(id.to_owned()).or_insert(result.clone());
            assert_same(first, &result);
        }
        assert_eq!(
            answers.len(),
            self.ids.len(),
            "nothing but what was submitted"
        );
        let id = &self.ids[0];
        let before = self.aggregator.copies(id).len();
        self.lose_results(master);
        self.aggregator.submit(&honest_job(id, id));
        let again = self.aggregator.nth_result(id, before + 1).json();
        assert_ne!(
            again["scored_at_ms"], answers[id]["scored_at_ms"],
            "it was not lost"
        );
        assert_same(&answers[id], &again);
        self.aggregator.submit(&honest_job(id, id));
        let stored = self.aggregator.nth_result(id, before + 2).json();
        assert_eq!(
            stored["scored_at_ms"], again["scored_at_ms"],
            "it is stored again"
        );
        let log = self.worker.log();
        assert!(
            !log.contains("NOPERM") && !log.contains("no permissions"),
            "{log}"
        );
        self.worker.terminate();
        assert_eq!(self.worker.exit_code(DRAIN), 0);
    }

    fn lose_results(&self, master: &Redis) {
        let mut connection = master.connection();
        let keys: Vec<String> = connection.keys(self.stack.key("result:*")).expect("keys");
        assert!(!keys.is_empty(), "no result is stored");
        for key in keys {
            connection.del::<_, ()>(key).expect("a key is deleted");
        }
    }
}

/// A program that looks at the fleet with both Python clients.
struct Python(Child);

impl Python {
    fn started(mode: &str, urls: &str, stack: &Stack) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new("python3");
        command
            .arg(root.join("tests/services/watch_fleet.py"))
            .args([mode, urls, &stack.namespace, MODEL])
            .env("PYTHONPATH", root.join("clients/python/src"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Self(command.spawn().expect("python3 runs"))
    }

    #[track_caller]
    fn sees_the_worker(&mut self) {
        let asked = self.0.stdin.as_mut().expect("a pipe").write_all(b"look\n");
        asked.expect("it reads");
        let mut answer = [0; 5];
        let read = self
            .0
            .stdout
            .as_mut()
            .expect("a pipe")
            .read_exact(&mut answer);
        read.expect("it sees the worker, or says why not");
        assert_eq!(&answer, b"seen\n");
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        // It ends by itself once its input does.
        drop(self.0.stdin.take());
        self.0.wait().ok();
    }
}

fn with(common: Settings, settings: &[(&'static str, String)]) -> Settings {
    let settings = settings.iter();
    settings.fold(common, |all, (key, value)| all.set(key, value))
}

fn config(stack: &Stack, settings: &[(&'static str, String)]) -> Config {
    let common = [
        ("amqp.url", stack.rabbit.url()),
        ("amqp.namespace", stack.namespace.clone()),
        ("redis.namespace", stack.namespace.clone()),
    ];
    let all = common.iter().chain(settings);
    let set: Vec<String> = all.map(|(key, value)| format!("{key}={value}")).collect();
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    Config::load(&layers).expect("a sound configuration")
}

#[track_caller]
fn assert_same(one: &Value, other: &Value) {
    for field in BITS {
        assert_eq!(one[field], other[field], "{field}: {one} {other}");
    }
    assert_eq!(one["status"], "scored", "{one}");
}

#[track_caller]
fn assert_soon(after: Duration) {
    assert!(
        after <= RESUMES,
        "beats resumed {after:?} after the fail-over"
    );
}

#[test]
fn sentinels_name_another_master_where_it_was_killed() {
    let users = Users::new();
    let sentinels = Sentinels::started(&users.arguments());
    let servers = sentinels.servers();
    let mut fleet = Fleet::under_way("sentinel", |user| sentinels.urls(user), &servers[0]);
    servers[0].kill();
    let master = sentinels.another_master(0);
    assert_soon(fleet.beats_resume(&servers[master], now_ms()));
    fleet.sees_the_worker();
    fleet.stream("after");
    fleet.all_is_answered(&servers[master]);
}

#[test]
fn sentinels_name_another_master_where_it_froze_together_with_one_of_them() {
    let users = Users::new();
    let sentinels = Sentinels::started(&users.arguments());
    let servers = sentinels.servers();
    let mut fleet = Fleet::under_way("sentinel", |user| sentinels.urls(user), &servers[0]);
    servers[0].freeze();
    sentinels.sentinels()[0].freeze();
    let master = sentinels.another_master(0);
    assert_soon(fleet.beats_resume(&servers[master], now_ms()));
    fleet.sees_the_worker();
    // The old master comes back as one, and is told better.
    sentinels.sentinels()[0].thaw();
    servers[0].thaw();
    eventually(START, "it becomes a replica", || {
        let told = servers[0].ask::<String>(&["INFO", "replication"]);
        told.is_some_and(|told| told.contains("master_link_status:up"))
    });
    assert_soon(fleet.beats_resume(&servers[master], now_ms()));
    fleet.stream("after");
    fleet.all_is_answered(&servers[master]);
}

#[test]
fn a_cluster_moves_the_models_slot_and_then_loses_its_new_master() {
    let users = Users::new();
    let cluster = RedisCluster::started(&users.arguments());
    let nodes = cluster.nodes();
    let slot = cluster.slot(&format!("{{{MODEL}}}"));
    let first = cluster.master_of(slot, &[]);
    let mut fleet = Fleet::under_way("cluster", |user| cluster.urls(user), &nodes[first]);
    let second = (first + 1) % 3;
    cluster.move_slot(slot, first, second);
    assert_soon(fleet.beats_resume(&nodes[second], now_ms()));
    fleet.sees_the_worker();
    fleet.stream("moved");
    nodes[second].kill();
    let third = cluster.master_of(slot, &[first, second]);
    assert_soon(fleet.beats_resume(&nodes[third], now_ms()));
    fleet.sees_the_worker();
    fleet.stream("promoted");
    fleet.all_is_answered(&nodes[third]);
}

#[test]
fn a_cluster_promotes_the_replica_of_a_master_that_froze() {
    let users = Users::new();
    let cluster = RedisCluster::started(&users.arguments());
    let nodes = cluster.nodes();
    let slot = cluster.slot(&format!("{{{MODEL}}}"));
    let first = cluster.master_of(slot, &[]);
    let mut fleet = Fleet::under_way("cluster", |user| cluster.urls(user), &nodes[first]);
    nodes[first].freeze();
    let second = cluster.master_of(slot, &[first]);
    assert_soon(fleet.beats_resume(&nodes[second], now_ms()));
    fleet.sees_the_worker();
    fleet.stream("after");
    fleet.all_is_answered(&nodes[second]);
}
