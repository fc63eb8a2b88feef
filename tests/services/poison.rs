//! Jobs that kill their workers: counted by marks in Redis, answered `poisoned` after two deaths.
//! What was merely at hand when a worker died, froze or left is scored all the same.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use redis::Commands as _;
use serde_json::{Value, json};
use testkit::aggregator::Aggregator;
use testkit::broker::Rabbit;
use testkit::case::{honest, honest_job};
use testkit::encoding::Encoding;
use testkit::hazard::{enduring_job, enduring_package, hazard_job as job, patient};
use testkit::pace::Pace;
use testkit::package::{Package, VERSION};
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, secs, throughout};
use testkit::worker::{Settings, Worker};

/// So many turns for each window are about a second in all.
const SECOND: f32 = -9_000.0;

/// A start, and the wait for news of whoever died.
const START_AND_WAIT: Duration = secs(80);

/// Deaths are known after at most three lives of a record.
fn quick(settings: Settings) -> Settings {
    settings
        .set("heartbeat.ttl", "1s")
        .set("heartbeat.interval", "200ms")
}

fn on(package: &Package) -> impl Fn(Settings) -> Settings + '_ {
    // Room for a job that computes, and for those behind it.
    |settings| patient(quick(settings), package).set("amqp.prefetch", 4)
}

/// The marks of a job by worker id; an incarnation more or less makes no difference here.
fn marks(stack: &Stack, submission_id: &str) -> HashMap<String, String> {
    let key = stack.key(&format!("crash:{submission_id}:{VERSION}"));
    let marks: HashMap<String, String> = stack
        .redis
        .connection()
        .hgetall(key)
        .expect("a hash of marks");
    let id = |field: String| {
        field
            .split_once('/')
            .expect("WORKER_ID/INCARNATION")
            .0
            .to_owned()
    };
    marks
        .into_iter()
        .map(|(field, value)| (id(field), value))
        .collect()
}

fn holds(stack: &Stack, submission_id: &str, worker: &str) -> bool {
    marks(stack, submission_id)
        .get(worker)
        .is_some_and(|value| value.parse::<u64>().is_ok())
}

/// Waits until a worker computes an enduring job, and nobody else does.
fn computing(stack: &Stack, worker: &Worker, id: &str, submission_id: &str) {
    eventually(SOON, &format!("{id} marks {submission_id}"), || {
        holds(stack, submission_id, id)
    });
    worker.computes();
}

fn expect_poisoned(aggregator: &Aggregator, submission_id: &str, victims: &[&str]) {
    let message = aggregator.result(submission_id);
    let result = message.json();
    assert_eq!(result["status"], "failed", "{result}");
    let error = &result["error"];
    assert_eq!(error["code"], "poisoned", "{result}");
    assert_eq!(error["retryable"], false, "{result}");
    assert_eq!(
        error["detail"],
        json!({"deaths": victims.len(), "workers": victims}),
        "{result}"
    );
    let parked = aggregator.take_parked();
    assert_eq!(parked.headers["x-error-code"], "poisoned");
    assert_eq!(parked.headers["x-worker-id"], result["worker_id"]);
    let sent = Encoding::MessagePack.encode(&enduring_job(submission_id));
    assert!(
        parked.body == sent,
        "the parked copy is the job as it was sent"
    );
}

