//! The model package: a folder with a `model.json` that says which graph, weights and held-out
//! shards belong together, and where the graph holds each checkpoint tensor. Every file is checked
//! against its digest before it is used.

use super::files::{Stamp, compare_digests, inside, look, map_checked};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::model::error::require;
use crate::model::manifest::{Manifest, Objective, PackageError, ShardFile};
use crate::model::onnx::{External, externals, plain_location};
use crate::model::plan::{Cut, Shard, TokenCut};
use crate::model::shard::parse_shard;
use crate::model::weights::Weights;
use crate::protocol::update_manifest::Canary;

/// The manifest's file name.
pub const MANIFEST: &str = "model.json";

/// Weights of another version, stored outside of the package.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightsFile {
    /// Their version.
    pub version: u64,
    /// A safetensors file.
    pub path: PathBuf,
    /// SHA-256 of the file in hex.
    pub sha256: String,
    /// A known answer of this version.
    pub canary: Option<Canary>,
}

/// A package whose every file has been checked.
#[derive(Debug)]
pub struct Package {
    /// Where it is.
    pub dir: PathBuf,
    /// What it says.
    pub manifest: Manifest,
    /// SHA-256 of what the package measures: everything but version, weights and canary.
    pub package_id: String,
    /// Identifies what later versions derive from; see [`Package::root`].
    pub root: String,
    /// The graph, mapped, so that its own copy of the weights is not loaded into memory.
    pub graph: Bytes,
    /// The baseline, in checkpoint layout.
    pub weights: Weights,
    /// Held-out data, ascending by id.
    pub shards: Arc<Vec<Shard>>,
    stamps: Vec<Stamp>,
    weights_stamp: Option<Stamp>,
}

/// A trainable tensor.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    /// Its position in [`Weights::tensors`].
    pub index: usize,
    /// Its shape in the checkpoint.
    pub shape: &'a [usize],
    /// Its number of elements.
    pub numel: usize,
}

impl Package {
    /// Reads only the manifest.
    ///
    /// # Errors
    /// When it is missing, unreadable or breaks the schema.
    pub fn read_manifest(dir: &Path) -> Result<(Manifest, String), PackageError> {
        let path = dir.join(MANIFEST);
        let text = std::fs::read(&path).map_err(|e| PackageError::at(&path, e))?;
        Manifest::decode(&text).map_err(|e| PackageError::at(&path, e))
    }

    /// Names a package with its weights and their version: SHA-256 in hex.
    pub fn root(manifest: &Manifest, package_id: &str) -> String {
        let weights = manifest.weights.as_ref().map_or("", |w| w.sha256.as_str());
        let identity = format!("{package_id} {} {weights}", manifest.version);
        hex::encode(Sha256::digest(identity))
    }

    /// Whether an update led to the version that is served, so that the package's own `model.json` says nothing of it.
    pub fn is_updated(&self) -> bool {
        Self::root(&self.manifest, &self.package_id) != self.root
    }

    /// Reads and checks the whole package. With `subset`, shards whose files are missing are left
    /// out; a damaged one is still refused. The first valid file of `newer` replaces the package's
    /// own weights.
    ///
    /// # Errors
    /// Names the invalid file or field.
    pub fn load(dir: &Path, subset: bool, newer: &[WeightsFile]) -> Result<Self, PackageError> {
        let (manifest, package_id) = Self::read_manifest(dir)?;
        // Taken before the files are read, so that the first audit notices a change during loading.
        let stamps = manifest.stamps(dir)?;
        let graph = map_checked(&inside(dir, &manifest.graph.file)?, &manifest.graph.sha256)?;
        for external in manifest.graph.external.iter().flatten() {
            map_checked(&inside(dir, &external.file)?, &external.sha256)?;
        }
        manifest.check_external(&graph)?;
        let shards = load_shards(dir, &manifest.shards, manifest.objective, subset)?;
        let root = Self::root(&manifest, &package_id);
        let opened = newer.iter().find_map(|file| {
            let opened = open_weights(&file.path, &file.sha256, &manifest);
            let refused = |error: &PackageError| {
                tracing::error!(%error, version = file.version, "weights that were kept are not used");
            };
            opened.inspect_err(refused).ok().map(|opened| (file, opened))
        });
        let (manifest, weights, weights_stamp) = match opened {
            Some((file, (weights, stamp))) => (manifest.at(file), weights, Some(stamp)),
            None => {
                let (weights, stamp) = own_weights(dir, &manifest, &graph)?;
                (manifest, weights, stamp)
            }
        };
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            package_id,
            root,
            graph,
            weights,
            shards: Arc::new(shards),
            stamps,
            weights_stamp,
        })
    }

    /// The same package with other weights, after checking them.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn with_weights(&self, file: &WeightsFile) -> Result<Self, PackageError> {
        let (weights, stamp) = open_weights(&file.path, &file.sha256, &self.manifest)?;
        Ok(self.replaced(file, weights, stamp))
    }

    /// The same package with new weights, whose digest is not known yet.
    ///
    /// # Errors
    /// As [`Package::with_weights`].
    pub fn with_new_weights(
        &self,
        version: u64,
        path: PathBuf,
        canary: Option<Canary>,
    ) -> Result<(Self, WeightsFile), PackageError> {
        let (weights, stamp) = read_weights(&path, &self.manifest)?;
        let file = WeightsFile {
            version,
            path,
            sha256: stamp.sha256.clone(),
            canary,
        };
        Ok((self.replaced(&file, weights, stamp), file))
    }

    fn replaced(&self, file: &WeightsFile, weights: Weights, stamp: Stamp) -> Self {
        Self {
            dir: self.dir.clone(),
            manifest: self.manifest.at(file),
            package_id: self.package_id.clone(),
            root: self.root.clone(),
            graph: self.graph.clone(),
            weights,
            shards: Arc::clone(&self.shards),
            stamps: self.stamps.clone(),
            weights_stamp: Some(stamp),
        }
    }

    /// Checks that the files are still those that were loaded. Only files whose metadata changed
    /// are read again.
    ///
    /// # Errors
    /// Names the file whose contents changed, or that is missing.
    pub fn verify(&self) -> Result<(), PackageError> {
        for stamp in self.stamps.iter().chain(&self.weights_stamp) {
            if look(&stamp.path)? != stamp.seen {
                map_checked(&stamp.path, &stamp.sha256)?;
            }
        }
        Ok(())
    }

    /// How windows are cut.
    pub fn cut(&self) -> Cut {
        match self.manifest.objective {
            Objective::CausalLm {
                window,
                windows_per_row,
                label_shift,
                ignore_index,
            } => Cut::Tokens(TokenCut {
                window,
                windows_per_row,
                label_shift,
                ignore_index,
            }),
            Objective::GraphLoss {} => Cut::Examples,
        }
    }

    /// The position in [`Weights::tensors`] of the tensor with this checkpoint name or alias.
    pub fn position(&self, name: &str) -> Option<usize> {
        let aliases = self.manifest.aliases.as_ref();
        let canonical = aliases.and_then(|aliases| aliases.get(name));
        let canonical = canonical.map_or(name, String::as_str);
        let tensors = &self.weights.tensors;
        let found = tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(canonical));
        found.ok()
    }

    /// Looks up a trainable tensor by its checkpoint name or an alias.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let index = self.position(name)?;
        let tensor = &self.weights.tensors[index];
        let trainable = self.manifest.is_trainable(&tensor.name);
        trainable.then_some(TensorRef {
            index,
            shape: &tensor.shape,
            numel: tensor.numel,
        })
    }
}

