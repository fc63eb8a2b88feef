//! Reading a type out of a decoded document, strictly and alike for both encodings: a struct is a
//! map with text keys, a word is text, text is UTF-8, a number is finite, no map has a key twice, and
//! a field that is null is one that is absent. serde's derived code by itself also takes a struct
//! from a list, a field or a word from its number, and text from bytes, wherever a format offers
//! them, and null only where it is told for each field. Nor is a document of more values than any
//! message needs made at all: each takes a hundred times the byte it came in. Knows nothing of jobs.

use std::collections::HashSet;

use rmpv::Value;
use rmpv::ext::Error;
use serde::de::value::{BorrowedStrDeserializer, MapDeserializer, SeqDeserializer};
use serde::de::{
    Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IgnoredAny,
    IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use crate::protocol::encoding::{Encoding, MAX_STEPS};

/// Reads a type out of a decoded document, naming the field that is wrong.
///
/// # Errors
/// `field: what is wrong`.
pub fn from_document<T: DeserializeOwned>(document: &Value) -> Result<T, String> {
    serde_path_to_error::deserialize(Strict(document)).map_err(|e| {
        let path = e.path().to_string();
        let Error::Syntax(problem) = e.into_inner();
        match path.as_str() {
            "." => problem,
            path => format!("{path}: {problem}"),
        }
    })
}

/// Reads a type out of JSON that is no job, such as what workers write for others to read.
///
/// # Errors
/// `field: what is wrong`, or why it is no JSON.
pub fn from_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    from_document(&Encoding::Json.decode(text)?)
}

/// Values in a message, keys included.
pub(super) const MOST_VALUES: usize = 100_000;

/// Makes integers of the floats that are some, at every depth: writers that keep all numbers as
/// floats, or the large ones, write integers so.
pub(super) fn make_whole(value: &mut Value) {
    match value {
        Value::F32(float) => {
            if let Some(whole) = whole(f64::from(*float)) {
                *value = whole;
            }
        }
        Value::F64(float) => {
            if let Some(whole) = whole(*float) {
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
    let mut counter = Counter {
        left: most,
        over: false,
    };
    let mut reader = rmp_serde::Deserializer::from_read_ref(body);
    reader.set_max_depth(MAX_STEPS);
    match counter.deserialize(&mut reader) {
        Err(_) if counter.over => Err(format!("more than {most} values")),
        Ok(()) | Err(_) => Ok(()),
    }
}

struct Counter {
    /// Values that may still come.
    left: usize,
    /// One more came.
    over: bool,
}

impl<'de> DeserializeSeed<'de> for &mut Counter {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                deserializer.deserialize_any(self)
            }
            None => {
                self.over = true;
                Err(D::Error::custom("too many"))
            }
        }
    }
}

impl<'de> Visitor<'de> for &mut Counter {
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

const FINITE: &str = "must be a finite number";

/// Reads a map of those pairs that are to be seen, none twice.
fn read_pairs<'de, V: Visitor<'de>>(
    pairs: &'de [(Value, Value)],
    seen: impl Fn(&Value, &Value) -> bool,
    visitor: V,
) -> Result<V::Value, Error> {
    check_unique(pairs).map_err(Error::custom)?;
    let pairs = pairs.iter().filter(|(key, value)| seen(key, value));
    let pairs = pairs.map(|(key, value)| (Strict(key), Strict(value)));
    MapDeserializer::new(pairs).deserialize_any(visitor)
}

#[derive(Clone, Copy)]
struct Strict<'a>(&'a Value);

impl<'a> Strict<'a> {
    fn text(self, otherwise: impl FnOnce() -> String) -> Result<&'a str, Error> {
        let Value::String(text) = self.0 else {
            return Err(Error::custom(otherwise()));
        };
        text.as_str()
            .ok_or_else(|| Error::custom("text that is not UTF-8"))
    }
}

