//! Format `binary_v2`: UTF-8 JSON, a map (tensor name -> entry) or a list (entries with a name);
//! an entry is `{shape, k, data}`, data the base64 of a [`packed`](super::packed) tensor. Unknown keys
//! are ignored, because writers add metadata. A value under a tensor's name is never metadata.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::keys::Keys;
use super::packed::{Packed, Unpacker};
use super::update_builder::UpdateBuilder;
use super::{MOST_DIMENSIONS, foreign, malformed, natural, not_a, shorten};
use crate::protocol::failure::{Code, Failure};

/// Longer names are refused when looking for a common prefix.
const LONGEST_NAME: usize = 4096;

/// Reads the container, one tensor at a time.
///
/// # Errors
/// The first problem found.
pub(super) fn decode(bytes: &[u8], builder: &mut UpdateBuilder<'_>) -> Result<(), Failure> {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if !matches!(text.trim_ascii_start(), [b'{' | b'[', ..]) {
        return Err(not_a("binary_v2 JSON", bytes));
    }
    let untouched = builder.clone();
    let mut read = read(text, builder);
    if let Err(Stop::NoJson(_)) = read
        && foreign::any(text)
    {
        *builder = untouched;
        builder.spend(text.len() as u64)?;
        read = self::read(&foreign::without(text), builder);
    }
    read.map_err(|stop| match stop {
        Stop::Refused(failure) => failure,
        Stop::NoJson(error) => malformed(format!("not binary_v2 JSON: {error}")),
    })
}

/// Why reading stopped early.
enum Stop {
    Refused(Failure),
    NoJson(serde_json::Error),
}

/// Reads a document whose names may have a prefix. Only when a name is unknown does a second pass
/// collect all names to find the prefix.
fn read(text: &[u8], builder: &mut UpdateBuilder<'_>) -> Result<(), Stop> {
    // serde copies text with escapes and long numbers into a buffer that reallocates as it grows.
    if text.contains(&b'\\') || has_long_number(text) {
        let copies = builder.spend(3 * text.len() as u64);
        copies.map_err(Stop::Refused)?;
    }
    let untouched = builder.clone();
    let unknown = match take_all(text, builder) {
        Err(Stop::Refused(failure)) if failure.code == Code::CandidateUnknownTensor => failure,
        read => return read,
    };
    *builder = untouched;
    let names = names(text, builder, &unknown)?;
    if !builder.rename(names.iter().map(String::as_str)) {
        return Err(Stop::Refused(unknown));
    }
    take_all(text, builder)
}

fn has_long_number(bytes: &[u8]) -> bool {
    const LONG: usize = 1024;
    let mut numbers = bytes.split(|byte| !byte.is_ascii_digit());
    numbers.any(|digits| digits.len() > LONG)
}

/// The names of all entries. Too many or too long names fail with `unknown`, the failure that led
/// here.
fn names(text: &[u8], builder: &UpdateBuilder<'_>, unknown: &Failure) -> Result<Vec<String>, Stop> {
    let mut names = Vec::new();
    walk(text, |location, said| {
        let Some(name) = entry_name(location, &said, builder) else {
            return Ok(());
        };
        if names.len() as u64 == builder.most_pieces || name.len() > LONGEST_NAME {
            return Err(unknown.clone());
        }
        names.push(name.to_owned());
        Ok(())
    })?;
    Ok(names)
}

/// Takes every entry.
fn take_all(text: &[u8], builder: &mut UpdateBuilder<'_>) -> Result<(), Stop> {
    let mut unpacker = Unpacker::default();
    let mut taken = HashSet::new();
    walk(text, |location, said| {
        if let Location::Under(key) = location {
            builder.keys.note(key);
        }
        let Some(name) = entry_name(location, &said, builder) else {
            return match (location, said) {
                (Location::Under(_), _) => Ok(()),
                (Location::Listed, Said::Map(entry)) => Err(entry.nameless()),
                (Location::Listed, said) => {
                    let what = said.what();
                    Err(malformed(format!("a list entry is {what}, not a map")))
                }
            };
        };
        if !builder.knows(name) {
            return Err(UpdateBuilder::unknown(name));
        }
        // Other readers would silently take the last of equal keys.
        if let Location::Under(key) = location
            && !taken.insert(key.to_owned())
        {
            return Err(malformed(format!("{}: is given twice", shorten(key))));
        }
        let Said::Map(entry) = &said else {
            let (name, what) = (shorten(name), said.what());
            return Err(malformed(format!(
                "{name}: is {what}, not {{shape, k, data}}"
            )));
        };
        entry.add(name, &mut unpacker, builder)
    })
}

/// The name of an entry. In a list every item is an entry. In a map, an entry is any value under a
/// tensor's name, and under other names (unknown or prefixed) any value that looks like one.
fn entry_name<'e>(
    location: Location<'e>,
    said: &'e Said<'_>,
    builder: &UpdateBuilder<'_>,
) -> Option<&'e str> {
    match location {
        Location::Under(key) => {
            let is_entry = said.looks_like_entry() || !said.is_nothing() && builder.knows(key);
            is_entry.then_some(key)
        }
        Location::Listed => match said {
            Said::Map(entry) => entry.name.text(),
            Said::Null | Said::Natural(_) | Said::Text(_) | Said::Sizes(_) | Said::Other(_) => None,
        },
    }
}

