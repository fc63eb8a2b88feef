//! A wall clock that is set while a worker runs decides nothing: it only stands in records.

use std::sync::Arc;

use testkit::broker::Rabbit;
use testkit::clock::Clock;
use testkit::pace::Pace;
use testkit::package::Package;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, now_ms, secs};

const HOUR: i64 = 3600;

#[test]
fn a_step_of_the_clock_costs_no_job_and_switches_nothing_off() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let (package, clock) = (Package::hazard(), Clock::right());
    let worker = stack.worker_with("w1", |s| {
        clock.settings(s).set("model.dir", package.path().display())
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    let computes = |id: &str, seconds: f64| {
        aggregator.submit(&pace.job(id, seconds));
        worker.heartbeat_when(SOON, "it computes", |r| {
            r["progress"]["busy_ms"].as_u64() > Some(200)
        });
    };
    let scored = |id: &str| {
        let result = aggregator.result(id).json();
        assert_eq!(result["status"], "scored", "{result}");
    };

    computes("forward", 2.0);
    clock.set_off(HOUR);
    let record = worker.heartbeat_when(SOON, "its clock is set", |r| {
        r["at_ms"].as_u64() > Some(now_ms() + 3_000_000)
    });
    assert_eq!(record["ready"], true, "{record}");
    scored("forward");

    // Redis fails for a moment, which leaves it alone for a second of the clock before it is set back.
    stack.redis.freeze();
    aggregator.submit(&pace.job("frozen", 0.1));
    scored("frozen");
    clock.set_off(0);
    stack.redis.thaw();
    worker.heartbeat_when(SOON, "its clock is set back", |r| {
        r["at_ms"].as_u64() < Some(now_ms() + 3_000_000)
    });
    // No longer than the second: then jobs are marked, and answered from the store.
    let mut asked = 0;
    eventually(secs(5), "Redis is asked again", || {
        asked += 1;
        let id = format!("back-{asked}");
        computes(&id, 0.5);
        let marked = !stack.keys(&format!("crash:{id}*")).is_empty();
        scored(&id);
        marked
    });
    aggregator.submit(&pace.job(&format!("back-{asked}"), 0.5));
    worker.heartbeat_when(secs(5), "answered from the store", |r| {
        r["jobs"]["duplicates"] == 1
    });
    worker.drain();
}
