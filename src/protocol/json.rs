//! JSON as a tree of values, with numbers read from their digits: `7.0` and `70e-1` are the integer 7, and
//! `9007199254740993.0` is exact, unlike in a reader that goes through a float. The text of a context is
//! kept for the echo.

use rmpv::Value;
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
};
use serde_json::value::RawValue;

use crate::protocol::encoding::MAX_NESTING;
use crate::protocol::tree::Budget;

/// What some editors and systems put before a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The text without a byte-order mark.
pub(crate) fn unmarked(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Reads a document of at most so many values, keys included.
pub(super) fn read(text: &[u8], most_values: usize) -> Result<Value, String> {
    let text = unmarked(text);
    if is_deep(text) {
        return Err(format!("nested deeper than {MAX_NESTING} levels"));
    }
    let mut budget = Budget::of(most_values);
    let mut reader = serde_json::Deserializer::from_slice(text);
    let read = Node(&mut budget).deserialize(&mut reader);
    let read = read.and_then(|value| reader.end().map(|()| value));
    match budget.over {
        true => Err(format!("more than {most_values} values")),
        false => read.map_err(|e| format!("not JSON: {e}")),
    }
}

/// Where text is quoted, for who looks at it character by character.
#[derive(Default)]
struct Quotes {
    quoted: bool,
    escaped: bool,
}

impl Quotes {
    /// Whether this character, the next one, is within quotes.
    fn hold(&mut self, c: char) -> bool {
        let held = self.quoted;
        self.quoted ^= c == '"' && !self.escaped;
        self.escaped = self.quoted && c == '\\' && !self.escaped;
        held
    }
}

/// Looked at before anything is made: even to skip a list, a reader remembers each that is around it.
fn is_deep(text: &[u8]) -> bool {
    let (mut quotes, mut depth) = (Quotes::default(), 0_usize);
    text.iter().any(|byte| {
        match (quotes.hold(char::from(*byte)), byte) {
            (false, b'{' | b'[') => depth += 1,
            (false, b'}' | b']') => depth = depth.saturating_sub(1),
            (_, _) => {}
        }
        depth > MAX_NESTING
    })
}

/// A place in the document.
struct Node<'a>(&'a mut Budget);

impl Node<'_> {
    fn read(self, text: &str) -> serde_json::Result<Value> {
        self.0.take::<serde_json::Error>()?;
        let mut reader = serde_json::Deserializer::from_str(text);
        match text.as_bytes().first() {
            Some(b'{' | b'[') => reader.deserialize_any(self),
            Some(b'-' | b'0'..=b'9') => Ok(number(text)),
            Some(_) | None => Value::deserialize(&mut reader),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?;
        self.read(raw.get()).map_err(D::Error::custom)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a map or a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Node(&mut *self.0))? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(key) = pairs.next_key::<String>()? {
            self.0.take::<A::Error>()?;
            map.push((key.into(), pairs.next_value_seed(Node(&mut *self.0))?));
        }
        Ok(Value::Map(map))
    }
}

/// The integer that a number of JSON equals, if a field of ours can hold it; else the nearest float,
/// infinite where there is none.
fn number(text: &str) -> Value {
    let float = text.parse().unwrap_or(f64::INFINITY);
    let digits = whole(text);
    let meant = match digits {
        // Beyond 2^53 a float is written with the fewest digits that name it, and zeros for the others.
        Some(_) if text.contains(['.', 'e', 'E']) && digits == whole(&format!("{float:e}")) => {
            exact(float)
        }
        Some(_) | None => digits,
    };
    let unsigned = meant.and_then(|n| u64::try_from(n).ok());
    let signed = meant.and_then(|n| i64::try_from(n).ok());
    match (unsigned, signed) {
        (Some(n), _) => n.into(),
        (None, Some(n)) => n.into(),
        (None, None) => Value::F64(float),
    }
}

/// A float without a fraction; one beyond 128 bits as their end, which no field holds either.
#[expect(clippy::cast_possible_truncation, reason = "it has no fraction")]
fn exact(float: f64) -> Option<i128> {
    Some(float as i128)
}

/// What the digits say; none for what has a fraction or is beyond 128 bits.
fn whole(text: &str) -> Option<i128> {
    let (sign, text) = match text.strip_prefix('-') {
        Some(text) => (-1, text),
        None => (1, text),
    };
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (before, after) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{before}{after}");
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Some(0);
    }
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    let fraction = i64::try_from(after.len()).ok()?;
    let exponent: i64 = exponent.parse().ok()?;
    let shift = exponent.checked_add(zeros)?.checked_sub(fraction)?;
    let power = 10_i128.checked_pow(u32::try_from(shift).ok()?)?;
    significant.parse::<i128>().ok()?.checked_mul(sign * power)
}

/// What stands under the outermost `context`, each digit as it was sent, in one line.
pub(super) fn context(text: &[u8]) -> Option<Box<RawValue>> {
    #[derive(serde::Deserialize)]
    struct Outermost<'a> {
        #[serde(borrow)]
        context: Option<&'a RawValue>,
    }
    let outermost: Outermost<'_> = serde_json::from_slice(unmarked(text)).ok()?;
    RawValue::from_string(compact(outermost.context?.get())).ok()
}

