//! Held-out shards, and the windows that a job is measured on. The choice depends only on the nonce
//! and the shards, so every worker measures the same tokens; the plan's hash identifies them.

use super::tensor::Elem;
use sha2::{Digest, Sha256};

use crate::protocol::failure::{Code, Failure};

/// The most unknown shards that a refusal names.
const MAX_NAMED: usize = 20;

/// One shard of held-out data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// The first number in its file name.
    pub id: u64,
    /// Its contents.
    pub data: Data,
}

/// A shard's contents, in the form that the objective needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// Concatenated rows of tokens, all of the same length.
    Tokens {
        /// Tokens of a row.
        row_length: usize,
        /// All rows.
        tokens: Vec<i32>,
    },
    /// Examples: one column for each input of the graph, all with the same number of rows.
    Examples(Vec<Column>),
}

/// The values for one input of the graph, a row for each example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name of the input.
    pub name: String,
    /// Its element type.
    pub elem: Elem,
    /// Shape of a row.
    pub shape: Vec<usize>,
    /// All rows, little endian.
    pub bytes: Vec<u8>,
}

impl Column {
    /// Bytes of a row.
    pub fn row_size(&self) -> usize {
        self.shape.iter().product::<usize>() * self.elem.size()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.bytes.len() / self.row_size().max(1)
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[u8] {
        let size = self.row_size();
        &self.bytes[row * size..(row + 1) * size]
    }
}

/// How windows are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// From rows of tokens.
    Tokens(TokenCut),
    /// Every example is a window.
    Examples,
}

/// How windows are cut from rows of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCut {
    /// Input tokens of a window, L.
    pub window: usize,
    /// Windows taken from each row.
    pub windows_per_row: usize,
    /// The target of input i is token i + `label_shift`.
    pub label_shift: usize,
    /// The value of targets that do not count.
    pub ignore_index: i64,
}

/// One window, by value or by position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Window {
    /// L + 1 tokens.
    Tokens(Vec<i32>),
    /// An example.
    Example {
        /// Position of the shard in the package.
        shard: usize,
        /// Its row.
        row: usize,
    },
}

/// The windows of a job, in order, and the hash that identifies them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// SHA-256 over the exact windows.
    pub hash: [u8; 32],
    /// In order: shards as listed, then row, then k.
    pub windows: Vec<Window>,
    /// The places in `windows` in the order in which they are measured: by hash, so that what is measured
    /// first is a sample of the whole.
    pub order: Vec<usize>,
    /// Targets in each of them that count; none in a plan that is not a job's.
    pub targets: Vec<u64>,
}

/// About how many bytes are hashed for a window, for the plan's hash, its start and its turn; its tokens
/// are only copied.
const HASHED: usize = 192;

/// Collects windows and hashes their positions.
#[derive(Default)]
struct Choice {
    hash: Sha256,
    windows: Vec<Window>,
    targets: Vec<u64>,
}

impl Plan {
    /// The most bytes that making a plan of these shards hashes and copies: 4 KiB take about 10 µs.
    pub fn effort(shards: &[Shard], cut: Cut) -> usize {
        let of = |shard: &Shard| match (&shard.data, cut) {
            (Data::Tokens { row_length, tokens }, Cut::Tokens(cut)) => {
                let windows =
                    (tokens.len() / (*row_length).max(1)).saturating_mul(cut.windows_per_row);
                windows.saturating_mul(HASHED + size_of::<i32>() * (cut.window + 1))
            }
            (Data::Examples(columns), Cut::Examples) => columns
                .first()
                .map_or(0, Column::rows)
                .saturating_mul(HASHED),
            (Data::Tokens { .. }, Cut::Examples) | (Data::Examples(_), Cut::Tokens(_)) => 0,
        };
        shards.iter().map(of).fold(0, usize::saturating_add)
    }

    /// Chooses the windows.
    ///
    /// # Errors
    /// `unknown_shard` for ids that do not exist; `invalid_job` when no row is long enough for a
    /// window.
    pub fn new(
        shards: &[Shard],
        wanted: Option<&[u64]>,
        nonce: &str,
        cut: Cut,
    ) -> Result<Self, Failure> {
        let mut choice = Choice::default();
        for position in select(shards, wanted)? {
            let shard = &shards[position];
            match (&shard.data, cut) {
                (Data::Tokens { row_length, tokens }, Cut::Tokens(cut)) => {
                    for (row, tokens) in tokens.chunks_exact((*row_length).max(1)).enumerate() {
                        choice.cut(shard.id, row, tokens, nonce, cut);
                    }
                }
                (Data::Examples(columns), Cut::Examples) => {
                    for row in 0..columns.first().map_or(0, Column::rows) {
                        choice.note(shard.id, row, 0, 0, 0);
                        let shard = position;
                        choice.windows.push(Window::Example { shard, row });
                        choice.targets.push(1);
                    }
                }
                // Cannot happen: a package's shards are parsed for its objective.
                (Data::Tokens { .. }, Cut::Examples) | (Data::Examples(_), Cut::Tokens(_)) => {}
            }
        }
        if choice.windows.is_empty() {
            let needed = match cut {
                Cut::Tokens(cut) => format!("row with the {} tokens of a window", cut.window + 1),
                Cut::Examples => "example".into(),
            };
            let message = format!("validation: the chosen shards have no {needed}");
            return Err(Failure::new(Code::InvalidJob, message));
        }
        let hash = choice.hash.finalize().into();
        Ok(Self {
            order: measuring_order(&hash, choice.windows.len()),
            hash,
            windows: choice.windows,
            targets: choice.targets,
        })
    }

