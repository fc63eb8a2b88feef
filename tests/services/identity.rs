//! One id, one worker: a second incarnation waits beside the first and never over it.

use redis::Commands as _;
use testkit::stack::Stack;
use testkit::wait::{START, eventually, eventually_some, secs, throughout};

#[test]
fn a_second_worker_under_the_same_id_waits_until_the_first_is_gone() {
    let stack = Stack::shared();
    let first = stack.worker("twin");
    let holder = first.ready();
    let second = stack.worker("twin");
    let beside = eventually_some(START, "the second writes beside the first", || {
        let key = stack.keys("worker:twin~*").pop()?;
        let (_, id) = key.rsplit_once("worker:")?;
        stack
            .record(id)
            .filter(|r| r["state_detail"] == "duplicate_id")
            .map(|r| (id.to_owned(), r))
    });
    let (id, record) = beside;
    let incarnation = record["incarnation"].as_str().expect("an incarnation");
    assert_eq!(id, format!("twin~{}", &incarnation[..8]));
    assert_eq!(
        (&record["state"], &record["ready"]),
        (&"degraded".into(), &false.into())
    );
    assert_eq!(record["pid"], second.pid());
    assert_eq!(
        stack.rabbit.list_consumers(&stack.jobs_queue()),
        1,
        "only the first consumes"
    );
    throughout(secs(2), "the first keeps its record", || {
        stack
            .record("twin")
            .is_some_and(|r| r["incarnation"] == holder["incarnation"])
    });
    first.drain();
    let taken = second.ready();
    assert_eq!(
        taken["incarnation"], incarnation,
        "the second took over under the plain id"
    );
    assert_eq!(stack.rabbit.list_consumers(&stack.jobs_queue()), 1);
}

#[test]
fn the_record_of_a_dead_process_on_this_host_is_taken_over_at_once() {
    let stack = Stack::shared();
    let long = |s: testkit::worker::Settings| s.set("heartbeat.ttl", "120s");
    let first = stack.worker_with("w1", long);
    let dead = first.ready();
    first.kill();
    let second = stack.worker_with("w1", long);
    let record = second.ready();
    assert_ne!(record["incarnation"], dead["incarnation"]);
    second.drain();
    // A stopped record is nobody's claim either.
    let third = stack.worker_with("w1", long);
    third.ready();
}

/// Pods that share the network of their host share its name, and not its processes.
#[test]
fn the_record_of_a_process_that_is_not_in_sight_is_not_taken_over() {
    let stack = Stack::shared();
    let first = stack.worker("w1");
    let mut record = first.ready();
    first.kill();
    record["pid_space"] = "of another pod".into();
    let mut redis = stack.redis.connection();
    let kept = redis.set_ex::<_, _, ()>(stack.key("worker:w1"), record.to_string(), 60);
    kept.expect("a record that lives on");
    let second = stack.worker("w1");
    let waits = || {
        let beside = stack.keys("worker:w1~*").pop()?;
        let (_, id) = beside.rsplit_once("worker:")?;
        stack
            .record(id)
            .map(|r| r["state_detail"] == "duplicate_id")
    };
    eventually(START, "it waits", || waits() == Some(true));
    throughout(secs(2), "and goes on waiting", || waits() != Some(false));
    assert_eq!(stack.record("w1"), Some(record));
    let gone = redis.del::<_, ()>(stack.key("worker:w1"));
    gone.expect("its record ends");
    second.ready();
}
