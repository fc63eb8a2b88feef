//! The committed schemas are the generated ones, and every example is decoded by the real decoder.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

use std::path::{Path, PathBuf};

use scorer::cli::schemas;
use scorer::protocol::control;
use scorer::protocol::document::from_json;
use scorer::protocol::encoding::Encoding;
use scorer::protocol::job::{self, Undecodable};
use serde_json::{Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(
        &std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())),
    )
    .unwrap()
}

fn examples(kind: &str, name: &str) -> Vec<PathBuf> {
    let folder = folder().join("examples").join(kind);
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    found.retain(|p| p.file_name().unwrap().to_string_lossy().starts_with(name));
    assert!(!found.is_empty(), "no {kind} example of {name}");
    found
}

/// What the crate itself says of a message.
fn decoded(name: &str, body: &[u8], encoding: Encoding) -> Result<(), String> {
    match name {
        "score_job.v1" => job::decode(body, encoding).map(drop).map_err(|e| match e {
            Undecodable::Anonymous(failure) | Undecodable::Named { failure, .. } => failure.message,
        }),
        "control.v1" => control::decode(body, encoding).map(drop),
        "control_answer.v1" => control::ControlAnswer::decode(body, encoding).map(drop),
        "score_result.v1" => {
            scorer::protocol::result::ResultMessage::decode(body, encoding).map(drop)
        }
        "heartbeat.v1" => from_json::<scorer::protocol::heartbeat::Record>(body).map(drop),
        "model_package.v1" => scorer::model::manifest::Manifest::decode(body)
            .map(drop)
            .map_err(|e| e.0),
        "update_manifest.v1" => scorer::protocol::update_manifest::decode(body).map(drop),
        other => panic!("no decoder for {other}"),
    }
}

/// Those that come in MessagePack, too.
const BOTH: [&str; 4] = [
    "score_job.v1",
    "control.v1",
    "control_answer.v1",
    "score_result.v1",
];

/// What a schema cannot say, in the decoder's words: it compares parts of a document with each other.
const BEYOND_A_SCHEMA: [(&str, &str); 7] = [
    ("score_job.v1", "is given twice"),
    ("update_manifest.v1", "live_version: no entry leads"),
    ("update_manifest.v1", ".to: the same as from"),
    ("model_package.v1", "shards: ids must ascend"),
    ("model_package.v1", "aliases."),
    ("model_package.v1", "is the place of both"),
    (
        "model_package.v1",
        "objective.label_shift: must be at least 1 and at most the window",
    ),
];

#[test]
fn the_committed_schemas_are_the_generated_ones() {
    for name in schemas::NAMES {
        let generated = serde_json::to_value(schemas::schema(name).unwrap()).unwrap();
        let committed = read(&folder().join(format!("{name}.json")));
        assert_eq!(
            committed, generated,
            "run: scorer schema {name} > schemas/{name}.json"
        );
    }
}

