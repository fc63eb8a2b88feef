//! Jobs that may end early: what workers say and store of them, and what is counted.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use testkit::case::{Case, cases, honest};
use testkit::package::{Package, fixtures};
use testkit::port::free_port;
use testkit::scrape::{get, samples};
use testkit::stack::Stack;
use testkit::wait::SOON;
use testkit::worker::Worker;

/// The model of all tests, with eight windows a row: 136, enough to stop.
fn package() -> Package {
    let objective = ["--window", "128", "--windows-per-row", "8"];
    let (graph, weights) = ("graph-named.onnx", "checkpoint.safetensors");
    Package::made(&fixtures(), graph, weights, &objective)
}

fn harmful() -> &'static Case {
    let mut cases = cases().iter();
    let found = cases.find(|case| case.name == "noise-large");
    found.expect("cases.json has it")
}

fn job(case: &Case, id: &str, stop: Value) -> Value {
    let mut job = case.job(id);
    job["validation"] = json!({"stop": stop});
    job
}

fn worker(stack: &Stack, package: &Package, id: &str, share: f64) -> (Worker, u16) {
    let port = free_port();
    let worker = stack.worker_with(id, |s| {
        s.set("model.dir", package.path().display())
            .set("worker.finish_stopped", share)
            .set("telemetry.metrics_addr", format!("127.0.0.1:{port}"))
    });
    let record = worker.ready();
    let accepts = record["accepts"].as_array().expect("a list");
    assert!(accepts.contains(&json!("stop")), "{record}");
    (worker, port)
}

fn scrape(port: u16) -> BTreeMap<String, f64> {
    let (_, text) = get(port, "/metrics").expect("metrics");
    let found = samples(&text).into_iter();
    found
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn stops(finished: bool, contradicted: bool) -> String {
    format!(
        r#"scorer_stops_total{{contradicted="{contradicted}",decision="worse",finished="{finished}"}}"#
    )
}

#[test]
fn a_stopped_job_is_answered_stored_and_counted() {
    let (stack, package) = (Stack::shared(), package());
    let (w1, port) = worker(&stack, &package, "w1", 0.0);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let stop = || json!({"alpha": 0.05});
    aggregator.submit(&job(harmful(), "bad", stop()));
    let first = aggregator.result("bad");
    let said = first.json();
    assert_eq!(
        (&said["status"], &said["score"]),
        (&json!("scored"), &json!(0.0))
    );
    assert_eq!(said["stopped"]["decision"], "worse", "{said}");
    let windows = said["windows"].as_u64().expect("a count");
    assert!((32..136).contains(&windows), "{said}");

    // Delivered again it is answered from what is stored; with another stop it is another job.
    aggregator.submit(&job(harmful(), "bad", stop()));
    let copy = aggregator.nth_result("bad", 2);
    assert_eq!(
        (&copy.message_id, copy.json()),
        (&first.message_id, said.clone())
    );
    w1.heartbeat_when(SOON, "the duplicate is counted", |r| {
        r["jobs"]["duplicates"] == 1
    });
    aggregator.submit(&job(harmful(), "bad", json!({"alpha": 0.01})));
    let other = aggregator.nth_result("bad", 3);
    assert_ne!(other.message_id, first.message_id);
    assert!(other.json()["windows"].as_u64() > Some(windows));

    // What helps is measured whole, and a validate job has nothing to stop for.
    aggregator.submit(&job(honest(), "good", stop()));
    let good = aggregator.result("good").json();
    assert_eq!(
        (&good["windows"], &good["stopped"]),
        (&json!(136), &Value::Null)
    );
    let loss = json!({"v": 1, "kind": "validate", "submission_id": "loss", "validation": {"stop": stop()}});
    aggregator.submit(&loss);
    let refused = aggregator.result("loss").json();
    assert_eq!(refused["error"]["code"], "invalid_job");
    let message = refused["error"]["message"].as_str().expect("text");
    assert!(message.starts_with("validation.stop"), "{message}");

    let counted = scrape(port);
    assert_eq!(
        counted[&stops(false, false)],
        2.0,
        "a stored result is not counted again"
    );
    assert_eq!(counted["scorer_largest_gain_rms_ratio_count"], 1.0);
    // The honest one might have been stopped, but nothing is ever finished here.
    assert_eq!(counted["scorer_stops_expected_contradictions_total"], 0.0);

    offline_says_the_same(&stack, &package, &said);
    w1.drain();
    finished_to_check_it(&stack, &package, &said);
}

fn offline_says_the_same(stack: &Stack, package: &Package, said: &Value) {
    let (file, model) = (harmful().path(), package.path());
    let (file, model) = (file.display().to_string(), model.display().to_string());
    let asked = [
        "score",
        "--model",
        &model,
        "--candidate",
        &file,
        "--format",
        "binary_v2",
    ];
    let how = [
        "--semantics",
        harmful().semantics.as_deref().expect("a score case"),
    ];
    let stop = ["--stop", "0.05", "--set", "worker.finish_stopped=0"];
    let offline = stack.command(&[&asked[..], &how, &stop].concat());
    let offline = offline.expect_code(0).value();
    for field in ["stopped", "windows", "delta", "plan"] {
        assert_eq!(offline[field], said[field], "{field}");
    }
}

fn finished_to_check_it(stack: &Stack, package: &Package, said: &Value) {
    let (w2, port) = worker(stack, package, "w2", 1.0);
    let (file, how) = (harmful().path(), harmful().semantics.as_deref());
    let file = file.display().to_string();
    let asked = [
        "submit",
        "--candidate",
        &file,
        "--semantics",
        how.expect("a score case"),
    ];
    let more = [
        "--stop",
        "0.05",
        "--model-version",
        "7",
        "--inline",
        "--wait",
    ];
    let told = stack.command(&[&asked[..], &more].concat()).expect_code(0);
    assert!(
        told.stdout.contains("stopped  worse: delta at most -"),
        "{}",
        told.stdout
    );
    let json = stack.command(&[&asked[..], &more, &["--json"]].concat());
    let finished = json.expect_code(0).value();
    let whole = finished["stopped"]["finished"]["delta"].as_f64();
    assert!(whole.expect("it was finished") < 0.0, "{finished}");
    for field in ["windows", "delta", "plan"] {
        assert_eq!(finished[field], said[field], "{field}");
    }
    let counted = scrape(port);
    assert_eq!(
        counted[&stops(true, false)],
        1.0,
        "the second was answered from the store"
    );
    assert_eq!(counted["scorer_largest_gain_rms_ratio_count"], 1.0);
    w2.drain();
}
