//! The baseline weights: read-only, in checkpoint layout, memory-mapped from the package.
//! A candidate is computed against them and restored from them; nothing ever writes here.

use std::fs::File;
use std::path::Path;

use half::{bf16, f16};
use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::{Dtype, Manifest, PackageError, TensorEntry, check_digest};
use crate::engine::graph::Graph;

#[derive(Debug)]
enum Storage {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

/// One tensor of the baseline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Checkpoint name.
    pub name: String,
    /// Checkpoint shape.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: Dtype,
    /// Number of elements.
    pub numel: usize,
    offset: usize,
}

/// All tensors of the baseline, ascending by name.
#[derive(Debug)]
pub struct Weights {
    storage: Storage,
    /// Ascending by name.
    pub tensors: Vec<TensorInfo>,
    /// SHA-256 over names and contents of what is trainable: the same weights have the same id whichever way they came.
    pub weights_id: String,
}

impl Weights {
    /// Maps a safetensors file, checking its digest and that it holds exactly what is wanted.
    ///
    /// # Errors
    /// Names the file and the tensor.
    pub(super) fn open(
        path: &Path,
        sha256: Option<&str>,
        manifest: &Manifest,
    ) -> Result<Self, PackageError> {
        let wanted = &manifest.tensors;
        let broken = |e: &dyn std::fmt::Display| PackageError(format!("{}: {e}", path.display()));
        let file = File::open(path).map_err(|e| broken(&e))?;
        #[expect(
            unsafe_code,
            reason = "packages are immutable by contract; a later change is package_changed"
        )]
        // SAFETY: the mapping is only read; a package's files are never written in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| broken(&e))?;
        if let Some(expected) = sha256 {
            check_digest(path, &Sha256::digest(&map), expected)?;
        }
        let tensors = {
            let views = safetensors::SafeTensors::deserialize(&map).map_err(|e| broken(&e))?;
            let mut tensors = Vec::with_capacity(wanted.len());
            for (name, entry) in wanted {
                let view = views
                    .tensor(name)
                    .map_err(|_| broken(&format!("has no tensor {name}")))?;
                if view.shape() != entry.shape || dtype_of(view.dtype()) != Some(entry.dtype) {
                    return Err(broken(&format!(
                        "{name} is {:?} {:?}, model.json says {} {:?}",
                        view.dtype(),
                        view.shape(),
                        entry.dtype.as_str(),
                        entry.shape
                    )));
                }
                let offset = view.data().as_ptr().addr() - map.as_ptr().addr();
                tensors.push(TensorInfo::new(name, entry, offset)?);
            }
            tensors
        };
        Ok(Self::finish(Storage::Mapped(map), tensors, manifest))
    }

    /// Takes the weights out of the graph's own initializers.
    pub(super) fn from_graph(
        dir: &Path,
        graph: &[u8],
        manifest: &Manifest,
    ) -> Result<Self, PackageError> {
        let wanted = &manifest.tensors;
        let graph = Graph::decode(graph).map_err(|e| PackageError(e.to_string()))?;
        let mut storage = Vec::new();
        let mut tensors = Vec::with_capacity(wanted.len());
        for (name, entry) in wanted {
            let Some(place) = entry.places.first() else {
                continue;
            };
            let mut bytes = graph.initializer(&place.initializer, dir).map_err(|e| {
                PackageError(format!(
                    "tensors.{name}: {e}; without weights the graph must hold it"
                ))
            })?;
            if let (true, [rows, columns]) = (place.transposed, entry.shape.as_slice()) {
                bytes = transpose(&bytes, *columns, *rows, entry.dtype.size());
            }
            let info = TensorInfo::new(name, entry, storage.len())?;
            if bytes.len() != info.numel * entry.dtype.size() {
                return Err(PackageError(format!(
                    "tensors.{name}: shape and dtype do not fit initializer {}",
                    place.initializer
                )));
            }
            storage.extend_from_slice(&bytes);
            tensors.push(info);
        }
        Ok(Self::finish(Storage::Owned(storage), tensors, manifest))
    }

    fn finish(storage: Storage, tensors: Vec<TensorInfo>, manifest: &Manifest) -> Self {
        let mut weights = Self {
            storage,
            tensors,
            weights_id: String::new(),
        };
        let mut id = Sha256::new();
        let trainable = |t: &&TensorInfo| manifest.is_trainable(&t.name);
        for tensor in weights.tensors.iter().filter(trainable) {
            id.update(Sha256::digest(tensor.name.as_bytes()));
            id.update(Sha256::digest(weights.bytes(tensor)));
        }
        weights.weights_id = hex::encode(id.finalize());
        weights
    }

    /// A tensor's little-endian bytes, row-major.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        let all: &[u8] = match &self.storage {
            Storage::Mapped(map) => map,
            Storage::Owned(bytes) => bytes,
        };
        &all[tensor.offset..tensor.offset + tensor.numel * tensor.dtype.size()]
    }

    /// One element, widened to f32.
    pub fn element(&self, tensor: &TensorInfo, index: u32) -> f32 {
        read_element(self.bytes(tensor), tensor.dtype, index as usize)
    }
}

impl TensorInfo {
    fn new(name: &str, entry: &TensorEntry, offset: usize) -> Result<Self, PackageError> {
        let numel = entry
            .shape
            .iter()
            .try_fold(1_usize, |n, d| n.checked_mul(*d));
        match numel.filter(|n| u32::try_from(*n).is_ok()) {
            Some(numel) => Ok(Self {
                name: name.to_owned(),
                shape: entry.shape.clone(),
                dtype: entry.dtype,
                numel,
                offset,
            }),
            None => Err(PackageError(format!(
                "tensors.{name}: more than 2^32 elements"
            ))),
        }
    }
}

/// Reads one little-endian element, widened to f32.
pub fn read_element(bytes: &[u8], dtype: Dtype, index: usize) -> f32 {
    match dtype {
        Dtype::F32 => bytes
            .as_chunks::<4>()
            .0
            .get(index)
            .map_or(f32::NAN, |b| f32::from_le_bytes(*b)),
        Dtype::F16 => bytes
            .as_chunks::<2>()
            .0
            .get(index)
            .map_or(f32::NAN, |b| f16::from_le_bytes(*b).to_f32()),
        Dtype::Bf16 => bytes
            .as_chunks::<2>()
            .0
            .get(index)
            .map_or(f32::NAN, |b| bf16::from_le_bytes(*b).to_f32()),
    }
}

/// Rounds to the weight's type, once, and widens again.
pub fn round_to(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

/// Transposes a row-major `rows` x `columns` matrix of `size`-byte elements.
pub fn transpose(bytes: &[u8], rows: usize, columns: usize, size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            let at = (row * columns + column) * size;
            out.extend_from_slice(&bytes[at..at + size]);
        }
    }
    out
}

/// Our name for a safetensors element type, if it can be a weight.
pub fn dtype_of(dtype: safetensors::Dtype) -> Option<Dtype> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum: every other type is not a weight"
    )]
    match dtype {
        safetensors::Dtype::F32 => Some(Dtype::F32),
        safetensors::Dtype::F16 => Some(Dtype::F16),
        safetensors::Dtype::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_twice_is_the_identity() {
        let matrix: Vec<u8> = (0..24).collect();
        let flipped = transpose(&matrix, 2, 3, 4);
        assert_ne!(flipped, matrix);
        assert_eq!(transpose(&flipped, 3, 2, 4), matrix);
    }
}
