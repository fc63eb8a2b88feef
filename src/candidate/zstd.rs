//! Compression `zstd`: frames around a candidate's whole body.

use std::io::Read;

use zstd::stream::read::Decoder;

use super::{Gathered, malformed};
use crate::failure::Failure;

/// The least that memory grows by.
const PIECE: usize = 1 << 16;
/// The windows that zstd's own tool takes without being told to: 128 MiB.
const WINDOW_LOG: u32 = 27;

/// Inflates a body, a piece at a time, and never beyond what the candidate may inflate to; what a
/// frame says of its own size is not believed.
///
/// # Errors
/// Too much, or not zstd.
pub(super) fn inflate(bytes: &[u8], gathered: &mut Gathered<'_>) -> Result<Vec<u8>, Failure> {
    let broken = |e: std::io::Error| malformed(format!("not zstd: {e}"));
    let window_log = gathered.most_inflated.bytes.max(1024).ilog2();
    let mut decoder = Decoder::with_buffer(bytes).map_err(broken)?;
    decoder
        .window_log_max(window_log.min(WINDOW_LOG))
        .map_err(broken)?;
    let mut inflated = Vec::new();
    loop {
        // To double it, as a Vec does by itself, would take twice as much as there is.
        inflated.reserve_exact((inflated.len() / 16).max(PIECE));
        let room = inflated.capacity() - inflated.len();
        let piece = decoder.by_ref().take(room as u64);
        let read = { piece }.read_to_end(&mut inflated).map_err(broken)?;
        if read == 0 {
            return Ok(inflated);
        }
        gathered.spend(read as u64)?;
    }
}
