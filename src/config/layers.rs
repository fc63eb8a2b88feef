//! The layers of the configuration and how they are merged: which keys there are, how bare text is
//! read for a key's type, and what is wrong with a value by itself. The typed form, and what keys
//! mean together, are the parent's; how a duration or a size is written is in `units`.

use std::fmt::Write as _;
use std::path::Path;

use toml::{Table, Value};

use super::units::{parse_duration, parse_size};

/// The embedded defaults, as `scorer config` documents them.
pub(super) const DEFAULTS: &str = include_str!("../config.default.toml");
const ENVIRONMENT_PREFIX: &str = "SCORER_";

/// How the text of a key is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Text,
    Integer,
    Boolean,
    Duration,
    Size,
    TextList,
    DurationList,
}

pub(super) const KEYS: &[(&str, Type)] = &[
    ("worker.id", Type::Text),
    ("worker.score_timeout", Type::Duration),
    ("worker.drain_timeout", Type::Duration),
    ("model.name", Type::Text),
    ("model.dir", Type::Text),
    ("model.state_dir", Type::Text),
    ("model.update_url", Type::Text),
    ("model.update_interval", Type::Duration),
    ("model.update_key", Type::Text),
    ("model.update_stagger", Type::Boolean),
    ("model.allow_shards_subset", Type::Boolean),
    ("engine.execution_provider", Type::Text),
    ("engine.device_id", Type::Integer),
    ("engine.threads", Type::Integer),
    ("engine.micro_batch", Type::Integer),
    ("engine.onnxruntime", Type::Text),
    ("engine.gpu_memory_limit", Type::Size),
    ("engine.deterministic", Type::Boolean),
    ("engine.tf32", Type::Boolean),
    ("engine.audit_interval", Type::Duration),
    ("amqp.url", Type::Text),
    ("amqp.namespace", Type::Text),
    ("amqp.prefetch", Type::Integer),
    ("amqp.results_queue", Type::Boolean),
    ("amqp.retry_delays", Type::DurationList),
    ("amqp.poison_after", Type::Integer),
    ("amqp.heartbeat", Type::Duration),
    ("amqp.control", Type::Boolean),
    ("amqp.tls.ca", Type::Text),
    ("amqp.tls.cert", Type::Text),
    ("amqp.tls.key", Type::Text),
    ("redis.url", Type::Text),
    ("redis.namespace", Type::Text),
    ("redis.tls.ca", Type::Text),
    ("redis.tls.cert", Type::Text),
    ("redis.tls.key", Type::Text),
    ("heartbeat.interval", Type::Duration),
    ("heartbeat.ttl", Type::Duration),
    ("results.ttl", Type::Duration),
    ("candidates.allow", Type::TextList),
    ("candidates.allow_private", Type::Boolean),
    ("candidates.max_inline_bytes", Type::Size),
    ("candidates.max_bytes", Type::Size),
    ("candidates.max_inflated_bytes", Type::Size),
    ("candidates.max_entries", Type::Integer),
    ("candidates.fetch_timeout", Type::Duration),
    ("telemetry.log", Type::Text),
    ("telemetry.log_format", Type::Text),
    ("telemetry.metrics_addr", Type::Text),
    ("telemetry.otlp_endpoint", Type::Text),
];

/// What the layers above the defaults say.
#[derive(Debug, Default)]
pub struct Layers<'a> {
    /// `--config`.
    pub file: Option<&'a Path>,
    /// The environment; only `SCORER_` names are read.
    pub environment: Vec<(String, String)>,
    /// `--set KEY=VALUE`.
    pub set: &'a [String],
}

pub(super) fn merge_file(merged: &mut Table, path: &Path, problems: &mut Vec<String>) {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) => {
            return problems.push(format!("--config {}: cannot be read: {e}", path.display()));
        }
    };
    match toml::from_str::<Table>(&text) {
        Ok(table) => overlay(merged, table),
        Err(e) => problems.push(format!("--config {}: {e}", path.display())),
    }
}

fn overlay(below: &mut Table, above: Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => overlay(below, above),
            (_, value) => {
                below.insert(key, value);
            }
        }
    }
}

pub(super) fn merge_environment(
    merged: &mut Table,
    environment: &[(String, String)],
    problems: &mut Vec<String>,
) {
    for (name, text) in environment {
        let Some(rest) = name.strip_prefix(ENVIRONMENT_PREFIX) else {
            continue;
        };
        let key = rest.to_ascii_lowercase().replace("__", ".");
        if let Err(problem) = put(merged, &key, text) {
            problems.push(format!("{name} ({key}): {problem}"));
        }
    }
}

