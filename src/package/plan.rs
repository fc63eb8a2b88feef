//! Held-out shards and the windows a job is measured on. The choice depends on the nonce and the
//! shards alone, so every worker measures the same tokens; the plan's hash proves which.

use sha2::{Digest, Sha256};

use crate::failure::{Code, Failure};

/// Unknown shards that a refusal names.
const MOST_NAMED: usize = 20;

/// One shard of held-out tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// The number in its file name.
    pub id: u64,
    /// Tokens in one row.
    pub row_length: usize,
    /// All rows, one after the other.
    pub tokens: Vec<i32>,
}

impl Shard {
    fn rows(&self) -> impl Iterator<Item = &[i32]> {
        self.tokens.chunks_exact(self.row_length.max(1))
    }
}

/// How windows are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Input tokens of a window, L.
    pub window: usize,
    /// Windows taken from each row.
    pub windows_per_row: usize,
    /// The target of input i is token i + `label_shift`.
    pub label_shift: usize,
}

/// One window: where it is and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// The L + 1 tokens.
    pub chunk: Vec<i32>,
}

/// The windows of a job, in order, with the hash that names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// SHA-256 over the exact windows.
    pub hash: [u8; 32],
    /// In order: shards as listed, then row, then k.
    pub windows: Vec<Window>,
    /// How they were cut.
    pub cut: Cut,
}

impl Plan {
    /// Chooses the windows.
    ///
    /// # Errors
    /// `unknown_shard` for ids that are not there; `invalid_job` when no row is long enough for a
    /// window: that is an error, never a loss.
    pub fn new(
        shards: &[Shard],
        wanted: Option<&[u64]>,
        nonce: &str,
        cut: Cut,
    ) -> Result<Self, Failure> {
        let mut hash = Sha256::new();
        let mut windows = Vec::new();
        for shard in select(shards, wanted)? {
            for (row, tokens) in shard.rows().enumerate() {
                if tokens.len() < cut.window + 1 {
                    continue;
                }
                for k in 0..cut.windows_per_row {
                    let start = start(nonce, shard.id, row, k, tokens.len(), cut.window);
                    hash.update(shard.id.to_be_bytes());
                    hash.update(u32::try_from(row).unwrap_or(u32::MAX).to_be_bytes());
                    hash.update((start as u64).to_be_bytes());
                    hash.update(u32::try_from(cut.window).unwrap_or(u32::MAX).to_be_bytes());
                    hash.update([u8::try_from(cut.label_shift).unwrap_or(u8::MAX)]);
                    windows.push(Window {
                        chunk: tokens[start..=start + cut.window].to_vec(),
                    });
                }
            }
        }
        if windows.is_empty() {
            return Err(Failure::new(
                Code::InvalidJob,
                format!(
                    "validation: no row of the chosen shards has the {} tokens of a window",
                    cut.window + 1
                ),
            ));
        }
        Ok(Self {
            hash: hash.finalize().into(),
            windows,
            cut,
        })
    }
}

fn select<'a>(shards: &'a [Shard], wanted: Option<&[u64]>) -> Result<Vec<&'a Shard>, Failure> {
    let Some(wanted) = wanted else {
        return Ok(shards.iter().collect());
    };
    let available: Vec<u64> = shards.iter().map(|s| s.id).collect();
    // A stranger's list may be as long as a message: the answer names the first of them.
    let missing: Vec<u64> = wanted
        .iter()
        .copied()
        .filter(|id| !available.contains(id))
        .take(MOST_NAMED)
        .collect();
    if !missing.is_empty() {
        return Err(Failure::new(
            Code::UnknownShard,
            format!("validation.shards: {missing:?} are not in the package"),
        )
        .with("missing", missing)
        .with("available", available));
    }
    Ok(wanted
        .iter()
        .filter_map(|id| shards.iter().find(|s| s.id == *id))
        .collect())
}

fn start(nonce: &str, shard: u64, row: usize, k: usize, numel: usize, window: usize) -> usize {
    let seed = Sha256::digest(format!("{nonce}:{shard}:{row}:{k}:{numel}:{window}"));
    let number = seed
        .iter()
        .take(8)
        .fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
    // The remainder is below numel, which is a usize.
    usize::try_from(number % (numel - window) as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUT: Cut = Cut {
        window: 4,
        windows_per_row: 2,
        label_shift: 1,
    };

    fn shard(id: u64, rows: usize, row_length: usize) -> Shard {
        Shard {
            id,
            row_length,
            tokens: (0..i32::try_from(rows * row_length).unwrap()).collect(),
        }
    }

    #[test]
    fn the_nonce_and_the_order_of_shards_choose_the_plan() {
        let shards = [shard(3, 2, 50), shard(4, 1, 60)];
        let plan = |ids: &[u64], nonce| Plan::new(&shards, Some(ids), nonce, CUT).unwrap();
        assert_eq!(plan(&[3, 4], "").windows.len(), 6);
        assert_eq!(plan(&[3, 4], "a"), plan(&[3, 4], "a"));
        assert_ne!(plan(&[3, 4], "a").hash, plan(&[3, 4], "b").hash);
        assert_ne!(plan(&[3, 4], "a").hash, plan(&[4, 3], "a").hash);
    }

    #[test]
    fn a_row_of_exactly_one_window_is_used_and_a_shorter_one_is_not() {
        assert_eq!(
            Plan::new(&[shard(1, 1, 5)], None, "", CUT)
                .unwrap()
                .windows
                .len(),
            2
        );
        assert_eq!(
            Plan::new(&[shard(1, 1, 4)], None, "", CUT)
                .unwrap_err()
                .code,
            Code::InvalidJob
        );
    }

    #[test]
    fn unknown_shards_are_listed() {
        let failure = Plan::new(&[shard(1, 1, 9)], Some(&[1, 7]), "", CUT).unwrap_err();
        assert_eq!(failure.code, Code::UnknownShard);
        assert_eq!(failure.detail["missing"], serde_json::json!([7]));
    }
}
