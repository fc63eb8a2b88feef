//! `scorer ctl` and the control exchange: one worker or all of them, and nothing by accident.

use serde_json::json;

use crate::support::jobs::{Encoding, honest};
use crate::support::stack::Stack;
use crate::support::wait::{SOON, eventually, secs};

#[test]
fn ctl_reaches_one_worker_or_all_of_them() {
    let stack = Stack::shared();
    let (one, two) = (stack.worker("w1"), stack.worker("w2"));
    one.ready();
    two.ready();
    let aggregator = stack.aggregator();
    let consumers = || {
        aggregator
            .depth(&stack.jobs_queue())
            .expect("the jobs queue")
            .1
    };
    assert_eq!(consumers(), 2);

    stack
        .command(&["ctl", "pause", "--worker", "w1"])
        .expect_code(0);
    one.state("degraded", "paused");
    eventually(SOON, "one consumer is left", || consumers() == 1);
    assert_eq!(
        two.next_heartbeat()["ready"],
        true,
        "the other was not meant"
    );
    stack.command(&["ctl", "pause"]).expect_code(0);
    two.state("degraded", "paused");
    eventually(SOON, "no consumer is left", || consumers() == 0);

    stack.command(&["ctl", "resume"]).expect_code(0);
    let before = one.ready();
    two.ready();
    eventually(SOON, "both are back", || consumers() == 2);

    let warmings = |id: &str| stack.states(id).iter().filter(|s| *s == "warming").count();
    let so_far = (warmings("w1"), warmings("w2"));
    stack
        .command(&["ctl", "rewarm", "--worker", "w1"])
        .expect_code(0);
    one.heartbeat_when(secs(60), "warm again", |r| {
        r["ready"] == true && r["last_ready_at_ms"].as_u64() > before["last_ready_at_ms"].as_u64()
    });
    assert!(
        warmings("w1") > so_far.0,
        "it did not warm again: {:?}",
        stack.states("w1")
    );
    assert_eq!(warmings("w2"), so_far.1, "the other was not meant");

    stack
        .command(&["ctl", "drain", "--worker", "w2"])
        .expect_code(0);
    assert_eq!(
        two.exit_code(secs(30)),
        0,
        "a drain by control is a clean exit"
    );
    let drained = stack.events("w2");
    assert!(
        drained
            .iter()
            .any(|e| e["to"] == "draining" && e["detail"] == "drain_control"),
        "{drained:?}"
    );
    aggregator.collect_results();
    aggregator.submit(&honest().job("still-served"));
    assert_eq!(aggregator.result("still-served").json()["worker_id"], "w1");
}

#[test]
fn control_messages_are_read_in_both_encodings_and_nonsense_is_ignored() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.control("all", b"{\"v\": 1, \"comm", Encoding::Json);
    aggregator.control(
        "all",
        &Encoding::Json.encode(&json!({"v": 1, "command": "explode"})),
        Encoding::Json,
    );
    let elsewhere = json!({"v": 1, "command": "pause", "worker_id": "another"});
    aggregator.control("all", &Encoding::Json.encode(&elsewhere), Encoding::Json);
    aggregator.control(
        "worker.another",
        &Encoding::Json.encode(&json!({"v": 1, "command": "pause"})),
        Encoding::Json,
    );
    let pause = json!({"v": 1, "command": "pause", "worker_id": "w1"});
    aggregator.collect_results();
    aggregator.submit(&honest().job("meanwhile"));
    assert_eq!(aggregator.result("meanwhile").json()["status"], "scored");
    assert_eq!(
        worker.next_heartbeat()["ready"],
        true,
        "nonsense or another's message stopped it"
    );
    aggregator.control(
        "worker.w1",
        &Encoding::MessagePack.encode(&pause),
        Encoding::MessagePack,
    );
    worker.state("degraded", "paused");
    let resume = json!({"v": 1, "command": "resume"});
    aggregator.control("all", &Encoding::Json.encode(&resume), Encoding::Json);
    worker.ready();
}

#[test]
fn a_worker_that_refuses_control_goes_on() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("amqp.control", false));
    worker.ready();
    // Whether or not the exchange leads anywhere, the worker must not obey.
    stack.command(&["ctl", "pause"]);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest().job("unmoved"));
    assert_eq!(aggregator.result("unmoved").json()["status"], "scored");
    assert_eq!(worker.next_heartbeat()["state_detail"], "serving");
}
