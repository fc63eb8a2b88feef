//! Safetensors files of weights: opening one, and writing one tensor at a time.

use std::borrow::Cow;
use std::fs::File;
use std::path::Path;

use safetensors::tensor::View;
use safetensors::{SafeTensorError, SafeTensors};

use super::manifest::PackageError;
use super::tensor::{Dtype, read_element};
use crate::util::file_type::{self, Looks};

/// Reads the header of a safetensors file.
///
/// # Errors
/// Says what the file looks like, and what to give instead.
pub(super) fn deserialize<'a>(
    file: &Path,
    bytes: &'a [u8],
) -> Result<SafeTensors<'a>, PackageError> {
    let broken = |e: SafeTensorError| {
        let why = match remedy(Looks::of(bytes)) {
            Some(remedy) => format!("it {}; {remedy}", file_type::describe(bytes)),
            None => e.to_string(),
        };
        PackageError::at(file, format!("not safetensors: {why}"))
    };
    SafeTensors::deserialize(bytes).map_err(broken)
}

/// What to give instead of a file that is not safetensors; none if the parser's error says more.
fn remedy(looks: Looks) -> Option<&'static str> {
    match looks {
        Looks::Safetensors | Looks::Unknown => None,
        Looks::CheckpointIndex | Looks::Json => {
            Some("the index of a sharded checkpoint is given as a file *.json, beside its shards")
        }
        Looks::Zip | Looks::TorchLegacy | Looks::Pickle => {
            Some("save the weights with safetensors.torch.save_model(model, FILE)")
        }
        Looks::Gzip | Looks::Zstd | Looks::Xz | Looks::Bzip2 | Looks::Tar => {
            Some("unpack it, and give the file in it")
        }
        Looks::Empty
        | Looks::GitLfsPointer
        | Looks::WebPage
        | Looks::Xml
        | Looks::Text
        | Looks::Utf16
        | Looks::Onnx
        | Looks::Numpy
        | Looks::Hdf5
        | Looks::Gguf
        | Looks::MessagePack => Some("give the safetensors file itself"),
    }
}

/// A weight to write.
pub(crate) struct Stored<'a> {
    /// Their type in `bytes`.
    pub(crate) dtype: Dtype,
    /// Their type in the file: the same, or wider.
    pub(crate) wanted: Dtype,
    /// Their shape.
    pub(crate) shape: &'a [usize],
    /// Little endian, row-major.
    pub(crate) bytes: &'a [u8],
}

impl View for Stored<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.wanted.stored()
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.dtype == self.wanted {
            true => Cow::Borrowed(self.bytes),
            false => Cow::Owned(widen(self.bytes, self.dtype)),
        }
    }

    fn data_len(&self) -> usize {
        self.bytes.len() / self.dtype.size() * self.wanted.size()
    }
}

/// Writes weights to a safetensors file, with at most one of them in memory.
///
/// # Errors
/// On an I/O error.
pub(crate) fn write<'a>(
    file: &Path,
    tensors: impl Iterator<Item = (&'a str, Stored<'a>)>,
) -> std::io::Result<()> {
    // The crate replaces this file by one that only its owner may read.
    let permissions = File::create(file)?.metadata()?.permissions();
    safetensors::serialize_to_file(tensors, None, file).map_err(|error| {
        if let SafeTensorError::IoError(error) = error {
            error
        } else {
            std::io::Error::other(error)
        }
    })?;
    std::fs::set_permissions(file, permissions)
}

/// Widens 16-bit elements to 32 bits, which is exact.
pub(super) fn widen(bytes: &[u8], dtype: Dtype) -> Vec<u8> {
    let elements = bytes.len() / dtype.size();
    let mut wide = Vec::with_capacity(elements * Dtype::F32.size());
    for at in 0..elements {
        wide.extend_from_slice(&read_element(bytes, dtype, at).to_le_bytes());
    }
    wide
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::checkpoint::Checkpoint;

    #[test]
    fn what_is_written_can_be_read_by_others_and_is_wider_where_that_is_wanted() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (path, plain) = (
            folder.path().join("w.safetensors"),
            folder.path().join("plain"),
        );
        std::fs::write(&plain, "").unwrap();
        let half = half::f16::from_f32(0.1);
        let stored = Stored {
            dtype: Dtype::F16,
            wanted: Dtype::F32,
            shape: &[1],
            bytes: &half.to_le_bytes(),
        };
        write(&path, std::iter::once(("w", stored))).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain));
        let read = Checkpoint::open(&path).unwrap();
        assert_eq!(read.tensors[0].dtype, Dtype::F32);
        assert_eq!(read.tensors[0].bytes, half.to_f32().to_le_bytes()[..]);
    }
}
