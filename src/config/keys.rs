//! The keys of the configuration, the type and bounds of each, and how bare text is read as that type.

use std::time::Duration;

use strum::VariantNames;
use toml::Value;

use super::units::{format_duration, parse_duration, parse_size};
use super::{LogFormat, Provider, RedisMode};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// A longer duration is a typing error, and could overflow a clock.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// RabbitMQ counts milliseconds in 32 bits, and refuses a queue whose TTL does not fit; this is the last
/// whole hour that does.
const LONGEST_AT_BROKER: Duration = Duration::from_secs(1193 * 3600);
/// AMQP encodes it in 16 bits, in seconds.
const LONGEST_AMQP_HEARTBEAT: Duration = Duration::from_secs(18 * 3600);

/// The type of a key's value; two values are the minimum and the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Text,
    Choice(&'static [&'static str]),
    Integer(i64, i64),
    Boolean,
    /// A number from 0 to 1.
    Share,
    Duration(Duration, Duration),
    Size,
    TextList,
    /// One URL, or a list of them.
    Urls,
    DurationList(Duration, Duration),
}

/// Every key.
pub(super) const KEYS: &[(&str, Type)] = &[
    ("worker.id", Type::Text),
    ("worker.score_timeout", Type::Duration(MILLISECOND, YEAR)),
    ("worker.drain_timeout", Type::Duration(Duration::ZERO, YEAR)),
    ("worker.finish_stopped", Type::Share),
    ("model.name", Type::Text),
    ("model.dir", Type::Text),
    ("model.state_dir", Type::Text),
    ("model.update_url", Type::Text),
    ("model.update_interval", Type::Duration(SECOND, YEAR)),
    ("model.update_key", Type::Text),
    ("model.update_stagger", Type::Boolean),
    ("model.allow_shards_subset", Type::Boolean),
    (
        "engine.execution_provider",
        Type::Choice(Provider::VARIANTS),
    ),
    ("engine.webgpu_plugin", Type::Text),
    ("engine.device_id", Type::Integer(0, 0x7fff_ffff)),
    ("engine.threads", Type::Integer(0, 4096)),
    ("engine.micro_batch", Type::Integer(1, 65_536)),
    ("engine.parts", Type::Integer(0, 256)),
    ("engine.activation_cache", Type::Size),
    ("engine.onnxruntime", Type::Text),
    ("engine.gpu_memory_limit", Type::Size),
    ("engine.deterministic", Type::Boolean),
    ("engine.tf32", Type::Boolean),
    ("engine.audit_interval", Type::Duration(MILLISECOND, YEAR)),
    ("amqp.url", Type::Urls),
    (
        "amqp.consumer_timeout",
        Type::Duration(SECOND, LONGEST_AT_BROKER),
    ),
    ("amqp.namespace", Type::Text),
    ("amqp.prefetch", Type::Integer(1, 65_535)),
    ("amqp.results_queue", Type::Boolean),
    (
        "amqp.retry_delays",
        Type::DurationList(MILLISECOND, LONGEST_AT_BROKER),
    ),
    ("amqp.poison_after", Type::Integer(1, 0xffff_ffff)),
    (
        "amqp.heartbeat",
        Type::Duration(SECOND, LONGEST_AMQP_HEARTBEAT),
    ),
    ("amqp.control", Type::Boolean),
    ("amqp.tls.ca", Type::Text),
    ("amqp.tls.cert", Type::Text),
    ("amqp.tls.key", Type::Text),
    ("redis.url", Type::Urls),
    ("redis.mode", Type::Choice(RedisMode::VARIANTS)),
    ("redis.master", Type::Text),
    ("redis.namespace", Type::Text),
    ("redis.tls.ca", Type::Text),
    ("redis.tls.cert", Type::Text),
    ("redis.tls.key", Type::Text),
    ("heartbeat.interval", Type::Duration(MILLISECOND, YEAR)),
    ("heartbeat.ttl", Type::Duration(MILLISECOND, YEAR)),
    ("results.ttl", Type::Duration(SECOND, YEAR)),
    ("candidates.allow", Type::TextList),
    ("candidates.allow_private", Type::Boolean),
    ("candidates.max_inline_bytes", Type::Size),
    ("candidates.max_bytes", Type::Size),
    ("candidates.max_inflated_bytes", Type::Size),
    ("candidates.max_entries", Type::Integer(0, i64::MAX)),
    ("candidates.max_members", Type::Integer(2, 1000)),
    (
        "candidates.fetch_timeout",
        Type::Duration(MILLISECOND, YEAR),
    ),
    ("candidates.min_rate", Type::Size),
    ("candidates.cache_bytes", Type::Size),
    ("telemetry.log", Type::Text),
    ("telemetry.log_format", Type::Choice(LogFormat::VARIANTS)),
    ("telemetry.metrics_addr", Type::Text),
    ("telemetry.otlp_endpoint", Type::Text),
];

pub(super) fn type_of(key: &str) -> Option<Type> {
    let found = KEYS.iter().find(|(name, _)| *name == key);
    found.map(|(_, kind)| *kind)
}

pub(super) fn is_section(key: &str) -> bool {
    KEYS.iter().any(|(name, _)| {
        let rest = name.strip_prefix(key);
        rest.is_some_and(|rest| rest.starts_with('.'))
    })
}

/// More letters than this are no slip.
const SLIPS: usize = 2;

