//! `ops/runbook.md` has an entry for every word that an operator may meet, and names only commands that exist.
//! `ops/test_runbook.py` checks the rest: the pattern, links, alerts, keys, fields and metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use scorer::cli::Exit;
use scorer::protocol::failure::Code;
use scorer::protocol::state::Detail;
use strum::{IntoEnumIterator as _, VariantArray as _};

const RUNBOOK: &str = include_str!("../ops/runbook.md");

/// The titles of the entries, alerts left out: those are in `ops/prometheus/alerts.yml`.
fn entries() -> BTreeSet<String> {
    let titles = RUNBOOK
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .filter(|title| !title.starts_with("Scorer"));
    titles.map(str::to_owned).collect()
}

/// The word of the heartbeat; the version that is updated to is any.
fn word(detail: Detail) -> String {
    if let Detail::UpdateTo(_) = detail {
        return "update_to_vN".to_owned();
    }
    detail.to_string()
}

#[test]
fn every_detail_code_and_exit_has_an_entry_and_nothing_else_has_one() {
    // Words of `last_error.code` that are no detail: an update's failures degrade nothing.
    let updates = ["update_failed", "state_not_saved"].map(str::to_owned);
    let words = Detail::iter()
        .map(word)
        .chain(Code::VARIANTS.iter().map(|code| code.as_str().to_owned()))
        .chain(updates)
        .map(|word| format!("`{word}`"));
    let exits = Exit::iter().map(|exit| format!("Exit {}", exit as i32));
    let (entries, met) = (entries(), words.chain(exits).collect::<BTreeSet<_>>());
    let missing: Vec<&String> = met.difference(&entries).collect();
    let idle: Vec<&String> = entries.difference(&met).collect();
    assert!(missing.is_empty(), "no entry for {missing:?}");
    assert!(idle.is_empty(), "an entry for nothing: {idle:?}");
}

/// The options that the runbook gives to each command of `scorer`, by the words of the command. A code span is
/// taken for a command where it begins with `scorer`, or with one word and an option: `check --prove`.
fn commands() -> BTreeMap<Vec<&'static str>, BTreeSet<&'static str>> {
    let mut commands: BTreeMap<Vec<&str>, BTreeSet<&str>> = BTreeMap::new();
    for code in RUNBOOK
        .lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
    {
        let words: Vec<&str> = code.split(' ').collect();
        let words = match words.as_slice() {
            ["scorer", words @ ..] => words,
            [_, option, ..] if option.starts_with("--") => &words,
            _ => continue,
        };
        let named = words.iter().take_while(|word| !word.starts_with('-'));
        let options = words.iter().filter(|word| word.starts_with("--"));
        commands
            .entry(named.copied().collect())
            .or_default()
            .extend(options);
    }
    commands
}

#[test]
fn every_command_exists_with_its_options() {
    let commands = commands();
    assert!(commands.len() > 10, "{commands:?}");
    for (command, options) in commands {
        let asked = Command::new(env!("CARGO_BIN_EXE_scorer"))
            .args(&command)
            .arg("--help")
            .output();
        let help = asked.expect("the program runs");
        assert!(help.status.success(), "scorer {command:?}: no such command");
        let help = String::from_utf8_lossy(&help.stdout);
        for option in options {
            let offered = help.split([' ', ',', '\n']).any(|word| word == option);
            assert!(offered, "scorer {command:?} has no {option}");
        }
    }
}
