//! Finding a checkpoint's files: the file itself, the only one in a folder, or the shards that an
//! index names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::model::files::names_in;
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
    let names = names_in(path)?.into_iter();
    let names: Vec<String> = names.map(|n| n.to_string_lossy().into_owned()).collect();
    let those = |is_it: &dyn Fn(&str) -> bool| -> Vec<&str> {
        let names = names.iter().map(String::as_str);
        names.filter(|name| is_it(name)).collect()
    };
    let usual = those(&|name| [WHOLE, INDEX].contains(&name));
    let indexes = those(&|name| !name.starts_with('.') && name.ends_with(INDEX_END));
    // The other files are the index's shards.
    let others = those(&|name| !name.starts_with('.') && name.ends_with(WHOLE_END));
    let mut found = [usual, indexes, others]
        .into_iter()
        .filter(|f| !f.is_empty());
    let why = match found.next().as_deref() {
        Some([one]) => return Ok(path.join(one)),
        None => format!("holds no checkpoint: neither {WHOLE} nor {INDEX}; give the file itself"),
        Some(several) => {
            let several = several.join(", ");
            format!("holds several checkpoints: {several}; give one of them")
        }
    };
    Err(PackageError::at(path, why))
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
