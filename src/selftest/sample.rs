//! Candidates for benchmarks, as trainers send them and as they are checked.

use std::io::Write;
use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
use flate2::write::ZlibEncoder;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Map, json};

use crate::candidate::{self, Update};
use crate::config::Config;
use crate::engine::EngineError;
use crate::engine::patch::Patches;
use crate::model::package::Package;
use crate::protocol::failure::Failure;
use crate::protocol::job::{Format, Rule};
use crate::protocol::state::Detail;

/// A candidate of one density, as sent and as checked.
pub(super) struct Sample {
    pub(super) bytes: Bytes,
    pub(super) patches: Arc<Patches>,
}

pub(super) fn sample(
    package: &Package,
    config: &Config,
    density: f64,
    touched: impl Fn(usize) -> bool,
    random: &mut StdRng,
) -> Result<Sample, EngineError> {
    let bytes = encode(package, density, touched, random)
        .map_err(|e| EngineError::new(Detail::WarmFailed, e.to_string()))?;
    let update = decode(&bytes, package, config)?;
    let patches = Patches::new(package, update, Rule::ParamDiff).map_err(|f| refused(&f))?;
    Ok(Sample {
        bytes: bytes.into(),
        patches: Arc::new(patches),
    })
}

/// A `binary_v2` candidate that touches this share of every trainable tensor that is asked for, small steps.
///
/// # Errors
/// Never: writing into memory does not fail.
pub fn encode(
    package: &Package,
    density: f64,
    touched: impl Fn(usize) -> bool,
    random: &mut impl Rng,
) -> std::io::Result<Vec<u8>> {
    let base64 = base64::engine::general_purpose::STANDARD;
    let mut document = Map::new();
    for (at, tensor) in package.weights.tensors.iter().enumerate() {
        if !touched(at) || !package.manifest.is_trainable(&tensor.name) {
            continue;
        }
        let numel = u32::try_from(tensor.numel).unwrap_or(u32::MAX);
        let mut indices: Vec<u32> = (0..numel).filter(|_| random.random_bool(density)).collect();
        if indices.is_empty() {
            indices.push(random.random_range(0..numel.max(1)));
        }
        let mut zlib = ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        for _ in &indices {
            zlib.write_all(&random.random_range(-1e-4_f32..=1e-4).to_le_bytes())?;
        }
        for index in &indices {
            zlib.write_all(&index.to_le_bytes())?;
        }
        let entry = json!({
            "shape": tensor.shape, "k": indices.len(), "data": base64.encode(zlib.finish()?),
        });
        document.insert(tensor.name.clone(), entry);
    }
    Ok(serde_json::to_vec(&document)?)
}

/// Decodes what [`encode`] wrote.
pub(super) fn decode(
    bytes: &[u8],
    package: &Package,
    config: &Config,
) -> Result<Update, EngineError> {
    let limits = (&config.candidates).into();
    candidate::decode(bytes, Format::BinaryV2, None, package, limits).map_err(|f| refused(&f))
}

/// A failure of a candidate that must be sound.
pub(super) fn refused(failure: &Failure) -> EngineError {
    EngineError::new(Detail::WarmFailed, failure.to_string())
}

pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
