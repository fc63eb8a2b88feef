//! The committed schemas are the generated ones, and every example is decoded by the real decoder.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

use std::path::{Path, PathBuf};

use scorer::job::{self, Encoding};
use scorer::{control, schema};
use serde_json::Value;

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
fn decoded(name: &str, text: &[u8]) -> Result<(), String> {
    match name {
        "score_job.v1" => job::decode(text, Encoding::Json)
            .map(drop)
            .map_err(|e| format!("{e:?}")),
        "control.v1" => control::decode(text, Encoding::Json).map(drop),
        "control_answer.v1" => parse::<control::ControlAnswer>(text),
        "score_result.v1" => parse::<scorer::result::ResultMessage>(text),
        "heartbeat.v1" => parse::<scorer::heartbeat::Record>(text),
        "model_package.v1" => parse::<scorer::package::Manifest>(text),
        "update_manifest.v1" => scorer::update::manifest::decode(text).map(drop),
        other => panic!("no decoder for {other}"),
    }
}

fn parse<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<(), String> {
    serde_json::from_slice::<T>(text)
        .map(drop)
        .map_err(|e| e.to_string())
}

#[test]
fn the_committed_schemas_are_the_generated_ones() {
    for name in schema::NAMES {
        let generated = serde_json::to_value(schema::schema(name).unwrap()).unwrap();
        let committed = read(&folder().join(format!("{name}.json")));
        assert_eq!(
            committed, generated,
            "run: scorer schema {name} > schemas/{name}.json"
        );
    }
}

#[test]
fn every_valid_example_is_accepted_by_schema_and_decoder() {
    for name in schema::NAMES {
        let validator =
            jsonschema::validator_for(&read(&folder().join(format!("{name}.json")))).unwrap();
        for path in examples("valid", name) {
            let errors: Vec<String> = validator
                .iter_errors(&read(&path))
                .map(|e| e.to_string())
                .collect();
            assert!(errors.is_empty(), "{}: {errors:?}", path.display());
            decoded(name, &std::fs::read(&path).unwrap())
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }
}

#[test]
fn every_invalid_example_is_refused_by_the_decoder() {
    for name in schema::NAMES {
        for path in examples("invalid", name) {
            assert!(
                decoded(name, &std::fs::read(&path).unwrap()).is_err(),
                "{} is accepted",
                path.display()
            );
        }
    }
}
