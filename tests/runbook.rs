//! `ops/runbook.md` has a section for every word that an operator may meet. `ops/test_runbook.py` checks what
//! is in the sections, and the alerts.

#![expect(
    clippy::expect_used,
    reason = "a failed step of a test is a failed test"
)]

/// The words between quotes in a part of a source.
fn words<'a>(source: &'a str, from: &str, to: &str) -> Vec<&'a str> {
    let (_, rest) = source.split_once(from).expect("the part begins");
    let (part, _) = rest.split_once(to).expect("the part ends");
    let arms = part.lines().filter_map(|line| line.split_once("=> \""));
    arms.filter_map(|(_, word)| word.split_once('"'))
        .map(|(word, _)| word)
        .collect()
}

#[test]
fn every_detail_code_and_exit_has_its_section() {
    let runbook = include_str!("../ops/runbook.md");
    let headings: Vec<&str> = runbook
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    let details = words(
        include_str!("../src/protocol/state.rs"),
        "impl std::fmt::Display for Detail",
        "\n}",
    );
    let codes = words(
        include_str!("../src/protocol/failure.rs"),
        "impl Code {",
        "/// The status",
    );
    assert!(
        details.len() > 20 && codes.len() > 20,
        "{details:?} {codes:?}"
    );
    for word in details.iter().chain(&codes).chain(&["update_to_vN"]) {
        assert!(
            headings.contains(&format!("`{word}`").as_str()),
            "{word} has no section"
        );
    }
    let (_, exits) = include_str!("../src/cli.rs")
        .split_once("pub enum Exit {")
        .expect("the exit codes");
    let (exits, _) = exits.split_once('}').expect("their end");
    let exits = exits.lines().filter_map(|line| line.split_once(" = "));
    for (_, number) in exits {
        let heading = format!("Exit {}", number.trim_end_matches(','));
        assert!(
            headings.contains(&heading.as_str()),
            "{heading} has no section"
        );
    }
}