#[test]
fn every_valid_example_is_accepted_by_schema_and_decoder() {
    for name in schemas::NAMES {
        let validator =
            jsonschema::validator_for(&read(&folder().join(format!("{name}.json")))).unwrap();
        for path in examples("valid", name) {
            let errors: Vec<String> = validator
                .iter_errors(&read(&path))
                .map(|e| e.to_string())
                .collect();
            assert!(errors.is_empty(), "{}: {errors:?}", path.display());
            decoded(name, &std::fs::read(&path).unwrap(), Encoding::Json)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }
}

#[test]
fn every_invalid_example_is_refused_by_the_decoder() {
    for name in schemas::NAMES {
        for path in examples("invalid", name) {
            assert!(
                decoded(name, &std::fs::read(&path).unwrap(), Encoding::Json).is_err(),
                "{} is accepted",
                path.display()
            );
        }
    }
}

/// Every place of a document but what is within the maps that are a stranger's own.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        _ if at.ends_with("/context") || at.ends_with("/detail") => {}
        Value::Array(items) => {
            // What holds for one item holds for the others.
            for (n, item) in items.iter().enumerate().take(2) {
                places(item, &format!("{at}/{n}"), found);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                places(field, &format!("{at}/{}", name.replace('/', "~1")), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What is put in the place of a value, and what is done to it.
fn mutations(value: &Value) -> Vec<Value> {
    let mut all = vec![
        json!(null),
        json!(true),
        json!([]),
        json!({}),
        json!([null]),
        json!({"colour": "red"}),
    ];
    let whole = [
        0,
        1,
        7,
        255,
        256,
        1 << 20,
        u64::from(u32::MAX),
        1 << 53,
        u64::MAX,
    ];
    all.extend(whole.map(|n| json!(n)));
    all.extend([json!(-1), json!(i64::MIN)]);
    let floats = [
        0.0,
        -0.0,
        1.0,
        7.0,
        7.5,
        -7.0,
        5e-324,
        256.0,
        4_294_967_296.0,
        9_007_199_254_740_992.0,
        9_223_372_036_854_775_808.0,
        -9_223_372_036_854_775_808.0,
        18_446_744_073_709_551_616.0,
        1e300,
    ];
    all.extend(floats.map(|float| json!(float)));
    let texts = [
        "",
        "x",
        "a b",
        "e30=",
        "e31=",
        "e30",
        "e30=\n",
        "gradient",
        "https://h/x",
    ];
    all.extend(texts.map(|text| json!(text)));
    for (letter, length) in [("a", 64), ("A", 64), ("é", 64), ("é", 65), ("x", 129)] {
        all.push(json!(letter.repeat(length)));
    }
    match value {
        Value::Object(fields) => {
            for extra in [json!(1), json!(null)] {
                let mut fields = fields.clone();
                fields.insert("colour".into(), extra);
                all.push(Value::Object(fields));
            }
        }
        Value::Array(items) => {
            for more in [items.first().cloned(), Some(json!(null))] {
                all.push(items.iter().cloned().chain(more).collect());
            }
        }
        Value::Number(number) => all.extend(number.as_f64().map(|float| json!(float))),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
    all
}

/// The same with one place replaced, or without it.
fn bent(document: &Value, place: &str, by: Option<Value>) -> Value {
    let mut bent = document.clone();
    let Some(value) = by else {
        let (holder, name) = place.rsplit_once('/').unwrap();
        match bent.pointer_mut(holder).unwrap() {
            Value::Object(fields) => drop(fields.remove(&name.replace("~1", "/"))),
            Value::Array(items) => drop(items.remove(name.parse().unwrap())),
            other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => {
                panic!("{other} holds nothing")
            }
        }
        return bent;
    };
    *bent.pointer_mut(place).unwrap() = value;
    bent
}

fn validator(name: &str) -> jsonschema::Validator {
    let schema = serde_json::to_value(schemas::schema(name).unwrap()).unwrap();
    jsonschema::validator_for(&schema).unwrap()
}

#[track_caller]
fn agree(name: &str, validator: &jsonschema::Validator, document: &Value) {
    let valid = validator.is_valid(document);
    let mut encodings = vec![(Encoding::Json, document.to_string().into_bytes())];
    if BOTH.contains(&name) {
        encodings.push((
            Encoding::MessagePack,
            testkit::encoding::Encoding::MessagePack.encode(document),
        ));
    }
    for (encoding, body) in encodings {
        let verdict = decoded(name, &body, encoding);
        let excused = verdict.as_ref().is_err_and(|why| {
            let mut known = BEYOND_A_SCHEMA.iter();
            known.any(|(of, phrase)| *of == name && why.contains(phrase))
        });
        assert!(
            excused || verdict.is_ok() == valid,
            "{encoding:?}: the schema {name} says {valid}, the decoder {verdict:?}, of {document}"
        );
    }
}

#[test]
fn schema_and_decoder_agree_on_whatever_is_done_to_a_valid_message() {
    for name in schemas::NAMES {
        let validator = validator(name);
        let mut tried = 0;
        for path in examples("valid", name) {
            let document = read(&path);
            let mut found = Vec::new();
            places(&document, "", &mut found);
            for place in found {
                for by in mutations(document.pointer(&place).unwrap()) {
                    agree(name, &validator, &bent(&document, &place, Some(by)));
                    tried += 1;
                }
                if !place.is_empty() {
                    agree(name, &validator, &bent(&document, &place, None));
                }
            }
        }
        assert!(tried > 100, "{name}: {tried}");
    }
}

/// `SplitMix64`.
fn draw(state: &mut u64, below: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    usize::try_from((z ^ (z >> 31)) % below as u64).unwrap()
}

#[test]
fn schema_and_decoder_agree_on_messages_that_are_bent_in_several_places() {
    let mut state = 19;
    let manifests = ["update_manifest.v1", "model_package.v1"];
    for name in BOTH.into_iter().chain(manifests) {
        let (validator, seeds) = (validator(name), examples("valid", name));
        for _ in 0..500 {
            let mut document = read(&seeds[draw(&mut state, seeds.len())]);
            for _ in 0..2 + draw(&mut state, 2) {
                let mut found = Vec::new();
                places(&document, "", &mut found);
                let place = &found[draw(&mut state, found.len())];
                let mut by = mutations(document.pointer(place).unwrap());
                let by = by.swap_remove(draw(&mut state, by.len()));
                let removed = !place.is_empty() && draw(&mut state, 3) == 0;
                document = bent(&document, place, (!removed).then_some(by));
            }
            agree(name, &validator, &document);
        }
    }
}