#[test]
fn a_job_that_kills_two_workers_is_answered_and_parked_and_its_neighbours_are_scored() {
    let stack = Stack::shared();
    let package = enduring_package();
    let first = stack.worker_with("w1", on(&package));
    first.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&enduring_job("killer"));
    computing(&stack, &first, "w1", "killer");
    // They wait behind it for the device, and die with both workers.
    let innocents = ["innocent-0", "innocent-1", "innocent-2"];
    for id in innocents {
        aggregator.submit(&job(id, 2.0));
        eventually(SOON, "w1 holds it too", || holds(&stack, id, "w1"));
    }
    first.kill();

    let second = stack.worker_with("w2", on(&package));
    // Suspects compute one at a time; those before the killer are answered.
    eventually(START_AND_WAIT, "w2 computes it", || {
        holds(&stack, "killer", "w2")
    });
    let mark = &marks(&stack, "killer")["w1"];
    assert!(
        mark.starts_with("dead:"),
        "the first death is counted: {mark}"
    );
    for id in innocents {
        assert!(
            !holds(&stack, id, "w2"),
            "{id} waits for the device, unmarked"
        );
    }
    second.kill();

    let third = stack.worker_with("w3", on(&package));
    expect_poisoned(&aggregator, "killer", &["w1", "w2"]);
    for id in innocents {
        let result = aggregator.result(id).json();
        assert_eq!(result["status"], "scored", "{result}");
    }
    for id in innocents {
        assert_eq!(marks(&stack, id), HashMap::new(), "{id} is answered");
    }
    // Whoever sends it again gets the same answer, at no risk.
    let before = third.next_heartbeat()["progress"]["counter"].clone();
    aggregator.submit(&enduring_job("killer"));
    let again = aggregator.nth_result("killer", 2);
    assert_eq!(again.json()["error"]["code"], "poisoned");
    assert_eq!(third.next_heartbeat()["progress"]["counter"], before);
    assert_eq!(again.message_id, aggregator.result("killer").message_id);
    third.drain();
    aggregator.expect_empty(&stack.jobs_queue());
}

#[test]
fn a_merge_that_kills_two_workers_names_the_member_that_was_measured() {
    let (stack, package) = (Stack::shared(), enduring_package());
    let start = |id: &str| {
        let worker = stack.worker_with(id, on(&package));
        worker.ready();
        worker
    };
    let first = start("w1");
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let member =
        |id: &str, job: Value| json!({"id": id, "candidate": job["candidate"], "weight": 1});
    let members = [
        member("innocent", job("", 2.0)),
        member("killer", enduring_job("")),
        member("other", job("", 3.0)),
    ];
    aggregator.submit(&json!({
        "v": 1, "kind": "merge", "submission_id": "round", "model_version": VERSION, "members": members,
    }));
    for (id, worker) in [("w1", first), ("w2", start("w2"))] {
        eventually(START_AND_WAIT, &format!("{id} measures it"), || {
            let mark = marks(&stack, "round").remove(id);
            mark.is_some_and(|mark| !mark.starts_with("dead:") && mark.ends_with(" killer"))
        });
        worker.kill();
    }
    let last = start("w3");
    let result = aggregator.result("round").json();
    assert_eq!(
        result["error"]["detail"],
        json!({
            "deaths": 2, "workers": ["w1", "w2"], "members": [{"id": "killer", "code": "poisoned"}],
        }),
        "{result}"
    );
    last.drain();
}

/// How long a worker took for each of its results, in seconds: the median of the last ones.
fn pace_of(results: &[Value]) -> f64 {
    let at: Vec<u64> = results
        .iter()
        .map(|r| r["scored_at_ms"].as_u64().expect("a time"))
        .collect();
    let mut gaps: Vec<u64> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    gaps.sort_unstable();
    gaps[gaps.len() / 2] as f64 / 1e3
}

