//! Format `binary_v2`: UTF-8 JSON, a map (tensor name -> entry) or a list (entries with a name);
//! an entry is `{shape, k, data}` with data = `base64(zlib(k values ++ k int32 indices))`, little
//! endian, the values f16 or f32 as the length tells. Unknown keys are ignored.

use std::borrow::Cow;
use std::fmt;

use flate2::{Decompress, FlushDecompress, Status};
use half::f16;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Gathered, shorten};
use crate::failure::{Code, Failure};

#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(borrow, alias = "param_name")]
    name: Option<Cow<'a, str>>,
    shape: Option<Vec<u64>>,
    k: Option<u64>,
    #[serde(borrow)]
    data: Option<Cow<'a, str>>,
}

fn malformed(message: impl Into<String>) -> Failure {
    Failure::new(Code::CandidateMalformed, message)
}

/// Reads the container in one pass, one tensor at a time.
///
/// # Errors
/// The first thing that is wrong.
pub fn decode(bytes: &[u8], gathered: &mut Gathered<'_>) -> Result<(), Failure> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let mut reader = Reader {
        gathered,
        refused: None,
        packed: Vec::new(),
        zlib: Decompress::new(true),
        inflated: Vec::new(),
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

/// Where the entries go, and the memory in which one tensor after the other is unpacked.
struct Reader<'g, 'p> {
    gathered: &'g mut Gathered<'p>,
    /// A typed refusal leaves here, because serde's own error cannot carry it.
    refused: Option<Failure>,
    packed: Vec<u8>,
    zlib: Decompress,
    inflated: Vec<u8>,
}

/// The whole document.
struct Container<'a, 'g, 'p>(&'a mut Reader<'g, 'p>);

impl<'de> Visitor<'de> for Container<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map or a list of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            map.next_value_seed(Slot(self.0, Some(&name)))?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Slot(self.0, None))?.is_some() {}
        Ok(())
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
            (None, Some(name)) => name,
            (None, None) => return Err(malformed("a list entry has no name")),
        };
        let wrong = |what: String| malformed(format!("{}: {what}", shorten(&name)));
        let k = match entry.k {
            Some(k) => k,
            None if key.is_some() => return Ok(()),
            None => return Err(wrong("k is missing".into())),
        };
        let tensor = self.gathered.declare(&name, entry.shape.as_deref(), k)?;
        let data = entry.data.ok_or_else(|| wrong("data is missing".into()))?;
        // k is at most the tensor's elements, so this cannot overflow.
        self.gathered.spend(8 * k)?;
        let k = usize::try_from(k).map_err(|_| wrong("k is too large".into()))?;
        self.packed.clear();
        base64_simd::STANDARD
            .decode_append(data.as_bytes(), &mut self.packed)
            .map_err(|_| wrong("data is not base64".into()))?;
        self.zlib.reset(true);
        inflate(&mut self.zlib, &self.packed, k, &mut self.inflated).map_err(wrong)?;
        let half = self.inflated.len() == 6 * k;
        let (values, indices) = self.inflated.split_at(if half { 2 * k } else { 4 * k });
        let indices = indices.as_chunks().0.iter();
        let indices = indices.map(|b| i64::from(i32::from_le_bytes(*b)));
        if half {
            let values = values.as_chunks().0.iter();
            let values = values.map(|b| f16::from_le_bytes(*b).to_f32());
            self.gathered.add(&name, tensor, indices, values)
        } else {
            let values = values.as_chunks().0.iter();
            let values = values.map(|b| f32::from_le_bytes(*b));
            self.gathered.add(&name, tensor, indices, values)
        }
    }
}

/// Inflates to exactly k f16 or f32 values and k indices, never more, and nothing behind it.
fn inflate(
    zlib: &mut Decompress,
    packed: &[u8],
    k: usize,
    inflated: &mut Vec<u8>,
) -> Result<(), String> {
    inflated.clear();
    // One byte more than may come shows that more would.
    inflated.reserve_exact(8 * k + 1);
    let end = loop {
        let (seen, length) = (zlib.total_in(), inflated.len());
        let rest = usize::try_from(seen)
            .ok()
            .and_then(|seen| packed.get(seen..));
        let status = zlib
            .decompress_vec(rest.unwrap_or_default(), inflated, FlushDecompress::Finish)
            .map_err(|e| format!("data is not zlib: {e}"))?;
        let stalled = zlib.total_in() == seen && inflated.len() == length;
        if status == Status::StreamEnd || stalled || inflated.len() > 8 * k {
            break status;
        }
    };
    let length = inflated.len();
    if length <= 8 * k && end != Status::StreamEnd {
        return Err("data is not zlib: the stream ends early".into());
    }
    if length != 6 * k && length != 8 * k {
        let more = if length > 8 * k { "or more " } else { "" };
        return Err(format!(
            "data inflates to {length} bytes {more}where k = {k} needs {} or {}",
            6 * k,
            8 * k
        ));
    }
    if zlib.total_in() != packed.len() as u64 {
        return Err(format!(
            "{} bytes after the end of the zlib stream",
            packed.len() as u64 - zlib.total_in()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        hex::decode(text).unwrap()
    }

    fn inflated(packed: &[u8], k: usize) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        inflate(&mut Decompress::new(true), packed, k, &mut bytes).map(|()| bytes)
    }

    #[test]
    fn the_formats_own_example_inflates() {
        let f32s = unhex("7801636060b0676068d8c70004cc400c000efd0181");
        assert_eq!(
            inflated(&f32s, 2).unwrap(),
            unhex("0000003f000080be0000000003000000")
        );
    }

    #[test]
    fn a_bomb_is_refused_after_the_declared_size() {
        use std::io::Write;
        let mut writer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        writer.write_all(&vec![0; 10 << 20]).unwrap();
        let bomb = writer.finish().unwrap();
        assert!(inflated(&bomb, 4).unwrap_err().contains("33 bytes or more"));
    }

    #[test]
    fn a_stream_that_ends_early_is_refused() {
        let packed = unhex("7801636060b0676068d8c70004cc400c000efd0181");
        for length in 0..packed.len() {
            let error = inflated(&packed[..length], 2).unwrap_err();
            assert!(error.contains("not zlib"), "{length}: {error}");
        }
    }

    #[test]
    fn bytes_behind_the_stream_are_refused() {
        let mut packed = unhex("7801636060b0676068d8c70004cc400c000efd0181");
        packed.push(0);
        assert!(inflated(&packed, 2).unwrap_err().contains("after the end"));
    }
}
