//! `scorer status` where ten thousand workers beat.

use std::time::Instant;

use serde_json::{Value, json};
use testkit::wait::now_ms;

use crate::contest::Services;
use crate::sample::median;

const WORKERS: usize = 10_000;
const TURNS: usize = 9;

/// Takes a real record and writes it under many names.
pub(crate) fn status_of_many(services: &Services) {
    let stack = services.stack();
    let worker = stack.worker_on("w", &services.package.path());
    let record = worker.ready();
    worker.drain();
    println!("\n## scorer status of {WORKERS} workers, median of {TURNS} turns\n");
    println!("| output | bytes | ms |\n| --- | --- | --- |");
    for (name, arguments) in [("table", &["status"][..]), ("JSON", &["status", "--json"])] {
        let mut bytes = 0;
        let turns = (0..TURNS).map(|_| {
            beat(&record, |key| stack.key(key), &mut stack.redis.connection());
            let settings = services.settings(&stack).set("heartbeat.ttl", "10s");
            let began = Instant::now();
            let answer = stack.command_with(settings, arguments, "").expect_code(0);
            let took = began.elapsed().as_secs_f64() * 1e3;
            bytes = answer.stdout.len();
            let seen = answer.stdout.matches("tinylm").count();
            assert!(seen >= WORKERS, "{seen} workers in the answer");
            took
        });
        let took = median(turns.collect());
        println!("| {name} | {bytes} | {took:.0} |");
    }
}

fn beat(record: &Value, key: impl Fn(&str) -> String, redis: &mut redis::Connection) {
    let (mut record, mut pipe, now) = (record.clone(), redis::pipe(), now_ms());
    record["at_ms"] = json!(now);
    for n in 0..WORKERS {
        let id = format!("worker-{n:05}");
        record["worker_id"] = json!(id);
        let record_key = key(&format!("worker:{id}"));
        pipe.pset_ex(record_key, record.to_string(), 30_000)
            .ignore();
        pipe.zadd(key("workers"), &id, now).ignore();
    }
    pipe.exec(redis).expect("redis takes the records");
}
