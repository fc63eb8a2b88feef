//! New weights out of those that are here and the files of a way: everything is decoded and checked,
//! written once into a file of its own, and on the disk before anybody hears of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorView};

use super::manifest::{Delta, FullWeights};
use crate::candidate;
use crate::config::CandidatesConfig;
use crate::job::{Candidate, Rule, Source};
use crate::package::weights::add;
use crate::package::{Dtype, Package, PackageError};

/// Why there are no new weights.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The disk refuses.
    #[error("{}: {error}", path.display())]
    Disk {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A downloaded file does not hold what it should, or does not fit the model.
    #[error("{why}")]
    Unfit {
        /// SHA-256 of the file in hex.
        sha256: String,
        /// What is wrong with it.
        why: String,
    },
    /// What is here already is not what it was.
    #[error("{0}")]
    Base(#[from] PackageError),
}

/// What new weights begin with.
#[derive(Debug)]
pub enum Base<'a> {
    /// A version that is here.
    Here(&'a Package),
    /// Whole weights that were downloaded to this path; they are moved.
    Full(&'a FullWeights, &'a Path),
}

/// Writes the weights that come of adding the deltas, in order, to the base.
///
/// # Errors
/// As the variants say; what was written is of no use then.
pub fn build(
    model: &Package,
    base: &Base<'_>,
    deltas: &[(&Delta, PathBuf)],
    out: &Path,
) -> Result<(), BuildError> {
    let disk = |error| BuildError::Disk {
        path: out.to_owned(),
        error,
    };
    match base {
        Base::Here(package) => copy(package, out).map_err(disk)?,
        Base::Full(full, path) => {
            let file = crate::package::WeightsFile {
                version: full.version,
                path: (*path).to_owned(),
                sha256: full.sha256.clone(),
                canary: None,
            };
            let checked = model.with_weights(&file);
            checked.map_err(|e| unfit(&full.sha256, e.to_string()))?;
            std::fs::rename(path, out).map_err(disk)?;
        }
    }
    let mut draft = Draft::open(out).map_err(disk)?;
    for (delta, path) in deltas {
        let changed = draft.add(model, delta, path);
        changed.map_err(|error| match error {
            ApplyError::Disk(e) => disk(e),
            ApplyError::Unfit(why) => unfit(&delta.sha256, why),
        })?;
    }
    draft.file.sync_all().map_err(disk)
}

fn unfit(sha256: &str, why: String) -> BuildError {
    BuildError::Unfit {
        sha256: sha256.to_owned(),
        why,
    }
}

fn copy(package: &Package, out: &Path) -> std::io::Result<()> {
    let weights = &package.weights;
    let views = weights.tensors.iter().enumerate().map(|(index, tensor)| {
        let dtype = match tensor.dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::Bf16 => safetensors::Dtype::BF16,
        };
        let view = TensorView::new(dtype, tensor.shape.clone(), weights.bytes(index));
        view.map(|view| (tensor.name.as_str(), view))
    });
    let views = views
        .collect::<Result<Vec<_>, _>>()
        .map_err(std::io::Error::other)?;
    safetensors::serialize_to_file(views, None, out).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(e) => e,
        other => std::io::Error::other(other),
    })
}

/// A weights file that is being made.
struct Draft {
    file: File,
    /// Where the tensors begin.
    start: usize,
    header: Metadata,
}

enum ApplyError {
    Disk(std::io::Error),
    Unfit(String),
}

impl Draft {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let whole = crate::package::map(path).map_err(std::io::Error::other)?;
        let header = SafeTensors::read_metadata(&whole).map_err(std::io::Error::other)?;
        let (length, header) = header;
        let start = size_of::<u64>() + length;
        Ok(Self {
            file,
            start,
            header,
        })
    }

    /// Adds one delta, a tensor at a time.
    fn add(&mut self, model: &Package, delta: &Delta, path: &Path) -> Result<(), ApplyError> {
        let broken = |why: String| {
            ApplyError::Unfit(format!(
                "the update from {} to {}: {why}",
                delta.from, delta.to
            ))
        };
        let bytes = crate::package::map(path).map_err(|e| broken(e.to_string()))?;
        let candidate = Candidate {
            format: delta.format,
            compression: delta.compression,
            rule: Rule::ParamDiff,
            source: Source::Inline(Bytes::new()),
            sha256: None,
            size: None,
        };
        let update = candidate::decode(&bytes, &candidate, model, &limits(model));
        let update = update.map_err(|failure| broken(failure.message))?;
        for touched in update.tensors {
            let info = &model.weights.tensors[touched.tensor];
            let Some(place) = self.header.info(&info.name) else {
                return Err(broken(format!("{} is not among the weights", info.name)));
            };
            let (from, to) = place.data_offsets;
            let (offset, mut tensor) = ((self.start + from) as u64, vec![0; to - from]);
            let disk = ApplyError::Disk;
            self.file.read_exact_at(&mut tensor, offset).map_err(disk)?;
            let added = add(&mut tensor, info.dtype, &touched.indices, &touched.values);
            added.map_err(|index| {
                broken(format!(
                    "{}: the weight at index {index} becomes non-finite",
                    info.name
                ))
            })?;
            self.file.write_all_at(&tensor, offset).map_err(disk)?;
        }
        Ok(())
    }
}

/// An update may touch every weight once, and say so in as many words as a format needs.
fn limits(model: &Package) -> CandidatesConfig {
    let entries: u64 = model.weights.tensors.iter().map(|t| t.numel as u64).sum();
    CandidatesConfig {
        allow: Vec::new(),
        allow_private: false,
        max_inline_bytes: 0,
        max_bytes: 0,
        max_inflated_bytes: entries.saturating_mul(16).saturating_add(1 << 20),
        max_entries: entries,
        fetch_timeout: std::time::Duration::ZERO,
    }
}
