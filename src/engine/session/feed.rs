//! Tensors that are fed to the graph besides the weights.

use half::f16;
use ort::value::{DynTensor, PrimitiveTensorElementType, Tensor};

use crate::model::tensor::Elem;

/// The data of one graph input other than a weight.
#[derive(Debug)]
pub struct Feed<'a> {
    /// Name of the input.
    pub name: &'a str,
    /// Batch first.
    pub shape: Vec<usize>,
    /// Element type.
    pub elem: Elem,
    /// Little-endian, row-major.
    pub bytes: Vec<u8>,
}

impl<'a> Feed<'a> {
    /// Integers, converted to the element type of the input.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "positions and flags, far below 2^24"
    )]
    pub fn integers(
        name: &'a str,
        shape: Vec<usize>,
        elem: Elem,
        values: impl Iterator<Item = i64>,
    ) -> Self {
        let bytes = match elem {
            Elem::I64 => values.flat_map(i64::to_le_bytes).collect(),
            Elem::I32 => values.flat_map(|v| (v as i32).to_le_bytes()).collect(),
            Elem::F32 => values.flat_map(|v| (v as f32).to_le_bytes()).collect(),
            Elem::F16 => {
                let half = |v: i64| f16::from_f32(v as f32).to_le_bytes();
                values.flat_map(half).collect()
            }
            Elem::U8 | Elem::Bool => values.map(|v| v as u8).collect(),
        };
        Self {
            name,
            shape,
            elem,
            bytes,
        }
    }

    pub(super) fn tensor(self) -> ort::Result<DynTensor> {
        let (shape, bytes) = (self.shape, self.bytes);
        match self.elem {
            Elem::F32 => typed(shape, &bytes, f32::from_le_bytes),
            Elem::F16 => typed(shape, &bytes, f16::from_le_bytes),
            Elem::I64 => typed(shape, &bytes, i64::from_le_bytes),
            Elem::I32 => typed(shape, &bytes, i32::from_le_bytes),
            Elem::U8 => typed(shape, &bytes, u8::from_le_bytes),
            Elem::Bool => typed(shape, &bytes, |b: [u8; 1]| b != [0]),
        }
    }
}

fn typed<T: PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static, const N: usize>(
    shape: Vec<usize>,
    bytes: &[u8],
    read: impl Fn([u8; N]) -> T,
) -> ort::Result<DynTensor> {
    let values: Vec<T> = bytes.as_chunks().0.iter().map(|b| read(*b)).collect();
    Ok(Tensor::from_array((shape, values))?.upcast())
}
