//! Workers of two models in one namespace are told apart.

use std::path::PathBuf;
use std::process::Command;

use redis::Commands as _;
use serde_json::Value;
use testkit::folder::Folder;
use testkit::program::scorer;
use testkit::stack::Stack;
use testkit::wait::{DRAIN, SOON, START, eventually, eventually_some, secs, throughout};
use testkit::worker::{Settings, Worker};

use crate::dashboard::Dashboard;

/// The name of the sample model.
const OTHER: &str = "digits";

/// The package of the sample model.
fn sample(folder: &Folder) -> PathBuf {
    let ran = Command::new(scorer())
        .arg("init")
        .arg(folder.join("demo"))
        .output();
    assert!(ran.expect("the binary runs").status.success());
    folder.join("demo/package")
}

fn record(stack: &Stack, id: &str) -> Option<Value> {
    let key = format!("{}:{{{OTHER}}}:worker:{id}", stack.namespace);
    let text: Option<String> = stack.redis.connection().get(key).ok()?;
    serde_json::from_str(&text?).ok()
}

fn is_ready(stack: &Stack, id: &str) -> bool {
    record(stack, id).is_some_and(|record| record["ready"] == true)
}

/// A worker of the tests' model, and one of the sample.
fn both(stack: &Stack, folder: &Folder) -> (Worker, Worker) {
    let package = sample(folder);
    let ours = stack.worker("ours");
    let other = stack.worker_with("other", |s| {
        s.set("model.dir", package.display())
            .set("model.name", OTHER)
    });
    ours.ready();
    eventually(START, "the other is ready", || is_ready(stack, "other"));
    (ours, other)
}

#[test]
fn a_command_to_all_workers_of_a_model_reaches_no_other() {
    let (stack, folder) = (Stack::shared(), Folder::new("models"));
    let (ours, _other) = both(&stack, &folder);
    let answer = stack.command(&["ctl", "pause"]).expect_code(0);
    assert_eq!(answer.stdout, "ours  done: paused: no jobs are taken\n");
    ours.state("degraded", "paused");
    throughout(secs(1), "the other was not meant", || {
        is_ready(&stack, "other")
    });
    // Of a model without a worker nobody is asked.
    ours.terminate();
    assert_eq!(ours.exit_code(DRAIN), 0);
    let answer = stack.command(&["ctl", "pause"]).expect_code(1);
    assert!(
        answer.stderr.contains("no worker received it"),
        "{}",
        answer.stderr
    );
    assert!(is_ready(&stack, "other"));
}

#[test]
fn a_worker_that_says_goodbye_is_not_lost_whatever_its_model() {
    let (stack, folder) = (Stack::shared(), Folder::new("models"));
    // By name the other comes first.
    let (ours, _other) = both(&stack, &folder);
    let settings = Settings::new(&[
        ("SCORER_AMQP__URL", &stack.rabbit.url()),
        ("SCORER_AMQP__NAMESPACE", &stack.namespace),
        ("SCORER_REDIS__URL", &stack.redis.url()),
        ("SCORER_REDIS__NAMESPACE", &stack.namespace),
    ]);
    let dashboard = Dashboard::with(&settings, &["--listen", "127.0.0.1:0"]);
    let alive = || dashboard.told("now")?["totals"]["alive"].as_u64();
    eventually(SOON, "both are seen", || alive() == Some(2));
    ours.terminate();
    assert_eq!(ours.exit_code(DRAIN), 0);
    let now = eventually_some(SOON, "one is seen", || {
        dashboard
            .told("now")
            .filter(|now| now["totals"]["alive"] == 1)
    });
    assert_eq!(
        now["lost"].as_array().map(Vec::len),
        Some(0),
        "{}",
        now["lost"]
    );
    throughout(secs(2), "nobody is lost", || {
        dashboard
            .told("now")
            .is_some_and(|now| now["lost"] == serde_json::json!([]))
    });
}
