//! Programs in Python against the real binary: the Python client, the page in a browser, the users of the services, the
//! wheels.
//! Each starts services of its own.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

/// Runs a program of `tests`; its own words say what failed.
fn passes(program: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("python3")
        .arg(root.join("tests").join(program))
        .env("WORKER_BINARY", env!("CARGO_BIN_EXE_scorer"))
        .env("PYTHONPATH", root.join("clients/python/src"))
        .current_dir(root)
        .output()
        .expect("a python3, see ops/setup");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}:\n{said}");
}

#[test]
fn the_python_client_loses_nothing_and_answers_once() {
    passes("python_client_live.py");
}

#[test]
fn the_asyncio_client_loses_nothing_and_answers_once() {
    passes("python_aio_client_live.py");
}

#[test]
fn the_dashboard_is_for_everybody() {
    passes("dashboard_live.py");
}

#[test]
fn every_user_of_the_services_can_do_its_work_and_nothing_more() {
    passes("privileges_live.py");
}

#[test]
fn what_pip_installs_scores_checks_and_works() {
    passes("wheel_live.py");
}
