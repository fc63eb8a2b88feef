//! Reading a training checkpoint: a safetensors file, or the shards that an index names. Tensors of
//! type F32, F16 and BF16 are weights. Integers and booleans (counters, position ids, masks) and
//! empty tensors cannot be weights, and are skipped with a note. Any other float is refused by
//! name: it may be a weight, and nobody would notice that it is missing.

mod index;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;

use super::files;
use super::manifest::PackageError;
use super::names::list;
use super::tensor::{Dtype, is_integer};
use super::weights_file::deserialize;
use index::{locate, read_index};

/// A tensor that can be a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: Dtype,
    /// Little endian, row-major: a part of the mapped file.
    pub bytes: Bytes,
}

/// What a checkpoint holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The weights, ascending by name; at least one.
    pub tensors: Vec<Tensor>,
    /// What was skipped, and why: `NAME (I64)`; ascending by name.
    pub passed_over: Vec<String>,
}

impl Checkpoint {
    /// Reads a checkpoint: a safetensors file, the index (`*.json`) of a sharded one, or the folder
    /// that contains either. The files are mapped, not copied.
    ///
    /// # Errors
    /// Names the file and the tensor, and what to give instead.
    pub fn open(path: &Path) -> Result<Self, PackageError> {
        let file = locate(path)?;
        if file.extension().is_some_and(|end| end == "json") {
            return read_shards(&file);
        }
        Self::read(&file)
    }

    /// Reads one safetensors file.
    ///
    /// # Errors
    /// Names the file and the tensor.
    pub fn read(file: &Path) -> Result<Self, PackageError> {
        let mut contents = Contents::default();
        contents.add(file, |_| Ok(()))?;
        contents.finish(file)
    }

    /// A note for the operator of what was skipped, if anything was.
    pub fn note(&self) -> Option<String> {
        let passed_over = list(&self.passed_over);
        (!self.passed_over.is_empty())
            .then(|| format!("passed over, because they cannot be weights: {passed_over}"))
    }
}

/// The contents of a checkpoint's files.
#[derive(Default)]
struct Contents {
    tensors: Vec<Tensor>,
    passed_over: Vec<String>,
    /// Floats of unsupported types.
    refused: Vec<String>,
}

impl Contents {
    /// Adds a file, after checking that each name in it is `expected` there.
    fn add(
        &mut self,
        file: &Path,
        mut expected: impl FnMut(&str) -> Result<(), PackageError>,
    ) -> Result<(), PackageError> {
        let map = files::map(file)?;
        for (name, view) in deserialize(file, &map)?.iter() {
            expected(name)?;
            let dtype = view.dtype();
            match kind(dtype) {
                // There is nothing to train in it, whatever its type.
                _ if view.data().is_empty() => {
                    self.passed_over.push(format!("{name} (no elements)"));
                }
                Kind::Weight(dtype) => self.tensors.push(Tensor {
                    name: name.to_owned(),
                    shape: view.shape().to_vec(),
                    dtype,
                    bytes: map.slice_ref(view.data()),
                }),
                Kind::NoWeight => self.passed_over.push(format!("{name} ({dtype})")),
                Kind::OtherFloat => self.refused.push(format!("{name} ({dtype})")),
            }
        }
        Ok(())
    }

    fn finish(mut self, file: &Path) -> Result<Checkpoint, PackageError> {
        let broken = |why: String| PackageError::at(file, why);
        self.refused.sort();
        self.passed_over.sort();
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if !self.refused.is_empty() {
            return Err(broken(format!(
                "weights must be F32, F16 or BF16, and these are not: {}; save them in one of these types \
                 (PyTorch: tensor.float()), or leave them out of the file if they are not weights",
                list(&self.refused)
            )));
        }
        if self.tensors.is_empty() {
            return Err(broken(match self.passed_over.as_slice() {
                [] => "holds no tensors".into(),
                others => format!("holds no weights (F32, F16 or BF16), but {}", list(others)),
            }));
        }
        Ok(Checkpoint {
            tensors: self.tensors,
            passed_over: self.passed_over,
        })
    }
}

/// The kind of a tensor, by its type.
enum Kind {
    Weight(Dtype),
    NoWeight,
    OtherFloat,
}

fn kind(stored: safetensors::Dtype) -> Kind {
    match Dtype::of_stored(stored) {
        Some(dtype) => Kind::Weight(dtype),
        None if is_integer(stored) || stored == safetensors::Dtype::C64 => Kind::NoWeight,
        None => Kind::OtherFloat,
    }
}

fn read_shards(index: &Path) -> Result<Checkpoint, PackageError> {
    let broken = |why: String| PackageError::at(index, why);
    let map = read_index(index).map_err(broken)?;
    let names: BTreeSet<&str> = map.values().map(String::as_str).collect();
    let folder = index.parent().unwrap_or(Path::new(""));
    for file in &names {
        if !files::is_plain(file) {
            return Err(broken(format!("names {file:?}, which is not beside it")));
        }
    }
    let missing = names.iter().filter(|file| !folder.join(file).is_file());
    let missing: Vec<String> = missing.map(|file| (*file).to_owned()).collect();
    if !missing.is_empty() {
        let (lost, all, missing) = (missing.len(), names.len(), list(&missing));
        let why = format!("{lost} of its {all} shards are missing: {missing}");
        return Err(broken(why));
    }
    let mut contents = Contents::default();
    let mut awaited = map.clone();
    for file in names {
        contents.add(&folder.join(file), |name| match map.get(name) {
            Some(named) if named == file => {
                awaited.remove(name);
                Ok(())
            }
            Some(named) => Err(broken(format!(
                "says that {name} is in {named}, but {file} holds it, too"
            ))),
            None => Err(broken(format!("does not name {name}, which {file} holds"))),
        })?;
    }
    let lost = awaited
        .iter()
        .map(|(name, file)| format!("{name} ({file})"));
    let lost: Vec<String> = lost.collect();
    if !lost.is_empty() {
        let why = format!("names tensors that its shards do not hold: {}", list(&lost));
        return Err(broken(why));
    }
    contents.finish(index)
}
