//! The pages of `docs/reference` say what the code says. `UPDATE=1 cargo test --test reference` writes them anew.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

use std::fmt::Write as _;
use std::path::Path;

use scorer::cli::schemas as schema;
use scorer::cli::{self, Exit};
use scorer::config;
use scorer::protocol::failure::{Code, Remedy};
use scorer::protocol::state::Detail;
use scorer::telemetry::metrics;
use serde_json::{Map, Value};
use strum::{EnumMessage, IntoEnumIterator, VariantArray};

const DEFAULTS: &str = include_str!("../src/config.default.toml");

/// Compares a page with what the code says, or writes it.
fn is_current(name: &str, title: &str, body: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/reference/{name}.md"));
    let made = "<!-- Generated from the code: UPDATE=1 cargo test --test reference -->";
    let page = format!("{made}\n\n# {title}\n\n{}\n", body.trim());
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let mut lines = page.lines().zip(committed.lines());
    let differs = lines.find(|(ours, theirs)| ours != theirs);
    assert!(
        page == committed,
        "{} is not what the code says, at {differs:?}; run: UPDATE=1 cargo test --test reference",
        path.display()
    );
}

/// Text within a table: one line, no bar.
fn cell(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").replace('|', "\\|")
}

fn sentence(text: &str) -> String {
    let text = cell(text);
    match text.ends_with(['.', '!', '?']) || text.is_empty() {
        true => text,
        false => text + ".",
    }
}

#[test]
fn the_reference_of_commands_is_current() {
    let mut scorer = cli::command();
    scorer.build();
    let mut body = format!(
        "{}\n\nEvery command takes these options:\n\n{}",
        sentence(&scorer.get_about().expect("about").to_string()),
        options(&scorer, &[])
    );
    let global: Vec<String> = scorer
        .get_arguments()
        .map(|a| a.get_id().to_string())
        .collect();
    for command in scorer.get_subcommands() {
        if command.get_name() != "help" {
            describe(command, &global, 2, &mut body);
        }
    }
    is_current("cli", "Commands", &body);
}

/// A command and those below it.
fn describe(command: &clap::Command, global: &[String], level: usize, page: &mut String) {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    let about = command.get_long_about().or(command.get_about());
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let about = sentence(&about.map(ToString::to_string).unwrap_or_default());
    writeln!(
        page,
        "\n{} `{name}`\n\n{about}\n\n    {usage}\n",
        "#".repeat(level)
    )
    .unwrap();
    page.push_str(&options(command, global));
    if let Some(examples) = command.get_after_help() {
        let examples = examples.to_string();
        let lines = examples.lines().filter(|line| line.starts_with("  "));
        let lines: Vec<String> = lines.map(|line| format!("    {}", line.trim())).collect();
        writeln!(page, "\nExamples:\n\n{}", lines.join("\n")).unwrap();
    }
    for below in command.get_subcommands() {
        if below.get_name() != "help" {
            describe(below, global, level + 1, page);
        }
    }
}

/// The options and arguments of a command but those that all have.
fn options(command: &clap::Command, global: &[String]) -> String {
    let mut rows = String::new();
    for argument in command.get_arguments() {
        let id = argument.get_id().as_str();
        if !global.iter().any(|g| g == id) && !["help", "version"].contains(&id) {
            let (name, meaning) = (cell(&argument.to_string()), meaning(argument));
            writeln!(rows, "| `{name}` | {meaning} |").unwrap();
        }
    }
    match rows.is_empty() {
        true => rows,
        false => format!("| option | meaning |\n| --- | --- |\n{rows}"),
    }
}

fn meaning(argument: &clap::Arg) -> String {
    let help = argument.get_long_help().or(argument.get_help());
    let mut text = sentence(&help.map(ToString::to_string).unwrap_or_default());
    let default: Vec<_> = argument.get_default_values().iter().collect();
    let takes_value = argument.get_action().takes_values();
    if let (true, [default]) = (takes_value, default.as_slice())
        && !default.is_empty()
    {
        write!(text, " Default: `{}`.", default.to_string_lossy()).unwrap();
    }
    let values = argument.get_possible_values();
    if takes_value && !values.is_empty() {
        let values = values.iter().map(|value| match value.get_help() {
            Some(help) => format!("`{}` ({help})", value.get_name()),
            None => format!("`{}`", value.get_name()),
        });
        let values: Vec<String> = values.collect();
        write!(text, " One of {}.", values.join(", ")).unwrap();
    }
    text
}

