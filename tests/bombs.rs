//! What is small and wants to be huge is refused before it is: the memory that refusing takes stays
//! within the budget, of every format. Alone in its process, because it reads the process's memory.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed step of a test is a failed test"
)]

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use flate2::write::DeflateEncoder;
use scorer::candidate;
use scorer::config::{CandidatesConfig, Config, Layers};
use scorer::model::onnx::synthetic::Decoder;
use scorer::model::package::Package;
use scorer::protocol::encoding::Encoding;
use scorer::protocol::failure::{Code, Failure};
use scorer::protocol::job::{self, Compression, Format};
use scorer::selftest::synthetic_model;
use testkit::archive::{torch_zip, zip, zlib, zstd};
use testkit::pickle::{Pickle, one_chunk};

const MIB: u64 = 1 << 20;
/// What a candidate may inflate to, and with it the budget.
const BUDGET: u64 = 32 * MIB;
/// What the bombs would inflate to.
const HUGE: u64 = 10 << 30;

/// A model of 4 million weights: large enough that the configuration is what limits.
const MODEL: Decoder = Decoder {
    layers: 1,
    width: 512,
    heads: 8,
    vocabulary: 1000,
    window: 16,
};

/// So many zeros as zlib, as small as they can be.
fn zlib_of_zeros(bytes: u64) -> Vec<u8> {
    let mut deflate = DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    let zeros = vec![0; 1 << 20];
    deflate.write_all(&zeros).unwrap();
    // What is flushed ends at a byte, and so can be repeated.
    deflate.flush().unwrap();
    let first = deflate.get_ref().len();
    deflate.write_all(&zeros).unwrap();
    deflate.flush().unwrap();
    let (first, more) = deflate.get_ref().split_at(first);
    let times = usize::try_from(bytes >> 20).unwrap();
    [&[0x78, 0xda], first, &more.repeat(times)].concat()
}

/// A zstd frame of blocks that repeat one byte, 128 KiB in four bytes, with a window of 128 MiB.
fn zstd_of_spaces(bytes: u64) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, (27 - 10) << 3];
    for _ in 0..bytes >> 17 {
        let header: u32 = (1 << 17) << 3 | 1 << 1;
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.push(b' ');
    }
    frame
}

struct Bomb {
    name: &'static str,
    format: Format,
    compression: Option<Compression>,
    bytes: Vec<u8>,
    codes: &'static [Code],
}

const LARGE: &[Code] = &[Code::CandidateTooLarge];
const MALFORMED: &[Code] = &[Code::CandidateMalformed];
const UNKNOWN: &[Code] = &[Code::CandidateUnknownTensor];

