//! Whether a file is in the format that the command line says: the first bytes of most files tell.

use std::io::Read as _;
use std::path::Path;

use super::Fault;
use crate::protocol::job::{Compression, Format};
use crate::util::file_type::Looks;

/// As many bytes as any format is known by.
const HEAD: u64 = 512;

/// Refuses a candidate that is plainly in another format than was said, and names the flag. `named` says whose it is.
pub(super) fn check(
    named: &str,
    bytes: &[u8],
    (format, compression): (Format, Option<Compression>),
) -> Result<(), Fault> {
    match other(bytes, format, compression) {
        Some(hint) => Err(Fault::data(format!("{named}: {hint}"))),
        None => Ok(()),
    }
}

/// The same for a file, of which only the beginning is read.
pub(super) fn check_file(
    named: &str,
    file: &Path,
    said: (Format, Option<Compression>),
) -> Result<(), Fault> {
    let mut head = Vec::new();
    let opened = std::fs::File::open(file);
    let read = opened.and_then(|file| file.take(HEAD).read_to_end(&mut head));
    read.map_err(|e| Fault::data(format!("{named}: {e}")))?;
    check(named, &head, said)
}

/// What bytes are instead, with the flag that says so. What is inside a compressed file is not looked at.
fn other(bytes: &[u8], format: Format, compression: Option<Compression>) -> Option<String> {
    if compression.is_some() {
        return None;
    }
    let looks = Looks::of(bytes);
    if looks == Looks::Zstd {
        return Some("looks compressed with zstd: --compression zstd".into());
    }
    let known = [
        (Looks::Safetensors, "safetensors", Format::Safetensors),
        (Looks::Zip, "a file of torch.save", Format::PtChunks),
        (Looks::Json, "JSON", Format::BinaryV2),
    ];
    let (_, what, right) = known.into_iter().find(|(known, ..)| *known == looks)?;
    (right != format).then(|| format!("looks like {what}: --format {}", right.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Exit;

    const SAFETENSORS: &[u8] = b"\x10\0\0\0\0\0\0\0{\"a\":{}}";
    const ZIP: &[u8] = b"PK\x03\x04\0\0";
    const JSON: &[u8] = b"\n{\"v\": 1}";
    const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd\x20";

    #[test]
    fn a_file_of_another_format_is_known_by_its_first_bytes() {
        let (binary, safe, chunks) = (Format::BinaryV2, Format::Safetensors, Format::PtChunks);
        for (bytes, format, hint) in [
            (
                SAFETENSORS,
                binary,
                "looks like safetensors: --format safetensors",
            ),
            (
                SAFETENSORS,
                chunks,
                "looks like safetensors: --format safetensors",
            ),
            (
                ZIP,
                binary,
                "looks like a file of torch.save: --format pt_chunks",
            ),
            (
                ZIP,
                safe,
                "looks like a file of torch.save: --format pt_chunks",
            ),
            (JSON, safe, "looks like JSON: --format binary_v2"),
            (JSON, chunks, "looks like JSON: --format binary_v2"),
            (
                ZSTD,
                binary,
                "looks compressed with zstd: --compression zstd",
            ),
        ] {
            let refused = check("--candidate x", bytes, (format, None)).unwrap_err();
            assert_eq!(refused.message, format!("--candidate x: {hint}"));
            assert_eq!(refused.exit, Exit::Data);
        }
    }

    #[test]
    fn what_is_right_or_cannot_be_told_is_left_to_the_decoder() {
        let zstd = Some(Compression::Zstd);
        for (bytes, format, compression) in [
            (SAFETENSORS, Format::Safetensors, None),
            (ZIP, Format::PtChunks, None),
            (JSON, Format::BinaryV2, None),
            (ZSTD, Format::Safetensors, zstd),
            (SAFETENSORS, Format::BinaryV2, zstd),
            (b"", Format::Safetensors, None),
            (b"<!DOCTYPE html><html>", Format::BinaryV2, None),
            (b"\xff\xff\xff\xff", Format::PtChunks, None),
        ] {
            assert_eq!(check("x", bytes, (format, compression)), Ok(()));
        }
    }
}
