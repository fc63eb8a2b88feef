//! Versions live beside each other: what every released version wrote is read by this one, and what this one writes is
//! read by programs of that time. `tests/released/README.md` says what the files are.

#![expect(
    clippy::expect_used,
    reason = "a failed step of a test is a failed test"
)]

use std::path::{Path, PathBuf};

use scorer::broker::topology::Topology;
use scorer::cli::{self, Exit};
use scorer::config::{self, Config, Layers};
use scorer::model::manifest::Manifest;
use scorer::protocol::control::{self, Command, ControlAnswer};
use scorer::protocol::document::from_json;
use scorer::protocol::encoding::Encoding;
use scorer::protocol::failure::Code;
use scorer::protocol::heartbeat::{Accepts, Record};
use scorer::protocol::job::{self, Compression, Format, Semantics, Validation};
use scorer::protocol::message::{
    Blob, CandidateMessage, JobMessage, ScoreMessage, ScoreValidation, V1, ValidateMessage,
};
use scorer::protocol::result::ResultMessage;
use scorer::protocol::state::{Detail, State};
use scorer::protocol::update_manifest;
use scorer::telemetry::metrics;
use serde_json::{Value, json};
use strum::{IntoEnumIterator, VariantArray};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The paths in a folder, in order.
fn paths(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut found: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    found.sort();
    assert!(!found.is_empty(), "{} is empty", folder.display());
    found
}

