//! Parked jobs: an operator sees why, tries them again, or drops them.

use redis::Commands as _;
use serde_json::{Value, json};
use testkit::case::{honest, honest_job};
use testkit::http::{Route, Server};
use testkit::package::{MODEL, VERSION};
use testkit::stack::Stack;
use testkit::wait::{SOON, START, eventually};

#[test]
fn parked_jobs_are_listed_shown_tried_again_and_dropped() {
    let (stack, server) = (Stack::shared(), Server::start());
    let worker = stack.worker_with("w1", |s| {
        s.set("amqp.retry_delays", "[]")
            .set("candidates.allow", json!([server.url("/")]))
            .set("candidates.allow_private", true)
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let url = server.put("/c", Route::Status(404));
    for id in ["one", "two", "three"] {
        aggregator.submit(&honest().job_by_url(id, &url));
        assert_eq!(aggregator.result(id).json()["status"], "failed");
    }
    let parked = stack.object(&format!("dead.{MODEL}"));
    let depth = || aggregator.depth(&parked).map(|(jobs, _)| jobs);
    eventually(SOON, "three jobs are parked", || depth() == Some(3));

    // Looking takes nothing away, however often.
    for _ in 0..12 {
        let listed = stack.command(&["dead", "list", "--json"]).expect_code(0);
        let listed = listed.value();
        let listed = listed.as_array().expect("a list");
        assert_eq!(listed.len(), 3, "{listed:?}");
        let codes = listed.iter().map(|job| &job["code"]);
        assert!(codes.into_iter().all(|c| c == "candidate_unavailable"));
    }
    let table = stack.command(&["dead", "list"]).expect_code(0);
    assert!(
        table.stdout.contains("candidate_unavailable"),
        "{}",
        table.stdout
    );
    let shown = stack
        .command(&["dead", "show", "--id", "two"])
        .expect_code(0);
    let shown: Value = serde_json::from_str(&shown.stdout).expect("one job");
    assert_eq!(shown["job"]["candidate"]["url"], url, "{shown}");
    assert_eq!(shown["headers"]["x-worker-id"], "w1", "{shown}");
    let nobody = stack.command(&["dead", "list", "--code", "poisoned"]);
    assert!(
        nobody
            .expect_code(1)
            .stderr
            .contains("no such dead-lettered job")
    );

    server.put("/c", Route::Mirror(honest().bytes()));
    stack
        .command(&["dead", "requeue", "--id", "two"])
        .expect_code(0);
    let again = aggregator.nth_result("two", 2).json();
    assert_eq!(
        (&again["status"], &again["attempt"]),
        (&json!("scored"), &json!(1)),
        "{again}"
    );
    eventually(SOON, "two are left", || depth() == Some(2));
    stack
        .command(&["dead", "drop", "--id", "one"])
        .expect_code(0);
    stack.command(&["dead", "drop"]).expect_code(0);
    assert_eq!(depth(), Some(0));
}

#[test]
fn a_job_that_was_poisoned_gets_another_chance() {
    let stack = Stack::shared();
    let key = stack.key(&format!("crash:again:{VERSION}"));
    let deaths = [("x/1", "dead:1"), ("y/2", "dead:2")];
    let mut redis = stack.redis.connection();
    let () = redis.hset_multiple(&key, &deaths).expect("a hash of marks");
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest_job("again", "n"));
    let first = aggregator.result("again").json();
    assert_eq!(first["error"]["code"], "poisoned", "{first}");
    stack
        .command(&["dead", "requeue", "--code", "poisoned"])
        .expect_code(0);
    let second = aggregator.nth_result("again", 2).json();
    assert_eq!(second["status"], "scored", "{second}");
}

#[test]
fn a_full_queue_of_parked_jobs_can_be_looked_through_and_emptied() {
    let (stack, server) = (Stack::shared(), Server::start());
    let aggregator = stack.aggregator();
    aggregator.declare_full_dead(2);
    let worker = stack.worker_with("w1", |s| {
        s.set("amqp.retry_delays", "[]")
            .set("candidates.allow", json!([server.url("/")]))
            .set("candidates.allow_private", true)
    });
    worker.ready();
    aggregator.collect_results();
    let url = server.put("/c", Route::Status(404));
    for id in ["one", "two"] {
        aggregator.submit(&honest().job_by_url(id, &url));
        aggregator.result(id);
    }
    let parked = stack.object(&format!("dead.{MODEL}"));
    let depth = || aggregator.depth(&parked).map(|(jobs, _)| jobs);
    // What is handed back is there again a moment later.
    let holds = |jobs| {
        eventually(START, &format!("{jobs} jobs are parked"), || {
            depth() == Some(jobs)
        });
    };
    // More often than a job may come back before a copy is put in its place, which is refused here.
    for _ in 0..15 {
        holds(2);
        let listed = stack.command(&["dead", "list", "--json"]).expect_code(0);
        assert_eq!(listed.value().as_array().map(Vec::len), Some(2));
    }
    holds(2);
    stack
        .command(&["dead", "drop", "--id", "one"])
        .expect_code(0);
    holds(1);
}
