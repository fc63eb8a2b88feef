//! Files that torch and safetensors themselves have written: `tests/model/candidates/formats`, made by
//! `tests/model/generator/formats.py`.

use half::{bf16, f16};
use scorer::candidate::{Update, Versions, decode};
use scorer::protocol::failure::Failure;
use scorer::protocol::job::{Compression, Format};
use serde::Deserialize;

use super::{Bench, config, model_dir};

#[derive(Deserialize)]
struct Index {
    old_version: u64,
    new_version: u64,
    files: Vec<Listed>,
    refused: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    file: String,
    format: Format,
    compression: Option<Compression>,
    #[serde(default)]
    precision: String,
    #[serde(default)]
    source: String,
    #[serde(default)]
    code: String,
}

fn read(bench: &Bench, file: &str, listed: &Listed) -> Result<Update, Failure> {
    let bytes = std::fs::read(model_dir().join("candidates/formats").join(file)).unwrap();
    decode(
        &bytes,
        listed.format,
        listed.compression,
        bench.package(),
        (&config(&[]).candidates).into(),
    )
}

fn rounded(mut update: Update, precision: &str) -> Update {
    for value in update.tensors.iter_mut().flat_map(|t| &mut t.values) {
        *value = match precision {
            "f16" => f16::from_f32(*value).to_f32(),
            "bf16" => bf16::from_f32(*value).to_f32(),
            _ => *value,
        };
    }
    update
}

#[tokio::test(flavor = "multi_thread")]
async fn what_torch_and_safetensors_write_is_read_as_they_mean_it() {
    let bench = Bench::new(&[]).await;
    let index = std::fs::read(model_dir().join("candidates/formats/index.json")).unwrap();
    let index: Index = serde_json::from_slice(&index).unwrap();
    let json = Listed {
        file: String::new(),
        format: Format::BinaryV2,
        compression: None,
        precision: String::new(),
        source: String::new(),
        code: String::new(),
    };
    assert!(index.files.len() >= 40 && index.refused.len() >= 10);
    for listed in &index.files {
        let mut expected = rounded(
            read(&bench, &listed.source, &json).unwrap(),
            &listed.precision,
        );
        if listed.format == Format::PtChunks {
            let (old, new) = (index.old_version, index.new_version);
            expected.versions = Some(Versions { old, new });
        }
        let found = read(&bench, &listed.file, listed);
        assert_eq!(found.as_ref(), Ok(&expected), "{}", listed.file);
    }
    for listed in &index.refused {
        let refused = read(&bench, &listed.file, listed).unwrap_err();
        assert_eq!(
            refused.code.as_str(),
            listed.code,
            "{}: {refused}",
            listed.file
        );
    }
}
