//! The programs of `docs/aggregators.md` run as they are printed.

use std::process::Command;

use testkit::case::{Case, cases, honest};
use testkit::package::{MODEL, VERSION};
use testkit::stack::Stack;

pub(super) fn printed(name: &str) -> &'static str {
    let page = include_str!("../../docs/aggregators.md");
    let begins = format!("```python\n# {name}");
    let start = page.find(&begins).expect("the page has the program");
    let rest = &page[start + "```python\n".len()..];
    &rest[..rest.find("\n```").expect("its block ends")]
}

/// A program that names no namespace, so that the defaults have to be ours.
pub(super) fn in_namespace(program: &str, stack: &Stack) -> String {
    let ours = format!("URL\"], model, \"{}\")", stack.namespace);
    program.replace("URL\"], model)", &ours)
}

#[test]
fn the_printed_python_aggregator_gets_its_verdict() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let case = honest();
    let rate = case.learning_rate.expect("a gradient has a rate");
    let ran = Command::new("python3")
        .args(["-c", printed("aggregator.py")])
        .env("SCORER_AMQP__URL", stack.rabbit.url())
        .env("SCORER_REDIS__URL", stack.redis.url())
        .env("SCORER_NAMESPACE", &stack.namespace)
        .env("MODEL", MODEL)
        .env("MODEL_VERSION", VERSION.to_string())
        .env("CANDIDATE", case.path())
        .env("LEARNING_RATE", rate.to_string())
        .output()
        .expect("python3 runs");
    let (out, err) = (
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr),
    );
    assert!(
        ran.status.success(),
        "{err}\nIf a module is missing: run through ops/test."
    );
    let words: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(words[1], "scored", "{out}");
    assert!(words[2].parse::<f64>().expect("a number") > 0.0, "{out}");
}

/// The Python client, used as the page says.
#[test]
fn the_printed_program_that_scores_files_prints_every_verdict() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let difference = difference();
    let program = in_namespace(printed("score_files.py"), &stack);
    let ran = Command::new("python3")
        .args(["-c", &program, MODEL, &VERSION.to_string()])
        .arg(difference.path())
        .env(
            "PYTHONPATH",
            concat!(env!("CARGO_MANIFEST_DIR"), "/clients/python/src"),
        )
        .env("SCORER_AMQP__URL", stack.rabbit.url())
        .env("SCORER_REDIS__URL", stack.redis.url())
        .output()
        .expect("python3 runs");
    let (out, err) = (
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr),
    );
    assert!(ran.status.success(), "{err}");
    assert!(out.contains(" scored "), "{out} {err}");
}

/// The same in Rust, as cargo runs it: a crate of its own, which builds without ONNX Runtime.
#[test]
fn the_rust_program_that_scores_files_prints_every_verdict() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let ran = Command::new(env!("CARGO"))
        .args([
            "run",
            "--quiet",
            "--locked",
            "--package",
            "score_files",
            "--",
        ])
        .args([MODEL, &VERSION.to_string()])
        .arg(difference().path())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("SCORER_AMQP__URL", stack.rabbit.url())
        .env("SCORER_REDIS__URL", stack.redis.url())
        .env("SCORER_AMQP__NAMESPACE", &stack.namespace)
        .env("SCORER_REDIS__NAMESPACE", &stack.namespace)
        .output()
        .expect("cargo runs");
    let (out, err) = (
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr),
    );
    assert!(ran.status.success(), "{err}");
    assert!(out.contains(r#""status":"scored""#), "{out} {err}");
}

/// A file as both programs take them.
fn difference() -> &'static Case {
    let difference = cases().iter().find(|case| {
        case.semantics.as_deref() == Some("param_diff")
            && case.format.as_deref() == Some("binary_v2")
            && case.expect["status"] == "scored"
    });
    difference.expect("a difference that is scored")
}
