//! What is passed over in a container, and what must not be: remarks, but no data; counters, but no
//! weights; prefixes that all names have. And what is said of bytes that are another format altogether.

use std::sync::OnceLock;

use base64::Engine as _;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scorer::candidate::{Update, decode};
use scorer::config::CandidatesConfig;
use scorer::model::package::Package;
use scorer::protocol::failure::Failure;
use scorer::protocol::job::{Compression, Format};
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::archive::{torch_zip, zip, zlib, zstd};
use testkit::container::{Container, Entry, Kind, Width};
use testkit::pickle::{Pickle, one_chunk};

use super::{BASE64, config, make};

/// A norm's weight and bias-like second one, and the embedding by both of its names.
const NORM: &str = "model.norm.weight";
const OTHER: &str = "model.layers.0.input_layernorm.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
const ALIAS: &str = "lm_head.weight";

/// The test model.
fn model() -> &'static (Package, CandidatesConfig) {
    static MODEL: OnceLock<(Package, CandidatesConfig)> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        let out = folder.path().join("package");
        make(&out);
        let package = Package::load(&out, false, &[]).unwrap();
        (package, config(&[]).candidates)
    })
}

fn read(format: Format, bytes: &[u8]) -> Result<Update, Failure> {
    read_compressed(format, None, bytes)
}

fn read_compressed(
    format: Format,
    compression: Option<Compression>,
    bytes: &[u8],
) -> Result<Update, Failure> {
    read_for(&model().0, format, compression, bytes)
}

fn read_for(
    package: &Package,
    format: Format,
    compression: Option<Compression>,
    bytes: &[u8],
) -> Result<Update, Failure> {
    decode(bytes, format, compression, package, (&model().1).into())
}

/// What became of a candidate: the number of its entries, or the code and the message.
fn told(read: Result<Update, Failure>) -> String {
    match read {
        Ok(update) => update.entries().to_string(),
        Err(failure) => format!("{} {}", failure.code.as_str(), failure.message),
    }
}

/// Whatever is shown for it, the answer begins so.
fn expect(shown: &dyn std::fmt::Display, read: Result<Update, Failure>, expected: &str) {
    let told = told(read);
    let exact = expected.bytes().all(|byte| byte.is_ascii_digit());
    let fits = if exact {
        told == expected
    } else {
        told.starts_with(expected)
    };
    assert!(fits, "{shown:.300}: {told}, not {expected}");
}

/// Two entries of any tensor.
fn packed() -> Vec<u8> {
    let values = [0.5_f32, -0.25].map(f32::to_le_bytes).concat();
    zlib(&[values, [0_i32, 3].map(i32::to_le_bytes).concat()].concat())
}

fn data() -> String {
    BASE64.encode(packed())
}

fn shape(name: &str) -> Vec<usize> {
    model().0.tensor(name).unwrap().shape.to_vec()
}

/// A sound entry of `binary_v2`.
fn entry(name: &str) -> Value {
    json!({"shape": shape(name), "k": 2, "data": data()})
}

/// A sound entry with other fields; a null takes one away.
fn entry_but(name: &str, fields: Value) -> Value {
    let mut entry = entry(name);
    for (field, value) in fields.as_object().unwrap() {
        entry[field] = value.clone();
    }
    entry.as_object_mut().unwrap().retain(|_, v| !v.is_null());
    entry
}

