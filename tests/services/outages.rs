//! Services that are away: states, not exits; and a worker that comes back by itself.

use std::sync::Arc;

use crate::support::broker::Rabbit;
use crate::support::jobs::{honest, honest_job};
use crate::support::redis_server::Redis;
use crate::support::stack::Stack;
use crate::support::wait::{START, eventually, secs};

#[test]
fn scoring_goes_on_without_redis_and_the_heartbeat_returns_with_it() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::stopped()));
    let aggregator = stack.aggregator();
    let worker = stack.worker("w1");
    let consumes = || {
        aggregator
            .depth(&stack.jobs_queue())
            .is_some_and(|(_, consumers)| consumers == 1)
    };
    eventually(START, "it consumes without Redis", consumes);
    aggregator.collect_results();
    aggregator.submit(&honest().job("without"));
    assert_eq!(aggregator.result("without").json()["status"], "scored");
    stack.redis.start();
    let record = worker.ready();
    assert_eq!(record["jobs"]["scored"], 1, "{}", record["jobs"]);

    // Frozen, every command hangs; killed, every command fails: neither stops a job.
    stack.redis.freeze();
    for n in 0..3 {
        aggregator.submit(&honest_job(&format!("frozen-{n}"), "frozen"));
        assert_eq!(
            aggregator.result(&format!("frozen-{n}")).json()["status"],
            "scored"
        );
    }
    assert!(consumes(), "a frozen Redis is no reason to stop");
    stack.redis.thaw();
    stack.redis.kill();
    aggregator.submit(&honest_job("killed", "killed"));
    assert_eq!(aggregator.result("killed").json()["status"], "scored");
    stack.redis.start();
    worker.ready();
    stack.redis.kill();
    worker.terminate();
    assert_eq!(
        worker.exit_code(secs(15)),
        0,
        "a drain does not wait for Redis"
    );
}

#[test]
fn a_worker_rides_out_its_broker() {
    let rabbit = Arc::new(Rabbit::stopped());
    let stack = Stack::on(Arc::clone(&rabbit), Redis::shared());
    let worker = stack.worker_with("w1", |s| s.set("amqp.heartbeat", "2s"));
    let away = |r: &serde_json::Value| {
        r["broker"]["connected"] == false
            && r["ready"] == false
            && r["broker"]["consuming"] == false
    };
    let degraded = worker.state("degraded", "broker_disconnected");
    assert!(away(&degraded), "{degraded}");
    rabbit.start();
    let first = worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest().job("before"));
    assert_eq!(aggregator.result("before").json()["status"], "scored");

    // In order.
    rabbit.stop();
    worker.heartbeat_when(secs(20), "it notices", away);
    rabbit.start();
    let second = worker.ready();
    assert!(
        second["broker"]["generation"].as_u64() > first["broker"]["generation"].as_u64(),
        "{}",
        second["broker"]
    );
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest_job("between", "between"));
    assert_eq!(aggregator.result("between").json()["status"], "scored");

    // Frozen: the connection stays open and only the missing heartbeats tell.
    rabbit.freeze();
    worker.heartbeat_when(secs(20), "it notices", away);
    rabbit.thaw();
    worker.ready();

    // Without a word, and for good.
    rabbit.kill();
    worker.heartbeat_when(secs(20), "it notices", away);
    worker.terminate();
    assert_eq!(
        worker.exit_code(secs(15)),
        0,
        "a drain does not wait for the broker"
    );
    assert_eq!(worker.heartbeat()["state"], "stopped");
}

#[test]
fn a_worker_without_any_service_still_drains_in_time() {
    let stack = Stack::on(Arc::new(Rabbit::stopped()), Arc::new(Redis::stopped()));
    let worker = stack.worker("w1");
    eventually(START, "it says something", || {
        worker.log().lines().count() > 2
    });
    worker.terminate();
    assert_eq!(worker.exit_code(secs(15)), 0);
}

#[test]
fn a_redis_that_refuses_writes_stops_nothing_and_beats_resume_within_two_seconds() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let worker = stack.worker_with("w1", |s| s.set("heartbeat.interval", "1s"));
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let configure = |words: &[&str]| {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        let done = command.query::<String>(&mut stack.redis.connection());
        assert_eq!(done.as_deref(), Ok("OK"), "{words:?}");
    };
    for (refuses, takes) in [
        // Full, and nothing may be evicted.
        (
            &["CONFIG", "SET", "maxmemory", "1"][..],
            &["CONFIG", "SET", "maxmemory", "0"][..],
        ),
        // A replica, as after a failover.
        (
            &["REPLICAOF", "127.0.0.1", "1"],
            &["REPLICAOF", "NO", "ONE"],
        ),
    ] {
        configure(refuses);
        // `ttl` is 3 s: by then its record is gone.
        eventually(secs(10), "its record expires", || {
            worker.try_heartbeat().is_none()
        });
        let id = format!("during-{}", refuses[0]);
        aggregator.submit(&honest_job(&id, &id));
        assert_eq!(aggregator.result(&id).json()["status"], "scored");
        configure(takes);
        eventually(secs(2), "beats resume", || worker.try_heartbeat().is_some());
        assert_eq!(worker.ready()["last_error"], serde_json::Value::Null);
    }
    // Somebody's list where the record belongs.
    let key = stack.key("worker:w1");
    let mut connection = stack.redis.connection();
    let spoilt = redis::pipe()
        .del(&key)
        .rpush(&key, "x")
        .exec(&mut connection);
    spoilt.expect("a list under its key");
    eventually(secs(2), "the record is back", || {
        redis::cmd("TYPE")
            .arg(&key)
            .query::<String>(&mut connection)
            .as_deref()
            == Ok("string")
    });
    worker.drain();
}
