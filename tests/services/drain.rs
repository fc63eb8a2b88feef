//! Draining: the consumer leaves first, nothing is scored twice or lost, and the process says how it went.

use std::collections::HashSet;

use nix::sys::signal::Signal;

use crate::support::jobs::honest_job;
use crate::support::package::Package;
use crate::support::stack::Stack;
use crate::support::wait::{SOON, START, eventually, secs};
use crate::support::worker::Worker;

/// Enough jobs, each on windows of its own, to keep this worker busy for about this long.
fn stream(stack: &Stack, worker: &Worker, prefix: &str, busy_ms: f64) -> Vec<String> {
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let mut slowest = 1.0_f64;
    for n in 0..3 {
        let id = format!("{prefix}-probe-{n}");
        aggregator.submit(&honest_job(&id, &id));
        let result = aggregator.result(&id).json();
        assert_eq!(result["worker_id"], worker.id(), "{result}");
        slowest = slowest.max(result["timings_ms"]["total"].as_f64().expect("timings_ms.total"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let jobs = (busy_ms / slowest).clamp(40.0, 800.0) as usize;
    (0..jobs).map(|n| format!("{prefix}-{n}")).collect()
}

fn drains_without_loss(signal: Signal) {
    let stack = Stack::shared();
    let first = stack.worker("w1");
    first.ready();
    let ids = stream(&stack, &first, "job", 4000.0);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    for id in &ids {
        aggregator.submit(&honest_job(id, id));
    }
    eventually(SOON, "the stream is under way", || aggregator.results().len() >= 5);
    first.signal(signal);
    assert_eq!(first.exit_code(secs(30)), 0, "jobs handed back in time are a clean exit");
    assert_eq!(stack.rabbit.list_consumers(&stack.jobs_queue()), 0, "its consumer is gone");
    let record = first.heartbeat();
    assert_eq!((record["state"].as_str(), record["ready"].as_bool()), (Some("stopped"), Some(false)), "{record}");
    let workers: Vec<String> = redis::Commands::zrange(&mut stack.redis.connection(), stack.key("workers"), 0, -1)
        .expect("the sorted set of workers");
    assert_eq!(workers, Vec::<String>::new(), "a stopped worker leaves the sorted set");
    let before = aggregator.results().len();
    assert!(before < ids.len(), "all {before} jobs were done before the signal: the test saw no drain");

    let second = stack.worker("w2");
    second.ready();
    aggregator.all_results(&ids, secs(90));
    second.drain();
    assert_eq!(aggregator.depth(&stack.jobs_queue()), Some((0, 0)), "all acknowledged");
    let results = aggregator.results();
    let distinct: HashSet<String> = results.iter().map(|m| m.id().to_owned()).collect();
    assert_eq!((results.len(), distinct.len()), (ids.len(), ids.len()), "one result for each job, and no second");
    assert!(results.iter().all(|m| m.json()["status"] == "scored"), "a drain is nobody's failure");
    let states = stack.states("w1");
    assert_eq!(states[states.len() - 2..], ["draining".to_owned(), "stopped".to_owned()], "{states:?}");
}

#[test]
fn sigterm_in_the_middle_of_a_stream_loses_and_doubles_nothing() {
    drains_without_loss(Signal::SIGTERM);
}

#[test]
fn sigint_drains_as_sigterm_does() {
    drains_without_loss(Signal::SIGINT);
}

#[test]
fn the_consumer_leaves_at_once_while_the_work_in_flight_is_finished() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let ids = stream(&stack, &worker, "job", 4000.0);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    for id in &ids {
        aggregator.submit(&honest_job(id, id));
    }
    eventually(SOON, "the stream is under way", || aggregator.results().len() >= 5);
    worker.terminate();
    // What is still waiting when the consumer is gone can only grow from then on.
    let left = worker.exit_code(secs(30));
    assert_eq!(left, 0);
    let (waiting, consumers) = aggregator.depth(&stack.jobs_queue()).expect("the jobs queue");
    let answered = aggregator.results().len();
    assert_eq!(consumers, 0);
    assert!(waiting > 0, "the worker went on consuming after SIGTERM");
    eventually(secs(5), "answered + waiting = all", || {
        aggregator.results().len() + waiting as usize == ids.len()
    });
    assert!(answered <= ids.len());
}

#[test]
fn a_worker_that_never_got_ready_drains_promptly() {
    let stack = Stack::shared();
    let package = Package::copy();
    package.spoil_a_shard();
    let waiting = stack.worker_on("backing-off", &package.path());
    let young = stack.worker("starting");
    young.heartbeat_when(START, "a first record", |_| true);
    young.terminate();
    assert_eq!(young.exit_code(secs(10)), 0, "SIGTERM while it starts");
    waiting.heartbeat_when(START, "a failed warm-up", |r| r["state"] == "degraded");
    waiting.terminate();
    assert_eq!(waiting.exit_code(secs(10)), 0, "SIGTERM while it waits to try again");
    assert_eq!(waiting.heartbeat()["state"], "stopped");
    assert_eq!(stack.aggregator().depth(&stack.jobs_queue()).map_or(0, |(_, consumers)| consumers), 0);
}