#[test]
fn what_stands_under_a_tensors_name_is_an_entry_or_a_refusal() {
    let swallowed = "misspelt, of a wrong kind, or missing";
    let faults = [
        (
            json!({"k": null}),
            "k is missing; it has the keys \"data\", \"shape\"",
        ),
        (
            json!({"k": null, "K": 2}),
            "k is missing; it has the keys \"K\"",
        ),
        (json!({"k": null, "data": null}), "k is missing"),
        (json!({"k": null, "shape": null}), "k is missing"),
        (json!({"data": null}), "data is missing"),
        (json!({"data": null, "values_": "x"}), "data is missing"),
        (
            json!({"k": null, "shape": null, "data": null, "K": 2}),
            "k is missing",
        ),
        (json!({"k": "2"}), "k is text, not a natural number"),
        (json!({"k": true}), "k is a truth value, not"),
        (json!({"k": -2}), "k is a negative number, not"),
        (
            json!({"k": 7.5}),
            "k is a number that is negative, too large or has a fraction",
        ),
        (json!({"k": 1e300}), "k is a number that"),
        (json!({"k": [2]}), "k is a list, not"),
        (json!({"k": {"k": 2}}), "k is a map, not"),
        (json!({"data": 7}), "data is a number, not text"),
        (
            json!({"data": ["x"]}),
            "data is a list of more than sizes, not text",
        ),
        (json!({"shape": "2"}), "shape is text, not a list of sizes"),
        (json!({"shape": 2}), "shape is a number, not"),
        (
            json!({"shape": [2.5]}),
            "shape is a list of more than sizes, not",
        ),
        (
            json!({"shape": [1, 1, 1, 1, 1, 1, 1, 1, 1]}),
            "shape is a list of more",
        ),
    ];
    for name in [NORM, EMBEDDING, ALIAS] {
        for (fields, words) in &faults {
            let faulty = entry_but(name, fields.clone());
            let expected = format!("candidate_malformed {name}: {words}");
            let mut listed = faulty.clone();
            listed["name"] = json!(name);
            let other = json!({"name": OTHER, "k": 2, "data": data()});
            for document in [
                json!({OTHER: entry(OTHER), name: faulty}),
                json!([other, listed]),
            ] {
                let body = document.to_string();
                // The list form has one key more.
                let expected = expected.split("; it has").next().unwrap();
                let read = read(Format::BinaryV2, body.as_bytes());
                expect(&format!("{swallowed} {body}"), read, expected);
            }
        }
        for (instead, what) in [
            (json!("eJw="), "text"),
            (json!(7), "a number"),
            (json!([1, 2]), "a list"),
            (json!([0.5]), "a list of more than sizes"),
            (json!(false), "a truth value"),
        ] {
            let body = json!({OTHER: entry(OTHER), name: instead}).to_string();
            let expected = format!("candidate_malformed {name}: is {what}, not {{shape, k, data}}");
            expect(&body, read(Format::BinaryV2, body.as_bytes()), &expected);
        }
    }
    let keys = json!({OTHER: entry_but(OTHER, json!({"k": null, "K": 2}))}).to_string();
    let said = told(read(Format::BinaryV2, keys.as_bytes()));
    let words = "k is missing; it has the keys \"K\", \"data\", \"shape\"";
    assert!(said.ends_with(words), "{said}");
}

/// With the keys in the order in which they are written here.
#[test]
fn remarks_do_no_harm_and_a_document_of_nothing_else_says_what_it_has() {
    let sound = entry(NORM).to_string();
    let with = |remark: &str| format!("{{{remark}, \"{NORM}\": {sound}}}");
    for remark in [
        r#""dtype": "torch.float32""#,
        r#""loss": NaN, "best": [Infinity, -Infinity]"#,
        r#""large": 1e999, "larger": -12345678901234567890123456789"#,
        r#""note": "NaN \" Infinity", "nan": {"k": NaN}"#,
        r#""meta": {"shape": "square"}, "source": {"data": "text"}, "topk": {"k": 0.01}"#,
        r#""meta": {"shape": [1, 2, "x"]}, "more": {"k": null, "data": null, "shape": null}"#,
        r#""model.norm.bias": null, "lm_head.weight": {}, "model.embed_tokens.weight": null"#,
        r#""nested": {"model.norm.weight": {"k": 1}}"#,
    ] {
        let body = with(remark);
        expect(&body, read(Format::BinaryV2, body.as_bytes()), "2");
        let body = format!("\u{feff}{body}");
        expect(&body, read(Format::BinaryV2, body.as_bytes()), "2");
    }
    let none = "candidate_empty the candidate has no entries";
    let gradient = json!({"gradient": {NORM: entry(NORM)}, "loss": 1}).to_string();
    let keys = format!("{none}; it has the keys \"gradient\", \"loss\", and no");
    expect(
        &gradient,
        read(Format::BinaryV2, gradient.as_bytes()),
        &keys,
    );
    let mut many = serde_json::Map::new();
    for n in 0..1000 {
        many.insert(format!("{n:03}{}", "k".repeat(1000)), json!("\u{7}"));
    }
    let many = Value::Object(many).to_string();
    let said = told(read(Format::BinaryV2, many.as_bytes()));
    assert!(
        said.contains("kkk...\" and 994 more, and no tensor"),
        "{said}"
    );
    for empty in ["{}", "[]"] {
        expect(&empty, read(Format::BinaryV2, empty.as_bytes()), none);
    }
}