#[test]
fn a_survivor_goes_on_at_its_pace_while_it_waits_for_news_of_the_dead() {
    let (stack, package) = (Stack::shared(), Package::hazard_of(4));
    let start = |id: &str| {
        let worker = stack.worker_with(id, |s| {
            patient(s, &package)
                .set("heartbeat.ttl", "2s")
                .set("heartbeat.interval", "200ms")
                .set("amqp.prefetch", 2)
        });
        worker.ready();
        worker
    };
    let (victim, survivor) = (start("w1"), start("w2"));
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    let by_survivor = || -> Vec<Value> {
        let results = aggregator
            .results()
            .into_iter()
            .map(|message| message.json());
        results
            .filter(|r| {
                r["worker_id"] == "w2"
                    && r["submission_id"]
                        .as_str()
                        .is_some_and(|id| id.starts_with("job-"))
            })
            .collect()
    };
    for n in 0..60 {
        aggregator.submit(&pace.job(&format!("job-{n}"), 0.25));
    }
    eventually(SOON, "both have computed", || by_survivor().len() >= 6);
    let held = || {
        let record = victim.heartbeat();
        record["jobs"]["in_flight"].as_u64() == Some(1)
            && record["jobs"]["buffered"].as_u64() == Some(1)
    };
    eventually(SOON, "the victim holds two", held);
    let before = by_survivor();
    victim.kill();
    let record = survivor.heartbeat_when(SOON, "it waits", |r| {
        r["jobs"]["waiting"].as_u64() > Some(0)
    });
    assert_eq!(record["jobs"]["waits_for"], json!(["w1"]), "{record}");
    let waits = Instant::now();
    survivor.heartbeat_when(SOON, "it waits no longer", |r| r["jobs"]["waiting"] == 0);
    let (waited, all) = (waits.elapsed(), by_survivor());
    let during = &all[before.len()..];
    assert!(waited > secs(3), "{waited:?}");
    let (usual, then) = (pace_of(&before), pace_of(during));
    let rate = during.len() as f64 * usual / waited.as_secs_f64();
    println!(
        "before {usual} s a job, then {then} s; {} in {waited:?}: {rate:.2} of what it was",
        during.len()
    );
    assert!(
        rate > 0.8,
        "{} results in {waited:?}, {usual} s each before",
        during.len()
    );
    let losses = stack
        .states("w1")
        .into_iter()
        .filter(|state| state == "lost");
    assert_eq!(
        losses.count(),
        1,
        "whoever saw it first wrote it down, once"
    );
    let told = stack.command(&["status"]).expect_code(0).stdout;
    assert!(
        told.contains("bad: 1 worker vanished: killed, frozen, or cut off from Redis (w1)"),
        "{told}"
    );
    let ids: Vec<String> = (0..60).map(|n| format!("job-{n}")).collect();
    aggregator.all_results(&ids, secs(60));
    let consumers = || stack.rabbit.list_consumers(&stack.jobs_queue());
    eventually(SOON, "the other consumers are gone", || consumers() == 1);
    survivor.drain();
    aggregator.expect_empty(&stack.jobs_queue());
}

#[test]
fn one_death_is_forgiven_and_others_are_scored_during_the_wait() {
    let stack = Stack::shared();
    let package = enduring_package();
    let slow = |settings: Settings| on(&package)(settings).set("heartbeat.ttl", "3s");
    let heir = stack.worker_with("heir", slow);
    heir.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let tell_heir = |command: &str| {
        let body = json!({"v": 1, "command": command}).to_string();
        aggregator.control("worker.heir", body.as_bytes(), Encoding::Json);
    };
    tell_heir("pause");
    heir.state("degraded", "paused");
    let victim = stack.worker_with("victim", slow);
    victim.ready();
    aggregator.submit(&job("unlucky", SECOND));
    stack.stop_amid(&victim, "unlucky");
    victim.kill();
    let died = Instant::now();
    tell_heir("resume");
    heir.heartbeat_when(SOON, "it holds the job", |r| r["jobs"]["in_flight"] == 1);
    aggregator.submit(&job("meanwhile", 2.0));
    assert_eq!(aggregator.result("meanwhile").json()["status"], "scored");
    assert_eq!(
        aggregator.copies("unlucky").len(),
        0,
        "it did not wait for the other one"
    );
    assert_eq!(
        marks(&stack, "unlucky").into_keys().collect::<Vec<_>>(),
        ["victim"],
        "what waits is not marked"
    );
    let result = aggregator.result("unlucky").json();
    assert!(
        died.elapsed() >= secs(6),
        "computed after {:?}, before the victim could be known to be dead",
        died.elapsed()
    );
    assert_eq!(
        (&result["status"], &result["worker_id"]),
        (&json!("scored"), &json!("heir"))
    );
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new());
    heir.drain();
    aggregator.expect_empty(&stack.jobs_queue());
}

