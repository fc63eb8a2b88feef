//! Guesses what bytes are that are not what they should be, for error messages: users pass web pages, LFS
//! pointers and other formats, which a parser's own message does not say. No verdict on a job relies on it.

/// What may have been handed over in the place of something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Looks {
    /// There are no bytes.
    Empty,
    /// What git keeps in the place of a large file.
    GitLfsPointer,
    /// What a server says in the place of a file.
    WebPage,
    /// What a bucket says in the place of a file.
    Xml,
    /// The index of a checkpoint that is in several files.
    CheckpointIndex,
    /// Other JSON.
    Json,
    /// Other text.
    Text,
    /// Text of two bytes a character.
    Utf16,
    /// A safetensors file.
    Safetensors,
    /// A zip archive.
    Zip,
    /// What `torch.save` wrote before it wrote zips.
    TorchLegacy,
    /// Another pickle.
    Pickle,
    /// An ONNX model.
    Onnx,
    /// An array of numpy.
    Numpy,
    /// HDF5, as of Keras.
    Hdf5,
    /// GGUF, as of llama.cpp.
    Gguf,
    /// A map, or a list of maps, in MessagePack.
    MessagePack,
    /// Compressed with gzip.
    Gzip,
    /// Compressed with zstd.
    Zstd,
    /// Compressed with xz.
    Xz,
    /// Compressed with bzip2.
    Bzip2,
    /// A tar archive.
    Tar,
    /// Anything else.
    Unknown,
}

/// Where formats write their names.
const MAGIC: [(usize, &[u8], Looks); 15] = [
    (0, b"version https://git-lfs", Looks::GitLfsPointer),
    (0, b"PK\x03\x04", Looks::Zip),
    (0, b"PK\x05\x06", Looks::Zip),
    (
        2,
        b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19",
        Looks::TorchLegacy,
    ),
    (0, b"\x93NUMPY", Looks::Numpy),
    (0, b"\x89HDF\r\n\x1a\n", Looks::Hdf5),
    (0, b"GGUF", Looks::Gguf),
    (0, b"\x1f\x8b", Looks::Gzip),
    (0, b"\x28\xb5\x2f\xfd", Looks::Zstd),
    (0, b"\xfd7zXZ\0", Looks::Xz),
    (0, b"BZh", Looks::Bzip2),
    (0, b"\xff\xfe", Looks::Utf16),
    (0, b"\xfe\xff", Looks::Utf16),
    (257, b"ustar", Looks::Tar),
    // A header of less than 16 MiB, and how it begins.
    (3, b"\0\0\0\0\0{", Looks::Safetensors),
];

/// How much is looked at, and how much of it is shown.
const LOOKED_AT: usize = 512;
const SHOWN: usize = 48;

impl Looks {
    /// What bytes look like.
    pub fn of(bytes: &[u8]) -> Self {
        let bytes = bytes.get(..LOOKED_AT).unwrap_or(bytes);
        let mut magic = MAGIC.iter();
        let named = magic.find(|(at, magic, _)| {
            let there = bytes.get(*at..);
            there.is_some_and(|there| there.starts_with(magic))
        });
        if let Some((.., looks)) = named {
            return *looks;
        }
        match bytes {
            [] => Self::Empty,
            [0x80, 2..=5, ..] => Self::Pickle,
            // The version of the format, and who made it.
            [0x08, 1..=30, 0x12, ..] => Self::Onnx,
            [0x81..=0x8f, key, ..] | [0xde, _, _, key, ..] if is_key(*key) => Self::MessagePack,
            [0x91..=0x9f, 0x81..=0x8f, key, ..] if is_key(*key) => Self::MessagePack,
            _ => Self::of_text(bytes),
        }
    }

    fn of_text(bytes: &[u8]) -> Self {
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            // The last character is cut.
            Err(error) if error.error_len().is_none() => {
                std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => return Self::Unknown,
        };
        let text = text.trim_start_matches('\u{feff}').trim_start();
        if text.contains(|c: char| c.is_control() && !c.is_whitespace()) {
            return Self::Unknown;
        }
        let begin = text.to_ascii_lowercase();
        match begin.as_bytes() {
            [b'<', ..] if begin.contains("<html") || begin.starts_with("<!doctype html") => {
                Self::WebPage
            }
            [b'<', ..] => Self::Xml,
            [b'{', ..] if begin.contains("\"weight_map\"") => Self::CheckpointIndex,
            [b'{' | b'[', ..] => Self::Json,
            _ => Self::Text,
        }
    }

