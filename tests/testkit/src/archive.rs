//! Compressed bytes and zip archives.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use rawzip::{CompressionMethod, ZipArchiveWriter};

/// As `zstd` compresses.
pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).expect("a Vec takes every write")
}

/// As `zlib` compresses.
pub fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("a Vec takes every write");
    encoder.finish().expect("a Vec takes every write")
}

/// Stored entries in a zip.
pub fn zip(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = ZipArchiveWriter::new(&mut bytes);
    for (name, data) in entries {
        let file = archive.new_file(name);
        let file = file.compression_method(CompressionMethod::STORE).start();
        let (mut entry, config) = file.expect("a name that a zip takes");
        let mut writer = config.wrap(&mut entry);
        writer.write_all(data).expect("a Vec takes every write");
        let (_, descriptor) = writer.finish().expect("a Vec takes every write");
        entry.finish(descriptor).expect("a Vec takes every write");
    }
    archive.finish().expect("a Vec takes every write");
    bytes
}

/// What `torch.save` makes of a pickle and its storages.
pub fn torch_zip(pickle: Vec<u8>, storages: Vec<Vec<u8>>) -> Vec<u8> {
    let mut entries = vec![("archive/data.pkl".to_owned(), pickle)];
    let numbered = storages.into_iter().enumerate();
    entries.extend(numbered.map(|(at, bytes)| (format!("archive/data/{at}"), bytes)));
    entries.push(("archive/version".to_owned(), b"3\n".to_vec()));
    zip(&entries)
}
