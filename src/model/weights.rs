//! The baseline weights: read-only, in checkpoint layout, memory-mapped from the package.
//! Candidates are applied to them and restored from them; they are never written.

use std::path::Path;

use bytes::Bytes;
use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::weights_file::deserialize;
use crate::model::manifest::{Manifest, PackageError, TensorEntry};
use crate::model::onnx::Graph;
use crate::model::tensor::Dtype;
pub use crate::model::tensor::{read_element, round_to};

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
}

/// All tensors of the baseline, ascending by name.
#[derive(Debug)]
pub struct Weights {
    /// For each tensor a slice of the mapped file, or an own buffer if the graph holds it
    /// transposed.
    contents: Vec<Bytes>,
    /// Ascending by name.
    pub tensors: Vec<TensorInfo>,
    /// SHA-256 over names and contents of the trainable tensors: equal weights have equal ids,
    /// however they were produced.
    pub weights_id: String,
}

impl Weights {
    /// Maps a safetensors file and checks that it holds the manifest's tensors. Also returns the
    /// SHA-256 of the file, which the caller compares.
    ///
    /// # Errors
    /// Names the file and the tensor.
    pub(super) fn open(path: &Path, manifest: &Manifest) -> Result<(Self, Digest32), PackageError> {
        let broken = |why: String| PackageError::at(path, why);
        let map = crate::model::files::map(path)?;
        let views = deserialize(path, &map)?;
        let mut tensors = Vec::with_capacity(manifest.tensors.len());
        let mut contents = Vec::with_capacity(manifest.tensors.len());
        for (name, entry) in &manifest.tensors {
            let view = views.tensor(name);
            let view = view.map_err(|_| broken(format!("has no tensor {name}")))?;
            if view.shape() != entry.shape || Dtype::of_stored(view.dtype()) != Some(entry.dtype) {
                return Err(broken(format!(
                    "{name} is {:?} {:?}, model.json says {} {:?}",
                    view.dtype(),
                    view.shape(),
                    entry.dtype.as_str(),
                    entry.shape
                )));
            }
            tensors.push(TensorInfo::new(name, entry)?);
            contents.push(map.slice_ref(view.data()));
        }
        let (whole, each) = digests(&map, &contents);
        Ok((Self::finish(contents, tensors, &each, manifest), whole))
    }

    /// Reads the weights from the graph's own initializers.
    pub(super) fn from_graph(
        dir: &Path,
        graph: &Bytes,
        manifest: &Manifest,
    ) -> Result<Self, PackageError> {
        let graph = Graph::decode(graph.clone())?;
        let mut tensors = Vec::with_capacity(manifest.tensors.len());
        let mut contents = Vec::with_capacity(manifest.tensors.len());
        for (name, entry) in &manifest.tensors {
            let Some(place) = entry.places.first() else {
                continue;
            };
            let mut bytes = graph.initializer(&place.initializer, dir).map_err(|e| {
                PackageError(format!(
                    "tensors.{name}: {e}; without weights the graph must hold it"
                ))
            })?;
            if let (true, [rows, columns]) = (place.transposed, entry.shape.as_slice()) {
                bytes = transpose(&bytes, *columns, *rows, entry.dtype.size()).into();
            }
            let info = TensorInfo::new(name, entry)?;
            if bytes.len() != info.numel * entry.dtype.size() {
                return Err(PackageError(format!(
                    "tensors.{name}: shape and dtype do not fit initializer {}",
                    place.initializer
                )));
            }
            tensors.push(info);
            contents.push(bytes);
        }
        let each: Vec<Digest32> = contents.iter().map(|c| Sha256::digest(c).into()).collect();
        Ok(Self::finish(contents, tensors, &each, manifest))
    }

    fn finish(
        contents: Vec<Bytes>,
        tensors: Vec<TensorInfo>,
        digests: &[Digest32],
        manifest: &Manifest,
    ) -> Self {
        let mut id = Sha256::new();
        for (tensor, digest) in tensors.iter().zip(digests) {
            if manifest.is_trainable(&tensor.name) {
                id.update(Sha256::digest(tensor.name.as_bytes()));
                id.update(digest);
            }
        }
        Self {
            contents,
            tensors,
            weights_id: hex::encode(id.finalize()),
        }
    }

    /// A tensor's little-endian bytes, row-major.
    pub fn bytes(&self, tensor: usize) -> &[u8] {
        &self.contents[tensor]
    }

    /// The same, shared.
    pub fn shared_bytes(&self, tensor: usize) -> Bytes {
        self.contents[tensor].clone()
    }

    /// One element, widened to f32.
    #[cfg(test)]
    pub fn element(&self, tensor: usize, index: u32) -> f32 {
        let dtype = self.tensors[tensor].dtype;
        read_element(self.bytes(tensor), dtype, index as usize)
    }
}