impl Manifest {
    /// The current state of the files with digests in the manifest, except the weights; missing
    /// files are left to the loader.
    fn stamps(&self, dir: &Path) -> Result<Vec<Stamp>, PackageError> {
        let mut stamps = Vec::new();
        let others = self.files().filter(|(field, ..)| *field != Self::WEIGHTS);
        for (_, file, sha256) in others {
            let path = inside(dir, file)?;
            if let Ok(seen) = look(&path) {
                let sha256 = sha256.to_owned();
                stamps.push(Stamp { path, sha256, seen });
            }
        }
        Ok(stamps)
    }

    /// Checks that the digest of every external data file of the graph was compared.
    fn check_external(&self, graph: &Bytes) -> Result<(), PackageError> {
        let files = self.graph.external.iter().flatten();
        let files: BTreeSet<&str> = files.map(|external| external.file.as_str()).collect();
        for External { location, at, .. } in externals(graph)? {
            let known = plain_location(&location).is_some_and(|l| files.contains(l.as_str()));
            let problem = format!(
                "graph: {at}: its external data {location:?} is not among graph.external, so its digest was not compared; package it again"
            );
            require(known, problem)?;
        }
        Ok(())
    }

    /// The manifest with weights of another version.
    fn at(&self, file: &WeightsFile) -> Self {
        Self {
            version: file.version,
            canary: file.canary,
            ..self.clone()
        }
    }
}

fn open_weights(
    path: &Path,
    sha256: &str,
    manifest: &Manifest,
) -> Result<(Weights, Stamp), PackageError> {
    let (weights, stamp) = read_weights(path, manifest)?;
    compare_digests(path, &stamp.sha256, sha256)?;
    Ok((weights, stamp))
}

fn read_weights(path: &Path, manifest: &Manifest) -> Result<(Weights, Stamp), PackageError> {
    let seen = look(path)?;
    let (weights, digest) = Weights::open(path, manifest)?;
    let stamp = Stamp {
        path: path.to_owned(),
        sha256: hex::encode(digest),
        seen,
    };
    Ok((weights, stamp))
}

fn own_weights(
    dir: &Path,
    manifest: &Manifest,
    graph: &Bytes,
) -> Result<(Weights, Option<Stamp>), PackageError> {
    let Some(file) = &manifest.weights else {
        return Ok((Weights::from_graph(dir, graph, manifest)?, None));
    };
    let (weights, stamp) = open_weights(&inside(dir, &file.file)?, &file.sha256, manifest)?;
    Ok((weights, Some(stamp)))
}

fn load_shards(
    dir: &Path,
    files: &[ShardFile],
    objective: Objective,
    subset: bool,
) -> Result<Vec<Shard>, PackageError> {
    let mut shards = Vec::with_capacity(files.len());
    for file in files {
        if subset && !inside(dir, &file.file)?.exists() {
            tracing::warn!(
                shard = file.id,
                "missing, left out (model.allow_shards_subset)"
            );
            continue;
        }
        let bytes = map_checked(&inside(dir, &file.file)?, &file.sha256)?;
        shards.push(parse_shard(file.id, &file.file, &bytes, objective)?);
    }
    if shards.is_empty() {
        return Err(PackageError::at(dir, "every shard is missing"));
    }
    Ok(shards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_update_led_to_is_told_from_the_package_s_own() {
        let (mut package, _dir) = crate::model::fit::tests::package();
        assert!(!package.is_updated());
        package.manifest.version += 1;
        assert!(package.is_updated());
    }

    #[test]
    fn no_file_name_leads_out_of_the_package() {
        let dir = Path::new("/models/m");
        for file in ["../x", "/etc/passwd", "a/../../x", "", "./x"] {
            assert!(inside(dir, file).is_err(), "{file}");
        }
        assert_eq!(
            inside(dir, "shards/a.safetensors").unwrap(),
            dir.join("shards/a.safetensors")
        );
    }
}
