//! SHA-256 as packages, jobs and manifests write it.

use sha2::{Digest as _, Sha256};

/// Hex SHA-256.
pub fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}
