//! Format `safetensors`: for each tensor either `NAME`, every element of it, or the pair
//! `NAME::indices` (i32 or i64) and `NAME::values`, both of one dimension. Values are f16, bf16 or
//! f32. Metadata is ignored.

use ::safetensors::tensor::TensorView;
use ::safetensors::{Dtype, SafeTensorError, SafeTensors};
use half::{bf16, f16};

use super::{Gathered, malformed, shorten, too_large};
use crate::failure::Failure;

const INDICES: &str = "::indices";
const VALUES: &str = "::values";
/// What a header may say of a tensor besides its name, twice for a pair, and of the whole.
const OF_A_TENSOR: u64 = 512;
const OF_THE_WHOLE: u64 = 1 << 16;

/// Reads the container.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn decode(bytes: &[u8], gathered: &mut Gathered<'_>) -> Result<(), Failure> {
    check_header(bytes, gathered)?;
    let file = SafeTensors::deserialize(bytes);
    let file = file.map_err(|error| {
        // Which of several the crate names is chance, and the same bytes are to be refused alike.
        if let SafeTensorError::InvalidOffset(_) = error {
            return malformed("not safetensors: tensors do not lie one behind the other");
        }
        malformed(format!("not safetensors: {error}"))
    })?;
    // The crate keeps them in an order of chance; what is refused first must not be.
    let mut tensors: Vec<_> = file.iter().collect();
    tensors.sort_unstable_by_key(|(name, _)| *name);
    for (name, view) in tensors {
        let wrong = |what: &str| malformed(format!("{}: {what}", shorten(name)));
        if let Some(tensor) = name.strip_suffix(INDICES) {
            let values = file.tensor(&format!("{tensor}{VALUES}"));
            let values = values.map_err(|_| wrong("has no ::values beside it"))?;
            add_pair(tensor, &view, &values, gathered)?;
        } else if let Some(tensor) = name.strip_suffix(VALUES) {
            let indices = file.tensor(&format!("{tensor}{INDICES}"));
            indices.map_err(|_| wrong("has no ::indices beside it"))?;
        } else {
            add_dense(name, &view, gathered)?;
        }
    }
    Ok(())
}

/// The crate reads a header of 100 MB, of which it makes many times as much. One of a candidate
/// needs no more than a few words for each tensor of the model.
fn check_header(bytes: &[u8], gathered: &Gathered<'_>) -> Result<(), Failure> {
    let Some(length) = bytes.first_chunk() else {
        return Err(malformed("not safetensors: shorter than its header"));
    };
    let (length, names) = (u64::from_le_bytes(*length), gathered.names());
    let most = names.fold(OF_THE_WHOLE, |sum, name| {
        sum + OF_A_TENSOR + 4 * name.len() as u64
    });
    match length > most {
        true => Err(too_large(format!(
            "a header of {length} bytes, where one that names every tensor of the model needs less than {most}"
        ))),
        false => Ok(()),
    }
}

fn add_pair(
    name: &str,
    indices: &TensorView<'_>,
    values: &TensorView<'_>,
    gathered: &mut Gathered<'_>,
) -> Result<(), Failure> {
    let wrong = |what: String| malformed(format!("{}: {what}", shorten(name)));
    let (&[k], &[other]) = (indices.shape(), values.shape()) else {
        return Err(wrong("indices and values must have one dimension".into()));
    };
    if k != other {
        return Err(wrong(format!("{k} indices for {other} values")));
    }
    let tensor = gathered.declare(name, None, k as u64)?;
    #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum")]
    match indices.dtype() {
        Dtype::I32 => {
            let indices = indices.data().as_chunks().0.iter();
            let indices = indices.map(|b| i64::from(i32::from_le_bytes(*b)));
            add_values(name, tensor, indices, values, gathered)
        }
        Dtype::I64 => {
            let indices = indices.data().as_chunks().0.iter();
            let indices = indices.map(|b| i64::from_le_bytes(*b));
            add_values(name, tensor, indices, values, gathered)
        }
        other => Err(wrong(format!("indices of {other}, not I32 or I64"))),
    }
}

fn add_dense(
    name: &str,
    values: &TensorView<'_>,
    gathered: &mut Gathered<'_>,
) -> Result<(), Failure> {
    let shape: Vec<u64> = values.shape().iter().map(|d| *d as u64).collect();
    // The crate has multiplied them, so this cannot overflow.
    let entries: u64 = shape.iter().product();
    let tensor = gathered.declare(name, Some(&shape), entries)?;
    // A tensor has fewer elements than a u32 counts.
    let indices = (0..u32::try_from(entries).unwrap_or(0)).map(i64::from);
    add_values(name, tensor, indices, values, gathered)
}

fn add_values(
    name: &str,
    tensor: usize,
    indices: impl ExactSizeIterator<Item = i64> + Clone,
    values: &TensorView<'_>,
    gathered: &mut Gathered<'_>,
) -> Result<(), Failure> {
    let (dtype, data) = (values.dtype(), values.data());
    #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum")]
    match dtype {
        Dtype::F32 => {
            let values = data.as_chunks().0.iter();
            let values = values.map(|b| f32::from_le_bytes(*b));
            gathered.add(name, tensor, indices, values)
        }
        Dtype::F16 => {
            let values = data.as_chunks().0.iter();
            let values = values.map(|b| f16::from_le_bytes(*b).to_f32());
            gathered.add(name, tensor, indices, values)
        }
        Dtype::BF16 => {
            let values = data.as_chunks().0.iter();
            let values = values.map(|b| bf16::from_le_bytes(*b).to_f32());
            gathered.add(name, tensor, indices, values)
        }
        other => {
            let name = shorten(name);
            Err(malformed(format!(
                "{name}: values of {other}, not F16, BF16 or F32"
            )))
        }
    }
}