#[test]
fn a_frozen_worker_that_comes_back_takes_its_death_back() {
    let stack = Stack::shared();
    let package = enduring_package();
    let settings = |settings: Settings| on(&package)(settings).set("amqp.heartbeat", "2s");
    let frozen = stack.worker_with("frozen", settings);
    frozen.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&enduring_job("innocent"));
    computing(&stack, &frozen, "frozen", "innocent");
    frozen.signal(Signal::SIGSTOP);
    let second = stack.worker_with("second", settings);
    eventually(START_AND_WAIT, "the second computes it", || {
        holds(&stack, "innocent", "second")
    });
    let mark = marks(&stack, "innocent")["frozen"].clone();
    assert!(mark.starts_with("dead:"), "counted: {mark}");

    frozen.signal(Signal::SIGCONT);
    eventually(SOON, "it removes its mark", || {
        !marks(&stack, "innocent").contains_key("frozen")
    });
    frozen.kill();
    second.kill();
    let third = stack.worker_with("third", settings);
    eventually(
        START_AND_WAIT,
        "the third computes it: one worker died, not two",
        || holds(&stack, "innocent", "third"),
    );
    assert_eq!(aggregator.copies("innocent").len(), 0);
    assert_eq!(marks(&stack, "innocent").len(), 2);
    third.kill();
}

#[test]
fn somebody_alive_is_waited_for_until_the_next_beat_and_is_no_death() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    let other = stack.worker_with("other", quick);
    let incarnation = other.ready()["incarnation"].clone();
    let incarnation = incarnation.as_str().expect("an incarnation");
    // It goes on beating, and takes no jobs.
    let pause = json!({"v": 1, "command": "pause"}).to_string();
    aggregator.control("worker.other", pause.as_bytes(), Encoding::Json);
    other.state("degraded", "paused");
    let worker = stack.worker_with("w1", quick);
    worker.ready();
    aggregator.collect_results();
    let key = stack.key(&format!("crash:shared:{VERSION}"));
    let mut redis = stack.redis.connection();
    let _: () = redis
        .hset(&key, format!("other/{incarnation}"), "1700000000000")
        .expect("a mark");
    aggregator.submit(&honest().job("shared"));
    assert_eq!(aggregator.result("shared").json()["status"], "scored");
    assert_eq!(
        marks(&stack, "shared"),
        HashMap::from([("other".to_owned(), "1700000000000".to_owned())]),
        "only its owner removes a mark that is not counted"
    );

    // Without an end to the wait a drain hands the job back at once.
    let _: () = redis
        .hset(
            stack.key(&format!("crash:waiting:{VERSION}")),
            "ghost/gone",
            "1700000000000",
        )
        .expect("a mark");
    let waits = stack.worker_with("patient", |s| s.set("heartbeat.ttl", "30s"));
    worker.drain();
    waits.ready();
    aggregator.submit(&honest_job("waiting", "waiting"));
    waits.heartbeat_when(SOON, "it holds the job", |r| r["jobs"]["in_flight"] == 1);
    waits.terminate();
    assert_eq!(
        waits.exit_code(SOON),
        0,
        "a drain does not wait for the dead"
    );
    eventually(SOON, "the job is back", || {
        aggregator
            .depth(&stack.jobs_queue())
            .is_some_and(|(waiting, _)| waiting == 1)
    });
    assert_eq!(marks(&stack, "waiting").len(), 1);
}

