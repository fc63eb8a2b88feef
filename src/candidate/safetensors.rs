//! Format `safetensors`: for each tensor either `NAME`, every element of it, or the pair
//! `NAME::indices` (i32 or i64) and `NAME::values`, both of one dimension. Values are f16, bf16 or
//! f32. Metadata is ignored, and so are integers that the model does not have.

use ::safetensors::tensor::TensorView;
use ::safetensors::{Dtype, SafeTensorError, SafeTensors};

use super::update_builder::UpdateBuilder;
use super::{bf16_from, each, f16_from, i32_from, malformed, not_a, shorten, too_large};
use crate::model::tensor::is_integer;
use crate::protocol::failure::Failure;
use crate::util::file_type::{self, Looks};

const INDICES: &str = "::indices";
const VALUES: &str = "::values";
/// What a header may say of a tensor besides its name, twice for a pair, and of the whole.
const OF_A_TENSOR: u64 = 512;
const OF_THE_WHOLE: u64 = 1 << 16;

/// Reads the container.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn decode(bytes: &[u8], builder: &mut UpdateBuilder<'_>) -> Result<(), Failure> {
    check_header(bytes, builder)?;
    let file = SafeTensors::deserialize(bytes);
    let file = file.map_err(|error| {
        // Which of several the crate names is chance, and the same bytes are to be refused alike.
        if let SafeTensorError::InvalidOffset(_) = error {
            return malformed("not safetensors: tensors are not contiguous");
        }
        malformed(format!("not safetensors: {error}"))
    })?;
    // The crate keeps them in an order of chance; what is refused first must not be.
    let mut parts: Vec<_> = file
        .iter()
        .map(|(name, view)| Part::of(name, view))
        .collect();
    parts.sort_unstable_by_key(|part| part.name);
    let weights = parts.iter().filter(|part| !part.is_foreign(&file, builder));
    let renamed: Vec<&str> = weights.map(|part| part.tensor).collect();
    builder.rename(renamed.iter().copied());
    for part in &parts {
        part.add(&file, builder)?;
    }
    Ok(())
}

/// One tensor of the file, and the tensor of the model that it is about.
struct Part<'f> {
    name: &'f str,
    tensor: &'f str,
    role: Role,
    view: TensorView<'f>,
}

/// What of the model's tensor it holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Whole,
    Indices,
    Values,
}

impl<'f> Part<'f> {
    fn of(name: &'f str, view: TensorView<'f>) -> Self {
        let (tensor, role) = if let Some(tensor) = name.strip_suffix(INDICES) {
            (tensor, Role::Indices)
        } else if let Some(tensor) = name.strip_suffix(VALUES) {
            (tensor, Role::Values)
        } else {
            (name, Role::Whole)
        };
        Self {
            name,
            tensor,
            role,
            view,
        }
    }

    /// Whether it is meant for no tensor of the model and the type of its values cannot be a weight's, so
    /// that it is a counter, a mask or the like.
    fn is_foreign(&self, file: &SafeTensors<'f>, builder: &UpdateBuilder<'_>) -> bool {
        let values = match self.role {
            Role::Whole | Role::Values => Some(self.view.dtype()),
            Role::Indices => self.other(file, VALUES).map(|values| values.dtype()),
        };
        values.is_some_and(is_integer) && !builder.may_mean(self.tensor)
    }