impl<'de> IntoDeserializer<'de, Error> for Strict<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Strict<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(items) => {
                SeqDeserializer::new(items.iter().map(Strict)).deserialize_any(visitor)
            }
            Value::Map(pairs) => read_pairs(pairs, |_, _| true, visitor),
            Value::String(_) => self.deserialize_str(visitor),
            Value::Nil
            | Value::Boolean(_)
            | Value::Integer(_)
            | Value::F32(_)
            | Value::F64(_)
            | Value::Binary(_)
            | Value::Ext(..) => self.0.as_ref().deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0.is_nil() {
            true => visitor.visit_none(),
            false => visitor.visit_some(self),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Value::Map(pairs) = self.0 else {
            return Err(Error::custom("must be a map"));
        };
        if let Some((key, _)) = pairs.iter().find(|(key, _)| !key.is_str()) {
            return Err(Error::custom(format!("the key {key} is not text")));
        }
        // A name that is none of ours stays, to be refused where a typing error must not pass.
        let known = |key: &Value| key.as_str().is_some_and(|key| fields.contains(&key));
        read_pairs(pairs, |key, value| !(value.is_nil() && known(key)), visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::F32(number) if !number.is_finite() => Err(Error::custom(FINITE)),
            Value::F64(number) if !number.is_finite() => Err(Error::custom(FINITE)),
            Value::F32(_)
            | Value::F64(_)
            | Value::Nil
            | Value::Boolean(_)
            | Value::Integer(_)
            | Value::String(_)
            | Value::Binary(_)
            | Value::Array(_)
            | Value::Map(_)
            | Value::Ext(..) => self.deserialize_any(visitor),
        }
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let word = self.text(|| format!("must be text, one of {}", variants.join(", ")))?;
        visitor.visit_enum(BorrowedStrDeserializer::new(word))
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_borrowed_str(self.text(|| "must be text".into())?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 char bytes byte_buf unit
        unit_struct seq tuple tuple_struct map identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

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

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase", deny_unknown_fields)]
    struct Part {
        word: Option<Word>,
        name: String,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Word {
        One,
    }

    fn map(pairs: Vec<(&str, Value)>) -> Value {
        Value::Map(pairs.into_iter().map(|(k, v)| (k.into(), v)).collect())
    }

    fn refused(document: Value) -> String {
        from_document::<Part>(&document).unwrap_err()
    }

    #[test]
    fn a_map_with_text_keys_is_read() {
        let part = from_document(&map(vec![("word", "one".into()), ("name", "n".into())]));
        assert_eq!(
            part,
            Ok(Part {
                word: Some(Word::One),
                name: "n".into()
            })
        );
        let nameless = map(vec![("word", Value::Nil), ("name", "".into())]);
        assert_eq!(from_document::<Part>(&nameless).unwrap().word, None);
    }

    #[test]
    fn what_serde_alone_would_take_for_a_struct_a_word_or_text_is_refused() {
        let list = Value::Array(vec!["one".into(), "n".into()]);
        assert_eq!(refused(list), "must be a map");
        let numbered = Value::Map(vec![(0.into(), "one".into()), (1.into(), "n".into())]);
        assert_eq!(refused(numbered), "the key 0 is not text");
        let bytes = |bytes: &[u8]| Value::Binary(bytes.to_vec());
        let packed = Value::Map(vec![(bytes(b"name"), "n".into())]);
        assert!(refused(packed).ends_with("is not text"));
        for word in [0.into(), bytes(b"one"), map(vec![("one", Value::Nil)])] {
            assert_eq!(
                refused(map(vec![("word", word), ("name", "n".into())])),
                "word: must be text, one of one"
            );
        }
        for name in [7.into(), bytes(b"n")] {
            assert_eq!(refused(map(vec![("name", name)])), "name: must be text");
        }
    }

    #[test]
    fn a_field_that_is_null_is_absent_and_a_name_that_is_none_of_ours_is_refused() {
        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Many {
            #[serde(default)]
            list: Vec<u64>,
            #[serde(default = "seven")]
            number: u64,
        }
        fn seven() -> u64 {
            7
        }
        let nothing = map(vec![("list", Value::Nil), ("number", Value::Nil)]);
        let expected = Many {
            list: Vec::new(),
            number: 7,
        };
        assert_eq!(from_document(&nothing), Ok(expected));
        let within = map(vec![("list", Value::Array(vec![Value::Nil]))]);
        assert!(
            from_document::<Many>(&within)
                .unwrap_err()
                .starts_with("list[0]: ")
        );
        let unknown = from_document::<Many>(&map(vec![("colour", Value::Nil)]));
        assert!(unknown.unwrap_err().contains("unknown field `colour`"));
        assert_eq!(
            refused(map(vec![("name", Value::Nil)])),
            "missing field `name`"
        );
        let twice = map(vec![("name", Value::Nil), ("name", "n".into())]);
        assert_eq!(refused(twice), "\"name\" is given twice");
    }

    #[test]
    fn a_number_of_ours_is_finite() {
        #[derive(Debug, Deserialize)]
        struct Number {
            #[expect(dead_code, reason = "only whether it is read")]
            a: Option<f64>,
        }
        for endless in [
            Value::F64(f64::NAN),
            Value::F64(f64::INFINITY),
            Value::F32(f32::NAN),
        ] {
            let refused = from_document::<Number>(&map(vec![("a", endless)])).unwrap_err();
            assert_eq!(refused, "a: must be a finite number");
        }
        assert!(from_document::<Number>(&map(vec![("a", 7.into())])).is_ok());
    }

    #[test]
    fn a_key_that_is_there_twice_is_refused_at_every_depth() {
        let twice = map(vec![("name", "a".into()), ("name", "b".into())]);
        assert_eq!(refused(twice), "\"name\" is given twice");
        let inner = Value::Map(vec![(1.into(), 1.into()), (1.into(), 2.into())]);
        let outer = map(vec![("a", Value::Array(vec![inner]))]);
        let problem = from_document::<Value>(&outer).unwrap_err();
        assert!(problem.contains("1 is given twice"), "{problem}");
    }

    #[test]
    fn any_value_comes_through_as_it_is() {
        let value = map(vec![
            ("numbers", Value::Array(vec![(-1).into(), u64::MAX.into()])),
            (
                "floats",
                Value::Array(vec![Value::F32(0.1), Value::F64(0.1)]),
            ),
            ("bytes", Value::Binary(vec![0xff])),
            ("time", Value::Ext(-1, vec![0; 4])),
            ("nothing", Value::Nil),
        ]);
        assert_eq!(from_document::<Value>(&value), Ok(value));
    }
}