/// JSON without what is only space.
pub(crate) fn compact(text: &str) -> String {
    let mut quotes = Quotes::default();
    let kept = text
        .chars()
        .filter(|c| quotes.hold(*c) || !c.is_ascii_whitespace());
    kept.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Value {
        read(text.as_bytes(), 100).unwrap()
    }

    #[test]
    fn a_number_without_a_fraction_is_the_integer_that_its_digits_say() {
        for (text, whole) in [
            ("7", 7),
            ("7.0", 7),
            ("70e-1", 7),
            ("0.07E+2", 7),
            ("700.000e-2", 7),
            ("-0.0", 0),
            ("0e999999999999999999999", 0),
            ("9007199254740993.0", 9_007_199_254_740_993),
            ("9.007199254740993e15", 9_007_199_254_740_993),
            // A float of 2^60, as it is written.
            ("1.152921504606847e+18", 1 << 60),
            ("1152921504606847000", 1_152_921_504_606_847_000),
            ("18446744073709551615", u64::MAX),
            ("18446744073709551615.000", u64::MAX),
        ] {
            assert_eq!(read_text(text), Value::from(whole), "{text}");
        }
        for (text, whole) in [
            ("-7.0", -7),
            ("-9223372036854775808.0", i64::MIN),
            ("-9.223372036854776e18", i64::MIN),
        ] {
            assert_eq!(read_text(text), Value::from(whole), "{text}");
        }
    }

    #[test]
    fn what_no_field_of_ours_holds_as_an_integer_stays_a_float() {
        for text in [
            "7.5",
            "9007199254740992.5",
            "18446744073709551616",
            "1.8446744073709552e19",
            "-9223372036854775809",
            "123456789012345678901234567890",
            "1e30",
            "1e-400",
            "-1.5e-7",
        ] {
            assert_eq!(read_text(text), Value::F64(text.parse().unwrap()), "{text}");
        }
        for (text, endless) in [
            ("1e400", f64::INFINITY),
            ("-1e99999999999999999999", -f64::INFINITY),
        ] {
            assert_eq!(read_text(text), Value::F64(endless), "{text}");
        }
    }

    #[test]
    fn every_shortest_float_comes_back_with_every_bit() {
        for bits in (0..10_000_u64).map(|n| 0x3f1d_0000_0000_0000 + n * 0x0000_0123_4567_89ab) {
            let float = f64::from_bits(bits);
            assert_eq!(read_text(&float.to_string()).as_f64(), Some(float));
        }
    }

    #[test]
    fn the_tree_is_what_serde_json_reads() {
        let text = r#" {"a\u0000b": [true, false, null, "\ud83d\ude00\n", {}, []], "a": -5, "": {"x": 0.5}} "#;
        let known: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(read_text(text)).unwrap(), known);
        let marked = [BYTE_ORDER_MARK, text.as_bytes()].concat();
        assert_eq!(read(&marked, 100).unwrap(), read_text(text));
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in [
            "",
            "{",
            "[1,]",
            "{} {}",
            "nul",
            "01",
            "+1",
            "1.",
            ".5",
            "NaN",
            "Infinity",
            "\"\u{1}\"",
            r#""\ud800""#,
            r#""\x""#,
            "{\"a\" 1}",
            "{a: 1}",
            "[1] // why",
            "\u{feff}\u{feff}1",
        ] {
            let refused = read(text.as_bytes(), 100);
            let why = refused.expect_err(text);
            assert!(why.starts_with("not JSON: "), "{text}: {why}");
        }
        assert!(read(b"\"\xff\"", 100).is_err());
    }

    #[test]
    fn bounds_hold_before_anything_is_made() {
        assert!(read(b"[1,2,3]", 4).is_ok());
        assert_eq!(read(b"[1,2,3]", 3), Err("more than 3 values".into()));
        assert_eq!(read(br#"{"a":1}"#, 2), Err("more than 2 values".into()));
        let nested = |levels| "[".repeat(levels) + &"]".repeat(levels);
        let quoted = format!(r#"["{0}\"{0}", []]"#, "[".repeat(50));
        assert!(read(quoted.as_bytes(), 100).is_ok());
        assert!(read(nested(MAX_NESTING).as_bytes(), 100).is_ok());
        let deeper = read(nested(MAX_NESTING + 1).as_bytes(), 100);
        assert_eq!(deeper, Err("nested deeper than 64 levels".into()));
    }

    #[test]
    fn a_context_is_kept_to_the_digit_and_in_one_line() {
        let body = "\u{feff}{\"x\": {\"context\": 1}, \"context\" : {\n \"a b\\\" \" :[1.10, 1e400,\r\n\t-0.0 , null]}}";
        let kept = context(body.as_bytes()).unwrap();
        assert_eq!(kept.get(), r#"{"a b\" ":[1.10,1e400,-0.0,null]}"#);
        assert!(context(br#"{"context": null}"#).is_none());
        assert_eq!(compact(r#"{"\\" : "\\\" x"}"#), r#"{"\\":"\\\" x"}"#);
    }
}
