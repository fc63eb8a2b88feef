//! The graph, the weights and the shards of a package under construction.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use bytes::Bytes;

use super::disk::{GRAPH, SHARDS, WEIGHTS, digest, make_folder, name_of, write, write_tensors};
use super::external::{check_external, external_names};
use super::shards::find_shards;
use super::staging::Staging;
use crate::model::checkpoint::Tensor;
use crate::model::files;
use crate::model::manifest::{FileDigest, GraphFile, Objective, PackageError, ShardFile};
use crate::model::onnx::{externals, plain_location, relocate};
use crate::model::shard::parse_shard;

impl Staging {
    /// Writes the graph and copies its external data files.
    ///
    /// # Errors
    /// Names the file that cannot be read, or that is outside of the graph's folder.
    pub(super) fn graph(&self, model: Bytes, from: &Path) -> Result<GraphFile, PackageError> {
        let tensors = externals(&model)?;
        let names = external_names(&tensors)?;
        for tensor in &tensors {
            check_external(tensor, from)?;
        }
        let model = relocate(&model, &names)?.map_or(model, Bytes::from);
        let mut copied: BTreeMap<&str, FileDigest> = BTreeMap::new();
        for (location, name) in &names {
            if !copied.contains_key(name.as_str()) {
                let plain = plain_location(location).unwrap_or_default();
                let sha256 = self.copy(&from.join(plain), name)?;
                let file = name.clone();
                copied.insert(name, FileDigest { file, sha256 });
            }
        }
        let external: Vec<FileDigest> = copied.into_values().collect();
        let FileDigest { file, sha256 } = write(&self.dir().join(GRAPH), &model)?;
        Ok(GraphFile {
            file,
            sha256,
            external: (!external.is_empty()).then_some(external),
        })
    }

    /// Writes the weights.
    ///
    /// # Errors
    /// On an I/O error.
    pub(super) fn weights(&self, checkpoint: &[Tensor]) -> Result<FileDigest, PackageError> {
        let tensors = checkpoint
            .iter()
            .map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice(), &t.bytes[..]));
        write_tensors(&self.dir().join(WEIGHTS), tensors)
    }

    /// Copies the shards, ascending by id; also notes which files are not shards.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub(super) fn shards(
        &self,
        from: &Path,
        objective: Objective,
    ) -> Result<(Vec<ShardFile>, Vec<String>), PackageError> {
        let (files, notes) = find_shards(from)?;
        let mut shards = Vec::new();
        for (id, path) in files {
            let name = name_of(&path);
            let bytes = files::map(&path)?;
            parse_shard(id, &name, &bytes, objective)?;
            let digest = write(&self.dir().join(SHARDS).join(&name), &bytes)?;
            shards.push(ShardFile {
                id,
                file: format!("{SHARDS}/{name}"),
                sha256: digest.sha256,
            });
        }
        Ok((shards, notes))
    }

    /// Copies a file of any size, with the permissions of a new one, and returns its SHA-256.
    fn copy(&self, from: &Path, name: &str) -> Result<String, PackageError> {
        let mut folder = self.dir().to_owned();
        for part in Path::new(name).parent().into_iter().flat_map(Path::iter) {
            folder.push(part);
            make_folder(&folder)?;
        }
        let to = self.dir().join(name);
        let mut source = files::open(from)?;
        let copied = File::create(&to).and_then(|mut file| std::io::copy(&mut source, &mut file));
        copied.map_err(|e| PackageError(format!("{} to {}: {e}", from.display(), to.display())))?;
        digest(&to)
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::tests::holds;
    use super::super::external::tests::external;
    use super::super::staging::Unfinished;
    use super::*;
    use crate::model::checkpoint::Checkpoint;
    use sha2::{Digest, Sha256};

    fn begin(out: &Path) -> Result<Staging, PackageError> {
        Staging::begin(out, &Unfinished::default())
    }

    #[test]
    fn what_is_copied_can_be_read_as_what_is_written_can() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let export = folder.path().join("m.data");
        std::fs::write(&export, "x").unwrap();
        std::fs::set_permissions(&export, PermissionsExt::from_mode(0o600)).unwrap();
        let staging = begin(&folder.path().join("package")).unwrap();
        write(&staging.dir().join("x"), b"x").unwrap();
        let copied = staging.copy(&export, "parts/m.data").unwrap();
        assert_eq!(copied, hex::encode(Sha256::digest("x")));
        let mode = |name: &str| {
            let found = std::fs::metadata(staging.dir().join(name)).unwrap();
            found.permissions().mode()
        };
        assert_eq!(mode("parts/m.data"), mode("x"));
    }

    #[test]
    fn only_regular_files_are_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (pipe, inner) = (folder.path().join("pipe"), folder.path().join("folder"));
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        std::fs::create_dir(&inner).unwrap();
        let index = folder.path().join("x.safetensors.index.json");
        for (name, said) in [
            ("pipe", "pipe: is a pipe"),
            ("folder", "folder: is a folder"),
        ] {
            let path = folder.path().join(name);
            let tensor = external(name);
            let refusals = [
                check_external(&tensor, folder.path()).unwrap_err(),
                files::map(&path).unwrap_err(),
                begin(&folder.path().join("package"))
                    .unwrap()
                    .copy(&path, "x")
                    .unwrap_err(),
            ];
            for PackageError(refusal) in refusals {
                assert!(refusal.contains(said), "{refusal}");
            }
            std::fs::write(&index, format!(r#"{{"weight_map": {{"w": "{name}"}}}}"#)).unwrap();
            let refusal = Checkpoint::open(&index).unwrap_err().0;
            assert!(refusal.contains(name), "{refusal}");
        }
        let piped = folder.path().join("pipe.json");
        std::fs::rename(&pipe, &piped).unwrap();
        let refusal = Checkpoint::open(&piped).unwrap_err().0;
        assert!(refusal.contains("is no regular file"), "{refusal}");
    }

    #[test]
    fn what_is_removed_early_does_not_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let export = folder.path().join("m.data");
        std::fs::write(&export, "x").unwrap();
        let unfinished = Unfinished::default();
        let staging = Staging::begin(&folder.path().join("a/package"), &unfinished).unwrap();
        write(&staging.dir().join("shards/x"), b"x").unwrap();
        drop(unfinished.remove());
        assert_eq!(holds(folder.path()), ["m.data".to_owned()].into());
        for name in ["x", "shards/y"] {
            assert!(write(&staging.dir().join(name), b"x").is_err());
        }
        assert!(staging.copy(&export, "a/b/m.data").is_err());
        assert!(staging.weights(&[]).is_err());
        assert!(staging.finish().is_err());
        assert!(!folder.path().join("a/package").exists());
    }
}