    /// Some windows, which no job asks for under this hash, measured as they are listed.
    pub fn excerpt(hash: [u8; 32], windows: &[Window]) -> Self {
        Self {
            hash,
            windows: windows.to_vec(),
            order: (0..windows.len()).collect(),
            targets: Vec::new(),
        }
    }
}

impl Choice {
    fn cut(&mut self, shard: u64, row: usize, tokens: &[i32], nonce: &str, cut: TokenCut) {
        if tokens.len() < cut.window + 1 {
            return;
        }
        for k in 0..cut.windows_per_row {
            let start = start(nonce, shard, row, k, tokens.len(), cut.window);
            self.note(shard, row, start, cut.window, cut.label_shift);
            let chunk = tokens[start..=start + cut.window].to_vec();
            let targets = chunk.iter().skip(cut.label_shift);
            let counting = targets.filter(|token| i64::from(**token) != cut.ignore_index);
            self.targets.push(counting.count() as u64);
            self.windows.push(Window::Tokens(chunk));
        }
    }

    fn note(&mut self, shard: u64, row: usize, start: usize, length: usize, label_shift: usize) {
        let long = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_be_bytes();
        self.hash.update(shard.to_be_bytes());
        self.hash.update(long(row));
        self.hash.update((start as u64).to_be_bytes());
        self.hash.update(long(length));
        self.hash
            .update([u8::try_from(label_shift).unwrap_or(u8::MAX)]);
    }
}

/// Places in ascending order of the SHA-256 of the plan's hash and the place.
fn measuring_order(plan: &[u8; 32], windows: usize) -> Vec<usize> {
    let plan = hex::encode(plan);
    let mut order: Vec<usize> = (0..windows).collect();
    order.sort_by_cached_key(|place| Sha256::digest(format!("{plan}:{place}")));
    order
}

/// Positions of the shards, in the order wanted.
fn select(shards: &[Shard], wanted: Option<&[u64]>) -> Result<Vec<usize>, Failure> {
    let Some(wanted) = wanted else {
        return Ok((0..shards.len()).collect());
    };
    let available: Vec<u64> = shards.iter().map(|s| s.id).collect();
    // An untrusted list may be as long as a message: the answer names only the first.
    let missing: Vec<u64> = wanted
        .iter()
        .copied()
        .filter(|id| !available.contains(id))
        .take(MAX_NAMED)
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
        .filter_map(|id| shards.iter().position(|s| s.id == *id))
        .collect())
}

fn start(nonce: &str, shard: u64, row: usize, k: usize, numel: usize, window: usize) -> usize {
    let seed = Sha256::digest(format!("{nonce}:{shard}:{row}:{k}:{numel}:{window}"));
    let number = seed
        .iter()
        .take(8)
        .fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
    // The remainder is below `numel`, which is a usize.
    usize::try_from(number % (numel - window) as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUT: Cut = Cut::Tokens(TokenCut {
        window: 4,
        windows_per_row: 2,
        label_shift: 1,
        ignore_index: -100,
    });

    fn shard(id: u64, rows: usize, row_length: usize) -> Shard {
        Shard {
            id,
            data: Data::Tokens {
                row_length,
                tokens: (0..i32::try_from(rows * row_length).unwrap()).collect(),
            },
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

    /// The hash and the order were computed from the contract's words by another program.
    #[test]
    fn windows_are_measured_in_the_order_of_their_hashes() {
        let plan = Plan::new(&[shard(3, 2, 50), shard(4, 1, 60)], None, "", CUT).unwrap();
        let hash = "2fd6cb6e121963346386d98dcf1e96db93e0b631fc9465cc4e4183713da61847";
        assert_eq!(hex::encode(plan.hash), hash);
        assert_eq!(plan.order, [4, 0, 1, 3, 2, 5]);
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
    fn targets_that_do_not_count_are_not_counted() {
        // One window, of the tokens 0 to 4: the first is no target.
        let targets = |ignore_index| {
            let cut = TokenCut {
                window: 4,
                windows_per_row: 1,
                label_shift: 1,
                ignore_index,
            };
            let plan = Plan::new(&[shard(1, 1, 5)], None, "", Cut::Tokens(cut));
            plan.unwrap().targets.iter().sum::<u64>()
        };
        assert_eq!([-100, 0, 3].map(targets), [4, 4, 3]);
    }

    #[test]
    fn what_a_plan_takes_is_known_before_it_is_made() {
        let shards = [shard(1, 3, 50), shard(2, 1, 60)];
        let tokens = Plan::new(&shards, None, "", CUT).unwrap().windows.len() * 5 * 4;
        assert_eq!(Plan::effort(&shards, CUT), 8 * HASHED + tokens);
        assert_eq!(Plan::effort(&shards, Cut::Examples), 0);
        let column = Column {
            name: "x".into(),
            elem: Elem::U8,
            shape: vec![2],
            bytes: vec![0; 20],
        };
        let data = Data::Examples(vec![column]);
        let effort = Plan::effort(&[Shard { id: 1, data }], Cut::Examples);
        assert_eq!(effort, 10 * HASHED);
    }

    #[test]
    fn unknown_shards_are_listed() {
        let failure = Plan::new(&[shard(1, 1, 9)], Some(&[1, 7]), "", CUT).unwrap_err();
        assert_eq!(failure.code, Code::UnknownShard);
        assert_eq!(failure.detail["missing"], serde_json::json!([7]));
    }
}