fn json_bombs(name: &str) -> Vec<Bomb> {
    let packed = |k: u64, zlib: &[u8]| {
        let data = BASE64.encode(zlib);
        format!(r#"{{"{name}":{{"k":{k},"data":"{data}"}}}}"#).into_bytes()
    };
    let mut names = "{".to_owned();
    for n in 0..2_000_000 {
        write!(names, r#""t{n}":{{"k":0,"data":""}},"#).unwrap();
    }
    // Each has a prefix of many parts, and a renaming fails at the last of them.
    let mut wrapped = "{".to_owned();
    for n in 0..100_000 {
        let parts = "a.".repeat(20);
        write!(wrapped, r#""{parts}{name}":{{"k":0,"data":"","n":{n}}},"#).unwrap();
    }
    write!(wrapped, r#""{name}":{{"k":0,"data":""}}}}"#).unwrap();
    let mut remarks = "{".to_owned();
    for n in 0..2_000_000 {
        write!(remarks, r#""t{n}":0,"#).unwrap();
    }
    remarks.push_str(r#""last":0}"#);
    let bomb = |name, bytes, codes| Bomb {
        name,
        format: Format::BinaryV2,
        compression: None,
        bytes,
        codes,
    };
    // Each nearly fills the budget by itself: nothing of it can be copied.
    let filled = |name, begin: &str, fill: &str, end: &str, codes| {
        let times = 30 * MIB as usize / fill.len();
        let text = [begin, &fill.repeat(times), end].concat();
        Bomb {
            compression: Some(Compression::Zstd),
            ..bomb(name, zstd(text.as_bytes()), codes)
        }
    };
    let of_tensor = |field: &str| format!(r#"{{"{name}":{{"{field}":"#);
    let filled = [
        filled(
            "json: a long name",
            r#"{""#,
            "n",
            r#"":{"k":0,"data":""}}"#,
            UNKNOWN,
        ),
        filled(
            "json: a long name in a list",
            r#"[{"name":""#,
            "n",
            r#"","k":0}]"#,
            UNKNOWN,
        ),
        filled(
            "json: a shape of millions",
            &of_tensor("shape"),
            "[1,",
            "",
            MALFORMED,
        ),
        filled(
            "json: a shape of many ones",
            &(of_tensor("shape") + "[1"),
            ",1",
            "]}}",
            MALFORMED,
        ),
        filled(
            "json: k is text",
            &(of_tensor("k") + "\""),
            "x",
            "\"}}",
            MALFORMED,
        ),
        filled(
            "json: a size is text",
            &(of_tensor("shape") + "[\""),
            "x",
            "\"]}}",
            MALFORMED,
        ),
        filled("json: all of it is text", "\"", "x", "\"", MALFORMED),
        filled(
            "json: escapes",
            &(of_tensor("data") + "\""),
            "\\/",
            "\",\"k\":1}}",
            LARGE,
        ),
        filled("json: a long number", "{\"remark\":0.", "1", "}", LARGE),
        // What Python writes and JSON does not know is replaced in a copy.
        filled("json: no numbers", "{\"remark\":[", "NaN,", "0]}", LARGE),
        filled(
            "json: an entry in an entry",
            &of_tensor("data"),
            r#"{"data":"#,
            "",
            MALFORMED,
        ),
        filled(
            "json: pieces",
            "[",
            &format!(r#"{{"name":"{name}","k":0,"data":"eAEDAAAAAAE="}},"#),
            "0]",
            LARGE,
        ),
    ];
    let others = vec![
        bomb(
            "json: zlib of 10 GB",
            packed(4, &zlib_of_zeros(HUGE)),
            MALFORMED,
        ),
        bomb("json: 2^31 entries", packed(1 << 31, &zlib(&[])), LARGE),
        bomb("json: 2^64 entries", packed(u64::MAX, &zlib(&[])), LARGE),
        bomb("json: millions of tensors", names.into_bytes(), UNKNOWN),
        bomb("json: a long prefix", wrapped.into_bytes(), UNKNOWN),
        bomb(
            "json: millions of remarks",
            remarks.into_bytes(),
            &[Code::CandidateEmpty],
        ),
        bomb("json: lists in lists", vec![b'['; 4_000_000], MALFORMED),
        bomb(
            "json: maps in maps",
            br#"{"a":"#.repeat(1_000_000),
            MALFORMED,
        ),
        Bomb {
            compression: Some(Compression::Zstd),
            ..bomb(
                "zstd of zlib of 10 GB",
                zstd(&packed(4, &zlib_of_zeros(HUGE))),
                MALFORMED,
            )
        },
        Bomb {
            compression: Some(Compression::Zstd),
            ..bomb("zstd of 10 GB", zstd_of_spaces(HUGE), LARGE)
        },
    ];
    filled.into_iter().chain(others).collect()
}

fn safetensors_bombs() -> Vec<Bomb> {
    let header = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    };
    let mut names = "{".to_owned();
    for n in 0..1_000_000 {
        write!(
            names,
            r#""t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},"#
        )
        .unwrap();
    }
    let declared = r#"{"a":{"dtype":"F32","shape":[2147483648],"data_offsets":[0,8589934592]}}"#;
    let overflow =
        r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}"#;
    let nested = format!("{{\"a\":{}", "[".repeat(100_000));
    let bomb = |name, bytes, codes| Bomb {
        name,
        format: Format::Safetensors,
        compression: None,
        bytes,
        codes,
    };
    vec![
        bomb("safetensors: a million tensors", header(&names), LARGE),
        bomb("safetensors: 2^31 entries", header(declared), MALFORMED),
        bomb(
            "safetensors: more than can be counted",
            header(overflow),
            MALFORMED,
        ),
        bomb("safetensors: lists in lists", header(&nested), LARGE),
        bomb(
            "safetensors: a header of 2^63 bytes",
            [&[0xff; 8][..], b"{       "].concat(),
            MALFORMED,
        ),
        Bomb {
            compression: Some(Compression::Zstd),
            ..bomb("safetensors: zstd of 10 GB", zstd_of_spaces(HUGE), LARGE)
        },
    ]
}

fn torch_bombs(name: &str) -> Vec<Bomb> {
    let pickled = |operations: Vec<u8>| torch_zip([vec![0x80, 2], operations].concat(), Vec::new());
    let chunk = |write: &dyn Fn(&mut Pickle)| one_chunk(name, write);
    let compact = chunk(&|pickle| {
        pickle.text("k");
        pickle.number(4);
        pickle.text("data");
        pickle.text(&BASE64.encode(zlib_of_zeros(HUGE)));
    });
    // One element, said to be there two milliard times.
    let broadcast = chunk(&|pickle| {
        for (key, (field, storage)) in [("indices", "Int"), ("values", "Float")].iter().enumerate()
        {
            pickle.text(field);
            pickle.tensor(storage, key, 2, 1 << 31, 0);
        }
    });
    // One chunk of thousands of fields, said thousands of times.
    let mut repeated = Pickle::new();
    repeated.op(b"}");
    repeated.text("chunks");
    repeated.op(b"](}q\x00(");
    for field in 0..3000 {
        repeated.text(&field.to_string());
        repeated.op(b"N");
    }
    repeated.op(b"u");
    repeated.op(&b"h\x00".repeat(5000));
    repeated.op(b"es.");
    let repeated = torch_zip(repeated.0, Vec::new());
    // One stream that inflates to nothing, for a tensor that has no entries, said a thousand times.
    let mut inflated_again = Pickle::new();
    inflated_again.op(b"}");
    inflated_again.text("chunks");
    inflated_again.op(b"](}q\x00(");
    inflated_again.text("name");
    inflated_again.text(name);
    inflated_again.text("k");
    inflated_again.number(0);
    inflated_again.text("data");
    inflated_again.op(b"c_codecs\nencode\n");
    inflated_again.text(&zlib(&[]).into_iter().map(char::from).collect::<String>());
    inflated_again.text("latin1");
    inflated_again.op(b"\x86Ru");
    inflated_again.op(&b"h\x00".repeat(1000));
    inflated_again.op(b"es.");
    let inflated_again = torch_zip(inflated_again.0, Vec::new());
    // One tuple, said a million times.
    let mut recalled = b"(".to_vec();
    recalled.extend_from_slice(&b")".repeat(100));
    recalled.extend_from_slice(b"tq\x00");
    recalled.extend_from_slice(&b"h\x00".repeat(1_000_000));
    // A set of one tuple, filled a million times; and the tuple as a size, a set and an argument.
    let mut filled = b"(".to_vec();
    filled.extend_from_slice(&b")".repeat(100));
    filled.extend_from_slice(b"tq\x00\x8f");
    filled.extend_from_slice(&b"(h\x00\x90".repeat(1_000_000));
    let mut made = b"(".to_vec();
    made.extend_from_slice(&b")".repeat(100));
    made.extend_from_slice(b"tq\x00ctorch\nSize\nq\x01c__builtin__\nset\nq\x02");
    made.extend_from_slice(&b"h\x01h\x00\x85Rh\x02h\x00\x85R(h\x00\x91".repeat(300_000));
    let entries: Vec<_> = (0..200_000)
        .map(|n| (format!("a/{n}"), Vec::new()))
        .collect();
    let bomb = |name, bytes, codes| Bomb {
        name,
        format: Format::PtChunks,
        compression: None,
        bytes,
        codes,
    };
    vec![
        bomb("torch: zlib of 10 GB", compact, MALFORMED),
        bomb("torch: one large chunk many times", repeated, MALFORMED),
        bomb("torch: one stream many times", inflated_again, LARGE),
        bomb("torch: 2^31 entries", broadcast, LARGE),
        bomb(
            "torch: lists in lists",
            pickled(b"]".repeat(5_000_000)),
            LARGE,
        ),
        bomb("torch: marks", pickled(b"(".repeat(5_000_000)), LARGE),
        bomb("torch: remembered without end", pickled(recalled), LARGE),
        bomb("torch: a set without end", pickled(filled), LARGE),
        bomb("torch: made without end", pickled(made), LARGE),
        bomb(
            "torch: text of 2^32 bytes",
            pickled(b"X\xff\xff\xff\xff".to_vec()),
            MALFORMED,
        ),
        bomb(
            "torch: bytes of 2^64",
            pickled([vec![0x8e], vec![0xff; 8]].concat()),
            MALFORMED,
        ),
        bomb("torch: a zip of 200,000 entries", zip(&entries), LARGE),
        Bomb {
            compression: Some(Compression::Zstd),
            ..bomb("torch: zstd of 10 GB", zstd_of_spaces(HUGE), LARGE)
        },
    ]
}

/// Bytes of this process that are in memory now, and at most since the last reset.
fn memory() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kib = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        let number = line.split_whitespace().nth(1).unwrap();
        number.parse::<u64>().unwrap()
    };
    (1024 * kib("VmRSS:"), 1024 * kib("VmHWM:"))
}

/// Whoever measures is alone.
static ALONE: Mutex<()> = Mutex::new(());

/// Gives back what was freed, so that no bomb hides in the memory that another has left.
#[expect(unsafe_code, reason = "glibc offers it only so")]
fn trim() {
    // Any thread may call it at any time.
    unsafe { libc::malloc_trim(0) };
}

/// Does something; gives what it gave, and the most memory that it took beyond what there was.
fn measured<T>(work: impl FnOnce() -> T) -> (T, u64) {
    trim();
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak can be reset");
    let (before, _) = memory();
    let done = work();
    (done, memory().1.saturating_sub(before))
}

fn limits() -> CandidatesConfig {
    let set = [format!("candidates.max_inflated_bytes={BUDGET}B")];
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    Config::load(&layers).unwrap().candidates
}

fn refusal(bomb: &Bomb, package: &Package, limits: &CandidatesConfig) -> Failure {
    let decoded = candidate::decode(
        &bomb.bytes,
        bomb.format,
        bomb.compression,
        package,
        limits.into(),
    );
    decoded
        .err()
        .unwrap_or_else(|| panic!("{} was taken", bomb.name))
}

#[test]
fn a_bomb_is_refused_within_the_budget() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    synthetic_model::make(MODEL, folder.path()).unwrap();
    let package = Package::load(folder.path(), false, &[]).unwrap();
    let name = package.weights.tensors[0].name.clone();
    let limits = limits();
    let bombs = [json_bombs(&name), safetensors_bombs(), torch_bombs(&name)];
    for bomb in bombs.into_iter().flatten() {
        let (failure, took) = measured(|| refusal(&bomb, &package, &limits));
        let (shown, sent) = (bomb.name, bomb.bytes.len());
        eprintln!("{shown}: {sent} bytes, {took} bytes of memory: {failure}");
        assert!(bomb.codes.contains(&failure.code), "{shown}: {failure}");
        assert!(took <= BUDGET + BUDGET / 10, "{shown} took {took} bytes");
    }
}

#[test]
fn a_job_of_millions_of_values_is_refused_without_making_them() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let many = 16_000_000;
    let mut packed = vec![0xdd];
    packed.extend_from_slice(&u32::try_from(many).unwrap().to_be_bytes());
    packed.resize(5 + many, 0xc0);
    let listed = format!("[{}0]", "0,".repeat(many / 2));
    let nested = [0x91].repeat(many);
    for (body, encoding) in [
        (packed, Encoding::MessagePack),
        (listed.into_bytes(), Encoding::Json),
        (nested, Encoding::MessagePack),
        (vec![b'['; many], Encoding::Json),
    ] {
        // Half of what a worker's threads have, and nothing is optimised here.
        let small = std::thread::Builder::new().stack_size(1 << 20);
        let (refused, took) = measured(|| {
            std::thread::scope(|scope| {
                let decoding = small.spawn_scoped(scope, || job::decode(&body, encoding).is_err());
                decoding.expect("a thread").join().expect("no overflow")
            })
        });
        assert!(refused);
        assert!(took <= 16 * MIB, "{took} bytes");
    }
}
