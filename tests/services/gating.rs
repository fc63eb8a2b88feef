//! No consumer at the broker unless the worker is ready, seen by the broker itself.

use std::time::Duration;

use testkit::case::honest;
use testkit::package::Package;
use testkit::stack::Stack;
use testkit::wait::{SOON, START, eventually, now_ms, secs, throughout};

use crate::watch::{Watch, longest_unready_consumer};
use serde_json::{Value, json};

/// What a failed load or warm-up may be called.
const FAILED: [&str; 3] = ["warm_failed", "model_load_failed", "canary_mismatch"];

/// From the broker's word to the beat that passes it on: a round trip, which a busy machine may take its time for.
const SHORT: Duration = secs(5);

fn failed_warm_up(record: &Value) -> bool {
    record["state"] == "degraded"
        && FAILED
            .iter()
            .any(|detail| record["state_detail"] == *detail)
}

#[test]
fn there_is_no_consumer_unless_the_worker_is_ready() {
    let stack = Stack::shared();
    let package = Package::copy();
    let spoilt = package.spoil_a_shard();
    let watch = Watch::start(&stack, "w1");
    let worker = stack.worker_on("w1", &package.path());

    // A failing warm-up, again and again.
    let first = worker.heartbeat_when(START, "a failed warm-up", failed_warm_up);
    let error = first["last_error"]["message"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(
        error.contains(&spoilt),
        "the error does not name {spoilt}: {error}"
    );
    let later = worker.heartbeat_when(START, "a second failure", |r| {
        failed_warm_up(r) && r["warm"]["attempt"].as_u64() > first["warm"]["attempt"].as_u64()
    });
    assert_eq!(
        (&later["ready"], &later["accepting"]),
        (&json!(false), &json!(false)),
        "{later}"
    );
    assert_eq!(later["broker"]["consuming"], false, "{later}");
    assert!(
        later["warm"]["next_retry_at_ms"].as_u64() > Some(now_ms() - 60_000),
        "{}",
        later["warm"]
    );
    assert!(
        later["last_error"]["code"].is_string() && later["last_error"]["at_ms"].is_u64(),
        "{later}"
    );
    assert_eq!(
        stack.rabbit.list_consumers(&stack.jobs_queue()),
        0,
        "a consumer while the warm-up fails"
    );
    let failing = watch.stop();
    assert!(
        failing.iter().all(|s| s.consumers == 0),
        "a consumer before the first warm-up succeeded"
    );

    // Recovery without a restart.
    let watch = Watch::start(&stack, "w1");
    package.repair();
    let ready = worker.ready();
    assert_eq!(ready["broker"]["consuming"], true, "{ready}");
    assert_eq!(stack.rabbit.list_consumers(&stack.jobs_queue()), 1);
    watch.sees("ready", |s| s.consumers == 1 && s.ready == [true, true]);

    // Pause, and it lasts.
    stack.command(&["ctl", "pause"]).expect_code(0);
    let paused = worker.state("degraded", "paused");
    assert_eq!(paused["ready"], false);
    let aggregator = stack.aggregator();
    let consumers = || {
        aggregator
            .depth(&stack.jobs_queue())
            .expect("the jobs queue")
            .1
    };
    eventually(SOON, "the consumer leaves when paused", || consumers() == 0);
    aggregator.submit(&honest().job("while-paused"));
    eventually(SOON, "the job waits", || {
        aggregator.depth(&stack.jobs_queue()) == Some((1, 0))
    });
    throughout(
        secs(2),
        "paused: no consumer, and the queue keeps the job",
        || aggregator.depth(&stack.jobs_queue()) == Some((1, 0)),
    );
    assert_eq!(
        stack.rabbit.list_consumers(&stack.jobs_queue()),
        0,
        "a consumer while paused"
    );
    assert_eq!(worker.next_heartbeat()["state_detail"], "paused");

    watch.sees("paused", |s| {
        s.consumers == 0 && s.states[0] == "degraded/paused"
    });

    // Resume, and drain.
    stack.command(&["ctl", "resume"]).expect_code(0);
    worker.ready();
    aggregator.collect_results();
    assert_eq!(aggregator.result("while-paused").json()["status"], "scored");
    assert_eq!(stack.rabbit.list_consumers(&stack.jobs_queue()), 1);
    worker.drain();
    let samples = watch.stop();
    let unready = longest_unready_consumer(&samples);
    assert!(
        unready < SHORT,
        "for {unready:?} the broker had a consumer that was not ready: {samples:#?}"
    );
    aggregator.expect_empty(&stack.jobs_queue());
}

#[test]
fn a_canary_that_is_not_met_keeps_the_worker_away_until_it_is() {
    let stack = Stack::shared();
    let package = Package::copy();
    package.edit(|model| model["canary"] = json!({"loss": 1234.5, "tolerance": 1e-6}));
    let worker = stack.worker_on("w1", &package.path());
    let first = worker.heartbeat_when(START, "a failed canary", failed_warm_up);
    worker.heartbeat_when(START, "the attempt grows", |r| {
        failed_warm_up(r) && r["warm"]["attempt"].as_u64() > first["warm"]["attempt"].as_u64()
    });
    assert_eq!(
        stack
            .aggregator()
            .depth(&stack.jobs_queue())
            .map(|(_, consumers)| consumers),
        Some(0)
    );
    let measured = first["warm"]["baseline_loss"].as_f64();
    package.edit(|model| {
        model.as_object_mut().expect("a map").remove("canary");
        if let Some(loss) = measured {
            model["canary"] = json!({"loss": loss, "tolerance": 1e-4});
        }
    });
    let ready = worker.ready();
    assert!(
        ready["warm"]["baseline_loss"]
            .as_f64()
            .is_some_and(f64::is_finite),
        "{}",
        ready["warm"]
    );
    assert!(
        !stack.states("w1").contains(&"stopped".to_owned()),
        "it recovered without a restart"
    );
}

#[test]
fn a_job_published_before_the_warm_up_is_scored_only_after_it() {
    let stack = Stack::shared();
    let package = Package::copy();
    package.spoil_a_shard();
    let aggregator = stack.aggregator();
    aggregator.declare_jobs();
    aggregator.submit(&honest().job("early"));
    eventually(SOON, "the job waits", || {
        aggregator.depth(&stack.jobs_queue()) == Some((1, 0))
    });
    let watch = Watch::start(&stack, "w1");
    let worker = stack.worker_on("w1", &package.path());
    let failed = worker.heartbeat_when(START, "a failed warm-up", failed_warm_up);
    worker.heartbeat_when(START, "a second failure", |r| {
        failed_warm_up(r) && r["warm"]["attempt"].as_u64() > failed["warm"]["attempt"].as_u64()
    });
    watch.sees("between its attempts", |s| {
        s.waiting == 1 && !s.states[1].is_empty()
    });
    package.repair();
    let ready = worker.ready();
    aggregator.collect_results();
    let result = aggregator.result("early").json();
    assert_eq!(result["status"], "scored", "{result}");
    let (scored_at, ready_at) = (
        result["scored_at_ms"].as_u64(),
        ready["last_ready_at_ms"].as_u64(),
    );
    assert!(
        scored_at >= ready_at && ready_at.is_some(),
        "scored at {scored_at:?}, ready at {ready_at:?}"
    );
    worker.drain();
    let samples = watch.stop();
    let before = samples.iter().take_while(|s| s.consumers == 0);
    let held: Vec<u32> = before.map(|s| s.waiting).collect();
    assert!(
        !held.is_empty() && held.iter().all(|n| *n == 1),
        "the queue did not hold it all along: {held:?}"
    );
    assert!(longest_unready_consumer(&samples) < SHORT, "{samples:#?}");
    aggregator.expect_empty(&stack.jobs_queue());
}

#[test]
fn a_package_that_changes_under_a_worker_takes_it_off_the_queue_until_it_is_whole_again() {
    let stack = Stack::shared();
    let package = Package::copy();
    let worker = stack.worker_with("w1", |settings| {
        settings
            .set("model.dir", package.path().display())
            .set("engine.audit_interval", "200ms")
    });
    worker.ready();
    let spoilt = package.spoil_a_shard();
    let changed = worker.state("degraded", "package_changed");
    let error = changed["last_error"]["message"]
        .as_str()
        .unwrap_or_default();
    assert!(
        error.contains(&spoilt),
        "the error does not name {spoilt}: {error}"
    );
    assert_eq!(stack.rabbit.list_consumers(&stack.jobs_queue()), 0);
    let attempt = changed["warm"]["attempt"].as_u64();
    worker.heartbeat_when(START, "it tries to load, and says the same", |r| {
        r["state_detail"] == "package_changed" && r["warm"]["attempt"].as_u64() > attempt
    });
    package.repair();
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest().job("after"));
    assert_eq!(aggregator.result("after").json()["status"], "scored");
    worker.drain();
}

/// An orchestrator must not restart what it should wait out.
#[test]
fn a_worker_that_does_not_know_its_model_yet_answers_probes_and_drains() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("model.dir", "/nowhere"));
    let probe = |which: &str| {
        let settings = stack.settings().set("worker.id", "w1");
        stack
            .command_with(settings, &["healthcheck", which], "")
            .code
    };
    eventually(SOON, "it waits for its package", || {
        worker
            .log()
            .contains("the package in model.dir cannot be read")
    });
    assert_eq!((probe("--live"), probe("--ready")), (0, 1));
    worker.drain();
}
