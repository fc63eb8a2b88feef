//! Jobs of very different length: what waits for long behind a long one goes to workers that have nothing to do.

use testkit::hazard::hazard_job;
use testkit::pace::Pace;
use testkit::package::Package;
use testkit::stack::Stack;
use testkit::wait::{SOON, secs};

#[test]
fn what_waits_behind_a_long_job_goes_to_an_idle_worker() {
    let stack = Stack::shared();
    // Many windows, one at a time: so the long job makes progress, and is not taken for stuck.
    let package = Package::hazard_of(16);
    let start = |id: &str| {
        stack.worker_with(id, |s| {
            s.set("model.dir", package.path().display())
                .set("amqp.prefetch", 4)
                .set("engine.micro_batch", 1)
        })
    };
    let busy = start("busy");
    busy.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    aggregator.submit(&pace.job("long", 16.0));
    // What comes right behind it may be ready for the device before it.
    busy.heartbeat_when(SOON, "it is at the long one", |r| {
        r["jobs"]["in_flight"] == 1
    });
    let short: Vec<String> = (0..3).map(|n| format!("short-{n}")).collect();
    for id in &short {
        aggregator.submit(&hazard_job(id, 2.0));
    }
    busy.heartbeat_when(SOON, "it holds all four", |r| r["jobs"]["buffered"] == 3);
    let idle = start("idle");
    idle.ready();
    aggregator.all_results(&short, secs(15));
    assert_eq!(
        aggregator.copies("long").len(),
        0,
        "the long one is not done yet"
    );
    for id in &short {
        let result = aggregator.result(id).json();
        assert_eq!(result["attempt"], 1, "{result}");
        assert_eq!(result["worker_id"], "idle", "{result}");
    }
    assert_eq!(aggregator.result("long").json()["worker_id"], "busy");
    for worker in [&busy, &idle] {
        worker.drain();
    }
}
