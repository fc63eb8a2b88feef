//! The heartbeat: every field, its time to live, the index, the events, and a beat that scoring cannot starve.

use redis::Commands as _;
use serde_json::{Value, json};
use testkit::case::honest;
use testkit::hazard::{enduring_job, enduring_package, patient};
use testkit::package::{MODEL, Package, VERSION};
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, now_ms};

/// Fields of contract 5 that are never null once a worker has served a job.
const NUMBERS: &[&str] = &[
    "/seq",
    "/at_ms",
    "/started_at_ms",
    "/pid",
    "/last_ready_at_ms",
    "/last_state_change_at_ms",
    "/warm/attempt",
    "/warm/last_at_ms",
    "/warm/last_ms",
    "/warm/baseline_loss",
    "/warm/inert_count",
    "/model/version",
    "/model/baseline_cache_entries",
    "/host_info/cores",
    "/host_info/ram_bytes",
    "/jobs/in_flight",
    "/jobs/buffered",
    "/jobs/scored",
    "/jobs/rejected",
    "/jobs/failed",
    "/jobs/duplicates",
    "/jobs/redelivered",
    "/jobs/avg_ms",
    "/jobs/p50_ms",
    "/jobs/p95_ms",
    "/jobs/last_scored_at_ms",
    "/progress/counter",
    "/progress/at_ms",
    "/progress/busy_ms",
    "/broker/generation",
    "/memory/rss_bytes",
];
const TEXTS: &[&str] = &[
    "/worker_id",
    "/incarnation",
    "/host",
    "/build/version",
    "/state",
    "/state_detail",
    "/model/name",
    "/model/weights_id",
    "/model/plan",
    "/engine/execution_provider",
    "/engine/device",
    "/engine/precision",
    "/engine/onnxruntime",
    "/host_info/cpu_model",
    "/host_info/os",
    "/host_info/arch",
];
const FLAGS: &[&str] = &[
    "/ready",
    "/accepting",
    "/broker/connected",
    "/broker/consuming",
    "/broker/blocked",
];
/// There, but null where there is nothing to say.
const NULLABLE: &[&str] = &[
    "/build/git",
    "/warm/next_retry_at_ms",
    "/host_info/gpu_model",
    "/host_info/gpu_memory_bytes",
    "/last_error",
];

fn has_every_field(record: &Value) {
    assert_eq!(record["v"], 1);
    let at = |pointer: &str| record.pointer(pointer).unwrap_or(&Value::Null);
    for (kind, pointers, test) in [
        ("number", NUMBERS, Value::is_number as fn(&Value) -> bool),
        ("text", TEXTS, Value::is_string),
        ("flag", FLAGS, Value::is_boolean),
    ] {
        for pointer in pointers {
            assert!(
                test(at(pointer)),
                "{pointer} is no {kind}: {}\n{record:#}",
                at(pointer)
            );
        }
    }
    for pointer in NULLABLE {
        assert!(
            record.pointer(pointer).is_some(),
            "{pointer} is missing:\n{record:#}"
        );
    }
    assert!(!record["model"]["shards"].is_null(), "{}", record["model"]);
}

#[test]
fn a_tensor_without_effect_is_a_warning_and_the_worker_serves() {
    let stack = Stack::shared();
    let package = Package::with_an_idle_expert();
    let worker = stack.worker_on("w1", &package.path());
    worker.ready();
    let warm = &worker.next_heartbeat()["warm"];
    let (inert, count) = (&json!(["experts.2.weight"]), &json!(1));
    assert_eq!((&warm["inert"], &warm["inert_count"]), (inert, count));
    let warned = |line: &&str| line.contains("WARN") && line.contains("experts.2.weight");
    assert_eq!(worker.log().lines().filter(warned).count(), 1);

    let settings = stack.settings().set("model.dir", package.path().display());
    let answer = stack.command_with(settings, &["check", "--json"], "");
    let report = &answer.expect_code(0).values()[0];
    assert_eq!((&report["inert"], &report["inert_count"]), (inert, count));
    let findings = report["findings"].as_array().expect("findings");
    let warm_up = findings.iter().find(|f| f["part"] == "warm-up");
    let warm_up = warm_up.expect("a finding of the warm-up");
    assert_eq!(warm_up["verdict"], "warn", "{warm_up}");
    let found = warm_up["found"].as_str().unwrap_or_default();
    assert!(found.contains("experts.2.weight"), "{warm_up}");
}

