//! Non-standard JSON numbers: `NaN` and `Infinity`, as Python's `json` writes them, and numbers too
//! large for a float. They are harmless in metadata.

use std::ops::Range;

/// Replaces such a number: valid as neither count, size nor text. No longer than the shortest of them.
const INSTEAD: &[u8] = b"0.5";

/// Whether there are any outside strings.
pub(super) fn any(bytes: &[u8]) -> bool {
    numbers(bytes).next().is_some()
}

/// A copy of the same length without them.
pub(super) fn without(bytes: &[u8]) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    for number in numbers(bytes) {
        let (instead, rest) = copy[number].split_at_mut(INSTEAD.len());
        instead.copy_from_slice(INSTEAD);
        rest.fill(b' ');
    }
    copy
}

/// The ranges of such numbers.
fn numbers(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    words(bytes).filter(|word| {
        let word = &bytes[word.clone()];
        match word {
            b"NaN" | b"-NaN" | b"Infinity" | b"-Infinity" => true,
            [b'0'..=b'9', ..] | [b'-', b'0'..=b'9', ..] => is_too_large(word),
            _ => false,
        }
    })
}

fn is_too_large(word: &[u8]) -> bool {
    let number = std::str::from_utf8(word).ok().map(str::parse::<f64>);
    matches!(number, Some(Ok(number)) if number.is_infinite())
}

/// Numbers and literals outside strings.
fn words(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let is_of_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            let rest = bytes.get(at..)?;
            match rest.first()? {
                b'"' => at += text(rest),
                byte if is_of_word(byte) => {
                    let length = rest.iter().take_while(|byte| is_of_word(byte)).count();
                    at += length;
                    return Some(at - length..at);
                }
                _ => at += 1,
            }
        }
    })
}

/// The length of the string that begins here, with its quotes.
fn text(bytes: &[u8]) -> usize {
    let mut at = 1;
    while let Some(next) = bytes.get(at..) {
        match next.iter().position(|byte| matches!(byte, b'"' | b'\\')) {
            Some(end) if next[end] == b'"' => return at + end + 1,
            Some(escape) => at += escape + 2,
            None => break,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_does_not_know_are_replaced_where_they_stand() {
        let large = "9".repeat(400);
        let cases = [
            (r#"{"a": NaN}"#, r#"{"a": 0.5}"#),
            (r"[NaN,-Infinity,Infinity]", r"[0.5,0.5      ,0.5     ]"),
            (r#"{"a":1e999,"b":-1e400}"#, r#"{"a":0.5  ,"b":0.5   }"#),
            (r#"{"NaN":"\"NaN","\\":NaN}"#, r#"{"NaN":"\"NaN","\\":0.5}"#),
        ];
        for (body, expected) in cases {
            assert!(any(body.as_bytes()), "{body}");
            let replaced = without(body.as_bytes());
            assert_eq!(String::from_utf8(replaced).unwrap(), expected);
        }
        assert!(any(large.as_bytes()));
        for body in [
            "",
            "\"",
            "\"NaN",
            "\"\\",
            "\"\\\"NaN\"",
            "nan",
            "inf",
            "NaNs",
            "1NaN",
            "[1e308, true, null, 0.25]",
        ] {
            assert!(!any(body.as_bytes()), "{body}");
        }
    }
}