/// The folders of all released versions.
fn versions() -> Vec<PathBuf> {
    let mut found = paths(&root().join("tests/released"));
    found.retain(|path| path.is_dir());
    found
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn parsed(path: &Path) -> Value {
    serde_json::from_slice(&read(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The name of a message's schema, which its file's name begins with.
fn schema_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let end = name.find('-').expect("SCHEMA-WHAT");
    name[..end].to_owned()
}

fn encoding_of(path: &Path) -> Encoding {
    match path.extension().and_then(|end| end.to_str()) {
        Some("json") => Encoding::Json,
        Some("msgpack") => Encoding::MessagePack,
        other => panic!("{other:?}"),
    }
}

/// A message as this version understands it; none where it understands it as a command, not as a record.
fn understood(schema: &str, body: &[u8], encoding: Encoding) -> Option<Value> {
    let value = |found: Result<Value, serde_json::Error>| Some(found.expect("JSON"));
    match schema {
        "score_job.v1" => {
            job::decode(body, encoding).expect("a job");
            None
        }
        "control.v1" => {
            control::decode(body, encoding).expect("a command");
            None
        }
        "update_manifest.v1" => {
            let read = update_manifest::decode(body).expect("a manifest");
            value(serde_json::to_value(read))
        }
        "control_answer.v1" => {
            let read = ControlAnswer::decode(body, encoding).expect("an answer");
            value(serde_json::to_value(read))
        }
        "score_result.v1" => {
            let read = ResultMessage::decode(body, encoding).expect("a result");
            value(serde_json::to_value(read))
        }
        "heartbeat.v1" => {
            let text = std::str::from_utf8(body).expect("text");
            value(serde_json::to_value(Record::read(text).expect("a record")))
        }
        "model_package.v1" => {
            let (read, _) = Manifest::decode(body).expect("a package");
            value(serde_json::to_value(read))
        }
        other => panic!("what is {other}?"),
    }
}

/// Whether everything in the old value is in the new one.
fn is_kept(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => old.iter().all(|(name, value)| {
            let found = new.get(name).unwrap_or(&Value::Null);
            is_kept(value, found)
        }),
        (Value::Array(old), Value::Array(new)) => {
            let mut pairs = old.iter().zip(new);
            old.len() == new.len() && pairs.all(|(old, new)| is_kept(old, new))
        }
        // 43 is 43.0.
        (Value::Number(old), Value::Number(new)) => old.as_f64() == new.as_f64(),
        (old, new) => old == new,
    }
}

#[test]
fn what_a_released_version_wrote_is_read_to_the_last_field() {
    for version in versions() {
        for path in paths(&version.join("messages")) {
            let (body, encoding) = (read(&path), encoding_of(&path));
            if let Some(now) = understood(&schema_of(&path), &body, encoding) {
                let then: Value = match encoding {
                    Encoding::Json => from_json(&body).expect("JSON"),
                    Encoding::MessagePack => rmp_serde::from_slice(&body).expect("MessagePack"),
                };
                assert!(is_kept(&then, &now), "{}:\n{then}\n{now}", path.display());
            }
        }
    }
}

/// A schema of a released version.
fn reader(version: &Path, schema: &str) -> jsonschema::Validator {
    let schema = parsed(&version.join(format!("schemas/{schema}.json")));
    jsonschema::validator_for(&schema).expect("a schema")
}

#[track_caller]
fn assert_read(reader: &jsonschema::Validator, document: &Value, what: &str) {
    let errors: Vec<String> = reader
        .iter_errors(document)
        .map(|e| format!("{}: {e}", e.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{what}: {errors:?}");
}

/// What the clients of a released version can have asked for: workers answer nothing else to them.
fn accepts(version: &Path) -> Vec<String> {
    serde_json::from_value(parsed(&version.join("accepts.json"))).expect("words")
}

#[test]
fn what_is_written_today_is_read_by_clients_of_that_time() {
    for version in versions() {
        let asked = accepts(&version);
        for schema in ["score_result.v1", "heartbeat.v1", "control_answer.v1"] {
            let reader = reader(&version, schema);
            let all = paths(&root().join("schemas/examples/valid"));
            let all = all.iter().filter(|path| schema_of(path) == schema);
            let mut seen = 0;
            for path in all {
                let mut document = parsed(path);
                let kind = document["kind"].as_str().unwrap_or_default().to_owned();
                if schema == "score_result.v1" && !asked.contains(&kind) {
                    continue;
                }
                document["field_of_tomorrow"] = json!({ "colour": "red" });
                assert_read(&reader, &document, &path.display().to_string());
                seen += 1;
            }
            assert!(seen > 0, "{schema}");
        }
    }
}

/// Jobs with every field that there is, as the Rust client sends them.
fn jobs() -> [JobMessage; 2] {
    let validation = || {
        Some(Validation {
            shards: Some(vec![1, 2]),
            nonce: "epoch-1".into(),
        })
    };
    let context = || Some(rmpv::Value::Map(vec![("miner_id".into(), "m7".into())]));
    let candidate = CandidateMessage {
        format: Format::Safetensors,
        compression: Some(Compression::Zstd),
        semantics: Semantics::Gradient,
        learning_rate: Some(0.1),
        url: None,
        data: Some(Blob(vec![1, 2, 3])),
        sha256: Some("1".repeat(64)),
        size: Some(3),
    };
    let score = ScoreMessage {
        v: V1,
        submission_id: "epoch-1:miner-7".into(),
        model: Some("tinylm".into()),
        model_version: 7,
        candidate,
        validation: validation().map(|Validation { shards, nonce }| ScoreValidation {
            shards,
            nonce,
            stop: None,
        }),
        deadline_ms: Some(1_790_000_000_000),
        context: context(),
    };
    let validate = ValidateMessage {
        v: V1,
        submission_id: "epoch-1:loss".into(),
        model: Some("tinylm".into()),
        model_version: Some(7),
        validation: validation(),
        deadline_ms: Some(1_790_000_000_000),
        context: context(),
    };
    [JobMessage::Score(score), JobMessage::Validate(validate)]
}

#[test]
fn the_jobs_that_every_worker_knows_are_read_by_workers_of_that_time() {
    for version in versions() {
        let reader = reader(&version, "score_job.v1");
        let asked = accepts(&version);
        for job in jobs() {
            let document = serde_json::to_value(&job).expect("JSON");
            assert!(
                asked.contains(&job.needs().as_str().to_owned()),
                "{document}"
            );
            assert_read(&reader, &document, &document["kind"].to_string());
        }
    }
}

#[test]
fn a_package_of_today_is_read_by_workers_of_that_time() {
    let made = parsed(&root().join("src/cli/init/package/model.json"));
    for version in versions() {
        assert_read(&reader(&version, "model_package.v1"), &made, "model.json");
    }
}

#[test]
fn a_worker_that_does_not_say_what_it_accepts_is_of_the_first_version() {
    let first = versions().swap_remove(0);
    let silent = serde_json::to_value(Accepts::default()).expect("JSON");
    assert_eq!(silent, json!(accepts(&first)));
}

/// A command and its options, and those below it.
fn command_line(command: &clap::Command, called: &str, found: &mut Vec<String>) {
    let options = command.get_arguments().filter_map(clap::Arg::get_long);
    found.extend(options.map(|option| format!("{called} --{option}").trim().to_owned()));
    for below in command.get_subcommands() {
        let called = format!("{called} {}", below.get_name());
        command_line(below, called.trim(), found);
        found.push(called.trim().to_owned());
    }
}

/// What this version has, as `names.json` lists it.
fn names() -> Value {
    let mut commands = Vec::new();
    command_line(&cli::command(), "", &mut commands);
    let config = Config::load(&Layers::default()).expect("the defaults");
    let metrics = metrics::descriptions().expect("metrics").into_iter();
    json!({
        "codes": Code::VARIANTS.iter().map(|code| code.as_str()).collect::<Vec<_>>(),
        "command_line": commands,
        "configuration": config::key_names().collect::<Vec<_>>(),
        "control": Command::VARIANTS.iter().map(|command| command.as_str()).collect::<Vec<_>>(),
        "details": Detail::iter().map(|detail| detail.to_string()).collect::<Vec<_>>(),
        "exit_codes": Exit::iter().map(|exit| exit as i32).collect::<Vec<_>>(),
        "metrics": metrics.map(|metric| metric.name).collect::<Vec<_>>(),
        "states": State::VARIANTS.iter().map(|state| state.as_str()).collect::<Vec<_>>(),
        "topology": Topology::new(&config.amqp, "tinylm"),
    })
}

/// What is in the old lists and not in the new ones.
fn lost(old: &Value, new: &Value, found: &mut Vec<Value>) {
    match (old, new) {
        (Value::Object(old), Value::Object(_)) => {
            old.iter()
                .for_each(|(name, old)| lost(old, &new[name], found));
        }
        (Value::Array(old), Value::Array(new)) => {
            found.extend(old.iter().filter(|item| !new.contains(item)).cloned());
        }
        (old, new) if old == new => {}
        (old, _) => found.push(old.clone()),
    }
}

#[test]
fn no_name_of_a_released_version_is_gone() {
    let names = names();
    for version in versions() {
        let mut gone = Vec::new();
        lost(&parsed(&version.join("names.json")), &names, &mut gone);
        assert!(gone.is_empty(), "{}: {gone:?}", version.display());
    }
}
