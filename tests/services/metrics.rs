//! What Prometheus and systemd are told.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use serde_json::json;
use testkit::case::{honest, honest_job, of_the_last_layer};
use testkit::folder::Folder;
use testkit::port::free_port;
use testkit::scrape::{get, samples};
use testkit::stack::Stack;
use testkit::wait::{START, eventually_some, secs};

#[test]
fn a_scrape_tells_what_happened_in_prometheus_conventions() {
    let (stack, port) = (Stack::shared(), free_port());
    let worker = stack.worker_with("w1", |s| {
        s.set("telemetry.metrics_addr", format!("127.0.0.1:{port}"))
    });
    worker.ready();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    aggregator.submit(&honest_job("good", "n"));
    let mut bad = honest().job("bad");
    bad["candidate"]["data"] = json!("AAAA");
    bad["candidate"]
        .as_object_mut()
        .expect("a map")
        .remove("sha256");
    bad["candidate"]
        .as_object_mut()
        .expect("a map")
        .remove("size");
    aggregator.submit(&bad);
    for id in ["good", "bad"] {
        aggregator.result(id);
    }
    let (status, text) = eventually_some(secs(10), "both jobs are counted", || {
        let (status, text) = get(port, "/metrics")?;
        let counted = samples(&text).get("scorer_job_duration_seconds_count") == Some(&2.0);
        counted.then_some((status, text))
    });
    assert!(status.contains("200"), "{status}");
    let found = samples(&text);
    for (name, value) in [
        (
            r#"scorer_jobs_total{code="scored",kind="score",status="scored"}"#,
            1.0,
        ),
        (
            r#"scorer_jobs_total{code="candidate_malformed",kind="score",status="rejected"}"#,
            1.0,
        ),
        (
            r#"scorer_stage_duration_seconds_count{stage="forward"}"#,
            1.0,
        ),
        (r#"scorer_state{state="ready"}"#, 1.0),
        (r#"scorer_state{state="degraded"}"#, 0.0),
        (r#"scorer_state_detail{detail="serving"}"#, 1.0),
        (r#"scorer_confirms_total{outcome="confirmed"}"#, 2.0),
        (r#"scorer_warmups_total{outcome="succeeded"}"#, 1.0),
        ("scorer_ready", 1.0),
        ("scorer_broker_consuming", 1.0),
    ] {
        assert_eq!(found.get(name), Some(&value), "{name} in\n{text}");
    }
    assert!(found["scorer_device_busy_seconds_total"] > 0.0);
    assert!(found["process_resident_memory_bytes"] > 1e6);
    lint(&text);
    assert!(get(port, "/").is_some_and(|(status, _)| status.contains("404")));

    let taken = stack
        .settings()
        .set("telemetry.metrics_addr", format!("127.0.0.1:{port}"));
    let refused = stack.command_with(taken, &["run"], "").expect_code(64);
    assert!(
        refused.stderr.contains("telemetry.metrics_addr") && refused.stderr.contains("in use"),
        "{}",
        refused.stderr
    );
}

#[test]
fn a_candidate_of_the_last_layer_starts_from_what_is_kept() {
    let (stack, port) = (Stack::shared(), free_port());
    let worker = stack.worker_with("w1", |s| {
        s.set("telemetry.metrics_addr", format!("127.0.0.1:{port}"))
            .set("engine.parts", 4)
    });
    worker.ready();
    assert_eq!(worker.next_heartbeat()["engine"]["parts"], 4);
    let [hit, miss] =
        ["hit", "miss"].map(|o| format!(r#"scorer_activation_lookups_total{{outcome="{o}"}}"#));
    let scrape = || samples(&get(port, "/metrics").expect("metrics").1);
    let before = scrape();
    assert_eq!(
        (before[&*hit], before[&*miss]),
        (0.0, 0.0),
        "a warm-up has no candidates"
    );
    assert!(before["scorer_activation_bytes"] > 0.0);
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    for (id, case) in [("late", of_the_last_layer()), ("early", honest())] {
        aggregator.submit(&case.job(id));
        assert_eq!(aggregator.result(id).json()["status"], "scored");
    }
    let found = scrape();
    assert!(found[&*hit] > 0.0, "{found:?}");
    assert_eq!(found[&*miss], 0.0, "{found:?}");
    worker.drain();
}

/// Every metric is explained and named as its kind and unit want; `promtool` says so too, where it is.
fn lint(text: &str) {
    let families = |word: &str| -> BTreeMap<&str, &str> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(word));
        lines.filter_map(|line| line.split_once(' ')).collect()
    };
    let (help, kinds) = (families("# HELP "), families("# TYPE "));
    let names: BTreeSet<_> = help.keys().collect();
    assert_eq!(names, kinds.keys().collect(), "explained and typed");
    for (name, kind) in kinds {
        let legal = |b: u8| b.is_ascii_lowercase() || b == b'_';
        assert!(name.bytes().all(legal), "{name}");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
        let units = ["_seconds", "_ratio"];
        let has_unit = units.iter().any(|unit| name.ends_with(unit));
        assert!(kind != "histogram" || has_unit, "{name}");
    }
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .spawn();
    if let Ok(mut promtool) = promtool {
        let mut input = promtool.stdin.take().expect("a pipe");
        input.write_all(text.as_bytes()).expect("promtool reads");
        drop(input);
        assert!(
            promtool.wait().expect("it ends").success(),
            "see its complaint above"
        );
    }
}

#[test]
fn systemd_hears_of_readiness_progress_and_the_end() {
    let (stack, folder) = (Stack::shared(), Folder::new("systemd"));
    let socket = UnixDatagram::bind(folder.join("notify")).expect("a socket");
    socket.set_read_timeout(Some(START)).expect("a timeout");
    let path = folder.join("notify").display().to_string();
    let worker = stack.worker_with("w1", |s| s.env("NOTIFY_SOCKET", &path));
    let heard = |wanted: &str| {
        let mut before = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let length = socket
                .recv(&mut buffer)
                .expect("systemd hears of it in time");
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            before.extend(text.lines().map(str::to_owned));
            if before.iter().any(|line| line == wanted) {
                return before;
            }
        }
    };
    let before = heard("READY=1");
    assert!(before.contains(&"WATCHDOG=1".to_owned()), "{before:?}");
    assert!(
        before.contains(&"STATUS=ready / serving".to_owned()),
        "{before:?}"
    );
    worker.terminate();
    heard("STOPPING=1");
}
