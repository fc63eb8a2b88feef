//! Reads a type from a decoded document, strictly, and in the same way for both encodings: a struct is
//! a map with text keys, a word is text, text is UTF-8, a number is finite, no map has a key twice, and
//! a field that is null is absent. serde's derived code alone would also read a struct from a list, a
//! field or a word from its number, and text from bytes, wherever a format offers them, and null only
//! where each field says so.

use rmpv::Value;
use rmpv::ext::Error;
use serde::de::value::{BorrowedStrDeserializer, MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Error as _, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use crate::protocol::encoding::Encoding;
use crate::protocol::tree::check_unique;

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
        match self.0.as_f64() {
            Some(number) if !number.is_finite() => Err(Error::custom("must be a finite number")),
            Some(_) | None => self.deserialize_any(visitor),
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
