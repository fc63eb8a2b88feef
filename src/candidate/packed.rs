//! `zlib(k values ++ k int32 indices)`, little endian, the values f16 or f32 as the length tells: how
//! `binary_v2` packs a tensor, and `pt_chunks` a compact chunk.

use flate2::{Decompress, FlushDecompress, Status};
use half::f16;

use super::{Gathered, malformed, shorten};
use crate::failure::Failure;

/// The memory in which one tensor after the other is unpacked.
pub(super) struct Unpacker {
    zlib: Decompress,
    inflated: Vec<u8>,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self {
            zlib: Decompress::new(true),
            inflated: Vec::new(),
        }
    }
}

impl Unpacker {
    /// Unpacks the k entries of a declared tensor.
    pub(super) fn unpack(
        &mut self,
        gathered: &mut Gathered<'_>,
        name: &str,
        tensor: usize,
        k: u64,
        packed: &[u8],
    ) -> Result<(), Failure> {
        let wrong = |what: String| malformed(format!("{}: {what}", shorten(name)));
        // k is at most the tensor's elements, so this cannot overflow.
        gathered.spend(8 * k)?;
        let k = usize::try_from(k).map_err(|_| wrong("k is too large".into()))?;
        self.zlib.reset(true);
        inflate(&mut self.zlib, packed, k, &mut self.inflated).map_err(wrong)?;
        let half = self.inflated.len() == 6 * k;
        let (values, indices) = self.inflated.split_at(if half { 2 * k } else { 4 * k });
        let indices = indices.as_chunks().0.iter();
        let indices = indices.map(|b| i64::from(i32::from_le_bytes(*b)));
        if half {
            let values = values.as_chunks().0.iter();
            let values = values.map(|b| f16::from_le_bytes(*b).to_f32());
            gathered.add(name, tensor, indices, values)
        } else {
            let values = values.as_chunks().0.iter();
            let values = values.map(|b| f32::from_le_bytes(*b));
            gathered.add(name, tensor, indices, values)
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