    /// In words; none where nothing can be said.
    pub fn in_words(self) -> Option<&'static str> {
        Some(match self {
            Self::GitLfsPointer => {
                "a Git LFS pointer; the file itself is elsewhere, see git lfs pull"
            }
            Self::WebPage => "a web page",
            Self::Xml => "XML, as buckets answer",
            Self::CheckpointIndex => "the index of a checkpoint in several files",
            Self::Json => "JSON",
            Self::Text => "text",
            Self::Utf16 => "text in UTF-16",
            Self::Safetensors => "safetensors",
            Self::Zip => "a zip archive, as torch.save writes",
            Self::TorchLegacy => {
                "the older format of torch.save; without _use_new_zipfile_serialization=False it writes today's"
            }
            Self::Pickle => "a pickle",
            Self::Onnx => "an ONNX model",
            Self::Numpy => "a numpy array",
            Self::Hdf5 => "HDF5",
            Self::Gguf => "GGUF",
            Self::MessagePack => "MessagePack",
            Self::Gzip => "compressed with gzip",
            Self::Zstd => "compressed with zstd",
            Self::Xz => "compressed with xz",
            Self::Bzip2 => "compressed with bzip2",
            Self::Tar => "a tar archive",
            Self::Empty | Self::Unknown => return None,
        })
    }
}

/// Whether MessagePack writes text so.
fn is_key(byte: u8) -> bool {
    matches!(byte, 0xa0..=0xbf | 0xd9..=0xdb)
}

/// Says how bytes begin and what they look like, in at most some 250 printable characters:
/// `begins with "<!DOCTYPE html>" (a web page)`.
pub fn describe(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "is empty".into();
    }
    let shown = bytes.get(..SHOWN).unwrap_or(bytes);
    let line = shown.split(|byte| *byte == b'\n').next();
    let line = line.filter(|line| !line.is_empty()).unwrap_or(shown);
    let words = Looks::of(bytes).in_words();
    let words = words.map_or_else(String::new, |words| format!(" ({words})"));
    format!("begins with \"{}\"{words}", line.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_hand_over_is_called_by_its_name() {
        let umlauts = "für ".repeat(200);
        let tar = [&[0; 257][..], b"ustar\x0000"].concat();
        let cases: [(&[u8], Looks); 32] = [
            (b"", Looks::Empty),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
                Looks::GitLfsPointer,
            ),
            (b"<!DOCTYPE html><html>", Looks::WebPage),
            (b"\xef\xbb\xbf \r\n<!doctype HTML>", Looks::WebPage),
            (b"<!-- 404 --><HTML lang=en>", Looks::WebPage),
            (
                b"<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code>",
                Looks::Xml,
            ),
            (
                b"{\"metadata\": {}, \"weight_map\": {",
                Looks::CheckpointIndex,
            ),
            (b"\n{\"head.weight\": 1}", Looks::Json),
            (b"\xef\xbb\xbf[1]", Looks::Json),
            (b"Not found\n", Looks::Text),
            (umlauts.as_bytes(), Looks::Text),
            (b"\xff\xfe{\0\"\0", Looks::Utf16),
            (b"\x10\0\0\0\0\0\0\0{\"a\":{}}", Looks::Safetensors),
            (b"PK\x03\x04\0\0", Looks::Zip),
            (
                b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M",
                Looks::TorchLegacy,
            ),
            (b"\x80\x02}q\0", Looks::Pickle),
            (b"\x80\x04\x95", Looks::Pickle),
            (b"\x08\x0a\x12\x07pytorch", Looks::Onnx),
            (b"\x93NUMPY\x01\0", Looks::Numpy),
            (b"\x89HDF\r\n\x1a\n\0", Looks::Hdf5),
            (b"GGUF\x03\0", Looks::Gguf),
            (b"\x82\xa1v\x01", Looks::MessagePack),
            (b"\x81\xd9\x20model.layers", Looks::MessagePack),
            (b"\xde\0\x20\xabhead.weight", Looks::MessagePack),
            (b"\x92\x84\xa4name", Looks::MessagePack),
            (b"\x1f\x8b\x08\0", Looks::Gzip),
            (b"\x28\xb5\x2f\xfd\x20", Looks::Zstd),
            (b"\xfd7zXZ\0", Looks::Xz),
            (b"BZh9", Looks::Bzip2),
            (&tar, Looks::Tar),
            (&[0xff; 16], Looks::Unknown),
            (b"\x7fELF\x02\x01", Looks::Unknown),
        ];
        for (bytes, looks) in cases {
            assert_eq!(Looks::of(bytes), looks, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_description_is_short_printable_and_of_one_line() {
        let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0000";
        let said = describe(lfs.as_bytes());
        let begin =
            "begins with \"version https://git-lfs.github.com/spec/v1\" (a Git LFS pointer;";
        assert!(said.starts_with(begin), "{said}");
        assert_eq!(describe(b""), "is empty");
        assert_eq!(
            describe(b"\x1f\x8b\x08\""),
            r#"begins with "\x1f\x8b\x08\"" (compressed with gzip)"#
        );
        for byte in 0..=255 {
            for length in [1, 7, 48, 5000] {
                let said = describe(&vec![byte; length]);
                assert!(said.is_ascii() && said.len() < 260, "{said}");
                assert!(!said.contains(|c: char| c.is_control()), "{said}");
            }
        }
    }
}
