//! The values that a pickle is read into.

use super::names::{Element, Name};
use crate::candidate::natural;

/// Index of a value.
pub(super) type Id = u32;

/// A value.
#[derive(Debug)]
pub(super) enum Value<'a> {
    None,
    /// Opaque: anything that a candidate does not need.
    Other,
    Int(i64),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    /// Bytes as text with one character per byte, as protocol 2 writes them.
    Latin1(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Map(Vec<(Id, Id)>),
    Name(Name),
    Storage(Storage<'a>),
    Tensor(Tensor<'a>),
    /// A numpy dtype: a letter for the kind, then the size in bytes.
    NumpyType(&'a str),
}

impl Value<'_> {
    /// The value as a natural number, if it is one.
    pub(super) fn natural(&self) -> Option<u64> {
        if let Self::Float(number) = self {
            return natural(*number);
        }
        let Self::Int(number) = self else { return None };
        u64::try_from(*number).ok()
    }

    /// A noun for messages.
    pub(super) fn what(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::Bytes(_) | Self::Latin1(_) => "bytes",
            Self::Tuple(_) => "a tuple",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
            Self::Tensor(_) => "a tensor",
            Self::Other | Self::Name(_) | Self::Storage(_) | Self::NumpyType(_) => "something else",
        }
    }
}

/// Elements stored in an entry of the archive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    pub(super) element: Element,
    pub(super) key: &'a str,
    /// As declared.
    pub(super) elements: u64,
}

/// A view of a storage. Length and stride are those of the first dimension.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tensor<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) offset: u64,
    pub(super) dimensions: usize,
    pub(super) length: u64,
    pub(super) stride: u64,
}

/// The values of a pickle and the root among them.
pub(super) struct Pickle<'a> {
    pub(super) values: Vec<Value<'a>>,
    pub(super) root: Id,
}

impl<'a> Pickle<'a> {
    pub(super) fn get(&self, id: Id) -> &Value<'a> {
        self.values.get(id as usize).unwrap_or(&Value::Other)
    }

    /// The textual keys of a map.
    pub(super) fn keys(&self, map: &[(Id, Id)]) -> impl Iterator<Item = &'a str> {
        map.iter().filter_map(|(key, _)| {
            let Value::Text(text) = self.get(*key) else {
                return None;
            };
            Some(*text)
        })
    }

    /// The value under a key; an error if the key occurs twice.
    pub(super) fn entry(&self, map: &[(Id, Id)], key: &str) -> Result<Option<&Value<'a>>, String> {
        let is_key = |id: Id| matches!(self.get(id), Value::Text(text) if *text == key);
        let mut found = map.iter().filter(|(k, _)| is_key(*k));
        let first = found.next().map(|(_, value)| self.get(*value));
        match found.next() {
            None => Ok(first),
            Some(_) => Err(format!("{key} is given twice")),
        }
    }
}

/// Decodes a little-endian two's complement integer of any length.
pub(super) fn long(bytes: &[u8]) -> Value<'static> {
    let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
    let mut whole = [if negative { 0xff } else { 0 }; 8];
    match whole.get_mut(..bytes.len()) {
        Some(part) => {
            part.copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(whole))
        }
        // Larger than any count in a candidate.
        None => Value::Other,
    }
}

/// A numpy scalar, if it is a number. Its byte order is the file's, which is little endian.
pub(super) fn numpy_scalar<'a>(kind: &str, data: &Value<'_>) -> Value<'a> {
    const MOST: usize = 8;
    let mut bytes = Vec::new();
    if let Value::Bytes(data) = data {
        bytes.extend(data.iter().take(MOST + 1));
    } else if let Value::Latin1(text) = data {
        let data = text.chars().take(MOST + 1);
        bytes.extend(data.map(|c| u8::try_from(c).unwrap_or_default()));
    }
    if bytes.is_empty() || bytes.len() > MOST {
        return Value::Other;
    }
    let mut whole = [0; MOST];
    whole[..bytes.len()].copy_from_slice(&bytes);
    match kind {
        "i1" | "i2" | "i4" | "i8" => long(&bytes),
        "u1" | "u2" | "u4" | "u8" => {
            let number = i64::try_from(u64::from_le_bytes(whole));
            number.map_or(Value::Other, Value::Int)
        }
        "f8" => Value::Float(f64::from_le_bytes(whole)),
        _ => Value::Other,
    }
}