#[test]
fn marks_go_with_answers_hand_backs_and_drains() {
    let stack = Stack::shared();
    let package = enduring_package();
    let worker = stack.worker_with("w1", |s| {
        on(&package)(s)
            .set("worker.drain_timeout", "0s")
            .set("amqp.retry_delays", "[]")
            .set("candidates.allow", "[\"http://127.0.0.1\"]")
            .set("candidates.allow_private", true)
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let validate = json!({"v": 1, "kind": "validate", "submission_id": "check"});
    aggregator.submit(&validate);
    assert_eq!(aggregator.result("check").json()["status"], "scored");
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new(), "answered");
    // Not fetched, so it climbs the ladder.
    let mut missing = job("missing", 2.0);
    missing["candidate"] = json!({
        "format": "binary_v2", "semantics": "param_diff", "url": "http://127.0.0.1:9/missing",
        "sha256": "0".repeat(64), "size": 10,
    });
    aggregator.submit(&missing);
    aggregator.submit(&job("malformed", f32::NAN));
    assert_eq!(aggregator.result("malformed").json()["status"], "rejected");
    aggregator.result("missing");
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new(), "refused");

    aggregator.submit(&enduring_job("long"));
    computing(&stack, &worker, "w1", "long");
    for id in ["behind-0", "behind-1"] {
        aggregator.submit(&job(id, 2.0));
        eventually(SOON, "marked", || holds(&stack, id, "w1"));
    }
    worker.terminate();
    assert_eq!(worker.exit_code(SOON), 75, "a computation was cut short");
    assert_eq!(stack.keys("crash:*"), Vec::<String>::new(), "handed back");
    eventually(SOON, "all three wait again", || {
        aggregator.depth(&stack.jobs_queue()) == Some((3, 0))
    });
}

#[test]
fn without_redis_jobs_are_scored_unmarked_and_marks_left_behind_are_removed_later() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let package = enduring_package();
    let worker = stack.worker_with("w1", on(&package));
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&job("marked", SECOND));
    stack.stop_amid(&worker, "marked");
    stack.redis.freeze();
    worker.signal(Signal::SIGCONT);
    assert_eq!(aggregator.result("marked").json()["status"], "scored");
    for n in 0..3 {
        let id = format!("frozen-{n}");
        aggregator.submit(&job(&id, 2.0));
        assert_eq!(aggregator.result(&id).json()["status"], "scored");
    }
    stack.redis.thaw();
    eventually(SOON, "the marks are removed", || {
        stack.keys("crash:*").is_empty()
    });
    stack.redis.kill();
    aggregator.submit(&job("killed", 2.0));
    assert_eq!(aggregator.result("killed").json()["status"], "scored");
    worker.drain();
}

#[test]
fn a_killer_takes_two_of_a_fleet() {
    const FLEET: usize = 8;
    let stack = Stack::shared();
    let package = enduring_package();
    let names: Vec<String> = (0..FLEET).map(|n| format!("w{n}")).collect();
    let mut fleet: HashMap<&str, Worker> = names
        .iter()
        .map(|id| (id.as_str(), stack.worker_with(id, on(&package))))
        .collect();
    for worker in fleet.values() {
        worker.ready();
    }
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&enduring_job("killer"));
    let mut victims = Vec::new();
    // Whoever computes it dies at once; the broker has another deliver it within milliseconds.
    while aggregator.copies("killer").is_empty() {
        let marks = marks(&stack, "killer");
        let computing = marks
            .iter()
            .find(|(id, value)| !value.starts_with("dead:") && fleet.contains_key(id.as_str()));
        if let Some((id, _)) = computing
            && let Some(worker) = fleet.remove(id.as_str())
        {
            worker.kill();
            victims.push(id.clone());
        }
        assert!(victims.len() <= 2, "it took {victims:?}");
    }
    victims.sort();
    let victims: Vec<&str> = victims.iter().map(String::as_str).collect();
    expect_poisoned(&aggregator, "killer", &victims);
    assert_eq!(fleet.len(), FLEET - 2);
    throughout(secs(2), "the others live on", || {
        fleet
            .values()
            .all(|worker| worker.heartbeat()["state"] == "ready")
    });
    let ttl: i64 = stack
        .redis
        .connection()
        .ttl(stack.key(&format!("crash:killer:{VERSION}")))
        .expect("the marks of a poisoned job stay");
    assert!((86_000..=86_400).contains(&ttl), "for a day: {ttl}");
}