/// Reads a document and passes its values to `show`, in order.
fn walk(
    text: &[u8],
    show: impl FnMut(Location<'_>, Said<'_>) -> Result<(), Failure>,
) -> Result<(), Stop> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let mut walker = Walker {
        show,
        refused: None,
    };
    let read = json
        .deserialize_any(Document(&mut walker))
        .and_then(|()| json.end());
    match (walker.refused, read) {
        (Some(failure), _) => Err(Stop::Refused(failure)),
        (None, Err(error)) => Err(Stop::NoJson(error)),
        (None, Ok(())) => Ok(()),
    }
}

/// Where a value is in the document.
#[derive(Clone, Copy)]
enum Location<'a> {
    Under(&'a str),
    Listed,
}

struct Walker<F> {
    show: F,
    /// A typed failure, which serde's error cannot carry.
    refused: Option<Failure>,
}

/// The whole document.
struct Document<'a, F>(&'a mut Walker<F>);

impl<'de, F: FnMut(Location<'_>, Said<'_>) -> Result<(), Failure>> Visitor<'de>
    for Document<'_, F>
{
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map or a list of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(key)) = map.next_key()? {
            map.next_value_seed(Slot(self.0, Location::Under(&key)))?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut slot = || list.next_element_seed(Slot(self.0, Location::Listed));
        while slot()?.is_some() {}
        Ok(())
    }
}

/// A value under a key or in the list.
struct Slot<'a, F>(&'a mut Walker<F>, Location<'a>);

impl<'de, F: FnMut(Location<'_>, Said<'_>) -> Result<(), Failure>> DeserializeSeed<'de>
    for Slot<'_, F>
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let Self(walker, location) = self;
        let said = Said::deserialize(deserializer)?;
        (walker.show)(location, said).map_err(|failure| {
            walker.refused = Some(failure);
            serde::de::Error::custom("refused")
        })
    }
}

/// A value, reduced to what an entry can use. Deserialising it never fails on its type: metadata may be
/// anything, and an error by serde would quote it in full.
#[derive(Default)]
enum Said<'a> {
    #[default]
    Null,
    Natural(u64),
    Text(Cow<'a, str>),
    /// A list of natural numbers, short enough to be a shape.
    Sizes(Vec<u64>),
    Map(Box<Entry<'a>>),
    /// Anything else, and what it is.
    Other(&'static str),
}

/// A map, which may be an entry.
#[derive(Default)]
struct Entry<'a> {
    name: Said<'a>,
    shape: Said<'a>,
    k: Said<'a>,
    data: Said<'a>,
    keys: Keys,
    /// A field that occurs twice.
    twice: Option<&'static str>,
}

impl Said<'_> {
    fn is_nothing(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Map(entry) => entry.keys.is_empty(),
            Self::Natural(_) | Self::Text(_) | Self::Sizes(_) | Self::Other(_) => false,
        }
    }

    /// Metadata may have one key of these names, but hardly two.
    fn looks_like_entry(&self) -> bool {
        let Self::Map(entry) = self else {
            return false;
        };
        let fields = [&entry.shape, &entry.k, &entry.data];
        fields.iter().filter(|field| !field.is_nothing()).count() >= 2
    }

    fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Null | Self::Natural(_) | Self::Sizes(_) | Self::Map(_) | Self::Other(_) => None,
        }
    }

    fn what(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Natural(_) => "a number",
            Self::Text(_) => "text",
            Self::Sizes(_) => "a list",
            Self::Map(_) => "a map",
            Self::Other(what) => what,
        }
    }
}