#[test]
fn no_key_of_the_json_is_read_twice() {
    let sound = entry(NORM).to_string();
    let twice = "is given twice";
    for (body, name) in [
        (format!("{{\"{NORM}\":{sound},\"{NORM}\":{sound}}}"), NORM),
        (
            format!("{{\"{NORM}\":{sound},\"{NORM}\":{{\"k\":0,\"data\":\"\"}}}}"),
            NORM,
        ),
    ] {
        let expected = format!("candidate_malformed {name}: {twice}");
        expect(&body, read(Format::BinaryV2, body.as_bytes()), &expected);
    }
    for field in ["k", "data", "shape"] {
        let value = &entry(NORM)[field];
        let body = format!(
            "{{\"{NORM}\":{{\"{field}\":{value},{}}}}}",
            &sound[1..sound.len() - 1]
        );
        let expected = format!("candidate_malformed {NORM}: {field} {twice}");
        expect(&body, read(Format::BinaryV2, body.as_bytes()), &expected);
    }
    // Pieces of one tensor have a form of their own.
    let piece = |at: i32| {
        let packed = zlib(&[0.5_f32.to_le_bytes(), at.to_le_bytes()].concat());
        json!({"name": NORM, "k": 1.0, "data": BASE64.encode(packed)})
    };
    let body = json!([piece(0), piece(1)]).to_string();
    expect(&body, read(Format::BinaryV2, body.as_bytes()), "2");
    let body = json!([piece(0), piece(0)]).to_string();
    expect(
        &body,
        read(Format::BinaryV2, body.as_bytes()),
        "candidate_duplicate_index",
    );
}

/// What a file of tensors says of one.
type Tensor<'a> = (&'a str, Dtype, &'a [usize], Vec<u8>);

fn tensors(tensors: &[Tensor<'_>]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.to_vec(), bytes).unwrap();
        (*name, view)
    });
    safetensors::serialize(views, None).unwrap()
}

fn indices<'a>(name: &'a str) -> Tensor<'a> {
    let bytes = [0_i32, 3].map(i32::to_le_bytes).concat();
    (name, Dtype::I32, &[2], bytes)
}

fn values<'a>(name: &'a str) -> Tensor<'a> {
    let bytes = [0.5_f32, -0.25].map(f32::to_le_bytes).concat();
    (name, Dtype::F32, &[2], bytes)
}

fn zeros<'a>(name: &'a str, dtype: Dtype, shape: &'a [usize]) -> Tensor<'a> {
    let bytes = dtype.bitsize() / 8 * shape.iter().product::<usize>();
    (name, dtype, shape, vec![0; bytes])
}

