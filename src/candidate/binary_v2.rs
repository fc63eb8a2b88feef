//! Format `binary_v2`: UTF-8 JSON, a map (tensor name -> entry) or a list (entries with a name);
//! an entry is `{shape, k, data}`, data the base64 of a [`packed`](super::packed) tensor. Unknown keys
//! are ignored.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::packed::{Packed, Unpacker};
use super::{Gathered, MOST_DIMENSIONS, malformed, shorten};
use crate::failure::Failure;

#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(borrow, alias = "param_name")]
    name: Option<Text<'a>>,
    shape: Option<Shape>,
    k: Option<Count>,
    #[serde(borrow)]
    data: Option<Text<'a>>,
}

/// Reads the container in one pass, one tensor at a time.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn decode(bytes: &[u8], gathered: &mut Gathered<'_>) -> Result<(), Failure> {
    // Text with escapes is copied, as long numbers are, and the copy moves while it grows.
    if bytes.contains(&b'\\') || has_long_number(bytes) {
        gathered.spend(3 * bytes.len() as u64)?;
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let mut reader = Reader {
        gathered,
        refused: None,
        unpacker: Unpacker::default(),
    };
    let read = json
        .deserialize_any(Container(&mut reader))
        .and_then(|()| json.end());
    match (reader.refused, read) {
        (Some(failure), _) => Err(failure),
        (None, Err(e)) => Err(malformed(format!("not binary_v2 JSON: {e}"))),
        (None, Ok(())) => Ok(()),
    }
}

fn has_long_number(bytes: &[u8]) -> bool {
    const LONG: usize = 1024;
    let mut numbers = bytes.split(|byte| !byte.is_ascii_digit());
    numbers.any(|digits| digits.len() > LONG)
}

/// Where the entries go, and the memory in which one tensor after the other is unpacked.
struct Reader<'g, 'p> {
    gathered: &'g mut Gathered<'p>,
    /// A typed refusal leaves here, because serde's own error cannot carry it.
    refused: Option<Failure>,
    unpacker: Unpacker,
}

/// The whole document.
struct Container<'a, 'g, 'p>(&'a mut Reader<'g, 'p>);

impl<'de> Visitor<'de> for Container<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map or a list of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(name)) = map.next_key()? {
            map.next_value_seed(Slot(self.0, Some(&name)))?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Slot(self.0, None))?.is_some() {}
        Ok(())
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        Err(E::custom("text is neither a map nor a list of tensors"))
    }
}

/// What stands under a key, or in the list: a tensor or, in the map form, a writer's remark
/// ("dtype", "fmt", ...).
struct Slot<'a, 'g, 'p>(&'a mut Reader<'g, 'p>, Option<&'a str>);

impl Slot<'_, '_, '_> {
    fn remark<E: serde::de::Error>(&self) -> Result<(), E> {
        match self.1 {
            Some(_) => Ok(()),
            None => Err(E::custom("a list entry is no map")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Slot<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Slot<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        let Self(reader, key) = self;
        let read = match Entry::deserialize(MapAccessDeserializer::new(map)) {
            Ok(entry) => reader.take(key, entry),
            Err(e) => {
                let place = key.map_or_else(|| "list entry".into(), shorten);
                Err(malformed(format!("{place}: {e}")))
            }
        };
        read.map_err(|failure| {
            reader.refused = Some(failure);
            serde::de::Error::custom("refused")
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        self.remark()
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        self.remark()
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.remark()
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.remark()
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.remark()
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.remark()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.remark()
    }
}

impl Reader<'_, '_> {
    fn take(&mut self, key: Option<&str>, entry: Entry<'_>) -> Result<(), Failure> {
        let name = match (key, entry.name) {
            (Some(key), _) => Cow::Borrowed(key),
            (None, Some(Text(name))) => name,
            (None, None) => return Err(malformed("a list entry has no name")),
        };
        let wrong = |what: String| malformed(format!("{}: {what}", shorten(&name)));
        let k = match entry.k {
            Some(Count(k)) => k,
            None if key.is_some() => return Ok(()),
            None => return Err(wrong("k is missing".into())),
        };
        let shape = entry.shape.map(|Shape(shape)| shape);
        let tensor = self.gathered.declare(&name, shape.as_deref(), k)?;
        let Text(data) = entry.data.ok_or_else(|| wrong("data is missing".into()))?;
        let packed = Packed::Base64(data.as_bytes());
        self.unpacker
            .unpack(self.gathered, &name, tensor, k, packed)
    }
}

/// Text where it stands, if it stands there without escapes. serde's own Cow is always a copy.
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

/// A natural number. serde's own refusal of anything else quotes it, however long it is.
struct Count(u64);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CountVisitor;
        impl Visitor<'_> for CountVisitor {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a natural number")
            }

            fn visit_u64<E>(self, number: u64) -> Result<Count, E> {
                Ok(Count(number))
            }

            fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<Count, E> {
                Err(E::custom("text instead of a natural number"))
            }
        }
        deserializer.deserialize_any(CountVisitor)
    }
}

/// A shape, of no more dimensions than any has.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(Count(size)) = sizes.next_element()? {
                    if shape.len() == MOST_DIMENSIONS {
                        let most = format!("a shape of more than {MOST_DIMENSIONS} dimensions");
                        return Err(serde::de::Error::custom(most));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }

            fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<Shape, E> {
                Err(E::custom("text instead of a shape"))
            }
        }
        deserializer.deserialize_any(ShapeVisitor)
    }
}
