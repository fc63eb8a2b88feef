//! Element types of weights and of a graph's inputs, and their names in safetensors files.

use half::{bf16, f16};
use safetensors::Dtype as Stored;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Its name in the manifest and in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The type in a safetensors file.
    pub(crate) fn stored(self) -> Stored {
        match self {
            Self::F32 => Stored::F32,
            Self::F16 => Stored::F16,
            Self::Bf16 => Stored::BF16,
        }
    }

    /// The weight type that a safetensors file's type is, if it is one.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum: no other type is a weight's"
    )]
    pub(crate) fn of_stored(stored: Stored) -> Option<Self> {
        match stored {
            Stored::F32 => Some(Self::F32),
            Stored::F16 => Some(Self::F16),
            Stored::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }
}

/// Whether elements of a safetensors file's type are integers or booleans.
pub(crate) fn is_integer(stored: Stored) -> bool {
    matches!(
        stored,
        Stored::BOOL
            | Stored::U8
            | Stored::I8
            | Stored::U16
            | Stored::I16
            | Stored::U32
            | Stored::I32
            | Stored::U64
            | Stored::I64
    )
}

/// Element type of an input that is no weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Elem {
    F32,
    F16,
    I64,
    I32,
    U8,
    Bool,
}

impl Elem {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 => 2,
            Self::U8 | Self::Bool => 1,
        }
    }
    /// The input type that a safetensors file's type is, if it can be fed.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum: every other type is no input"
    )]
    pub(crate) fn of_stored(stored: Stored) -> Option<Self> {
        match stored {
            Stored::F32 => Some(Self::F32),
            Stored::F16 => Some(Self::F16),
            Stored::I64 => Some(Self::I64),
            Stored::I32 => Some(Self::I32),
            Stored::U8 => Some(Self::U8),
            Stored::BOOL => Some(Self::Bool),
            _ => None,
        }
    }
}

/// Reads one little-endian element, widened to f32.
pub fn read_element(bytes: &[u8], dtype: Dtype, index: usize) -> f32 {
    fn at<const N: usize>(bytes: &[u8], index: usize) -> Option<[u8; N]> {
        bytes.as_chunks().0.get(index).copied()
    }
    let element = match dtype {
        Dtype::F32 => at(bytes, index).map(f32::from_le_bytes),
        Dtype::F16 => at(bytes, index).map(|b| f16::from_le_bytes(b).to_f32()),
        Dtype::Bf16 => at(bytes, index).map(|b| bf16::from_le_bytes(b).to_f32()),
    };
    element.unwrap_or(f32::NAN)
}

/// Rounds to the weight's type, once, and widens again.
pub fn round_once(dtype: Dtype, value: f64) -> f32 {
    match dtype {
        #[expect(clippy::cast_possible_truncation, reason = "this is the rounding")]
        Dtype::F32 => value as f32,
        // Rounding to odd keeps, in the last bit, that something was cut off, so that a tie is one only where it was.
        Dtype::F16 | Dtype::Bf16 => round_to(dtype, round_to_odd(value)),
    }
}

/// The f32 itself where there is one, else the neighbour whose last bit is set.
fn round_to_odd(value: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "corrected below")]
    let near = value as f32;
    let wide = f64::from(near);
    if wide.to_bits() == value.to_bits() || !value.is_finite() {
        return near;
    }
    let beyond = u32::from(wide.abs() > value.abs());
    f32::from_bits((near.to_bits() - beyond) | 1)
}

/// Rounds to the weight's type, once, and widens again.
pub fn round_to(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between every number of 16 bits and the next: halfway goes to the even one, and whatever is beyond, by however
    /// little, to the nearer one.
    #[test]
    fn a_double_is_rounded_once_to_the_nearest_of_16_bits_and_ties_go_to_even() {
        let wide = |dtype: Dtype, bits: u16| match dtype {
            Dtype::F16 => f16::from_bits(bits).to_f64(),
            Dtype::Bf16 => bf16::from_bits(bits).to_f64(),
            Dtype::F32 => f64::from(bits),
        };
        for (dtype, infinity) in [(Dtype::F16, 0x7c00_u16), (Dtype::Bf16, 0x7f80)] {
            for low in 0..infinity - 1 {
                let (below, above) = (wide(dtype, low), wide(dtype, low + 1));
                let (tie, even) = (
                    f64::midpoint(below, above),
                    if low % 2 == 0 { below } else { above },
                );
                let (less, more) = (tie.next_down(), tie.next_up());
                for (value, expected) in [(below, below), (less, below), (tie, even), (more, above)]
                {
                    for sign in [1.0, -1.0] {
                        let rounded = round_once(dtype, sign * value);
                        assert_eq!(f64::from(rounded), sign * expected, "{dtype:?} {value:e}");
                    }
                }
            }
            assert_eq!(round_once(dtype, 1e300), f32::INFINITY);
            assert!(round_once(dtype, f64::NAN).is_nan());
        }
    }
}
