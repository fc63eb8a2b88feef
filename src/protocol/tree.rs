//! The tree of values that a body decodes to: its limits, and its numbers. A document with more values
//! than any message needs is refused before it is built: a value takes a hundred times the bytes that it
//! was sent in.

use std::collections::HashSet;

use rmpv::Value;
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use crate::protocol::encoding::MAX_STEPS;

/// Values in a message, keys included.
pub(super) const MOST_VALUES: usize = 100_000;

/// Makes integers of the floats that are some, at every depth: writers that keep all numbers as
/// floats, or the large ones, write integers so.
pub(super) fn make_whole(value: &mut Value) {
    match value {
        Value::F32(_) | Value::F64(_) => {
            if let Some(whole) = value.as_f64().and_then(whole) {
                *value = whole;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(make_whole),
        Value::Map(pairs) => pairs.iter_mut().for_each(|(_, value)| make_whole(value)),
        Value::Nil
        | Value::Boolean(_)
        | Value::Integer(_)
        | Value::String(_)
        | Value::Binary(_)
        | Value::Ext(..) => {}
    }
}

/// 2 to the power of 63, and of 64.
const TWO_63: f64 = 9_223_372_036_854_775_808.0;
const TWO_64: f64 = 2.0 * TWO_63;

/// The integer of 64 bits that a float equals.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "whole and in range: nothing is lost"
)]
fn whole(float: f64) -> Option<Value> {
    match float.trunc() == float {
        true if (0.0..TWO_64).contains(&float) => Some((float as u64).into()),
        true if (-TWO_63..0.0).contains(&float) => Some((float as i64).into()),
        true | false => None,
    }
}

/// What a value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Nil => "null",
        Value::Boolean(_) => "true or false",
        Value::Integer(_) | Value::F32(_) | Value::F64(_) => "a number",
        Value::String(_) => "text",
        Value::Binary(_) => "bytes",
        Value::Array(_) => "a list",
        Value::Map(_) => "a map",
        Value::Ext(..) => "an extension",
    }
}

/// Counts what MessagePack would be made of, without making it. What is none is left to the decoder
/// to refuse.
pub(super) fn check_count(body: &[u8], most: usize) -> Result<(), String> {
    let mut budget = Budget::of(most);
    let mut reader = rmp_serde::Deserializer::from_read_ref(body);
    reader.set_max_depth(MAX_STEPS);
    match budget.deserialize(&mut reader) {
        Err(_) if budget.over => Err(format!("more than {most} values")),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// How many values a document may have.
pub(super) struct Budget {
    /// Values that may still come.
    left: usize,
    /// One more came.
    pub(super) over: bool,
}

impl Budget {
    pub(super) fn of(most: usize) -> Self {
        Self {
            left: most,
            over: false,
        }
    }

    /// Counts a value before it is made.
    pub(super) fn take<E: serde::de::Error>(&mut self) -> Result<(), E> {
        self.over = self.left == 0;
        self.left = self.left.saturating_sub(1);
        match self.over {
            true => Err(E::custom("too many values")),
            false => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for &mut Budget {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.take::<D::Error>()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Budget {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("anything")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(&mut *self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<(), A::Error> {
        while pairs.next_key_seed(&mut *self)?.is_some() {
            pairs.next_value_seed(&mut *self)?;
        }
        Ok(())
    }

    /// MessagePack's extensions.
    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<(), D::Error> {
        IgnoredAny::deserialize(inner).map(|_| ())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_bytes<E>(self, _: &[u8]) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

/// Whether every key of a map is there once; what a reader does with the second is anyone's guess.
pub(super) fn check_unique(pairs: &[(Value, Value)]) -> Result<(), String> {
    // Encoded, since a value can neither be hashed nor ordered.
    let mut seen = HashSet::with_capacity(pairs.len());
    match pairs.iter().find(|(key, _)| !seen.insert(packed(key))) {
        None => Ok(()),
        Some((twice, _)) => Err(format!("{twice} is given twice")),
    }
}

/// A value as MessagePack.
pub(super) fn packed(value: &Value) -> Vec<u8> {
    let mut packed = Vec::new();
    let written = rmpv::encode::write_value(&mut packed, value);
    debug_assert!(written.is_ok(), "a Vec takes every write");
    packed
}

/// Maps and lists in each other, the outermost counted.
pub(super) fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Map(pairs) => {
            let inner = pairs
                .iter()
                .map(|(key, value)| depth(key).max(depth(value)));
            1 + inner.max().unwrap_or(0)
        }
        Value::Nil
        | Value::Boolean(_)
        | Value::Integer(_)
        | Value::F32(_)
        | Value::F64(_)
        | Value::String(_)
        | Value::Binary(_)
        | Value::Ext(..) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::encoding::Encoding;

    fn map(pairs: Vec<(&str, Value)>) -> Value {
        Value::Map(pairs.into_iter().map(|(k, v)| (k.into(), v)).collect())
    }

    #[test]
    fn a_document_of_too_many_values_is_not_made() {
        let many = |values: usize| Value::Array(vec![Value::Nil; values - 1]);
        for encoding in [Encoding::Json, Encoding::MessagePack] {
            let read = |values| encoding.decode(&encoding.encode(&many(values)).unwrap());
            assert!(read(MOST_VALUES).is_ok());
            assert_eq!(read(MOST_VALUES + 1), Err("more than 100000 values".into()));
        }
        assert_eq!(check_count(b"\xc1 no document", 10), Ok(()));
        let extended = map(vec![
            ("time", Value::Ext(-1, vec![0; 4])),
            ("b", Value::Binary(vec![1])),
        ]);
        assert_eq!(check_count(&packed(&extended), 5), Ok(()));
        assert!(check_count(&packed(&extended), 4).is_err());
    }

    #[test]
    fn a_float_that_equals_an_integer_of_64_bits_is_that_integer() {
        let made = |mut value: Value| {
            make_whole(&mut value);
            value
        };
        for (float, whole) in [
            (0.0, 0),
            (-0.0, 0),
            (7.0, 7),
            (4_102_444_800_000.0, 4_102_444_800_000),
            (9_007_199_254_740_992.0, 1 << 53),
            (TWO_63, 1 << 63),
            (18_446_744_073_709_549_568.0, u64::MAX - 2047),
        ] {
            assert_eq!(made(Value::F64(float)), Value::from(whole), "{float}");
        }
        assert_eq!(made(Value::F64(-TWO_63)), Value::from(i64::MIN));
        assert_eq!(made(Value::F32(16_777_216.0)), Value::from(1 << 24));
        let unlike = [
            7.5,
            -0.5,
            TWO_64,
            -1e19,
            1e300,
            f64::INFINITY,
            -f64::INFINITY,
            5e-324,
        ];
        for float in unlike {
            assert_eq!(made(Value::F64(float)), Value::F64(float));
        }
        assert_eq!(made(Value::F32(0.1)), Value::F32(0.1));
        assert!(matches!(made(Value::F64(f64::NAN)), Value::F64(n) if n.is_nan()));
        let nested = |value: Value| map(vec![("a", Value::Array(vec![map(vec![("b", value)])]))]);
        assert_eq!(made(nested(Value::F64(1.0))), nested(1.into()));
    }
}
