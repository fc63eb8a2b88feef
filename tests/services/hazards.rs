//! Candidates that make the model itself run away: out of memory is an answer and the worker goes on;
//! a run that cannot be ended is the end of the process, and the last record says why.

use serde_json::{Value, json};
use testkit::aggregator::Aggregator;
use testkit::encoding::Encoding;
use testkit::hazard::hazard_job as job;
use testkit::package::Package;
use testkit::stack::Stack;
use testkit::wait::{SOON, START};
use testkit::worker::Worker;

/// A product of matrices of this size takes ONNX Runtime a minute, and it looks up only after it.
const ENDLESS: f32 = 14_000.0;
/// What each of those takes.
const MATRIX_BYTES: u64 = 14_000 * 14_000 * 4;
/// Matrices of this size need 400 terabytes.
const TOO_LARGE: f32 = 10_000_000.0;

#[test]
fn a_candidate_that_needs_too_much_memory_is_answered_and_leaves_no_trace() {
    let stack = Stack::shared();
    let package = Package::hazard();
    let worker = stack.worker_on("w1", &package.path());
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let scored = |id: &str| {
        aggregator.submit(&job(id, 2.0));
        let result = aggregator.result(id).json();
        assert_eq!(result["status"], "scored", "{result}");
        result["delta"].as_f64().expect("a number").to_bits()
    };
    let before = scored("before");
    aggregator.submit(&job("too-large", TOO_LARGE));
    let result = aggregator.result("too-large").json();
    assert_eq!(result["status"], "failed", "{result}");
    assert_eq!(result["error"]["code"], "out_of_memory", "{result}");
    assert_eq!(scored("after"), before, "the same score, bit for bit");
    assert!(
        worker.log().contains("\"micro_batch\":1"),
        "it tried with one window at a time first"
    );
    assert_eq!(worker.next_heartbeat()["state"], "ready");
    worker.drain();
}

#[test]
fn a_run_that_cannot_be_ended_ends_the_process_and_the_last_record_says_why() {
    let stack = Stack::shared();
    let package = Package::hazard();
    let worker = stack.worker_with("w1", |settings| {
        settings
            .set("model.dir", package.path().display())
            // Long enough for the node before, which fills the matrix: after that one it could be ended.
            .set("worker.score_timeout", "9s")
            .set("heartbeat.ttl", "30s")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&job("endless", ENDLESS));
    let result = aggregator.result("endless").json();
    assert_eq!(result["status"], "failed", "{result}");
    assert_eq!(result["error"]["code"], "score_timeout", "{result}");
    assert_eq!(worker.exit_code(SOON), 70, "{}", worker.log());
    let record = worker.heartbeat();
    assert_eq!(
        (&record["state"], &record["state_detail"], &record["ready"]),
        (&json!("degraded"), &json!("stuck"), &json!(false)),
        "{record}"
    );
    assert_eq!(
        stack.states("w1").last().map(String::as_str),
        Some("degraded")
    );

    // Answered, so it does not take the next worker down too.
    let heir = stack.worker_on("w2", &package.path());
    heir.ready();
    aggregator.submit(&job("harmless", 2.0));
    assert_eq!(aggregator.result("harmless").json()["status"], "scored");
    heir.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(aggregator.copies("endless").len(), 1);
}

/// A worker amid a run that cannot be ended.
fn amid_an_endless_run(stack: &Stack, package: &Package) -> (Worker, Aggregator) {
    let worker = stack.worker_with("w1", |settings| {
        settings
            .set("model.dir", package.path().display())
            .set("worker.drain_timeout", "4s")
            .set("heartbeat.ttl", "30s")
    });
    worker.ready();
    let aggregator = stack.aggregator();
    let before = worker.next_heartbeat();
    let bytes = |record: &Value| record["memory"]["rss_bytes"].as_u64().expect("bytes");
    let matrix_and_more = bytes(&before) + MATRIX_BYTES + MATRIX_BYTES / 10;
    aggregator.submit(&job("endless", ENDLESS));
    // Beyond the node before, which fills the matrix: after that one it could be ended.
    worker.heartbeat_when(START, "it multiplies", |r| {
        bytes(r) > matrix_and_more && r["progress"]["counter"] == before["progress"]["counter"]
    });
    (worker, aggregator)
}

#[test]
fn a_run_that_cannot_be_ended_is_noticed_although_its_job_was_given_up() {
    let (stack, package) = (Stack::shared(), Package::hazard());
    let (worker, aggregator) = amid_an_endless_run(&stack, &package);
    // Without its queue the job cannot be answered any more: the computation is abandoned.
    aggregator.delete(&stack.jobs_queue());
    assert_eq!(worker.exit_code(START), 70, "{}", worker.log());
    assert_eq!(worker.heartbeat()["state_detail"], "stuck");
}

#[test]
fn a_run_that_cannot_be_ended_is_noticed_although_something_else_is_asked_meanwhile() {
    let (stack, package) = (Stack::shared(), Package::hazard());
    let (worker, aggregator) = amid_an_endless_run(&stack, &package);
    // What is to be proven has to wait for the device, which does not come back.
    let rewarm = json!({"v": 1, "command": "rewarm"}).to_string();
    aggregator.control("worker.w1", rewarm.as_bytes(), Encoding::Json);
    assert_eq!(worker.exit_code(START), 70, "{}", worker.log());
    assert_eq!(worker.heartbeat()["state_detail"], "stuck");
}

#[test]
fn a_run_that_makes_no_progress_is_ended_and_the_worker_proves_itself_anew() {
    let stack = Stack::shared();
    let package = Package::hazard();
    let worker = stack.worker_on("w1", &package.path());
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    // A loop without an end. It is noticed after 10 s without progress.
    aggregator.submit(&job("stalled", -1e12));
    let waits: Vec<String> = (0..3).map(|n| format!("behind-{n}")).collect();
    for id in &waits {
        aggregator.submit(&job(id, 2.0));
    }
    let result = aggregator.result("stalled").json();
    assert_eq!(result["error"]["code"], "score_timeout", "{result}");
    let said = result["error"]["message"].as_str().expect("a message");
    assert!(said.contains("no progress"), "{said}");
    worker.ready();
    aggregator.all_results(&waits, START);
    let events = stack.events("w1");
    let details: Vec<&str> = events.iter().map(|e| e["detail"].as_str()).collect();
    let expected = [
        "serving",
        "stuck",
        "loading_model",
        "startup_baseline",
        "serving",
    ];
    assert!(details.ends_with(&expected), "{details:?}");
    worker.drain();
}