impl TensorInfo {
    fn new(name: &str, entry: &TensorEntry) -> Result<Self, PackageError> {
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
            }),
            None => Err(PackageError(format!(
                "tensors.{name}: more than 2^32 elements"
            ))),
        }
    }
}

type Digest32 = [u8; 32];

/// SHA-256 of a file and of each of its parts in one pass: each part is hashed for both while it is
/// in the cache.
fn digests(file: &[u8], parts: &[Bytes]) -> (Digest32, Vec<Digest32>) {
    const BITE: usize = 1 << 18;
    let offset = |part: &Bytes| part.as_ptr().addr() - file.as_ptr().addr();
    // An empty part has no offset in the file.
    let mut order: Vec<usize> = (0..parts.len()).filter(|p| !parts[*p].is_empty()).collect();
    order.sort_by_key(|part| offset(&parts[*part]));
    let (mut whole, mut at) = (Sha256::new(), 0);
    let mut each = vec![Sha256::digest([]).into(); parts.len()];
    for part in order {
        let start = offset(&parts[part]);
        whole.update(&file[at..start]);
        let mut own = Sha256::new();
        for bite in parts[part].chunks(BITE) {
            whole.update(bite);
            own.update(bite);
        }
        each[part] = own.finalize().into();
        at = start + parts[part].len();
    }
    whole.update(&file[at..]);
    (whole.finalize().into(), each)
}

/// Adds values to elements of a tensor's bytes, in f32 and rounded once.
///
/// # Errors
/// The first index whose element becomes non-finite, or does not exist.
pub fn add(bytes: &mut [u8], dtype: Dtype, indices: &[u32], values: &[f32]) -> Result<(), u32> {
    for (index, value) in indices.iter().zip(values) {
        let at = *index as usize;
        let sum = round_to(dtype, read_element(bytes, dtype, at) + value);
        if !sum.is_finite() {
            return Err(*index);
        }
        // In range, because the element was read.
        let at = at * dtype.size()..(at + 1) * dtype.size();
        match dtype {
            Dtype::F32 => bytes[at].copy_from_slice(&sum.to_le_bytes()),
            Dtype::F16 => bytes[at].copy_from_slice(&f16::from_f32(sum).to_le_bytes()),
            Dtype::Bf16 => bytes[at].copy_from_slice(&bf16::from_f32(sum).to_le_bytes()),
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_gives_the_digests_of_the_whole_and_of_every_part() {
        let file = Bytes::from((0..=255).cycle().take(1_000_000).collect::<Vec<u8>>());
        let parts = [file.slice(600_000..999_990), file.slice(8..300_000)];
        let (whole, each) = digests(&file, &parts);
        assert_eq!(whole, Digest32::from(Sha256::digest(&file)));
        for (part, digest) in parts.iter().zip(each) {
            assert_eq!(digest, Digest32::from(Sha256::digest(part)));
        }
    }

    #[test]
    fn adding_rounds_once_and_stops_at_what_is_not_finite() {
        let mut f32s = [1.0_f32, 2.0].map(f32::to_le_bytes).concat();
        assert_eq!(add(&mut f32s, Dtype::F32, &[1], &[0.5]), Ok(()));
        assert_eq!(read_element(&f32s, Dtype::F32, 1), 2.5);
        assert_eq!(add(&mut f32s, Dtype::F32, &[0], &[f32::MAX]), Ok(()));
        assert_eq!(add(&mut f32s, Dtype::F32, &[0], &[f32::MAX]), Err(0));
        assert_eq!(add(&mut f32s, Dtype::F32, &[2], &[1.0]), Err(2));
        // 2049 lies between two halves; the sum is not rounded before it is complete.
        let mut halves = f16::from_f32(2048.0).to_le_bytes().to_vec();
        assert_eq!(add(&mut halves, Dtype::F16, &[0], &[1.5]), Ok(()));
        assert_eq!(read_element(&halves, Dtype::F16, 0), 2050.0);
        assert_eq!(add(&mut halves, Dtype::F16, &[0], &[65_000.0]), Err(0));
        let mut brains = bf16::from_f32(256.0).to_le_bytes().to_vec();
        assert_eq!(add(&mut brains, Dtype::Bf16, &[0], &[1.5]), Ok(()));
        assert_eq!(read_element(&brains, Dtype::Bf16, 0), 258.0);
    }

    #[test]
    fn transposing_twice_is_the_identity() {
        let matrix: Vec<u8> = (0..24).collect();
        let flipped = transpose(&matrix, 2, 3, 4);
        assert_ne!(flipped, matrix);
        assert_eq!(transpose(&flipped, 3, 2, 4), matrix);
    }
}