/// Keys that differ in dots, underscores and case alone; without any, those with the same last word; without any, those of
/// which a few letters differ; without any, those of the same section whose last word ends or begins so.
pub(super) fn similar(key: &str) -> Vec<&'static str> {
    let key = key.to_ascii_lowercase();
    let letters = |key: &str| key.replace(['.', '_'], "");
    let parts = |key: &str| {
        let (section, last) = key.rsplit_once('.').unwrap_or(("", key));
        (section.to_owned(), last.to_owned())
    };
    let (section, last) = parts(&key);
    let extends = |name: &str| {
        let (ours, theirs) = (parts(name), format!("_{}_", parts(name).1));
        !last.is_empty() && ours.0 == section && theirs.contains(&format!("_{last}_"))
    };
    let ways: [&dyn Fn(&str) -> bool; 4] = [
        &|name| letters(name) == letters(&key),
        &|name| parts(name).1 == last,
        &|name| strsim::osa_distance(&letters(name), &letters(&key)) <= SLIPS,
        &extends,
    ];
    let names = || KEYS.iter().map(|(name, _)| *name);
    let found = ways.map(|way| names().filter(|name| way(name)).collect::<Vec<_>>());
    let mut found = found.into_iter().filter(|names| !names.is_empty());
    found.next().unwrap_or_default()
}

/// Reads bare text as a type, so that `worker.id=7` is the text 7.
pub(super) fn read(kind: Type, text: &str) -> Result<Value, String> {
    let trimmed = text.trim();
    match kind {
        Type::Text => Ok(text.into()),
        Type::Urls if !trimmed.starts_with('[') => Ok(trimmed.into()),
        Type::Choice(_) | Type::Duration(..) | Type::Size => Ok(trimmed.into()),
        Type::Integer(..) => trimmed
            .parse()
            .map(Value::Integer)
            .map_err(|_| format!("{text:?} is not a whole number")),
        Type::Boolean => trimmed
            .parse()
            .map(Value::Boolean)
            .map_err(|_| format!("{text:?} is neither true nor false")),
        Type::Share => trimmed
            .parse()
            .map(Value::Float)
            .map_err(|_| format!("{text:?} is not a number")),
        // Not the text itself: it may hold a password.
        Type::Urls => trimmed
            .parse()
            .map_err(|_| "begins with [ but is no TOML array such as [\"a\", \"b\"]".to_owned()),
        Type::TextList | Type::DurationList(..) => trimmed
            .parse()
            .ok()
            .filter(Value::is_array)
            .ok_or_else(|| format!("{text:?} is not a TOML array such as [\"a\", \"b\"]")),
    }
}

pub(super) fn check(kind: Type, value: &Value) -> Result<(), String> {
    let wrong = |expected: &str| Err(format!("must be {expected}, not {}", value.type_str()));
    match (kind, value) {
        (Type::Text | Type::Urls, Value::String(text)) if text.is_empty() => {
            Err("must not be empty".into())
        }
        (Type::Text | Type::Urls, Value::String(_)) | (Type::Boolean, Value::Boolean(_)) => Ok(()),
        (Type::Choice(words), Value::String(text)) => check_choice(words, text),
        (Type::Integer(least, most), Value::Integer(n)) if (least..=most).contains(n) => Ok(()),
        (Type::Integer(least, most), Value::Integer(n)) => {
            Err(format!("must be from {least} to {most}, it is {n}"))
        }
        (Type::Share, Value::Float(share)) if (0.0..=1.0).contains(share) => Ok(()),
        (Type::Share, Value::Integer(0 | 1)) => Ok(()),
        (Type::Share, Value::Float(_) | Value::Integer(_)) => {
            Err(format!("must be from 0 to 1, it is {value}"))
        }
        (Type::Duration(least, most), Value::String(text)) => check_duration(least, most, text),
        (Type::Size, Value::String(text)) => parse_size(text).map(drop),
        (Type::Size, Value::Integer(0..)) => Ok(()),
        (Type::Size, Value::Integer(n)) => Err(format!("must not be negative, it is {n}")),
        (Type::Urls, Value::Array(items)) if items.is_empty() => {
            Err("must name at least one URL".into())
        }
        (Type::Urls | Type::TextList, Value::Array(items)) => check_items(Type::Text, items),
        (Type::DurationList(least, most), Value::Array(items)) => {
            check_items(Type::Duration(least, most), items)
        }
        (Type::Text, _) => wrong("text"),
        (Type::Choice(words), _) => wrong(&words.join(" or ")),
        (Type::Integer(..), _) => wrong("a whole number"),
        (Type::Boolean, _) => wrong("true or false"),
        (Type::Share, _) => wrong("a number from 0 to 1"),
        (Type::Duration(..), _) => wrong("a duration such as \"5s\""),
        (Type::Size, _) => wrong("a size such as \"4MiB\""),
        (Type::Urls, _) => wrong("a URL or a list of URLs"),
        (Type::TextList, _) => wrong("a list of texts"),
        (Type::DurationList(..), _) => wrong("a list of durations"),
    }
}

fn check_items(kind: Type, items: &[Value]) -> Result<(), String> {
    let mut numbered = items.iter().zip(1..);
    numbered.try_for_each(|(item, n)| check(kind, item).map_err(|e| format!("item {n}: {e}")))
}

fn check_choice(words: &[&str], text: &str) -> Result<(), String> {
    match words.contains(&text) {
        true => Ok(()),
        false => Err(format!("must be {}, it is {text:?}", words.join(" or "))),
    }
}

fn check_duration(least: Duration, most: Duration, text: &str) -> Result<(), String> {
    match parse_duration(text)? {
        duration if (least..=most).contains(&duration) => Ok(()),
        _ => {
            let (least, most) = (format_duration(least), format_duration(most));
            Err(format!("must be from {least} to {most}, it is {text}"))
        }
    }
}
