//! `scorer merge`, the binary itself: what it prints, and with which code it exits.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use testkit::package::{fixtures, sound};
use testkit::program::scorer;
use testkit::worker::Settings;

/// What a merge of these candidates prints, and its exit code.
#[track_caller]
fn merge(members: &[&str], more: &[&str]) -> (Value, Option<i32>) {
    let mut command = Command::new(scorer());
    command.args([
        "merge",
        "--format",
        "binary_v2",
        "--semantics",
        "param_diff",
    ]);
    for member in members {
        let (id, file) = member.split_once('=').expect("ID=FILE");
        let file = fixtures().join("candidates").join(file);
        command.arg(format!("--member={id}={}", file.display()));
    }
    command.args(more).arg("--model").arg(sound() as &Path);
    let settings = Settings::new(&[]).set("engine.execution_provider", "cpu");
    let output = settings.apply(&mut command).output();
    let output = output.expect("the binary runs");
    let answer = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (answer, output.status.code())
}

const FEW: &str = "few=difference-few-steps.json:0.5";
const MORE: &str = "more=difference-more-steps.json";
const EMPTY: &str = "empty=malformed-empty.json";

#[test]
fn a_merge_is_judged_offline() {
    let (answer, code) = merge(&[MORE, FEW, EMPTY], &[]);
    assert_eq!(code, Some(0), "{answer}");
    let told = |field: &str| (answer["kind"].clone(), answer[field].clone());
    assert_eq!(told("status"), ("merge".into(), "scored".into()));
    assert_eq!(answer["passes"], 3);
    let members = answer["members"].as_array().expect("members");
    let told: Vec<_> = members
        .iter()
        .map(|m| (&m["id"], m["weight"].as_f64()))
        .collect();
    let third = Some(1.0 / 3.0);
    assert_eq!(
        told,
        [
            (&"empty".into(), third),
            (&"few".into(), Some(0.5)),
            (&"more".into(), third)
        ]
    );
    assert_eq!(members[0]["error"]["code"], "candidate_empty");
    let value = |at: usize| {
        members[at]["contribution"]["value"]
            .as_f64()
            .expect("a number")
    };
    let joint = answer["joint"]["delta"].as_f64().expect("a number");
    assert!((value(1) + value(2) - joint).abs() < 1e-12, "{answer}");
}

#[test]
fn a_merge_that_is_refused_says_why_and_exits_with_1() {
    let (answer, code) = merge(&[MORE, FEW, EMPTY], &["--on-rejected", "fail"]);
    assert_eq!(code, Some(1), "{answer}");
    assert_eq!(answer["error"]["code"], "candidate_empty");
    assert_eq!(answer["error"]["detail"]["members"][0]["id"], "empty");
    let together = ["--set", "candidates.max_entries=4000"];
    let (answer, code) = merge(&[MORE, FEW], &together);
    assert_eq!(code, Some(1), "{answer}");
    assert_eq!(answer["error"]["code"], "candidate_too_large");
    let (answer, code) = merge(&[MORE, FEW], &["--shards", "3"]);
    assert_eq!(code, Some(1), "{answer}");
    assert_eq!(answer["error"]["code"], "unknown_shard");
}

#[test]
fn bad_usage_and_missing_files_have_codes_of_their_own() {
    let more_than_allowed = ["--set", "candidates.max_members=2"];
    assert_eq!(merge(&[MORE], &[]).1, Some(64));
    assert_eq!(merge(&[MORE, MORE], &[]).1, Some(64));
    assert_eq!(merge(&[MORE, FEW, EMPTY], &more_than_allowed).1, Some(64));
    assert_eq!(merge(&[MORE, "gone=gone.json"], &[]).1, Some(65));
}