    fn other(&self, file: &SafeTensors<'f>, suffix: &str) -> Option<TensorView<'f>> {
        file.tensor(&format!("{}{suffix}", self.tensor)).ok()
    }

    fn add(&self, file: &SafeTensors<'f>, builder: &mut UpdateBuilder<'_>) -> Result<(), Failure> {
        let wrong = |what: &str| Err(malformed(format!("{}: {what}", shorten(self.name))));
        match (
            self.role,
            self.other(file, INDICES),
            self.other(file, VALUES),
        ) {
            (Role::Indices, _, None) => wrong("has no ::values beside it"),
            (Role::Values, None, _) => wrong("has no ::indices beside it"),
            (Role::Whole, Some(_), _) | (Role::Whole, _, Some(_)) => {
                wrong("is there as a whole and as ::indices and ::values")
            }
            _ if self.is_foreign(file, builder) => {
                if self.role != Role::Values {
                    builder.pass_over(self.tensor);
                }
                Ok(())
            }
            (Role::Whole, None, None) => add_dense(self.name, &self.view, builder),
            (Role::Indices, _, Some(values)) => add_pair(self.tensor, &self.view, &values, builder),
            // With its indices.
            (Role::Values, Some(_), _) => Ok(()),
        }
    }
}

/// Looks at how the file begins. The crate reads a header of 100 MB, of which it makes many times as
/// much. One of a candidate needs no more than a few words for each tensor of the model.
fn check_header(bytes: &[u8], builder: &UpdateBuilder<'_>) -> Result<(), Failure> {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        let begins = file_type::describe(bytes);
        return Err(malformed(format!(
            "not safetensors: shorter than its header: {begins}"
        )));
    };
    let (length, there) = (u64::from_le_bytes(*length), rest.len() as u64);
    if !rest
        .first()
        .is_some_and(|byte| *byte == b'{' || byte.is_ascii_whitespace())
    {
        return Err(not_a("safetensors", bytes));
    }
    let names = builder.names();
    let most = names.fold(OF_THE_WHOLE, |sum, name| {
        sum + OF_A_TENSOR + 4 * name.len() as u64
    });
    if length > there {
        return Err(match Looks::of(bytes) == Looks::Safetensors {
            true => malformed(format!(
                "not safetensors: of a header of {length} bytes {there} are there"
            )),
            false => not_a("safetensors", bytes),
        });
    }
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
    builder: &mut UpdateBuilder<'_>,
) -> Result<(), Failure> {
    let wrong = |what: String| malformed(format!("{}: {what}", shorten(name)));
    let (&[k], &[other]) = (indices.shape(), values.shape()) else {
        return Err(wrong("indices and values must have one dimension".into()));
    };
    if k != other {
        return Err(wrong(format!("{k} indices for {other} values")));
    }
    let tensor = builder.declare(name, None, k as u64)?;
    let data = indices.data();
    #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum")]
    match indices.dtype() {
        Dtype::I32 => add_values(name, tensor, each(data, i32_from), values, builder),
        Dtype::I64 => add_values(
            name,
            tensor,
            each(data, i64::from_le_bytes),
            values,
            builder,
        ),
        other => Err(wrong(format!("indices of {other}, not I32 or I64"))),
    }
}

fn add_dense(
    name: &str,
    values: &TensorView<'_>,
    builder: &mut UpdateBuilder<'_>,
) -> Result<(), Failure> {
    let shape: Vec<u64> = values.shape().iter().map(|d| *d as u64).collect();
    // The crate has multiplied them, so this cannot overflow.
    let entries: u64 = shape.iter().product();
    let tensor = builder.declare(name, Some(&shape), entries)?;
    // A tensor has fewer elements than a u32 counts.
    let indices = (0..u32::try_from(entries).unwrap_or(0)).map(i64::from);
    add_values(name, tensor, indices, values, builder)
}

fn add_values(
    name: &str,
    tensor: usize,
    indices: impl ExactSizeIterator<Item = i64> + Clone,
    values: &TensorView<'_>,
    builder: &mut UpdateBuilder<'_>,
) -> Result<(), Failure> {
    let (dtype, data) = (values.dtype(), values.data());
    #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum")]
    match dtype {
        Dtype::F32 => builder.add(name, tensor, indices, each(data, f32::from_le_bytes)),
        Dtype::F16 => builder.add(name, tensor, indices, each(data, f16_from)),
        Dtype::BF16 => builder.add(name, tensor, indices, each(data, bf16_from)),
        other => {
            let name = shorten(name);
            Err(malformed(format!(
                "{name}: values of {other}, not F16, BF16 or F32"
            )))
        }
    }
}