#[test]
fn the_record_has_every_field_a_time_to_live_and_a_place_in_the_index() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| {
        s.set("heartbeat.interval", "500ms")
            .set("heartbeat.ttl", "4s")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest().job("one"));
    aggregator.result("one");
    let record = worker.heartbeat_when(SOON, "one job scored", |r| r["jobs"]["scored"] == 1);
    has_every_field(&record);
    assert_eq!(
        (&record["worker_id"], &record["model"]["name"]),
        (&"w1".into(), &MODEL.into())
    );
    assert_eq!(
        (&record["model"]["version"], &record["state_detail"]),
        (&VERSION.into(), &"serving".into())
    );
    assert_eq!(
        record["engine"]["execution_provider"],
        "CPUExecutionProvider"
    );
    assert_eq!(
        (&record["ready"], &record["accepting"]),
        (&true.into(), &true.into())
    );
    assert!(uuid::Uuid::parse_str(record["incarnation"].as_str().expect("text")).is_ok());

    let mut redis = stack.redis.connection();
    let ttl: i64 = redis.pttl(stack.key("worker:w1")).expect("a time to live");
    assert!((1..=4000).contains(&ttl), "PX is the configured ttl: {ttl}");
    let score: f64 = redis
        .zscore(stack.key("workers"), "w1")
        .expect("a member of the index");
    let (seconds, micros): (u64, u64) = redis::cmd("TIME").query(&mut redis).expect("the time");
    #[expect(clippy::cast_precision_loss, reason = "milliseconds fit into 53 bits")]
    let age = (seconds * 1000 + micros / 1000) as f64 - score;
    assert!(
        (0.0..4000.0).contains(&age),
        "the score is Redis' own time: {age} ms ago"
    );

    let next = worker.next_heartbeat();
    assert!(next["seq"].as_u64() > record["seq"].as_u64());
    assert_eq!(next["incarnation"], record["incarnation"]);
    worker.kill();
    eventually(SOON, "the record of a dead worker goes", || {
        stack.record("w1").is_none()
    });
}

#[test]
fn the_events_tell_every_state_in_order() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    let ready = worker.ready();
    worker.drain();
    let states = stack.states("w1");
    let mut rest = states.iter();
    for state in ["warming", "ready", "draining", "stopped"] {
        assert!(
            rest.any(|s| s == state),
            "{state} is missing or out of order: {states:?}"
        );
    }
    let events = stack.events("w1");
    for pair in events.windows(2) {
        assert_eq!(pair[0]["to"], pair[1]["from"], "a gap between {pair:?}");
    }
    assert!(
        ["from", "to"]
            .iter()
            .any(|end| events[0][*end] == "starting"),
        "{:?}",
        events[0]
    );
    for event in &events {
        assert_eq!(
            Some(event["incarnation"].as_str()),
            ready["incarnation"].as_str(),
            "{event:?}"
        );
        assert!(
            event.contains_key("detail") && event.contains_key("at"),
            "{event:?}"
        );
    }
    let record = worker.heartbeat();
    assert_eq!(
        (&record["state"], &record["ready"], &record["accepting"]),
        (&"stopped".into(), &false.into(), &false.into())
    );
    assert!(record["last_state_change_at_ms"].as_u64() >= ready["last_ready_at_ms"].as_u64());
}

#[test]
fn the_beat_goes_on_while_the_worker_scores() {
    let (stack, package) = (Stack::shared(), enduring_package());
    let worker = stack.worker_with("w1", |s| patient(s, &package));
    worker.ready();
    stack.aggregator().submit(&enduring_job("long"));
    worker.computes();
    let first = worker.heartbeat();
    let of = |record: &Value, field: &str| record.pointer(field).and_then(Value::as_u64);
    // Two seconds and a half of beats, while the worker does nothing but one and the same job.
    let beats = of(&first, "/seq").map(|seq| seq + 10);
    let last = worker.heartbeat_when(SOON, "ten more beats", |r| of(r, "/seq") >= beats);
    for field in ["/progress/busy_ms", "/at_ms"] {
        assert!(
            of(&last, field) > of(&first, field),
            "{field}: {first} {last}"
        );
    }
    assert_eq!(last["jobs"]["in_flight"], 1, "{last}");
    let moved = worker.heartbeat_when(SOON, "its progress is in the record", |r| {
        of(r, "/progress/counter") > of(&last, "/progress/counter")
    });
    assert!(
        of(&moved, "/progress/at_ms") > Some(now_ms() - 30_000),
        "{moved}"
    );
    worker.kill();
}
