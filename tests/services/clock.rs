//! A wall clock that is set while a worker runs decides nothing: it only stands in records.

use std::sync::Arc;

use testkit::broker::Rabbit;
use testkit::clock::Clock;
use testkit::pace::Pace;
use testkit::package::Package;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually_some, now_ms};

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
    let scored = |id: &str| {
        let message = aggregator.result(id);
        assert_eq!(message.json()["status"], "scored", "{}", message.json());
        message
    };

    aggregator.submit(&pace.job("forward", 2.0));
    worker.heartbeat_when(SOON, "it computes", |r| {
        r["progress"]["busy_ms"].as_u64() > Some(0)
    });
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
    // No longer than the second: then results are stored again, and answered from the store.
    let mut asked = 0;
    let again = eventually_some(SOON, "Redis is asked again", || {
        asked += 1;
        let id = format!("back-{asked}");
        aggregator.submit(&pace.job(&id, 0.1));
        let message = scored(&id);
        let key = message.id().rsplit(':').next()?;
        (!stack.keys(&format!("result:{key}")).is_empty()).then_some(id)
    });
    aggregator.submit(&pace.job(&again, 0.1));
    worker.heartbeat_when(SOON, "answered from the store", |r| {
        r["jobs"]["duplicates"] == 1
    });
    worker.drain();
}
