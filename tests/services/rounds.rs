//! A round from scores to payments: the programs of `docs/aggregators.md`, as they are printed, with a real worker.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use testkit::folder::Folder;
use testkit::package::{MODEL, VERSION, fixtures};
use testkit::stack::Stack;

use crate::readme::{in_namespace, printed};

const FEW: &str = "difference-few-steps.json";
const MORE: &str = "difference-more-steps.json";
const INVERTED: &str = "inverted-difference-303.json";
const EMPTY: &str = "malformed-empty.json";

/// What is said of a member.
struct Paid {
    weight: f64,
    contribution: f64,
    with_gap: f64,
}

/// Of each member, and what they change together.
type Round = (BTreeMap<String, Paid>, f64);

/// Copies of fixtures under names of their own.
fn candidates(folder: &Folder, files: &[(&str, &str)]) -> Vec<PathBuf> {
    let copied = files.iter().map(|(name, fixture)| {
        let path = folder.join(name);
        let from = fixtures().join("candidates").join(fixture);
        std::fs::copy(from, &path).expect("a writable folder");
        path
    });
    copied.collect()
}

#[track_caller]
fn pay(stack: &Stack, program: &str, epoch: &str, files: &[(&str, &str)]) -> Round {
    let folder = Folder::new("round");
    let ran = Command::new("python3")
        .args(["-c", &in_namespace(printed(program), stack)])
        .args([MODEL, &VERSION.to_string(), epoch])
        .args(candidates(&folder, files))
        .env(
            "PYTHONPATH",
            concat!(env!("CARGO_MANIFEST_DIR"), "/clients/python/src"),
        )
        .env("SCORER_AMQP__URL", stack.rabbit.url())
        .env("SCORER_REDIS__URL", stack.redis.url())
        .output()
        .expect("python3 runs");
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{program}: {said}");
    read(&String::from_utf8_lossy(&ran.stdout), epoch)
}

#[track_caller]
fn read(out: &str, epoch: &str) -> Round {
    let mut lines: Vec<&str> = out.lines().collect();
    let joint = lines.pop().and_then(|line| line.strip_prefix("joint "));
    let joint = joint.unwrap_or_else(|| panic!("{out}"));
    let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("{out}"));
    let members = lines.into_iter().map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let name = words[0]
            .strip_prefix(epoch)
            .and_then(|n| n.strip_prefix(':'));
        let paid = Paid {
            weight: number(words[1]),
            contribution: number(words[2]),
            with_gap: number(words[3]),
        };
        (name.unwrap_or_else(|| panic!("{out}")).to_owned(), paid)
    });
    (members.collect(), number(joint))
}

fn names(round: &Round) -> Vec<&str> {
    round.0.keys().map(String::as_str).collect()
}

/// The payments with the gap sum to the joint change, and nobody has another weight.
#[track_caller]
fn adds_up((members, joint): &Round) {
    let paid: f64 = members.values().map(|paid| paid.with_gap).sum();
    assert!((paid - joint).abs() < 1e-15, "{paid} of {joint}");
    #[expect(clippy::cast_precision_loss, reason = "a few members")]
    let share = 1.0 / members.len() as f64;
    assert!(members.values().all(|paid| paid.weight == share));
    assert!(*joint > 0.0, "{joint}");
}

#[test]
fn the_printed_programs_pay_by_contribution_and_copies_fall() {
    let stack = Stack::shared();
    let worker = stack.worker("w1");
    worker.ready();
    let (few, more) = (("few", FEW), ("more", MORE));
    let honest = [few, more, ("inverted", INVERTED), ("empty", EMPTY)];
    let alone = pay(&stack, "pay_round.py", "e1", &honest);
    assert_eq!(names(&alone), ["few", "more"], "what helps, and no more");
    adds_up(&alone);
    let copied = [
        few,
        more,
        ("more-2", MORE),
        ("more-3", MORE),
        ("inverted", INVERTED),
    ];
    // The same windows; scores that are known are answered from the store, and the merge is another job.
    let copied = pay(&stack, "pay_round_aio.py", "e1", &copied);
    assert_eq!(names(&copied), ["few", "more", "more-2", "more-3"]);
    adds_up(&copied);
    // What copies are paid for a weight of 1 falls, and all of them are paid alike.
    let (once, thrice) = (&alone.0["more"], &copied.0["more"]);
    assert!(thrice.contribution / thrice.weight < once.contribution / once.weight);
    for copy in ["more-2", "more-3"] {
        assert_eq!(copied.0[copy].contribution, thrice.contribution);
    }
}