#[test]
fn the_reference_of_the_configuration_is_current() {
    let mut body = String::from(
        "Durations are written `250ms`, `5s`, `5m`, `24h`; sizes `4MiB`, `1GiB` or a number of bytes. \
         [Operations](../operations.md#configuration) says where values come from. A key `section.key` is set with \
         `--set section.key=VALUE`, or with `SCORER_SECTION__KEY` in the environment.\n",
    );
    let mut described = Vec::new();
    let mut section = String::new();
    for line in DEFAULTS.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            name.clone_into(&mut section);
            write!(
                body,
                "\n## `[{name}]`\n\n| key | default | meaning |\n| --- | --- | --- |\n"
            )
            .unwrap();
        } else if let Some((key, value, meaning)) = key_line(line) {
            let default = match line.starts_with('#') {
                true => format!("none, such as `{value}`"),
                false => format!("`{value}`"),
            };
            described.push(format!("{section}.{key}"));
            writeln!(
                body,
                "| `{section}.{key}` | {default} | {} |",
                cell(meaning)
            )
            .unwrap();
        }
    }
    let known: Vec<&str> = config::key_names().collect();
    assert_eq!(
        described, known,
        "config.default.toml has one line with a comment for each key"
    );
    is_current("configuration", "Configuration", &body);
}

/// `key = value  # meaning`, commented out or not.
fn key_line(line: &str) -> Option<(&str, &str, &str)> {
    let line = line.strip_prefix("# ").unwrap_or(line);
    let (key, rest) = line.split_once(" = ")?;
    let (value, meaning) = rest.split_once(" #")?;
    let is_key = key
        .chars()
        .all(|c| c.is_ascii_lowercase() || "_.0123456789".contains(c));
    is_key.then_some((key, value.trim(), meaning.trim()))
}

#[test]
fn the_reference_of_codes_is_current() {
    let body = format!(
        "The [runbook](../../ops/runbook.md) says for each of these what to check and what to do.\n\n\
         ## Error codes\n\n\
         They are the `error.code` of a result. `rejected`: the job or its candidate is at fault. `failed`: the operation \
         failed, which says nothing about the candidate. *Then* is what the worker does: *answer* at once, *retry* and, at \
         the end, answer and dead-letter a copy, or answer and *dead-letter* a copy. *Resubmit* says whether the same job \
         may succeed later (`error.retryable`). *Stored* refusals answer the same job again without computing.\n\n\
         | code | status | then | resubmit | stored | when |\n| --- | --- | --- | --- | --- | --- |\n{}\n\
         ## Details\n\n\
         They are the `state_detail` of a heartbeat.\n\n| detail | meaning |\n| --- | --- |\n{}\n\
         ## Exit codes\n\n| code | meaning |\n| --- | --- |\n{}",
        codes(),
        details(),
        exits()
    );
    is_current("codes", "Codes", &body);
}

fn documented(word: &impl EnumMessage) -> String {
    let meaning = word
        .get_documentation()
        .expect("every variant says what it means");
    sentence(meaning)
}

fn codes() -> String {
    let yes = |is| if is { "yes" } else { "no" };
    let rows = Code::VARIANTS.iter().map(|code| {
        let then = match code.remedy() {
            Remedy::Answer => "answer",
            Remedy::Retry => "retry",
            Remedy::Park => "dead-letter",
        };
        format!(
            "| `{}` | {} | {then} | {} | {} | {} |\n",
            code.as_str(),
            code.status().as_str(),
            yes(code.retryable()),
            yes(code.proven_by_candidate()),
            documented(code)
        )
    });
    rows.collect()
}

fn details() -> String {
    let rows = Detail::iter().map(|detail| {
        // The version's number is not part of the word.
        let word = detail.to_string().replace("_v0", "_vN");
        format!("| `{word}` | {} |\n", documented(&detail))
    });
    rows.collect()
}

fn exits() -> String {
    let rows = Exit::iter().map(|exit| format!("| {} | {} |\n", exit as i32, documented(&exit)));
    rows.collect()
}

