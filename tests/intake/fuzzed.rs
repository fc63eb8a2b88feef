//! What the fuzzers begin with, and whatever they found, on every run of the tests.

use std::path::{Path, PathBuf};

use super::{fuzz, model_dir};

/// A target, and where its seeds are; of candidates the first byte is put before them.
type Target = (&'static str, fn(&[u8]));

const CANDIDATES: [Target; 3] = [
    ("binary_v2", fuzz::binary_v2),
    ("safetensors", fuzz::safetensors),
    ("pt_chunks", fuzz::pt_chunks),
];
const OTHERS: [Target; 3] = [
    ("job", fuzz::job),
    ("manifest", fuzz::manifest),
    ("url", fuzz::url),
];

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.is_file()).collect()
}

#[test]
fn what_the_fuzzers_begin_with_is_read_without_harm() {
    let candidates = model_dir().join("candidates");
    let seeds = [files(&candidates), files(&candidates.join("formats"))].concat();
    assert!(seeds.len() > 50, "{} seeds", seeds.len());
    for path in seeds {
        let bytes = std::fs::read(&path).unwrap();
        // Whole, cut, and with a byte changed: of every file by every reader.
        let half = &bytes[..bytes.len() / 2];
        let mut changed = bytes.clone();
        changed[bytes.len() / 3] ^= 0x55;
        for body in [&bytes[..], half, &changed] {
            for (choice, (_, read)) in [0, 1].into_iter().flat_map(|c| CANDIDATES.map(|t| (c, t))) {
                read(&[&[choice], body].concat());
            }
        }
    }
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/examples");
    for folder in ["valid", "invalid"] {
        for path in files(&examples.join(folder)) {
            let bytes = std::fs::read(&path).unwrap();
            fuzz::manifest(&bytes);
            fuzz::job(&[&[0], &bytes[..]].concat());
        }
    }
}

#[test]
fn what_was_found_is_mended() {
    let findings = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/findings");
    for (name, read) in CANDIDATES.into_iter().chain(OTHERS) {
        for path in files(&findings.join(name)) {
            read(&std::fs::read(&path).unwrap());
        }
    }
}
