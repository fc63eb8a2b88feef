//! Finding a checkpoint's files: the file itself, the only one in a folder, or the shards that an
//! index names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::model::manifest::PackageError;

/// File names of a checkpoint that has a folder of its own.
pub(super) const WHOLE: &str = "model.safetensors";
const WHOLE_END: &str = ".safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const INDEX_END: &str = ".safetensors.index.json";

/// The largest index that is read: several times a thousand bytes for each of ten thousand tensors.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The file to read: for a folder, the only checkpoint in it.
pub(super) fn locate(path: &Path) -> Result<PathBuf, PackageError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let broken = |why: String| PackageError(format!("{}: {why}", path.display()));
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(path).map_err(|e| broken(e.to_string()))? {
        let entry = entry.map_err(|e| broken(e.to_string()))?;
        names.insert(entry.file_name().to_string_lossy().into_owned());
    }
    let ending = |end: &str| -> Vec<&str> {
        let visible = names.iter().filter(|name| !name.starts_with('.'));
        visible
            .map(String::as_str)
            .filter(|n| n.ends_with(end))
            .collect()
    };
    let usual: Vec<&str> = [WHOLE, INDEX]
        .into_iter()
        .filter(|n| names.contains(*n))
        .collect();
    let indexes = ending(INDEX_END);
    // The other files are the index's shards.
    let others = if indexes.is_empty() {
        ending(WHOLE_END)
    } else {
        indexes
    };
    let found = if usual.is_empty() { others } else { usual };
    match found.as_slice() {
        [one] => Ok(path.join(one)),
        [] => Err(broken(format!(
            "holds no checkpoint: neither {WHOLE} nor {INDEX}; give the file itself"
        ))),
        several => Err(broken(format!(
            "holds several checkpoints: {}; give one of them",
            several.join(", ")
        ))),
    }
}

/// The index of a sharded checkpoint, in the format of the Hugging Face libraries.
#[derive(Deserialize)]
struct Index {
    /// The file of each tensor.
    weight_map: BTreeMap<String, String>,
}

pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>, String> {
    let found = std::fs::metadata(path).map_err(|e| e.to_string())?;
    if !found.is_file() {
        return Err("is no regular file".into());
    }
    let size = found.len();
    if size > MAX_INDEX_BYTES {
        return Err(format!(
            "{size} bytes, where the index of a sharded checkpoint has at most {MAX_INDEX_BYTES}"
        ));
    }
    let text = std::fs::read(path).map_err(|e| e.to_string())?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| format!("not the index of a sharded checkpoint: {e}"))?;
    if index.weight_map.is_empty() {
        return Err("weight_map names no tensors".into());
    }
    Ok(index.weight_map)
}