#[test]
fn of_a_file_of_tensors_only_foreign_integers_are_passed_over() {
    let pair = |rest: Vec<Tensor<'_>>| {
        let sound = [
            indices("model.norm.weight::indices"),
            values("model.norm.weight::values"),
        ];
        tensors(&[sound.to_vec(), rest].concat())
    };
    let unknown = "candidate_unknown_tensor";
    let malformed = "candidate_malformed";
    let norm = shape(OTHER);
    let cases: Vec<(Vec<Tensor<'_>>, String)> = vec![
        (vec![], "2".into()),
        // Counters, positions and masks, whole or in pairs.
        (
            vec![zeros("bn.num_batches_tracked", Dtype::I64, &[])],
            "2".into(),
        ),
        (
            vec![zeros("embeddings.position_ids", Dtype::I64, &[1, 8])],
            "2".into(),
        ),
        (
            vec![zeros("attn.bias", Dtype::BOOL, &[1, 1, 4, 4])],
            "2".into(),
        ),
        (vec![zeros("attn.mask", Dtype::U8, &[4])], "2".into()),
        (
            vec![
                indices("bn.steps::indices"),
                zeros("bn.steps::values", Dtype::I64, &[2]),
            ],
            "2".into(),
        ),
        // Weights of a name that the model does not have.
        (
            vec![zeros("bn.running_mean", Dtype::F32, &[4])],
            unknown.into(),
        ),
        (
            vec![zeros("bn.running_mean", Dtype::F64, &[4])],
            unknown.into(),
        ),
        (
            vec![indices("x::indices"), values("x::values")],
            unknown.into(),
        ),
        // What may be meant for a tensor that the model has, under a misspelt name or quantised.
        (vec![indices("model.norm.weight::idx")], unknown.into()),
        (
            vec![zeros("model.norm.weight.q", Dtype::I8, &[4])],
            unknown.into(),
        ),
        (
            vec![zeros(OTHER, Dtype::I8, &norm)],
            format!("{malformed} {OTHER}: values of I8"),
        ),
        (
            vec![zeros(OTHER, Dtype::F64, &norm)],
            format!("{malformed} {OTHER}: values of F64"),
        ),
        (
            vec![zeros(ALIAS, Dtype::BOOL, &[4])],
            "candidate_shape_mismatch".into(),
        ),
        // Half of a pair, a wrong kind, and one tensor in two forms.
        (
            vec![indices("model.layers.0.input_layernorm.weight::indices")],
            format!("{malformed} {OTHER}::indices: has no ::values"),
        ),
        (
            vec![values("model.layers.0.input_layernorm.weight::values")],
            format!("{malformed} {OTHER}::values: has no ::indices"),
        ),
        (
            vec![indices("nobody::indices")],
            format!("{malformed} nobody::indices: has no"),
        ),
        (
            vec![zeros(NORM, Dtype::F32, &norm)],
            format!("{malformed} {NORM}: is there as a whole and as"),
        ),
        (
            vec![
                values("lm_head.weight::indices"),
                values("lm_head.weight::values"),
            ],
            format!("{malformed} {ALIAS}: indices of F32"),
        ),
        (
            vec![
                indices("lm_head.weight::indices"),
                zeros("lm_head.weight::values", Dtype::I64, &[2]),
            ],
            format!("{malformed} {ALIAS}: values of I64"),
        ),
    ];
    for (rest, expected) in cases {
        let names: Vec<_> = rest
            .iter()
            .map(|(name, dtype, ..)| format!("{name} {dtype}"))
            .collect();
        expect(
            &names.join(", "),
            read(Format::Safetensors, &pair(rest)),
            &expected,
        );
    }
    let counters = tensors(&[zeros("bn.num_batches_tracked", Dtype::I64, &[])]);
    let none = "candidate_empty the candidate has no entries; of these the type cannot be a weight's: \"bn.num_batches_tracked\"";
    expect(&"counters", read(Format::Safetensors, &counters), none);
}

/// The fields of a chunk, as a caller writes them.
type Fields = fn(&mut Pickle);

/// A storage of the archive as a tensor of one element.
fn tensor(pickle: &mut Pickle, field: &str, storage: &str) {
    pickle.text(field);
    pickle.tensor(storage, usize::from(field == "values"), 1, 1, 1);
}

fn float(pickle: &mut Pickle, number: f64) {
    pickle.op(b"G");
    pickle.op(&number.to_be_bytes());
}

fn compact(pickle: &mut Pickle, k: Option<f64>) {
    if let Some(k) = k {
        pickle.text("k");
        float(pickle, k);
    }
    pickle.text("data");
    pickle.text(&data());
}

