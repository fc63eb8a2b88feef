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

/// The README, the runbook and the pages of the site that people write.
fn documents() -> Vec<(PathBuf, String)> {
    let pages = std::fs::read_dir(root().join("docs")).unwrap();
    let pages = pages.map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = pages
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .collect();
    assert!(paths.len() > 10, "{paths:?}");
    paths.extend(["README.md", "ops/runbook.md"].map(|path| root().join(path)));
    let text = |path: PathBuf| (path.clone(), std::fs::read_to_string(path).unwrap());
    paths.into_iter().map(text).collect()
}

/// The command lines of a document's code blocks, continued lines joined, remarks left out.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let lines = joined.lines().filter_map(|line| line.strip_prefix("    "));
    let lines = lines.filter(|line| line.trim_start().starts_with("scorer "));
    lines
        .map(|line| {
            line.split(" # ")
                .next()
                .unwrap()
                .split(" | ")
                .next()
                .unwrap()
        })
        .map(|line| line.trim().to_owned())
        .collect()
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
fn every_key_of_the_configuration_exists() {
    let keys: BTreeSet<&str> = config::key_names().collect();
    let sections: BTreeSet<&str> = keys
        .iter()
        .filter_map(|key| key.split('.').next())
        .collect();
    let fields = heartbeat_fields();
    let mut found = 0;
    for (path, text) in documents() {
        for word in quoted(&text) {
            let name = word.split(['=', ' ']).next().unwrap();
            let Some((section, key)) = name.split_once('.') else {
                continue;
            };
            let is_key = key
                .chars()
                .all(|c| c.is_ascii_lowercase() || "_.".contains(c));
            let is_file = [".json", ".safetensors", ".onnx"]
                .iter()
                .any(|end| name.ends_with(end));
            if sections.contains(section) && is_key && !is_file {
                let known = keys.contains(name) || fields.contains(name);
                let is_table = keys
                    .iter()
                    .any(|known| known.starts_with(&format!("{name}.")));
                assert!(known || is_table, "{}: `{word}` is no key", path.display());
                found += 1;
            }
        }
    }
    assert!(found > 30, "{found}");
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

/// `a.b`, `.c` in the first column means `a.b` and `a.c`; the second column has the parts of what is alone in the first.
#[test]
fn the_page_on_the_heartbeat_has_every_field() {
    let page = std::fs::read_to_string(root().join("docs/observability.md")).unwrap();
    let (_, table) = page.split_once("## The heartbeat").expect("its part");
    let mut named = BTreeSet::new();
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let (first, meaning) = row.split_once(" | ").expect("two columns");
        let mut words = first.split('`').skip(1).step_by(2);
        let whole = words.next().expect("a name");
        let group = whole.split('.').next().unwrap();
        named.extend([group, whole].map(str::to_owned));
        named.extend(words.map(|word| match word.strip_prefix('.') {
            Some(inner) => format!("{group}.{inner}"),
            None => word.to_owned(),
        }));
        named.extend(quoted(meaning).iter().map(|part| format!("{whole}.{part}")));
    }
    let missing: Vec<String> = heartbeat_fields().difference(&named).cloned().collect();
    assert!(missing.is_empty(), "{missing:?}");
}
