//! A whole worker on the GPU in software, with a broker and a Redis; and what one says where it may not use it.

use serde_json::Value;
use testkit::case::{Case, cases, honest};
use testkit::package::sound;
use testkit::port::free_port;
use testkit::scrape::{get, samples};
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually_some, secs};
use testkit::worker::Settings;

use crate::config;

/// By which a GPU in software is allowed.
const ALLOW: &str = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER";

/// The settings of a worker on the device; fails where there is none.
fn on_the_device(settings: Settings) -> Settings {
    config(&[]);
    settings.set("engine.execution_provider", "webgpu")
}

fn case(name: &str) -> &'static Case {
    let found = cases().iter().find(|case| case.name == name);
    found.unwrap_or_else(|| panic!("there is no case {name}"))
}

#[test]
fn a_worker_is_ready_scores_and_drains() {
    let (stack, port) = (Stack::shared(), free_port());
    let worker = stack.worker_with("w1", |settings| {
        let address = format!("127.0.0.1:{port}");
        on_the_device(settings).set("telemetry.metrics_addr", address)
    });
    let record = worker.heartbeat_when(secs(300), "ready", |r| r["ready"] == true);
    let engine = &record["engine"];
    assert_eq!(engine["execution_provider"], "WebGpuExecutionProvider");
    assert_eq!(
        (&engine["device"], &engine["software_device"]),
        (&"webgpu:0".into(), &true.into())
    );
    let nodes = |place: &str| engine["placement"][place].as_u64();
    assert!(nodes("device") > nodes("host"), "{engine}");
    let class = engine["class"].as_str().unwrap();
    assert!(
        class.len() == 64 && class.bytes().all(|b| b.is_ascii_hexdigit()),
        "{class}"
    );

    let aggregator = stack.aggregator();
    aggregator.collect_results();
    for case in [
        honest(),
        case("malformed-index-numel"),
        case("difference-one-window"),
    ] {
        aggregator.submit(&case.job(&case.name));
        let result: Value = aggregator.result(&case.name).json();
        assert_eq!(result["status"], case.expect["status"], "{result}");
        assert_eq!(result["error"]["code"], case.expect["code"], "{result}");
    }
    let metrics = eventually_some(SOON, "metrics", || get(port, "/metrics"));
    assert_eq!(
        samples(&metrics.1).get("scorer_software_device"),
        Some(&1.0)
    );
    worker.drain();
}

#[test]
fn a_device_in_software_is_refused_unless_it_is_allowed() {
    let stack = Stack::shared();
    let worker = stack.worker_with("w1", |s| on_the_device(s).env(ALLOW, "0"));
    let record = worker.state("degraded", "ep_unavailable");
    assert_eq!(record["ready"], false);
    let said = record["last_error"]["message"].as_str().unwrap();
    for part in ["software", "install", "Vulkan driver"] {
        assert!(said.contains(part), "{said}");
    }
    worker.drain();
}

#[test]
fn without_a_driver_check_says_what_to_install() {
    let stack = Stack::shared();
    let settings = on_the_device(stack.settings()).env("VK_ICD_FILENAMES", "/nowhere.json");
    let answer = stack.command_with(settings, &["check"], "").expect_code(69);
    let said = format!("{}{}", answer.stdout, answer.stderr);
    for part in ["WebGpuExecutionProvider", "Vulkan", "mesa-vulkan-drivers"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn every_promise_is_proven_on_the_device() {
    let stack = Stack::shared();
    let settings = on_the_device(stack.settings()).set("model.dir", sound().display());
    let proving = stack.command_with(settings, &["check", "--prove", "--json"], "");
    let report = proving.expect_code(0).value();
    assert_eq!(report["software_device"], true, "{report}");
    let proofs = report["proofs"].as_array().unwrap();
    assert_eq!(proofs.len(), 7, "{report}");
    for proof in proofs {
        assert_eq!(proof["holds"], true, "{proof}");
    }
    assert_eq!(proofs[0]["found"], "device memory, written in place");
}