fn chunk_faults() -> Vec<(Fields, &'static str)> {
    vec![
        (
            |p| (tensor(p, "indices", "Int"), tensor(p, "values", "Float")).0,
            "1",
        ),
        (|p| compact(p, Some(2.0)), "2"),
        (
            |p| (tensor(p, "indices", "Int"), p.text("values"), p.op(b"N")).1,
            "values is missing; it has the keys \"name\", \"indices\", \"values\"",
        ),
        (|p| tensor(p, "indices", "Int"), "values is missing"),
        (|p| tensor(p, "values", "Float"), "indices is missing"),
        (
            |p| (tensor(p, "idx", "Int"), tensor(p, "values", "Float")).0,
            "indices is missing; it has the keys \"name\", \"idx\", \"values\"",
        ),
        (
            |p| (tensor(p, "indices", "Int"), p.text("values"), p.text("x")).0,
            "values is text, not a tensor",
        ),
        (
            |p| {
                (
                    tensor(p, "indices", "Int"),
                    tensor(p, "values", "Float"),
                    compact(p, None),
                )
                    .0
            },
            "has data beside indices and values",
        ),
        (
            |p| (tensor(p, "values", "Float"), compact(p, Some(2.0))).0,
            "has data beside indices and values",
        ),
        (
            |p| (tensor(p, "indices", "Int"), tensor(p, "values", "Long")).0,
            "values are no floats",
        ),
        (
            |p| (tensor(p, "indices", "Int"), tensor(p, "values", "Bool")).0,
            "values are no floats",
        ),
        (
            |p| (tensor(p, "indices", "Bool"), tensor(p, "values", "Float")).0,
            "indices are neither int32 nor int64",
        ),
        (
            |p| compact(p, None),
            "k is missing; it has the keys \"name\", \"data\"",
        ),
        (
            |p| (p.text("K"), p.number(2), compact(p, None)).2,
            "k is missing; it has the keys",
        ),
        (
            |p| (p.text("k"), p.op(b"N"), compact(p, None)).2,
            "k is missing",
        ),
        (
            |p| compact(p, Some(7.5)),
            "k is a number, not a natural one",
        ),
        (
            |p| compact(p, Some(-2.0)),
            "k is a number, not a natural one",
        ),
        (
            |p| (p.text("k"), p.op(b"\x88"), compact(p, None)).2,
            "k is something else, not",
        ),
        (|p| (p.text("k"), p.number(2)).1, "data is missing"),
        (
            |p| (p.text("values_"), p.text("x")).1,
            "neither indices nor k; it has the keys",
        ),
        (
            |p| (p.text("shape"), p.text("x"), compact(p, Some(2.0))).2,
            "shape is text, not a tuple of sizes",
        ),
        (
            |p| {
                (
                    p.text("shape"),
                    p.op(b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t"),
                    compact(p, Some(2.0)),
                )
                    .2
            },
            "a shape of more than 8 dimensions",
        ),
        (
            |p| (p.text("shape"), float_shape(p, 1.5), compact(p, Some(2.0))).2,
            "shape holds what is no size",
        ),
        (
            |p| {
                (
                    p.text("shape"),
                    float_shape(p, 128.0),
                    compact(p, Some(2.0)),
                )
                    .2
            },
            "2",
        ),
    ]
}

fn float_shape(pickle: &mut Pickle, size: f64) {
    pickle.op(b"](");
    float(pickle, size);
    pickle.op(b"e");
}

#[test]
fn a_chunk_is_read_whole_or_refused() {
    for name in [NORM, "module.model.norm.weight"] {
        for (write, expected) in chunk_faults() {
            let file = one_chunk(name, write);
            let expected = match expected {
                "1" | "2" => expected.to_owned(),
                // Nothing says that the name has a prefix.
                "values are no floats" if name != NORM => "candidate_empty".to_owned(),
                _ => format!("candidate_malformed {name}: {expected}"),
            };
            expect(&expected, read(Format::PtChunks, &file), &expected);
        }
    }
    let counter = one_chunk("bn.num_batches_tracked", |p| {
        tensor(p, "indices", "Int");
        tensor(p, "values", "Long");
    });
    let none = "candidate_empty the candidate has no entries; of these the type cannot";
    expect(&"a counter", read(Format::PtChunks, &counter), none);
    let unknown = one_chunk("bn.running_mean", |p| {
        tensor(p, "indices", "Int");
        tensor(p, "values", "Float");
    });
    expect(
        &"a mean",
        read(Format::PtChunks, &unknown),
        "candidate_unknown_tensor",
    );
}

#[test]
fn a_pickle_without_a_list_of_chunks_says_what_it_has() {
    let file = |operations: &[u8]| torch_zip([b"\x80\x02", operations].concat(), Vec::new());
    let no_list = "candidate_malformed the pickle has no list of chunks; it has the keys";
    let cases: [(&[u8], String); 8] = [
        (b"}.", format!("{no_list} none")),
        (
            b"}(X\x06\0\0\0ChunksN\x88\x88u.",
            format!("{no_list} \"Chunks\""),
        ),
        (b"}(X\x06\0\0\0chunksNu.", format!("{no_list} \"chunks\"")),
        (
            b"}(X\x06\0\0\0chunks}u.",
            "candidate_malformed chunks is a map, not a list of chunks".into(),
        ),
        (
            b"}(X\x06\0\0\0chunks]Nau.",
            "candidate_malformed a chunk is None, not a map".into(),
        ),
        (
            b"}(X\x06\0\0\0chunks]}(X\x01\0\0\0kNuau.",
            "candidate_malformed a chunk has no name; it has the keys \"k\"".into(),
        ),
        (
            b"].",
            "candidate_malformed the pickle is a list, not a map".into(),
        ),
        (
            b"}(X\x06\0\0\0chunks)X\x04\0\0\0lossG\x7f\xf8\0\0\0\0\0\0u.",
            "candidate_empty the candidate has no entries; it has the keys \"chunks\", \"loss\""
                .into(),
        ),
    ];
    for (operations, expected) in cases {
        let read = read(Format::PtChunks, &file(operations));
        expect(&operations.escape_ascii(), read, &expected);
    }
}

/// Bytes of another format, and how they are called; none where only their beginning is shown.
fn strangers() -> Vec<(Vec<u8>, &'static str)> {
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::Write::write_all(&mut encoder, bytes).unwrap();
        encoder.finish().unwrap()
    };
    let noise: Vec<u8> = (0..2_000_000_u32)
        .map(|n| (n ^ n >> 7) as u8 | 0x80)
        .collect();
    let escapes = b"\x7fELF\\".repeat(1_000_000);
    let pickle = b"\x80\x02}q\0X\x0b\0\0\0head.weightK\x01s.".to_vec();
    let legacy = model_file("legacy.pt");
    let sized = |length: u64, rest: &[u8]| [&length.to_le_bytes(), rest].concat();
    vec![
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n".to_vec(),
            "begins with \"version https://git-lfs.github.com/spec/v1\" (a Git LFS pointer",
        ),
        (
            b"<!DOCTYPE html><html><head><title>404</title></head></html>".to_vec(),
            "(a web page)",
        ),
        (
            b"\r\n<HTML>moved</HTML>".to_vec(),
            "begins with \"\\r\" (a web page)",
        ),
        (
            b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>".to_vec(),
            "(XML, as buckets answer)",
        ),
        (
            b"404: Not Found".to_vec(),
            "begins with \"404: Not Found\" (text)",
        ),
        (gzip(b"{}"), "(compressed with gzip)"),
        // Its first eight bytes are no large number.
        (gzip(&noise), "(compressed with gzip)"),
        (pickle, "(a pickle)"),
        (legacy, "(the older format of torch.save"),
        (
            b"\x82\xabhead.weight\x83\xa1k\x01".to_vec(),
            "(MessagePack)",
        ),
        (
            b"\x93NUMPY\x01\0v\0{'descr': '<f4'}".to_vec(),
            "(a numpy array)",
        ),
        (b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), "(GGUF)"),
        (
            b"\x08\x0a\x12\x07pytorch\x1a\x062.15.0".to_vec(),
            "(an ONNX model)",
        ),
        (noise, "begins with \"\\x80\\x81"),
        (escapes, "begins with \"\\x7fELF\\\\"),
        (sized(u64::MAX, b"noise"), "begins with \"\\xff\\xff"),
    ]
}

