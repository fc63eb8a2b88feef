//! The parts that containers are made of.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use rawzip::{CompressionMethod, ZipArchiveWriter};

/// As `zstd` compresses.
pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).expect("a Vec takes every write")
}

/// As `zlib` compresses.
pub(crate) fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("a Vec takes every write");
    encoder.finish().expect("a Vec takes every write")
}

/// Stored entries in a zip.
pub(crate) fn zip(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
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
pub(crate) fn torch_zip(pickle: Vec<u8>, storages: Vec<Vec<u8>>) -> Vec<u8> {
    let mut entries = vec![("archive/data.pkl".to_owned(), pickle)];
    let numbered = storages.into_iter().enumerate();
    entries.extend(numbered.map(|(at, bytes)| (format!("archive/data/{at}"), bytes)));
    entries.push(("archive/version".to_owned(), b"3\n".to_vec()));
    zip(&entries)
}

/// A pickle of protocol 2, written an operation at a time.
#[derive(Default)]
pub(crate) struct Pickle(pub(crate) Vec<u8>);

impl Pickle {
    pub(crate) fn new() -> Self {
        Self(vec![0x80, 2])
    }

    pub(crate) fn op(&mut self, operations: &[u8]) {
        self.0.extend_from_slice(operations);
    }

    pub(crate) fn text(&mut self, text: &str) {
        self.op(b"X");
        let length = u32::try_from(text.len()).expect("a text of a test");
        self.op(&length.to_le_bytes());
        self.op(text.as_bytes());
    }

    pub(crate) fn number(&mut self, number: i64) {
        self.op(&[0x8a, 8]);
        self.op(&number.to_le_bytes());
    }

    /// A tensor of one dimension, a view of storage `key`.
    pub(crate) fn tensor(&mut self, storage: &str, key: usize, of: i64, length: i64, stride: i64) {
        self.op(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.op(format!("ctorch\n{storage}Storage\n").as_bytes());
        self.text(&key.to_string());
        self.text("cpu");
        self.number(of);
        self.op(b"tQ");
        self.number(0);
        for number in [length, stride] {
            self.number(number);
            self.op(&[0x85]);
        }
        self.op(b"\x89ccollections\nOrderedDict\n)RtR");
    }
}

/// A torch file of one chunk, whose fields but for the name are written by the caller, and of two
/// storages of eight zeros.
pub(crate) fn one_chunk(name: &str, write: impl FnOnce(&mut Pickle)) -> Vec<u8> {
    let mut pickle = Pickle::new();
    pickle.op(b"}");
    pickle.text("chunks");
    pickle.op(b"]}(");
    pickle.text("name");
    pickle.text(name);
    write(&mut pickle);
    pickle.op(b"uas.");
    torch_zip(pickle.0, vec![vec![0; 8], vec![0; 8]])
}
