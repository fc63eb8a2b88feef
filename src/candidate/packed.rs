//! `zlib(k values ++ k int32 indices)`, little endian, the values f16 or f32 as the length tells: how
//! `binary_v2` packs a tensor, and `pt_chunks` a compact chunk.

use flate2::{Decompress, FlushDecompress, Status};

use super::update_builder::UpdateBuilder;
use super::{each, f16_from, i32_from, malformed, shorten};
use crate::protocol::failure::Failure;

/// Bytes unpacked at a time; a multiple of a base64 group.
const PIECE: usize = 1 << 16;

/// A zlib stream in the encoding of its container.
#[derive(Debug, Clone, Copy)]
pub(super) enum Packed<'a> {
    Bytes(&'a [u8]),
    Base64(&'a [u8]),
    /// One character per byte.
    Latin1(&'a str),
}

impl Packed<'_> {
    /// Bytes it takes in the container.
    fn size(self) -> u64 {
        match self {
            Self::Bytes(bytes) | Self::Base64(bytes) => bytes.len() as u64,
            Self::Latin1(text) => text.len() as u64,
        }
    }

    /// Replaces the content of `piece` with the next bytes; empty at the end.
    fn next(&mut self, piece: &mut Vec<u8>) -> Result<(), String> {
        piece.clear();
        match self {
            Self::Bytes(rest) => {
                let (now, later) = rest.split_at(rest.len().min(PIECE));
                piece.extend_from_slice(now);
                *rest = later;
            }
            Self::Base64(rest) => {
                let (now, later) = rest.split_at(rest.len().min(PIECE));
                let decoded = base64_simd::STANDARD.decode_append(now, piece);
                decoded.map_err(|_| "data is not base64")?;
                *rest = later;
            }
            Self::Latin1(rest) => {
                let (now, later) = rest.split_at(rest.floor_char_boundary(PIECE));
                if now.chars().any(|c| u8::try_from(c).is_err()) {
                    return Err("data is not bytes".into());
                }
                piece.extend(now.chars().map(|c| u8::try_from(c).unwrap_or_default()));
                *rest = later;
            }
        }
        Ok(())
    }
}

/// Buffers that are reused from tensor to tensor.
pub(super) struct Unpacker {
    zlib: Decompress,
    piece: Vec<u8>,
    inflated: Vec<u8>,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self {
            zlib: Decompress::new(true),
            piece: Vec::new(),
            inflated: Vec::new(),
        }
    }
}

impl Unpacker {
    /// Unpacks the k entries of a declared tensor.
    pub(super) fn unpack(
        &mut self,
        builder: &mut UpdateBuilder<'_>,
        name: &str,
        tensor: usize,
        k: u64,
        packed: Packed<'_>,
    ) -> Result<(), Failure> {
        let wrong = |what: String| malformed(format!("{}: {what}", shorten(name)));
        builder.read(packed.size())?;
        // k is at most the tensor's elements, so this cannot overflow.
        builder.spend(8 * k)?;
        let k = usize::try_from(k).map_err(|_| wrong("k is too large".into()))?;
        self.inflate(packed, k).map_err(wrong)?;
        let half = self.inflated.len() == 6 * k;
        let (values, indices) = self.inflated.split_at(if half { 2 * k } else { 4 * k });
        let indices = each(indices, i32_from);
        match half {
            true => builder.add(name, tensor, indices, each(values, f16_from)),
            false => builder.add(name, tensor, indices, each(values, f32::from_le_bytes)),
        }
    }

    /// Inflates exactly k f16 or f32 values and k indices, and refuses bytes after the stream.
    fn inflate(&mut self, mut packed: Packed<'_>, k: usize) -> Result<(), String> {
        self.zlib.reset(true);
        self.inflated.clear();
        // One spare byte reveals a stream that is too long.
        self.inflated.reserve_exact(8 * k + 1);
        let (mut ended, mut behind) = (false, 0);
        loop {
            packed.next(&mut self.piece)?;
            if self.piece.is_empty() {
                break;
            }
            let rest = self.inflate_piece(8 * k, &mut ended)?;
            behind += rest;
        }
        let length = self.inflated.len();
        if !ended {
            return Err("data is not zlib: the stream ends early".into());
        }
        if length != 6 * k && length != 8 * k {
            return Err(wrong_length(length, "", k));
        }
        match behind {
            0 => Ok(()),
            _ => Err(format!("{behind} bytes after the end of the zlib stream")),
        }
    }

    /// Inflates the current piece and returns how many of its bytes follow the stream.
    fn inflate_piece(&mut self, most: usize, ended: &mut bool) -> Result<usize, String> {
        let mut rest = &self.piece[..];
        while !rest.is_empty() && !*ended {
            let seen = self.zlib.total_in();
            let status = self
                .zlib
                .decompress_vec(rest, &mut self.inflated, FlushDecompress::None)
                .map_err(|e| format!("data is not zlib: {e}"))?;
            if self.inflated.len() > most {
                return Err(wrong_length(self.inflated.len(), "or more ", most / 8));
            }
            // The buffer has room, so a call that reads nothing will never read more.
            let read = usize::try_from(self.zlib.total_in() - seen).unwrap_or(rest.len());
            *ended = status == Status::StreamEnd;
            if read == 0 && !*ended {
                return Err("data is not zlib: the stream stalls".into());
            }
            rest = rest.get(read..).unwrap_or_default();
        }
        Ok(rest.len())
    }
}

fn wrong_length(length: usize, more: &str, k: usize) -> String {
    format!(
        "data inflates to {length} bytes {more}where k = {k} needs {} or {}",
        6 * k,
        8 * k
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        hex::decode(text).unwrap()
    }

    fn inflated(packed: &[u8], k: usize) -> Result<Vec<u8>, String> {
        let mut unpacker = Unpacker::default();
        let bytes = unpacker.inflate(Packed::Bytes(packed), k);
        bytes.map(|()| unpacker.inflated)
    }

    #[test]
    fn every_spelling_gives_the_same_bytes_in_pieces() {
        let bytes: Vec<u8> = (0..=255).cycle().take(3 * PIECE + 5).collect();
        let base64 = base64_simd::STANDARD.encode_to_string(&bytes);
        let latin1: String = bytes.iter().copied().map(char::from).collect();
        for mut packed in [
            Packed::Bytes(&bytes),
            Packed::Base64(base64.as_bytes()),
            Packed::Latin1(&latin1),
        ] {
            let (mut whole, mut piece) = (Vec::new(), Vec::new());
            loop {
                packed.next(&mut piece).unwrap();
                if piece.is_empty() {
                    break;
                }
                whole.extend_from_slice(&piece);
            }
            assert!(whole == bytes, "{} bytes", whole.len());
        }
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