fn model_file(name: &str) -> Vec<u8> {
    let folder = super::model_dir().join("candidates/formats");
    std::fs::read(folder.join(name)).unwrap()
}

#[test]
fn what_is_of_another_format_is_called_what_it_is() {
    let formats = [
        (Format::Safetensors, "not safetensors: "),
        (Format::PtChunks, "not a zip archive: "),
        (Format::BinaryV2, "not binary_v2 JSON: "),
    ];
    let json = json!({NORM: entry(NORM)}).to_string().into_bytes();
    let file = tensors(&[zeros("a", Dtype::F32, &[2])]);
    let torch = one_chunk(NORM, |p| compact(p, Some(2.0)));
    let others = [
        (json, "(JSON)", Format::BinaryV2),
        (file, "(safetensors)", Format::Safetensors),
        (
            torch,
            "(a zip archive, as torch.save writes)",
            Format::PtChunks,
        ),
    ];
    for (format, begin) in formats {
        let own = |(.., of): &&(Vec<u8>, &str, Format)| *of != format;
        let others = others.iter().filter(own);
        let others = others.map(|(bytes, words, _)| (bytes.clone(), *words));
        for (bytes, words) in strangers().into_iter().chain(others) {
            let said = told(read(format, &bytes));
            let expected = format!("candidate_malformed {begin}begins with \"");
            assert!(
                said.starts_with(&expected) && said.contains(words),
                "{words}: {said}"
            );
            assert!(said.is_ascii() && said.len() < 400, "{said}");
            // The same within zstd, and with zstd that the job does not mention.
            let packed = zstd(&bytes);
            let inside = told(read_compressed(format, Some(Compression::Zstd), &packed));
            let large = inside.starts_with("candidate_too_large inflates");
            assert!(
                inside == said || large && bytes.len() > 1 << 20,
                "{words}: {inside}"
            );
            let forgotten = told(read(format, &packed));
            let hint = "the job does not say \"compression\": \"zstd\"";
            assert!(
                forgotten.starts_with(&expected) && forgotten.ends_with(hint),
                "{forgotten}"
            );
            let unpacked = told(read_compressed(format, Some(Compression::Zstd), &bytes));
            assert!(
                unpacked.starts_with("candidate_malformed not zstd: begins with"),
                "{unpacked}"
            );
        }
        let empty = told(read(format, b""));
        assert!(
            empty.starts_with("candidate_malformed not ") && empty.ends_with("is empty"),
            "{empty}"
        );
    }
}

