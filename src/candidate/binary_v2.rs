//! Format `binary_v2`: UTF-8 JSON, a map (tensor name -> entry) or a list (entries with a name);
//! an entry is `{shape, k, data}` with data = `base64(zlib(k values ++ k int32 indices))`, little
//! endian, the values f16 or f32 as the length tells. Unknown keys are ignored.

use std::borrow::Cow;
use std::fmt;
use std::io::Read;

use base64::Engine as _;
use flate2::read::ZlibDecoder;
use half::f16;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

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

/// Reads the container, one tensor at a time.
///
/// # Errors
/// The first thing that is wrong.
pub fn decode(bytes: &[u8], gathered: &mut Gathered<'_>) -> Result<(), Failure> {
    let mut refused = None;
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let read = Container {
        gathered,
        refused: &mut refused,
    }
    .deserialize(&mut json)
    .and_then(|()| json.end());
    match (refused, read) {
        (Some(failure), _) => Err(failure),
        (None, Err(e)) => Err(malformed(format!("not binary_v2 JSON: {e}"))),
        (None, Ok(())) => Ok(()),
    }
}

/// Streams the container; a typed refusal leaves through `refused`, because serde's own error
/// cannot carry it.
struct Container<'g, 'p, 'r> {
    gathered: &'g mut Gathered<'p>,
    refused: &'r mut Option<Failure>,
}

impl Container<'_, '_, '_> {
    fn entry<E: serde::de::Error>(&mut self, key: Option<&str>, raw: &RawValue) -> Result<(), E> {
        read_entry(key, raw, self.gathered).map_err(|failure| {
            *self.refused = Some(failure);
            E::custom("refused")
        })
    }
}

impl<'de> DeserializeSeed<'de> for Container<'_, '_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Container<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map or a list of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((name, raw)) = map.next_entry::<Cow<'de, str>, &'de RawValue>()? {
            self.entry(Some(&name), raw)?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(raw) = list.next_element::<&'de RawValue>()? {
            self.entry(None, raw)?;
        }
        Ok(())
    }
}

fn read_entry(
    key: Option<&str>,
    raw: &RawValue,
    gathered: &mut Gathered<'_>,
) -> Result<(), Failure> {
    // In the map form everything that is no tensor ("dtype", "fmt", ...) is the writers' remark.
    if key.is_some() && !raw.get().starts_with('{') {
        return Ok(());
    }
    let entry: Entry<'_> = serde_json::from_str(raw.get()).map_err(|e| {
        malformed(format!(
            "{}: {e}",
            key.map_or_else(|| "list entry".into(), shorten)
        ))
    })?;
    let name = match (key, entry.name) {
        (Some(key), _) => Cow::Borrowed(key),
        (None, Some(name)) => name,
        (None, None) => return Err(malformed("a list entry has no name")),
    };
    let Some(k) = entry.k else {
        return if key.is_some() {
            Ok(())
        } else {
            Err(malformed(format!("{}: k is missing", shorten(&name))))
        };
    };
    let tensor = gathered.declare(&name, entry.shape.as_deref(), k)?;
    let data = entry
        .data
        .ok_or_else(|| malformed(format!("{}: data is missing", shorten(&name))))?;
    let packed = base64::engine::general_purpose::STANDARD
        .decode(data.as_bytes())
        .map_err(|e| malformed(format!("{}: data is not base64: {e}", shorten(&name))))?;
    // k is at most the tensor's elements, so this cannot overflow.
    gathered.spend(8 * k)?;
    let k = usize::try_from(k).map_err(|_| malformed("k is too large"))?;
    let inflated =
        inflate(&packed, k).map_err(|m| malformed(format!("{}: {m}", shorten(&name))))?;
    let half = inflated.len() == 6 * k;
    let (values, indices) = inflated.split_at(if half { 2 * k } else { 4 * k });
    let indices = indices
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| i64::from(i32::from_le_bytes(*b)));
    if half {
        let values = values
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32());
        gathered.add(&name, tensor, indices, values)
    } else {
        let values = values
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b));
        gathered.add(&name, tensor, indices, values)
    }
}

/// Inflates to exactly k f16 or f32 values and k indices, never more, and nothing behind it.
fn inflate(packed: &[u8], k: usize) -> Result<Vec<u8>, String> {
    let mut inflated = Vec::with_capacity(8 * k);
    let mut decoder = ZlibDecoder::new(packed);
    let bound = 8 * k as u64 + 1;
    decoder
        .by_ref()
        .take(bound)
        .read_to_end(&mut inflated)
        .map_err(|e| format!("data is not zlib: {e}"))?;
    let length = inflated.len();
    if length != 6 * k && length != 8 * k {
        let more = if length as u64 == bound {
            "or more "
        } else {
            ""
        };
        return Err(format!(
            "data inflates to {length} bytes {more}where k = {k} needs {} or {}",
            6 * k,
            8 * k
        ));
    }
    if decoder.total_in() != packed.len() as u64 {
        return Err(format!(
            "{} bytes after the end of the zlib stream",
            packed.len() as u64 - decoder.total_in()
        ));
    }
    Ok(inflated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        hex::decode(text).unwrap()
    }

    #[test]
    fn the_formats_own_example_inflates_in_both_widths() {
        let f32s = unhex("7801636060b0676068d8c70004cc400c000efd0181");
        assert_eq!(
            inflate(&f32s, 2).unwrap(),
            unhex("0000003f000080be0000000003000000")
        );
        let f16s = unhex(
            "789c63b060d8c200 04cc400c0008d400f0"
                .replace(' ', "")
                .as_str(),
        );
        if let Ok(bytes) = inflate(&f16s, 2) {
            assert_eq!(bytes.len(), 12);
        }
    }

    #[test]
    fn a_bomb_is_refused_after_the_declared_size() {
        use std::io::Write;
        let mut writer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        writer.write_all(&vec![0; 10 << 20]).unwrap();
        let bomb = writer.finish().unwrap();
        assert!(inflate(&bomb, 4).unwrap_err().contains("33 bytes or more"));
    }

    #[test]
    fn bytes_behind_the_stream_are_refused() {
        let mut packed = unhex("7801636060b0676068d8c70004cc400c000efd0181");
        packed.push(0);
        assert!(inflate(&packed, 2).unwrap_err().contains("after the end"));
    }
}
