//! Services that are away: states, not exits; and a worker that comes back by itself.

use std::sync::Arc;

use redis::Commands as _;
use serde_json::{Value, json};
use testkit::broker::Rabbit;
use testkit::case::{honest, honest_job};
use testkit::port::free_port;
use testkit::redis_server::Redis;
use testkit::scrape::{get, samples};
use testkit::stack::Stack;
use testkit::wait::{SOON, START, eventually};

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
    worker.ready();
    // The first record that gets through may have been put together a moment before the answer.
    worker.heartbeat_when(SOON, "the answer is counted", |r| r["jobs"]["scored"] == 1);

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
    assert_eq!(worker.exit_code(SOON), 0, "a drain does not wait for Redis");
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
    worker.heartbeat_when(START, "it notices", away);
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
    worker.heartbeat_when(START, "it notices", away);
    rabbit.thaw();
    worker.ready();

    // Without a word, and for good.
    rabbit.kill();
    worker.heartbeat_when(START, "it notices", away);
    worker.terminate();
    assert_eq!(
        worker.exit_code(SOON),
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
    assert_eq!(worker.exit_code(SOON), 0);
}

#[test]
fn a_redis_that_refuses_writes_stops_nothing_and_is_tried_again_with_every_beat() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    let port = free_port();
    let worker = stack.worker_with("w1", |s| {
        s.set("heartbeat.interval", "1s")
            .set("telemetry.metrics_addr", format!("127.0.0.1:{port}"))
    });
    worker.ready();
    let refused = || {
        let (_, text) = get(port, "/metrics").expect("metrics");
        let failed = samples(&text)
            .get(r#"scorer_heartbeats_total{outcome="failed"}"#)
            .copied();
        failed.unwrap_or_default()
    };
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
        let before = refused();
        configure(refuses);
        // `ttl` is 3 s: by then its record is gone.
        eventually(SOON, "its record expires", || {
            worker.try_heartbeat().is_none()
        });
        let id = format!("during-{}", refuses[0]);
        aggregator.submit(&honest_job(&id, &id));
        assert_eq!(aggregator.result(&id).json()["status"], "scored");
        // Five seconds of beats; half a minute if it tried less and less often.
        eventually(SOON, "it goes on trying", || refused() >= before + 5.0);
        configure(takes);
        eventually(SOON, "beats resume", || worker.try_heartbeat().is_some());
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
    eventually(SOON, "the record is back", || {
        redis::cmd("TYPE")
            .arg(&key)
            .query::<String>(&mut connection)
            .as_deref()
            == Ok("string")
    });
    worker.drain();
}

#[test]
fn what_redis_does_not_do_is_said_once_and_counted_and_switches_nothing_else_off() {
    let (stack, port) = (
        Stack::on(Rabbit::shared(), Arc::new(Redis::started())),
        free_port(),
    );
    let worker = stack.worker_with("w1", |s| {
        s.set("telemetry.metrics_addr", format!("127.0.0.1:{port}"))
    });
    assert_eq!(worker.ready()["store"], json!({"ok": true}));
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let allow = |words: &str| {
        let mut command = redis::cmd("ACL");
        let command = command.arg("SETUSER").arg("default").arg(words);
        command
            .exec(&mut stack.redis.connection())
            .expect("redis changes its user");
    };
    let scored = |id: &str| {
        aggregator.submit(&honest_job(id, id));
        assert_eq!(aggregator.result(id).json()["status"], "scored");
    };
    allow("-hset");
    ["one", "two", "three"].iter().for_each(|id| scored(id));
    assert_eq!(
        stack.keys("result:*").len(),
        3,
        "results are stored all the same"
    );
    let record = worker.heartbeat_when(SOON, "it says so", |r| r["store"]["ok"] == false);
    assert_eq!(record["ready"], true, "{record}");
    let why = record["store"]["last_error"].as_str().expect("why");
    assert!(why.contains("jobs are not marked"), "{why}");
    let said = worker
        .log()
        .matches("Redis does not do what jobs ask")
        .count();
    assert_eq!(said, 1, "{}", worker.log());
    let (_, text) = get(port, "/metrics").expect("metrics");
    let refused = samples(&text)
        .get(r#"scorer_store_calls_total{outcome="refused"}"#)
        .copied();
    assert!(refused >= Some(3.0), "{text}");
    allow("+@all");
    scored("four");
    worker.heartbeat_when(SOON, "all is done again", |r| r["store"]["ok"] == true);
    worker.drain();
}

/// Sets the password of a Redis, and cuts off who was let in by another.
pub(crate) fn set_password(redis: &mut redis::Connection, password: &str) {
    let mut command = redis::cmd("CONFIG");
    let command = command.arg("SET").arg("requirepass").arg(password);
    command.exec(redis).expect("redis takes it");
    let mut end = redis::cmd("CLIENT");
    let end = end.arg("KILL").arg("TYPE").arg("normal");
    end.exec(redis).expect("others are cut off");
}

#[test]
fn beats_and_marks_resume_when_the_password_is_the_right_one_again() {
    let stack = Stack::on(Rabbit::shared(), Arc::new(Redis::started()));
    // It stays let in.
    let mut redis = stack.redis.connection();
    let key = stack.key("worker:w1");
    set_password(&mut redis, "old");
    let url = stack.redis.url().replace("//", "//:old@");
    let _worker = stack.worker_with("w1", |s| s.set("redis.url", url));
    let record = |redis: &mut redis::Connection| {
        let text: Option<String> = redis.get(&key).expect("redis reads");
        text.map(|text| serde_json::from_str::<Value>(&text).expect("JSON"))
    };
    let ready = |r: &Value| r["ready"] == true && r["store"]["ok"] == true;
    eventually(START, "it beats", || {
        record(&mut redis).is_some_and(|r| ready(&r))
    });
    set_password(&mut redis, "new");
    eventually(SOON, "its record expires", || record(&mut redis).is_none());
    set_password(&mut redis, "old");
    eventually(SOON, "beats resume", || record(&mut redis).is_some());
    eventually(SOON, "and so does what jobs ask", || {
        record(&mut redis).is_some_and(|r| ready(&r))
    });
}