#[test]
fn a_broken_file_of_the_right_format_is_no_stranger() {
    let file = tensors(&[zeros(OTHER, Dtype::F32, &shape(OTHER))]);
    let cut = read(Format::Safetensors, &file[..40]);
    expect(
        &"cut",
        cut,
        "candidate_malformed not safetensors: of a header of",
    );
    let header = format!("{{{}}}", " ".repeat(199_998));
    let long = [&200_000_u64.to_le_bytes(), header.as_bytes()].concat();
    let long = read(Format::Safetensors, &long);
    expect(
        &"long",
        long,
        "candidate_too_large a header of 200000 bytes",
    );
    let torch = one_chunk(NORM, |p| compact(p, Some(2.0)));
    let cut = read(Format::PtChunks, &torch[..torch.len() / 2]);
    expect(&"cut", cut, "candidate_malformed not a zip archive: ");
    let other = zip(&[("a/constants.pkl".into(), b"x".to_vec())]);
    let other = read(Format::PtChunks, &other);
    expect(
        &"other",
        other,
        "candidate_malformed a zip without data.pkl",
    );
    let cut = read(Format::BinaryV2, b"{\"a\": ");
    expect(&"cut", cut, "candidate_malformed not binary_v2 JSON: EOF");
}

/// The test model, all of whose tensors have names that begin so.
fn wrapped(prefix: &str) -> (TempDir, Package) {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("package");
    make(&out);
    let path = out.join("model.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    // The graph's own initializers are the weights.
    for field in ["weights", "aliases"] {
        manifest.as_object_mut().unwrap().remove(field);
    }
    let tensors = manifest["tensors"].as_object().unwrap().iter();
    let tensors = tensors.map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone()));
    manifest["tensors"] = Value::Object(tensors.collect());
    std::fs::write(path, manifest.to_string()).unwrap();
    let package = Package::load(&out, false, &[]).unwrap();
    (folder, package)
}

/// Three entries, under these names.
fn update(names: [&str; 3]) -> Vec<Entry> {
    let entry = |(name, of): (&str, &str)| Entry {
        name: name.into(),
        shape: shape(of),
        indices: vec![3, 1, 7, 0],
        values: vec![0.5, -0.25, 0.125, 1.0],
    };
    names
        .into_iter()
        .zip([NORM, OTHER, EMBEDDING])
        .map(entry)
        .collect()
}

