//! The invariants of ARCHITECTURE.md that a search can check.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

use std::path::{Path, PathBuf};

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// A file that two crates compile by `#[path]` is compiled twice, and its unused half needs an excuse in each: what tests
/// share is the crate `testkit`.
#[test]
fn no_source_is_compiled_into_two_crates_by_its_path() {
    for folder in ["src", "tests", "benches"] {
        let mut found = Vec::new();
        sources(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            &mut found,
        );
        assert!(!found.is_empty(), "{folder}");
        for path in found {
            let text = std::fs::read_to_string(&path).unwrap();
            let by_path = text
                .lines()
                .any(|line| line.trim_start().starts_with(concat!("#[", "path")));
            assert!(!by_path, "{} names a module's path", path.display());
        }
    }
}

/// The files below `src` that name something in this part of them.
fn naming(needle: &str, part: fn(&str) -> &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut found, mut naming) = (Vec::new(), Vec::new());
    sources(&root, &mut found);
    assert!(found.len() > 20);
    for path in found {
        let name = path
            .strip_prefix(&root)
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let named = part(&text)
            .lines()
            .any(|line| !line.trim_start().starts_with("//") && line.contains(needle));
        if named {
            naming.push(name);
        }
    }
    naming
}

fn but_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap()
}

#[track_caller]
fn only_in(needle: &str, allowed: &[&str]) {
    only_in_part(needle, |text| text, allowed);
}

#[track_caller]
fn only_in_part(needle: &str, part: fn(&str) -> &str, allowed: &[&str]) {
    for name in naming(needle, part) {
        assert!(allowed.contains(&name.as_str()), "{name} names {needle}");
    }
}

#[test]
fn each_outside_driver_is_named_in_one_file() {
    only_in(
        "lapin::",
        &[
            "broker/amqp.rs",
            "broker/amqp/address.rs",
            "broker/amqp/delivery.rs",
            "broker/amqp/publisher.rs",
        ],
    );
    only_in(
        "redis::",
        &[
            "store.rs",
            "store/address.rs",
            "store/connection.rs",
            "store/fleet.rs",
        ],
    );
    only_in("ort::", &["engine/session.rs", "engine/session/scratch.rs"]);
    only_in("reqwest::", &["fetch.rs"]);
    only_in("object_store::", &["fetch/bucket.rs"]);
    for driver in ["hyper::", "hyper_util::"] {
        only_in(driver, &["listener.rs"]);
    }
    only_in(
        "prost::",
        &[
            "engine/graph.rs",
            "engine/graph/proto.rs",
            "engine/graph/tensors.rs",
        ],
    );
    only_in("prometheus::", &["metrics.rs"]);
    for driver in [
        "opentelemetry::",
        "opentelemetry_sdk::",
        "opentelemetry_otlp::",
    ] {
        only_in(driver, &["traces.rs"]);
    }
    only_in("ratatui::", &["cli/watch.rs"]);
    only_in("sd_notify::", &["systemd.rs"]);
    only_in(
        "axum::",
        &[
            "listener.rs",
            "metrics.rs",
            "dashboard.rs",
            "dashboard/door.rs",
        ],
    );
}

#[test]
fn the_lifecycle_is_advanced_by_the_worker_alone() {
    let allowed = [
        "worker.rs",
        "worker/swap.rs",
        "worker/warmup.rs",
        "lifecycle.rs",
    ];
    only_in_part(".advance(", but_tests, &allowed);
}

#[test]
fn only_the_consumer_acknowledges_jobs_a_command_parked_ones_and_the_client_results() {
    let settle = "consumer/settle.rs";
    only_in("acker.ack()", &[settle, "cli/dead.rs", "client.rs"]);
    only_in("acker.hand_back()", &[settle, "cli/dead.rs"]);
}

/// Whatever comes from others is read through `job::Encoding` and `job::document`, where null is absent,
/// `7.0` is 7, and a key is there once. Here are those that read what is something else.
#[test]
fn messages_are_read_in_one_way() {
    let others = [
        // The readers themselves.
        "job/json.rs",
        // What this program has written itself.
        "update/state.rs",
        // The index of a checkpoint, which is another program's file.
        "package/checkpoint.rs",
        // Values as they are, to be shown or handed on.
        "bench.rs",
        "fleet.rs",
        "cli/submit.rs",
    ];
    // Containers are a stranger's, with rules of their own.
    let fits = |name: &str| name.starts_with("candidate") || name.ends_with("/tests.rs");
    for reader in [
        "serde_json::from_slice",
        "serde_json::from_str",
        "serde_json::from_reader",
        "rmp_serde::from_",
    ] {
        for name in naming(reader, but_tests) {
            assert!(
                fits(&name) || others.contains(&name.as_str()),
                "{name} names {reader}"
            );
        }
    }
}

#[test]
fn the_environment_has_one_door_and_one_reader() {
    only_in("env::vars", &["cli.rs"]);
    only_in("\"SCORER_\"", &["config/layers.rs"]);
}
