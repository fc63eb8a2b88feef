//! A provider that is not there is a state with a name, and `scorer check` says what to do.

use crate::support::stack::Stack;
use crate::support::wait::{START, secs, throughout};

/// No machine has it, so that the test means the same on one with a GPU.
const NO_SUCH_DEVICE: u32 = 99;

#[test]
fn a_missing_provider_is_degraded_and_never_consumes() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| {
        s.set("engine.execution_provider", "cuda")
            .set("engine.device_id", NO_SUCH_DEVICE)
    });
    let record = worker.state("degraded", "ep_unavailable");
    assert_eq!(
        (record["ready"].as_bool(), record["accepting"].as_bool()),
        (Some(false), Some(false))
    );
    assert!(
        record["last_error"]["message"]
            .as_str()
            .is_some_and(|m| !m.is_empty()),
        "{record}"
    );
    assert_ne!(
        record["engine"]["execution_provider"], "CPUExecutionProvider",
        "it says CPU instead"
    );
    worker.heartbeat_when(START, "it tries again", |r| {
        r["warm"]["attempt"].as_u64() >= Some(2)
    });
    let aggregator = stack.aggregator();
    throughout(secs(1), "no consumer", || {
        aggregator
            .depth(&stack.jobs_queue())
            .is_none_or(|(_, consumers)| consumers == 0)
    });
    worker.drain();
}

#[test]
fn check_says_what_is_missing_and_exits_69() {
    let stack = Stack::shared();
    let settings = stack
        .settings()
        .set("engine.execution_provider", "cuda")
        .set("engine.device_id", NO_SUCH_DEVICE);
    let answer = stack.command_with(settings, &["check"], "").expect_code(69);
    let said = format!("{}{}", answer.stdout, answer.stderr).to_lowercase();
    assert!(
        said.contains("cuda"),
        "it does not name the provider:\n{said}"
    );
    assert!(
        said.contains("onnxruntime") || said.contains("onnx runtime"),
        "it does not say what to get:\n{said}"
    );
}

#[test]
fn check_passes_where_all_is_well_and_names_a_broken_package() {
    let stack = Stack::shared();
    let answer = stack.command(&["check", "--json"]).expect_code(0);
    assert!(answer.value().is_object(), "{}", answer.stdout);
    let package = crate::support::package::Package::copy();
    let spoilt = package.spoil_a_shard();
    let settings = stack.settings().set("model.dir", package.path().display());
    let answer = stack.command_with(settings, &["check"], "");
    assert!(
        [65, 69, 1].contains(&answer.code),
        "exit code {}",
        answer.code
    );
    assert!(
        format!("{}{}", answer.stdout, answer.stderr).contains(&spoilt),
        "{}\n{}",
        answer.stdout,
        answer.stderr
    );
}
