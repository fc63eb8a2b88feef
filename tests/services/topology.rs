//! Everything contract 3 lists exists once a worker has started, with the arguments it lists.

use serde_json::{Value, json};
use testkit::broker::Rabbit;
use testkit::case::honest;
use testkit::package::MODEL;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually_some};

/// The argument table of a row, however this version of `rabbitmqctl` writes it.
pub(super) fn arguments(row: &Value) -> Value {
    let Value::Array(entries) = &row["arguments"] else {
        return row["arguments"].clone();
    };
    // Each is [name, type, value].
    let pair = |entry: &Value| {
        let parts = entry.as_array()?;
        Some((parts.first()?.as_str()?.to_owned(), parts.last()?.clone()))
    };
    Value::Object(entries.iter().filter_map(pair).collect())
}

#[test]
fn the_broker_is_of_the_version_that_was_asked_for() {
    let rabbit = Rabbit::shared();
    let status = eventually_some(SOON, "the broker's status", || rabbit.control(&["status"]));
    let version = status["rabbitmq_version"].as_str().expect("a version");
    let asked = std::env::var("TEST_RABBITMQ").unwrap_or_default();
    assert!(
        version.starts_with(&asked),
        "{version} instead of {asked}: did the variable get through?"
    );
}

#[test]
fn every_object_exists_with_its_arguments() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let rows = stack
        .rabbit
        .list("list_queues", &["name", "durable", "arguments"]);
    let queue = |rest: &str| {
        let name = stack.object(rest);
        let row = rows.iter().find(|r| r["name"] == name.as_str());
        let row = row.unwrap_or_else(|| panic!("there is no queue {name}"));
        assert_eq!(row["durable"], true, "{name}");
        let arguments = arguments(row);
        assert_eq!(arguments["x-queue-type"], "quorum", "{name}: {arguments}");
        arguments
    };
    let has = |arguments: &Value, expected: Value| {
        for (name, value) in expected.as_object().expect("a table") {
            assert_eq!(&arguments[name], value, "{name} of {arguments}");
        }
    };
    has(
        &queue(&format!("jobs.{MODEL}")),
        json!({
            "x-delivery-limit": 20, "x-dead-letter-exchange": stack.object("dead"),
            "x-dead-letter-routing-key": MODEL, "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
        }),
    );
    for (rung, ttl) in [("5s", 5_000), ("30s", 30_000), ("5m", 300_000)] {
        has(
            &queue(&format!("jobs.{MODEL}.retry.{rung}")),
            json!({
                "x-message-ttl": ttl, "x-dead-letter-exchange": stack.object("jobs"),
                "x-dead-letter-routing-key": MODEL, "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            }),
        );
    }
    queue(&format!("dead.{MODEL}"));
    queue(&format!("results.{MODEL}"));
    queue("results.unrouted");

    let rows = stack
        .rabbit
        .list("list_exchanges", &["name", "type", "durable", "arguments"]);
    for (rest, kind) in [
        ("jobs", "direct"),
        ("dead", "direct"),
        ("results", "topic"),
        ("results.unrouted", "fanout"),
        ("control", "topic"),
    ] {
        let name = stack.object(rest);
        let row = rows
            .iter()
            .find(|r| r["name"] == name.as_str())
            .unwrap_or_else(|| panic!("no exchange {name}"));
        assert_eq!(
            (&row["type"], &row["durable"]),
            (&json!(kind), &json!(true)),
            "{name}"
        );
        if rest == "results" {
            assert_eq!(
                arguments(row)["alternate-exchange"],
                stack.object("results.unrouted"),
                "{row}"
            );
        }
    }
    bindings_are_right(&stack);
}

fn bindings_are_right(stack: &Stack) {
    let rows = stack.rabbit.list(
        "list_bindings",
        &["source_name", "destination_name", "routing_key"],
    );
    let bound = |from: &str, to: &str| {
        let (from, to) = (stack.object(from), stack.object(to));
        let mut keys: Vec<&str> = rows
            .iter()
            .filter(|r| r["source_name"] == from.as_str() && r["destination_name"] == to.as_str())
            .filter_map(|r| r["routing_key"].as_str())
            .collect();
        keys.sort_unstable();
        keys.join(" ")
    };
    assert_eq!(bound("jobs", &format!("jobs.{MODEL}")), MODEL);
    assert_eq!(bound("dead", &format!("dead.{MODEL}")), MODEL);
    assert_eq!(
        bound("results", &format!("results.{MODEL}")),
        format!("{MODEL}.*")
    );
    let unrouted = rows
        .iter()
        .any(|r| r["source_name"] == stack.object("results.unrouted").as_str());
    assert!(unrouted, "nothing is bound to the alternate exchange");
    let control = stack.object("control");
    let mut keys: Vec<&str> = rows
        .iter()
        .filter(|r| r["source_name"] == control.as_str())
        .filter_map(|r| r["routing_key"].as_str())
        .collect();
    keys.sort_unstable();
    assert_eq!(keys, ["all", "worker.w1"], "the worker's own control queue");
}

#[test]
fn results_that_nobody_reads_are_kept_as_unrouted() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| s.set("amqp.results_queue", false));
    worker.ready();
    let aggregator = stack.aggregator();
    assert_eq!(
        aggregator.depth(&stack.object(&format!("results.{MODEL}"))),
        None,
        "the queue was declared"
    );
    aggregator.submit(&honest().job("unread"));
    let queue = stack.object("results.unrouted");
    let kept = eventually_some(SOON, "the result is kept", || aggregator.take(&queue));
    assert_eq!(
        (&kept.json()["submission_id"], &kept.json()["status"]),
        (&json!("unread"), &json!("scored"))
    );
    assert_eq!(kept.routing_key, format!("{MODEL}.scored"));
    worker.drain();
    aggregator.expect_empty(&stack.jobs_queue());
}

#[test]
fn a_queue_that_an_operator_declared_otherwise_is_used_as_it_is() {
    let stack = Stack::shared();
    let aggregator = stack.aggregator();
    aggregator.declare_plain_jobs();
    aggregator.submit(&honest().job("plain"));
    let worker = stack.worker("w1");
    worker.ready();
    aggregator.collect_results();
    assert_eq!(aggregator.result("plain").json()["status"], "scored");
    assert!(
        worker.log().contains(&stack.jobs_queue()),
        "no warning names the queue:\n{}",
        worker.log()
    );
}