#[test]
fn the_reference_of_metrics_is_current() {
    let mut described = metrics::descriptions().unwrap();
    described.sort();
    let mut body = String::from(
        "A worker answers at `/metrics` on `telemetry.metrics_addr`. Durations are in seconds. Counters count from the start \
         of the process.\n\n| name | type | labels | meaning |\n| --- | --- | --- | --- |\n",
    );
    for metric in described {
        let labels: Vec<String> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
        let (name, kind, labels) = (metric.name, metric.kind, labels.join(", "));
        writeln!(
            body,
            "| `{name}` | {kind} | {labels} | {} |",
            cell(&metric.help)
        )
        .unwrap();
    }
    is_current("metrics", "Metrics", &body);
}

#[test]
fn the_reference_of_schemas_is_current() {
    let mut body = String::from(
        "One JSON Schema (draft 2020-12) per message; `scorer schema NAME` prints it. [Protocol](../protocol.md) says what the \
         messages mean.\n",
    );
    for name in schema::NAMES {
        let whole = serde_json::to_value(schema::schema(name).unwrap()).unwrap();
        writeln!(
            body,
            "\n## `{name}`\n\n{}\n",
            sentence(text(&whole, "description"))
        )
        .unwrap();
        writeln!(body, "[Schema](../../schemas/{name}.json)\n").unwrap();
        let mut rows = Vec::new();
        fields(&whole, &whole, "", &mut rows);
        let mut seen = std::collections::HashSet::new();
        rows.retain(|row| seen.insert(row.clone()));
        writeln!(
            body,
            "| field | type | meaning |\n| --- | --- | --- |\n{}",
            rows.join("\n")
        )
        .unwrap();
    }
    is_current("schemas", "Schemas", &body);
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// What a `$ref` stands for.
fn resolved<'a>(whole: &'a Value, schema: &'a Value) -> &'a Value {
    let target = text(schema, "$ref").strip_prefix('#');
    target.map_or(schema, |at| whole.pointer(at).expect("what is referred to"))
}

/// The ways that a value may be, without null.
fn ways<'a>(whole: &'a Value, schema: &'a Value) -> Vec<&'a Value> {
    let schema = resolved(whole, schema);
    let several = ["anyOf", "oneOf", "allOf"]
        .iter()
        .filter_map(|key| schema.get(key).and_then(Value::as_array));
    let parts: Vec<&Value> = several.flatten().collect();
    let deeper = parts.into_iter().flat_map(|part| ways(whole, part));
    let mut all = vec![schema];
    all.extend(deeper.filter(|way| text(way, "type") != "null"));
    all
}

/// A row for each field, and for the fields below it.
fn fields(whole: &Value, schema: &Value, under: &str, rows: &mut Vec<String>) {
    for way in ways(whole, schema) {
        let none = Map::new();
        let properties = way.get("properties").and_then(Value::as_object);
        for (name, field) in properties.unwrap_or(&none) {
            if field.get("not").is_some() || field == &Value::Bool(true) {
                continue;
            }
            let path = format!("{under}{name}");
            let meaning = sentence(text(field, "description"));
            let kind = kind(whole, field);
            if !(kind.is_empty() && meaning.is_empty()) {
                rows.push(format!("| `{path}` | {kind} | {meaning} |"));
            }
            fields(whole, field, &format!("{path}."), rows);
            for way in ways(whole, field) {
                for (inner, mark) in [("items", "[]."), ("additionalProperties", ".NAME.")] {
                    if let Some(inner) = way.get(inner).filter(|inner| inner.is_object()) {
                        fields(whole, inner, &format!("{path}{mark}"), rows);
                    }
                }
            }
        }
    }
}

/// In words: a type, or the values that a field may have.
fn kind(whole: &Value, field: &Value) -> String {
    let mut found: Vec<String> = Vec::new();
    for way in ways(whole, field) {
        if let Some(only) = way.get("const") {
            found.push(format!("`{only}`"));
        } else if let Some(values) = way.get("enum").and_then(Value::as_array) {
            found.extend(values.iter().map(|value| format!("`{value}`")));
        } else {
            match way.get("type") {
                Some(Value::Array(types)) => {
                    found.extend(types.iter().filter_map(Value::as_str).map(str::to_owned));
                }
                Some(one) => found.extend(one.as_str().map(str::to_owned)),
                None => {}
            }
        }
    }
    let constant = found.iter().any(|word| word.starts_with('`'));
    found.retain(|word| !(word == "null" || constant && word == "string"));
    found.dedup();
    match found.len() {
        0..=4 => found.join(" or "),
        _ => format!("one of {} words", found.len()),
    }
}
