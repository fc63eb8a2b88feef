//! Jobs of very different length: what waits for long behind a long one goes to workers that have nothing to do.

use testkit::hazard::{enduring_job, enduring_package, hazard_job, patient};
use testkit::stack::Stack;
use testkit::wait::{SOON, START};

#[test]
fn what_waits_behind_a_long_job_goes_to_an_idle_worker() {
    let stack = Stack::shared();
    let package = enduring_package();
    let start = |id: &str| stack.worker_with(id, |s| patient(s, &package).set("amqp.prefetch", 4));
    let busy = start("busy");
    busy.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&enduring_job("long"));
    // What comes right behind it may be ready for the device before it.
    busy.computes();
    let short: Vec<String> = (0..3).map(|n| format!("short-{n}")).collect();
    for id in &short {
        aggregator.submit(&hazard_job(id, 2.0));
    }
    busy.heartbeat_when(SOON, "it holds all four", |r| r["jobs"]["buffered"] == 3);
    let idle = start("idle");
    idle.ready();
    aggregator.all_results(&short, START);
    assert!(stack.is_begun("long"), "the long one is not done yet");
    for id in &short {
        let result = aggregator.result(id).json();
        assert_eq!(result["attempt"], 1, "{result}");
        assert_eq!(result["worker_id"], "idle", "{result}");
    }
    idle.drain();
    busy.kill();
}
