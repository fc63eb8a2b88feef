//! Makes new weights of the local ones and the files of a route: everything is decoded and checked,
//! written once into a file of its own, and synced to the disk before it is used.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use super::route::Step;
use crate::candidate::{self, DecodeLimits, TensorUpdate, Update, Versions};
use crate::model::checkpoint::Checkpoint;
use crate::model::files::map;
use crate::model::fit::{Fitted, fit};
use crate::model::package::Package;
use crate::model::weights::add;
use crate::model::weights_file::{self, Stored};
use crate::protocol::update_manifest::{Delta, FullWeights};

/// Why there are no new weights.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The disk failed.
    #[error("{}: {error}", path.display())]
    Disk {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A downloaded file has the wrong content, or does not fit the model.
    #[error("{why}")]
    Unfit {
        /// SHA-256 of the file in hex.
        sha256: String,
        /// What is wrong with it.
        why: String,
    },
}

/// Applies the steps of a route, whose files are at these paths, and writes the weights that result. A
/// base is needed unless the first step is whole weights, which are moved, not copied.
///
/// # Errors
/// As the variants say; what was written must not be used then.
pub fn build(
    model: &Package,
    base: Option<&Package>,
    steps: &[(Step<'_>, PathBuf)],
    out: &Path,
) -> Result<(), BuildError> {
    let disk = |error| BuildError::Disk {
        path: out.to_owned(),
        error,
    };
    if let Some(base) = base {
        copy(base, out).map_err(disk)?;
    }
    for (step, path) in steps {
        let applied = match step {
            Step::Full(full) => take_full(model, full, path, out),
            Step::Delta(delta) => add_delta(model, delta, path, out),
        };
        applied.map_err(|error| match error {
            StepError::Disk(error) => disk(error),
            StepError::Unfit(why) => BuildError::Unfit {
                sha256: step.sha256().to_owned(),
                why,
            },
        })?;
    }
    File::open(out)
        .and_then(|file| file.sync_all())
        .map_err(disk)
}

/// Whether a worker that serves this package could use a step's file.
///
/// # Errors
/// What is wrong with the file.
pub fn check(model: &Package, step: Step<'_>, path: &Path) -> Result<(), String> {
    match step {
        Step::Full(full) => read_full(model, full, path).map(drop),
        Step::Delta(delta) => read_delta(model, delta, path).map(drop),
    }
}

fn copy(package: &Package, out: &Path) -> std::io::Result<()> {
    let weights = &package.weights;
    let tensors = weights.tensors.iter().enumerate().map(|(index, tensor)| {
        let stored = Stored {
            dtype: tensor.dtype,
            wanted: tensor.dtype,
            shape: &tensor.shape,
            bytes: weights.bytes(index),
        };
        (tensor.name.as_str(), stored)
    });
    weights_file::write(out, tensors)
}

#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Disk(#[from] std::io::Error),
    #[error("{0}")]
    Unfit(String),
}

/// Whole weights: moved if they are stored as in the package, otherwise rewritten.
fn take_full(
    model: &Package,
    full: &FullWeights,
    path: &Path,
    out: &Path,
) -> Result<(), StepError> {
    let fitted = read_full(model, full, path).map_err(StepError::Unfit)?;
    if let Some(note) = fitted.note() {
        tracing::info!(version = full.version, "{note}");
    }
    if fitted.as_it_is() {
        return Ok(std::fs::rename(path, out)?);
    }
    weights_file::write(out, fitted.stored())?;
    Ok(std::fs::remove_file(path)?)
}

fn read_full(model: &Package, full: &FullWeights, path: &Path) -> Result<Fitted, String> {
    let unfit = |why: String| format!("the weights of version {}: {why}", full.version);
    let checkpoint = Checkpoint::read(path).map_err(|e| unfit(e.to_string()))?;
    fit(checkpoint, model).map_err(unfit)
}

/// Adds one delta, one tensor at a time.
fn add_delta(model: &Package, delta: &Delta, path: &Path, out: &Path) -> Result<(), StepError> {
    let update = read_delta(model, delta, path).map_err(StepError::Unfit)?;
    add_tensors(model, &update.tensors, out).map_err(|error| match error {
        StepError::Disk(error) => StepError::Disk(error),
        StepError::Unfit(why) => StepError::Unfit(unfit(delta, &why)),
    })
}

fn unfit(Delta { from, to, .. }: &Delta, why: &str) -> String {
    format!("the update from {from} to {to}: {why}")
}

fn read_delta(model: &Package, delta: &Delta, path: &Path) -> Result<Update, String> {
    let broken = |why: String| unfit(delta, &why);
    let bytes = map(path).map_err(|e| broken(e.to_string()))?;
    let (format, compression) = (delta.format, delta.compression);
    let update = candidate::decode(&bytes, format, compression, model, limits(model));
    let update = update.map_err(|failure| broken(failure.message))?;
    if let Some(Versions { old, new }) = update.versions
        && (old, new) != (delta.from, delta.to)
    {
        return Err(broken(format!("the file leads from {old} to {new}")));
    }
    Ok(update)
}

fn add_tensors(model: &Package, tensors: &[TensorUpdate], out: &Path) -> Result<(), StepError> {
    let file = OpenOptions::new().read(true).write(true).open(out)?;
    let (start, header) = read_header(out)?;
    for touched in tensors {
        let info = &model.weights.tensors[touched.tensor];
        let Some(entry) = header.info(&info.name) else {
            let why = format!("{} is not among the weights", info.name);
            return Err(StepError::Unfit(why));
        };
        let (from, to) = entry.data_offsets;
        let (offset, mut tensor) = ((start + from) as u64, vec![0; to - from]);
        file.read_exact_at(&mut tensor, offset)?;
        let added = add(&mut tensor, info.dtype, &touched.indices, &touched.values);
        added.map_err(|index| {
            let name = &info.name;
            StepError::Unfit(format!(
                "{name}: the weight at index {index} becomes non-finite"
            ))
        })?;
        file.write_all_at(&tensor, offset)?;
    }
    Ok(())
}

/// Where the tensors of a weights file begin, and its header.
fn read_header(path: &Path) -> std::io::Result<(usize, Metadata)> {
    let whole = map(path).map_err(std::io::Error::other)?;
    let header = SafeTensors::read_metadata(&whole).map_err(std::io::Error::other)?;
    let (length, header) = header;
    Ok((size_of::<u64>() + length, header))
}

/// An update may touch every weight once, and inflate to what the model's size bounds.
fn limits(model: &Package) -> DecodeLimits {
    let entries = model.weights.tensors.iter().map(|t| t.numel as u64);
    DecodeLimits {
        max_entries: entries.sum(),
        max_inflated_bytes: u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tensor::Dtype;

    #[test]
    fn whole_weights_are_moved_or_rewritten_as_the_package_stores_them() {
        let (package, dir) = crate::model::fit::tests::package();
        let (part, out) = (dir.path().join("part"), dir.path().join("out"));
        let full = FullWeights {
            version: 2,
            urls: Vec::new(),
            sha256: "0".repeat(64),
            size: 1,
            graph_sha256: package.manifest.graph.sha256.clone(),
            canary: None,
        };
        let built = || {
            build(&package, None, &[(Step::Full(&full), part.clone())], &out).unwrap();
            assert!(!part.exists());
            let (made, _) = package.with_new_weights(2, out.clone(), None).unwrap();
            made.weights.weights_id
        };
        let weights = &package.weights;
        let tensors = || weights.tensors.iter().enumerate();
        let wrapped: Vec<String> = tensors()
            .map(|(_, t)| format!("module.{}", t.name))
            .collect();
        for names in [None, Some(&wrapped)] {
            let stored = tensors().map(|(at, tensor)| {
                let name = names.map_or(tensor.name.as_str(), |names| &names[at]);
                let stored = Stored {
                    dtype: Dtype::F32,
                    wanted: Dtype::F32,
                    shape: &tensor.shape,
                    bytes: weights.bytes(at),
                };
                (name, stored)
            });
            weights_file::write(&part, stored).unwrap();
            assert_eq!(built(), weights.weights_id, "{names:?}");
        }

        weights_file::write(&part, std::iter::empty()).unwrap();
        let refused = build(&package, None, &[(Step::Full(&full), part)], &out).unwrap_err();
        let why = refused.to_string();
        assert!(
            why.starts_with("the weights of version 2: ") && why.contains("no tensors"),
            "{why}"
        );
    }
}
