//! A worker that dies in the middle of a stream: others finish it, nothing is lost, copies agree.

use std::collections::HashMap;

use nix::sys::signal::Signal;
use testkit::case::honest_job;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, secs};

#[test]
fn another_worker_finishes_the_stream_of_one_that_was_killed() {
    let stack = Stack::shared();
    // Foreign crash marks are waited out for twice the time to live.
    let quick = |s: testkit::worker::Settings| {
        s.set("heartbeat.ttl", "1s")
            .set("heartbeat.interval", "200ms")
    };
    let victim = stack.worker_with("victim", quick);
    victim.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let ids: Vec<String> = (0..60).map(|n| format!("job-{n}")).collect();
    let submit = |ids: &[String]| {
        ids.iter()
            .for_each(|id| aggregator.submit(&honest_job(id, id)))
    };
    let (first, rest) = ids.split_at(20);
    submit(first);
    eventually(SOON, "the stream is under way", || {
        aggregator.results().len() >= 3
    });
    // However fast it is, it does not live to finish everything.
    victim.signal(Signal::SIGSTOP);
    submit(rest);
    victim.kill();
    let heir = stack.worker_with("heir", quick);
    heir.ready();
    aggregator.all_results(&ids, secs(90));
    let mut by_id: HashMap<String, Vec<serde_json::Value>> = HashMap::new();
    for message in aggregator.results() {
        let result = message.json();
        assert_eq!(
            result["status"], "scored",
            "one death is not a poisoned job: {result}"
        );
        by_id
            .entry(message.id().to_owned())
            .or_default()
            .push(result);
    }
    assert_eq!(
        by_id.len(),
        ids.len(),
        "copies of a result share their message_id"
    );
    for copies in by_id.values() {
        for field in [
            "score",
            "delta",
            "stderr",
            "loss_before",
            "loss_after",
            "plan",
            "candidate",
        ] {
            assert!(
                copies.iter().all(|c| c[field] == copies[0][field]),
                "{field} differs: {copies:#?}"
            );
        }
    }
    let workers: std::collections::HashSet<&str> = by_id
        .values()
        .flatten()
        .filter_map(|r| r["worker_id"].as_str())
        .collect();
    assert!(
        workers.contains("heir"),
        "the victim had finished everything: {workers:?}"
    );
    heir.drain();
    aggregator.expect_empty(&stack.jobs_queue());
    assert_eq!(
        stack.keys("crash:*"),
        Vec::<String>::new(),
        "marks of finished jobs are gone"
    );
}
