//! Compression `zstd`: frames around a candidate's whole body.

use zstd::bulk::Decompressor;

use super::update_builder::UpdateBuilder;
use super::{malformed, not_a, too_large};
use crate::protocol::failure::Failure;
use crate::util::file_type::Looks;

/// zstd's message when the buffer is too small.
const NO_ROOM: &str = "Destination buffer is too small";

/// Inflates a body within the candidate's limit. The size that a frame declares is not trusted.
///
/// It reserves the whole limit at once, since pages that are never written take no memory. A growing
/// buffer would exist twice while it moves, and streaming would add a window as large as a frame says.
///
/// # Errors
/// Too large, or not zstd.
pub(super) fn inflate(bytes: &[u8], builder: &mut UpdateBuilder<'_>) -> Result<Vec<u8>, Failure> {
    let most = &builder.most_inflated;
    let room = usize::try_from(most.bytes).unwrap_or(usize::MAX);
    let mut inflated = Vec::new();
    inflated.try_reserve_exact(room).map_err(|_| {
        too_large(format!(
            "may inflate to {room} bytes, which exceeds the memory of this machine; see candidates.max_inflated_bytes"
        ))
    })?;
    let broken = |e: std::io::Error| match e.to_string() {
        message if message == NO_ROOM => too_large(format!("inflates to more than {}", most.name)),
        message if Looks::of(bytes) == Looks::Zstd => malformed(format!("not zstd: {message}")),
        _ => not_a("zstd", bytes),
    };
    let mut decompressor = Decompressor::new().map_err(broken)?;
    decompressor
        .decompress_to_buffer(bytes, &mut inflated)
        .map_err(broken)?;
    inflated.shrink_to_fit();
    builder.spend(inflated.len() as u64)?;
    Ok(inflated)
}
