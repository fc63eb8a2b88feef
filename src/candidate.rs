//! Decodes untrusted bytes into a checked update: every name is known, every index is in range and
//! unique, every value is finite and every size is bounded before anything touches the weights.

mod binary_v2;
mod cache;
pub mod fetch;
mod foreign;
mod keys;
mod packed;
mod pt_chunks;
mod safetensors;
pub mod sketch;
mod update_builder;
mod zstd;

use half::{bf16, f16};

use crate::config::CandidatesConfig;
use crate::model::package::Package;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::{Compression, Format};
use crate::util::file_type::{self, Looks};
use update_builder::UpdateBuilder;

/// The most dimensions of a shape.
const MOST_DIMENSIONS: usize = 8;

/// The entries of one tensor, ascending by index.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorUpdate {
    /// Position in the package's weights.
    pub tensor: usize,
    /// Row-major indices in the checkpoint's layout.
    pub indices: Vec<u32>,
    /// One per index, as sent, widened to f32.
    pub values: Vec<f32>,
}

/// A checked update.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Update {
    /// Ascending by tensor.
    pub tensors: Vec<TensorUpdate>,
    /// The versions it leads from and to, if its container names them.
    pub versions: Option<Versions>,
}

/// The versions that a container says it leads from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// `old_version`
    pub old: u64,
    /// `new_version`
    pub new: u64,
}

impl Update {
    /// Number of entries in all tensors.
    pub fn entries(&self) -> u64 {
        self.tensors.iter().map(|t| t.indices.len() as u64).sum()
    }

    /// Euclidean norm of the values as sent.
    pub fn l2_norm(&self) -> f64 {
        let values = self.tensors.iter().flat_map(|t| &t.values);
        values.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
    }
}

/// What decoding may produce, whatever the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// `candidates.max_entries`
    pub max_entries: u64,
    /// `candidates.max_inflated_bytes`, over all compressed streams.
    pub max_inflated_bytes: u64,
}

impl From<&CandidatesConfig> for DecodeLimits {
    fn from(config: &CandidatesConfig) -> Self {
        Self {
            max_entries: config.max_entries,
            max_inflated_bytes: config.max_inflated_bytes,
        }
    }
}

/// A checked update, and what it took to decode it.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// What was decoded.
    pub update: Update,
    /// Bytes that all of its compressed streams inflated to.
    pub inflated: u64,
}

/// Decodes an update and checks it against the package.
///
/// # Errors
/// The first problem found, with its contract code.
pub fn decode(
    bytes: &[u8],
    format: Format,
    compression: Option<Compression>,
    package: &Package,
    limits: DecodeLimits,
) -> Result<Update, Failure> {
    decode_counted(bytes, format, compression, package, limits).map(|decoded| decoded.update)
}

/// The same, for who counts what several take together.
///
/// # Errors
/// As [`decode`].
pub fn decode_counted(
    bytes: &[u8],
    format: Format,
    compression: Option<Compression>,
    package: &Package,
    limits: DecodeLimits,
) -> Result<Decoded, Failure> {
    let mut builder = UpdateBuilder::new(package, limits);
    let inflated;
    let bytes = match compression {
        None => bytes,
        Some(Compression::Zstd) => {
            inflated = zstd::inflate(bytes, &mut builder)?;
            &inflated
        }
    };
    builder.unread = bytes.len() as u64;
    let read = match format {
        Format::BinaryV2 => binary_v2::decode(bytes, &mut builder),
        Format::Safetensors => safetensors::decode(bytes, &mut builder),
        Format::PtChunks => pt_chunks::decode(bytes, &mut builder),
    };
    read.map_err(|failure| match compression {
        None if Looks::of(bytes) == Looks::Zstd => {
            malformed(failure.message + "; the job does not say \"compression\": \"zstd\"")
        }
        None | Some(Compression::Zstd) => failure,
    })?;
    let inflated = builder.inflated;
    let update = builder.finish()?;
    Ok(Decoded { update, inflated })
}

/// The float as a natural number, if it is one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it has neither a fraction nor a sign, and fits"
)]
fn natural(number: f64) -> Option<u64> {
    const BEYOND: f64 = 18_446_744_073_709_551_616.0;
    let natural = number.fract() == 0.0 && (0.0..BEYOND).contains(&number);
    natural.then_some(number as u64)
}

/// Little-endian elements; generic, so that the compiler specialises the loop for each type.
fn each<const N: usize, T>(
    bytes: &[u8],
    read: impl Fn([u8; N]) -> T + Clone,
) -> impl ExactSizeIterator<Item = T> + Clone {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(move |element| read(*element))
}

fn i32_from(bytes: [u8; 4]) -> i64 {
    i32::from_le_bytes(bytes).into()
}

fn f16_from(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

fn bf16_from(bytes: [u8; 2]) -> f32 {
    bf16::from_le_bytes(bytes).to_f32()
}

/// The failure for bytes of another format.
fn not_a(format: &str, bytes: &[u8]) -> Failure {
    malformed(format!("not {format}: {}", file_type::describe(bytes)))
}

fn malformed(message: impl Into<String>) -> Failure {
    Failure::new(Code::CandidateMalformed, message)
}

fn too_large(message: impl Into<String>) -> Failure {
    Failure::new(Code::CandidateTooLarge, message)
}

/// An untrusted name, shortened for messages.
fn shorten(name: &str) -> String {
    const MOST: usize = 120;
    cut(name, MOST)
}

fn cut(name: &str, most: usize) -> String {
    match name.char_indices().nth(most) {
        None => name.to_owned(),
        Some((end, _)) => format!("{}...", &name[..end]),
    }
}