impl Entry<'_> {
    fn nameless(&self) -> Failure {
        let keys = &self.keys;
        malformed(format!("a list entry has no name; it has the keys {keys}"))
    }

    fn add(
        &self,
        name: &str,
        unpacker: &mut Unpacker,
        builder: &mut UpdateBuilder<'_>,
    ) -> Result<(), Failure> {
        let wrong = |what: String| malformed(format!("{}: {what}", shorten(name)));
        let refuse = |field: &str, said: &Said<'_>, wanted: &str| {
            wrong(match matches!(said, Said::Null) {
                true => format!("{field} is missing; it has the keys {}", self.keys),
                false => format!("{field} is {}, not {wanted}", said.what()),
            })
        };
        if let Some(field) = self.twice {
            return Err(wrong(format!("{field} is given twice")));
        }
        let Said::Natural(k) = self.k else {
            return Err(refuse("k", &self.k, "a natural number"));
        };
        let shape = match &self.shape {
            Said::Null => None,
            Said::Sizes(shape) => Some(shape.as_slice()),
            Said::Natural(_) | Said::Text(_) | Said::Map(_) | Said::Other(_) => {
                return Err(refuse("shape", &self.shape, "a list of sizes"));
            }
        };
        let tensor = builder.declare(name, shape, k)?;
        let Some(data) = self.data.text() else {
            return Err(refuse("data", &self.data, "text"));
        };
        let packed = Packed::Base64(data.as_bytes());
        unpacker.unpack(builder, name, tensor, k, packed)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Said<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SaidVisitor)
    }
}

struct SaidVisitor;

impl<'de> Visitor<'de> for SaidVisitor {
    type Value = Said<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_unit<E>(self) -> Result<Said<'de>, E> {
        Ok(Said::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Said<'de>, E> {
        Ok(Said::Other("a truth value"))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Said<'de>, E> {
        Ok(Said::Natural(number))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Said<'de>, E> {
        Ok(Said::Other("a negative number"))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Said<'de>, E> {
        let other = Said::Other("a number that is negative, too large or has a fraction");
        Ok(natural(number).map_or(other, Said::Natural))
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Said<'de>, E> {
        Ok(Said::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Said<'de>, E> {
        Ok(Said::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Said<'de>, A::Error> {
        let mut sizes = Vec::new();
        while let Some(element) = list.next_element()? {
            if let Said::Natural(size) = element
                && sizes.len() < MOST_DIMENSIONS
            {
                sizes.push(size);
                continue;
            }
            while list.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(Said::Other("a list of more than sizes"));
        }
        Ok(Said::Sizes(sizes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Said<'de>, A::Error> {
        let mut entry = Entry::default();
        while let Some(Text(key)) = map.next_key()? {
            entry.keys.note(&key);
            let (field, slot) = match &*key {
                "name" | "param_name" => ("name", &mut entry.name),
                "shape" => ("shape", &mut entry.shape),
                "k" => ("k", &mut entry.k),
                "data" => ("data", &mut entry.data),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            let said = map.next_value()?;
            if !matches!(std::mem::replace(slot, said), Said::Null) {
                entry.twice = Some(field);
            }
        }
        Ok(Said::Map(Box::new(entry)))
    }
}

/// Borrowed text, unless it has escapes. serde's own `Cow` copies, unless it is told to borrow.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
