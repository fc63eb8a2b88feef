//! What the documents name exists: commands as they are typed, keys of the configuration, fields of the heartbeat.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use scorer::cli;
use scorer::cli::schemas as schema;
use scorer::config;
use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The pages that people write, but the runbook: `tests/runbook.rs` and `ops/test_runbook.py` read it more closely.
fn documents() -> Vec<(PathBuf, String)> {
    let pages = std::fs::read_dir(root().join("docs")).unwrap();
    let pages = pages.map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = pages
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .collect();
    assert!(paths.len() > 10, "{paths:?}");
    paths.extend(["README.md", "CONTRIBUTING.md"].map(|path| root().join(path)));
    let text = |path: PathBuf| (path.clone(), std::fs::read_to_string(path).unwrap());
    paths.into_iter().map(text).collect()
}

/// The command lines of a document's code blocks: continued lines joined, without remarks, pipes and redirections.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let lines = joined.lines().filter_map(|line| line.strip_prefix("    "));
    let lines = lines.filter(|line| line.trim_start().starts_with("scorer "));
    let command = |line: &str| {
        let ends = [" # ", " | ", " > "].map(|end| line.find(end).unwrap_or(line.len()));
        let end = ends.into_iter().min().unwrap_or(line.len());
        line[..end].trim().to_owned()
    };
    lines.map(command).collect()
}

#[test]
fn every_command_line_is_one() {
    let mut tried = 0;
    for (path, text) in documents() {
        for line in commands(&text) {
            let words = shlex::split(&line).expect("quotes are closed");
            let parsed = cli::command().try_get_matches_from(words);
            assert!(
                parsed.is_ok(),
                "{}: {line}: {}",
                path.display(),
                parsed.unwrap_err()
            );
            tried += 1;
        }
    }
    assert!(tried > 15, "{tried}");
}

/// The words in backticks outside of code blocks.
fn quoted(text: &str) -> BTreeSet<&str> {
    let prose = text.split("```").step_by(2);
    prose
        .flat_map(|part| part.split('`').skip(1).step_by(2))
        .collect()
}

#[test]
fn every_key_of_the_configuration_and_field_of_the_heartbeat_exists() {
    let keys = config::key_names().map(str::to_owned);
    let known: BTreeSet<String> = keys.chain(heartbeat_fields()).collect();
    let groups: BTreeSet<&str> = known.iter().filter_map(|n| n.split('.').next()).collect();
    let mut found = 0;
    for (path, text) in documents() {
        let names = quoted(&text)
            .into_iter()
            .filter_map(|word| word.split(['=', ' ']).next());
        for name in names.filter(|name| is_dotted(name)) {
            if groups.contains(name.split('.').next().unwrap()) {
                // A table such as `redis.tls` stands for its keys.
                let within = format!("{name}.");
                let exists = known.iter().any(|n| n == name || n.starts_with(&within));
                assert!(exists, "{}: there is no `{name}`", path.display());
                found += 1;
            }
        }
    }
    assert!(found > 50, "{found}");
}

/// Whether this looks like a key or a field, and not like a file.
fn is_dotted(name: &str) -> bool {
    let is_file = [".json", ".safetensors", ".onnx", ".v1"]
        .iter()
        .any(|end| name.ends_with(end));
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_.".contains(c);
    name.contains('.') && !is_file && name.chars().all(word)
}

/// `name` and `name.inner` of the record.
fn heartbeat_fields() -> BTreeSet<String> {
    let whole = serde_json::to_value(schema::schema("heartbeat.v1").unwrap()).unwrap();
    let mut found = BTreeSet::new();
    below(&whole, &whole, "", &mut found);
    found
}

fn below(whole: &Value, schema: &Value, under: &str, found: &mut BTreeSet<String>) {
    let several = schema["anyOf"].as_array().into_iter().flatten();
    for part in std::iter::once(schema).chain(several) {
        let target = part["$ref"].as_str().and_then(|at| at.strip_prefix('#'));
        let part = target.map_or(part, |at| whole.pointer(at).unwrap());
        for (name, field) in part["properties"].as_object().into_iter().flatten() {
            let path = format!("{under}{name}");
            below(whole, field, &format!("{path}."), found);
            found.insert(path);
        }
    }
}
