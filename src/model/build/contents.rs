//! Finding tensors and initializers by a hash of their contents.

use std::collections::HashMap;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::model::checkpoint::Tensor;
use crate::model::manifest::GraphLocation;
use crate::model::onnx::InitializerInfo;
use crate::model::tensor::Dtype;
use crate::model::weights::transpose;

pub(super) type ContentHash = [u8; 32];

/// A tensor, with the hashes of its contents as they are and transposed.
pub(super) struct HashedTensor<'a> {
    tensor: &'a Tensor,
    pub(super) hash: ContentHash,
    transposed: Option<ContentHash>,
}

impl<'a> HashedTensor<'a> {
    pub(super) fn new(tensor: &'a Tensor) -> Self {
        let transposed = match *tensor.shape {
            [rows, columns] => {
                let bytes = transpose(&tensor.bytes, rows, columns, tensor.dtype.size());
                Some(content_hash(&[columns, rows], tensor.dtype, &bytes))
            }
            _ => None,
        };
        Self {
            tensor,
            hash: content_hash(&tensor.shape, tensor.dtype, &tensor.bytes),
            transposed,
        }
    }

    /// Whether it is its own transpose, so that contents do not show which of them an initializer
    /// holds.
    pub(super) fn is_symmetric(&self) -> bool {
        self.transposed == Some(self.hash)
    }

    /// The hashes of initializers that hold it, with whether they hold it transposed; a symmetric
    /// matrix counts as not transposed.
    pub(super) fn initializer_hashes(&self) -> impl Iterator<Item = (ContentHash, bool)> {
        let transposed = self.transposed.filter(|_| !self.is_symmetric());
        std::iter::once((self.hash, false)).chain(transposed.map(|contents| (contents, true)))
    }

    /// Whether their contents are equal, as they are or transposed.
    pub(super) fn has_equal_contents(&self, other: &Self) -> bool {
        self.hash == other.hash || self.transposed == Some(other.hash)
    }
}

impl std::ops::Deref for HashedTensor<'_> {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        self.tensor
    }
}

pub(super) fn content_hash(shape: &[usize], dtype: Dtype, bytes: &[u8]) -> ContentHash {
    let mut hash = Sha256::new();
    hash.update(format!("{shape:?} {}", dtype.as_str()));
    hash.update(bytes);
    hash.finalize().into()
}

/// Names of initializers that may hold a tensor, by content hash.
pub(super) fn by_contents<'a>(
    checkpoint: &[Tensor],
    initializers: &'a [(InitializerInfo, Bytes)],
) -> HashMap<ContentHash, Vec<&'a str>> {
    let mut by_contents: HashMap<ContentHash, Vec<&'a str>> = HashMap::new();
    // Spares reading a frozen base.
    let wanted = |info: &InitializerInfo| {
        let reversed = info.shape.iter().rev();
        let alike = |t: &Tensor| t.shape == info.shape || t.shape.iter().eq(reversed.clone());
        checkpoint.iter().any(alike)
    };
    for (info, bytes) in initializers.iter().filter(|(info, _)| wanted(info)) {
        let dtype = info.dtype.unwrap_or(Dtype::F32);
        by_contents
            .entry(content_hash(&info.shape, dtype, bytes))
            .or_default()
            .push(&info.name);
    }
    by_contents
}

/// Every initializer that holds the tensor's contents, as they are or transposed.
pub(super) fn copies(
    tensor: &HashedTensor<'_>,
    by_contents: &HashMap<ContentHash, Vec<&str>>,
) -> Vec<GraphLocation> {
    let places = |(contents, transposed)| {
        let names = by_contents.get(&contents).into_iter().flatten();
        names.map(move |name| GraphLocation {
            initializer: (*name).to_owned(),
            transposed,
        })
    };
    tensor.initializer_hashes().flat_map(places).collect()
}
