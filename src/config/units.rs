//! Durations and sizes: how they are written and read, and the serde modules for the typed
//! configuration. The bounds of each key are in `keys`.

use std::time::Duration;

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use toml::Value;

/// Reads `250ms`, `5s`, `5m`, `24h`.
///
/// # Errors
/// A sentence that shows the form.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration such as 250ms, 5s, 5m or 24h");
    let end = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (digits, unit) = text.split_at(end);
    let factor: u64 = match unit {
        _ if digits.is_empty() => return Err(wrong()),
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    product(digits, factor)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is too long"))
}

/// None where 64 bits do not hold it.
fn product(digits: &str, factor: u64) -> Option<u64> {
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// Writes a duration the way it is read; `5s`, not `5000ms`.
pub fn format_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    for (unit, size) in [("h", 3_600_000), ("m", 60_000), ("s", 1_000)] {
        if millis >= size && millis.is_multiple_of(size) {
            return format!("{}{unit}", millis / size);
        }
    }
    format!("{millis}ms")
}

/// Reads `512KiB`, `4MiB`, `1GiB` or a number of bytes.
///
/// # Errors
/// A sentence that shows the form.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size such as 512KiB, 4MiB or 1GiB");
    let end = text.find(|c: char| !c.is_ascii_digit());
    let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
    let factor: u64 = match unit.trim() {
        _ if digits.is_empty() => return Err(wrong()),
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(wrong()),
    };
    product(digits, factor).ok_or_else(|| format!("{text:?} is too large"))
}

/// A duration of the configuration.
pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

/// A list of durations.
pub(super) fn durations<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<Duration>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let durations = texts.iter().map(|text| parse_duration(text));
    durations
        .collect::<Result<_, _>>()
        .map_err(D::Error::custom)
}

/// One text, or a list of texts.
pub(super) fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    if let Value::String(text) = value {
        return Ok(vec![text]);
    }
    value.try_into().map_err(D::Error::custom)
}

/// A size, in bytes.
pub(super) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match value.as_integer() {
        Some(bytes) => u64::try_from(bytes).map_err(D::Error::custom),
        None => parse_size(value.as_str().unwrap_or_default()).map_err(D::Error::custom),
    }
}

/// A size that may be left out.
pub(super) fn optional_size<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    size(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_the_way_they_are_read() {
        for text in ["0ms", "250ms", "5s", "30s", "5m", "24h", "90s", "1500ms"] {
            assert_eq!(format_duration(parse_duration(text).unwrap()), text);
        }
    }

    #[test]
    fn what_is_no_duration_is_refused_and_what_overflows_is_not_cut() {
        for text in ["", "5", "s", "-5s", "5 s", "5sec", "0.5s", "5s5s", "٥s"] {
            let problem = parse_duration(text).unwrap_err();
            assert!(problem.contains("such as"), "{text}: {problem}");
        }
        for text in ["18446744073709551615h", "18446744073709551616ms"] {
            let problem = parse_duration(text).unwrap_err();
            assert!(problem.contains("too long"), "{problem}");
        }
    }

    #[test]
    fn sizes_are_bytes_with_or_without_a_unit() {
        for (text, bytes) in [("0", 0), ("7B", 7), ("4 MiB", 4 << 20), ("1GiB", 1 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "MiB", "-1", "1MB", "1.5GiB"] {
            assert!(parse_size(text).unwrap_err().contains("such as"), "{text}");
        }
        let problem = parse_size("17179869184GiB").unwrap_err();
        assert!(problem.contains("too large"), "{problem}");
    }
}
