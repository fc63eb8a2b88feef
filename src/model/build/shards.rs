//! The shards in a folder, by the number in the name of each file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::disk::name_of;
use super::staging::STAGING;
use crate::model::files::names_in;
use crate::model::manifest::PackageError;

/// Shard files by the number in their names, and a note of the files that are not shards.
pub(super) fn find_shards(
    from: &Path,
) -> Result<(BTreeMap<u64, PathBuf>, Vec<String>), PackageError> {
    let (mut shards, mut others) = (BTreeMap::new(), Vec::new());
    for name in names_in(from)? {
        let (path, name) = (from.join(&name), name.to_string_lossy().into_owned());
        if name.starts_with(STAGING) {
            continue;
        }
        // Other systems leave files of their own: `._shard_1.safetensors`, `.DS_Store`.
        if name.starts_with('.') || !name.ends_with(".safetensors") || !path.is_file() {
            others.push(name);
            continue;
        }
        let id = shard_id(&name).map_err(|why| PackageError::at(&path, why))?;
        if let Some(first) = shards.insert(id, path) {
            let first = name_of(&first);
            let why = format!(
                "{first} and {name} are both shard {id}: the first number in a file's name is the shard's id; rename one of them"
            );
            return Err(PackageError::at(from, why));
        }
    }
    if shards.is_empty() {
        return Err(PackageError::at(from, "holds no *.safetensors shards"));
    }
    let note = (!others.is_empty()).then(|| format!("not taken for shards: {}", others.join(", ")));
    Ok((shards, note.into_iter().collect()))
}

/// The first number in a shard's file name.
fn shard_id(name: &str) -> Result<u64, &'static str> {
    let mut numbers = name.split(|c: char| !c.is_ascii_digit());
    let first = numbers.find(|digits| !digits.is_empty());
    let first = first.ok_or("no number in the file name; it is the shard's id")?;
    first
        .parse()
        .map_err(|_| "the number in the file name, which is the shard's id, is above 2^64 - 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_told_by_the_first_number_in_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str| std::fs::write(folder.path().join(name), "").unwrap();
        assert!(
            find_shards(folder.path())
                .unwrap_err()
                .0
                .contains("holds no")
        );
        for name in [
            "shard_000002.safetensors",
            "10.safetensors",
            "._10.safetensors",
            "notes.txt",
        ] {
            put(name);
        }
        let (found, notes) = find_shards(folder.path()).unwrap();
        assert_eq!(found.into_keys().collect::<Vec<_>>(), [2, 10]);
        assert_eq!(notes, ["not taken for shards: ._10.safetensors, notes.txt"]);
        put("2024_b.safetensors");
        put("2024_a.safetensors");
        let refusal = find_shards(folder.path()).unwrap_err().0;
        let said =
            "2024_a.safetensors and 2024_b.safetensors are both shard 2024: the first number";
        assert!(refusal.contains(said), "{refusal}");
        assert!(shard_id("x.safetensors").unwrap_err().contains("no number"));
        assert!(
            shard_id("99999999999999999999.safetensors")
                .unwrap_err()
                .contains("2^64")
        );
    }
}