#[test]
fn a_prefix_of_all_names_makes_no_difference_in_any_container() {
    let wrappers = [
        "module.",
        "_orig_mod.",
        "base_model.model.",
        "module._orig_mod.",
        "my/own.m.",
    ];
    let plain = [NORM, OTHER, EMBEDDING];
    let (_folder, exported) = wrapped("m.");
    let containers = Container::all(&Kind::SPARSE, Width::F32);
    for container in containers {
        let read = |package: &Package, names: [&str; 3]| {
            let bytes = container.write(&update(names));
            let (format, compression) = super::format(container);
            read_for(package, format, compression, &bytes)
        };
        let (package, _) = model();
        let expected = read(package, plain).unwrap();
        for prefix in wrappers {
            let names = plain.map(|name| format!("{prefix}{name}"));
            let names = names.each_ref().map(String::as_str);
            assert_eq!(
                read(package, names),
                Ok(expected.clone()),
                "{container:?} {prefix}"
            );
            // Of some names only, it is none.
            let mixed = [names[0], names[1], plain[2]];
            let said = told(read(package, mixed));
            let first = format!("the model has no trainable tensor {:?}", mixed[0]);
            let second = format!("the model has no trainable tensor {:?}", mixed[1]);
            assert!(
                said.contains(&first) || said.contains(&second),
                "{container:?}: {said}"
            );
        }
        let found = read(&exported, plain).unwrap();
        let [ours, theirs] = [&expected, &found].map(|update| update.tensors.iter());
        assert!(
            ours.zip(theirs)
                .all(|(a, b)| (&a.indices, &a.values) == (&b.indices, &b.values))
        );
        let compiled = plain.map(|name| format!("_orig_mod.{name}"));
        let compiled = compiled.each_ref().map(String::as_str);
        assert_eq!(read(&exported, compiled), Ok(found), "{container:?}");
        let other = plain.map(|name| format!("other.{name}"));
        let other = other.each_ref().map(String::as_str);
        expect(
            &"another part",
            read(&exported, other),
            "candidate_unknown_tensor",
        );
    }
}

#[test]
fn what_stands_under_a_name_with_a_prefix_is_an_entry_too() {
    let name = |name: &str| format!("module.{name}");
    for fields in [
        json!({"k": null}),
        json!({"k": null, "K": 2, "shape": null}),
    ] {
        let faulty = entry_but(OTHER, fields);
        let body = json!({name(NORM): entry(NORM), name(OTHER): faulty}).to_string();
        let expected = format!("candidate_malformed {}: k is missing", name(OTHER));
        expect(&body, read(Format::BinaryV2, body.as_bytes()), &expected);
    }
    // The alias, and in a list.
    let body = json!([
        {"name": name(ALIAS), "k": 2, "data": data()},
        {"param_name": name(NORM), "k": 2, "data": data()},
    ]);
    expect(
        &body,
        read(Format::BinaryV2, body.to_string().as_bytes()),
        "4",
    );
    // Integers are looked at under their new names.
    let file = |dtype| {
        tensors(&[
            zeros("module.model.norm.weight", Dtype::F32, &[128]),
            zeros(
                "module.model.layers.0.input_layernorm.weight",
                dtype,
                &[128],
            ),
            zeros("bn.num_batches_tracked", Dtype::I64, &[]),
        ])
    };
    assert_eq!(shape(NORM), [128]);
    expect(
        &"floats",
        read(Format::Safetensors, &file(Dtype::F32)),
        "256",
    );
    let refused = format!("candidate_malformed {}: values of I32", name(OTHER));
    expect(
        &"integers",
        read(Format::Safetensors, &file(Dtype::I32)),
        &refused,
    );
}

#[test]
fn whole_floats_are_integers_and_others_are_not() {
    for (number, sound) in [
        ("2.0", true),
        ("2e0", true),
        ("20e-1", true),
        ("2.5", false),
        ("-2.0", false),
    ] {
        let shape = format!("{:?}.0", shape(NORM)[0]);
        let body = format!(
            "{{\"{NORM}\":{{\"k\":{number},\"shape\":[{shape}],\"data\":\"{}\"}}}}",
            data()
        );
        let expected = match sound {
            true => "2".to_owned(),
            false => format!("candidate_malformed {NORM}: k is a number that is negative"),
        };
        expect(&body, read(Format::BinaryV2, body.as_bytes()), &expected);
        let k = number.parse().unwrap();
        let file = one_chunk(NORM, |p| compact(p, Some(k)));
        let expected = match sound {
            true => expected,
            false => format!("candidate_malformed {NORM}: k is a number, not a natural one"),
        };
        expect(&number, read(Format::PtChunks, &file), &expected);
    }
}