pub(super) fn merge_set(merged: &mut Table, set: &[String], problems: &mut Vec<String>) {
    for pair in set {
        match pair.split_once('=') {
            Some((key, text)) => {
                if let Err(problem) = put(merged, key.trim(), text) {
                    problems.push(format!("{key}: {problem}"));
                }
            }
            None => problems.push(format!("--set {pair}: must be KEY=VALUE")),
        }
    }
}

fn put(merged: &mut Table, key: &str, text: &str) -> Result<(), String> {
    let Some((_, kind)) = KEYS.iter().find(|(name, _)| *name == key) else {
        return Err(unknown(key));
    };
    let value = read(*kind, text)?;
    let mut path: Vec<&str> = key.split('.').collect();
    let last = path.pop().unwrap_or_default();
    let mut table = merged;
    for part in path {
        let entry = table
            .entry(part)
            .or_insert_with(|| Value::Table(Table::new()));
        let Value::Table(inner) = entry else {
            return Err(format!("{part} is not a section"));
        };
        table = inner;
    }
    table.insert(last.to_owned(), value);
    Ok(())
}

/// Reads bare text for the key's type, so that `worker.id=7` is the string 7.
fn read(kind: Type, text: &str) -> Result<Value, String> {
    match kind {
        Type::Text | Type::Duration | Type::Size => Ok(Value::String(text.to_owned())),
        Type::Integer => text
            .trim()
            .parse()
            .map(Value::Integer)
            .map_err(|_| format!("{text:?} is not a whole number")),
        Type::Boolean => text
            .trim()
            .parse()
            .map(Value::Boolean)
            .map_err(|_| format!("{text:?} is neither true nor false")),
        Type::TextList | Type::DurationList => toml::from_str::<Table>(&format!("list = {text}"))
            .ok()
            .and_then(|mut table| table.remove("list"))
            .filter(Value::is_array)
            .ok_or_else(|| format!("{text:?} is not a TOML array such as [\"a\", \"b\"]")),
    }
}

pub(super) fn check_types(merged: &Table, problems: &mut Vec<String>) {
    visit(
        "",
        merged,
        &mut |key, value| match KEYS.iter().find(|(name, _)| *name == key) {
            None => problems.push(format!("{key}: {}", unknown(key))),
            Some((_, kind)) => {
                if let Err(problem) = check_type(*kind, value) {
                    problems.push(format!("{key}: {problem}"));
                }
            }
        },
    );
}

fn visit(prefix: &str, table: &Table, each: &mut impl FnMut(&str, &Value)) {
    for (name, value) in table {
        let key = if prefix.is_empty() {
            name.clone()
        } else {
            format!("{prefix}.{name}")
        };
        if let Value::Table(inner) = value {
            visit(&key, inner, each);
        } else {
            each(&key, value);
        }
    }
}

fn check_type(kind: Type, value: &Value) -> Result<(), String> {
    let wrong = |expected: &str| Err(format!("must be {expected}, not {}", value.type_str()));
    match (kind, value) {
        (Type::Text, Value::String(_))
        | (Type::Integer | Type::Size, Value::Integer(0..))
        | (Type::Boolean, Value::Boolean(_)) => Ok(()),
        (Type::Duration, Value::String(text)) => parse_duration(text).map(drop),
        (Type::Size, Value::String(text)) => parse_size(text).map(drop),
        (Type::TextList, Value::Array(items)) if items.iter().all(Value::is_str) => Ok(()),
        (Type::DurationList, Value::Array(items)) => items
            .iter()
            .try_for_each(|item| parse_duration(item.as_str().unwrap_or_default()).map(drop)),
        (Type::Text, _) => wrong("text"),
        (Type::Integer, Value::Integer(n)) => Err(format!("must not be negative, it is {n}")),
        (Type::Integer, _) => wrong("a whole number"),
        (Type::Boolean, _) => wrong("true or false"),
        (Type::Duration, _) => wrong("a duration such as \"5s\""),
        (Type::Size, _) => wrong("a size such as \"4MiB\""),
        (Type::TextList, _) => wrong("a list of texts"),
        (Type::DurationList, _) => wrong("a list of durations"),
    }
}

fn unknown(key: &str) -> String {
    let mut message = "unknown key".to_owned();
    let last = key.rsplit('.').next().unwrap_or(key);
    let similar = KEYS
        .iter()
        .find(|(name, _)| name.rsplit('.').next() == Some(last));
    if let Some((name, _)) = similar {
        // Writing to a String cannot fail.
        let _infallible = write!(message, "; did you mean {name}?");
    }
    message
}
