//! The warning that a package has few windows: how many, why, and how it would have more.

use crate::engine::sequential::LEAST_WINDOWS;
use crate::model::plan::{Column, Cut, Data, Shard, TokenCut};

/// None if there are enough.
pub(super) fn shortage(shards: &[Shard], cut: Cut, windows: usize) -> Option<String> {
    let because = match cut {
        Cut::Tokens(cut) => tokens(shards, cut),
        Cut::Examples => examples(shards),
    };
    (windows < LEAST_WINDOWS).then(|| {
        format!(
            "warning: few windows ({windows}): below {LEAST_WINDOWS}, scores have wide confidence intervals, and no \
             evaluation ends early. {because}"
        )
    })
}

fn examples(shards: &[Shard]) -> String {
    let of = |shard: &Shard| match &shard.data {
        Data::Examples(columns) => columns.first().map_or(0, Column::rows),
        Data::Tokens { .. } => 0,
    };
    let rows: usize = shards.iter().map(of).sum();
    format!("Why: each row of the shards is a window, rows: {rows}. To get more: more rows.")
}

/// Rows of tokens, by whether a window fits into them.
#[derive(Default)]
struct Rows {
    long: usize,
    short: usize,
    /// Whether windows of one row can differ.
    room: bool,
    tokens: usize,
    /// Rows of just one window that the tokens would fill.
    possible: usize,
}

impl Rows {
    fn count(shards: &[Shard], needed: usize) -> Self {
        let mut found = Self::default();
        for shard in shards {
            match &shard.data {
                Data::Tokens { row_length, tokens } => {
                    let rows = tokens.len() / (*row_length).max(1);
                    match *row_length < needed {
                        true => found.short += rows,
                        false => found.long += rows,
                    }
                    found.room |= *row_length > needed;
                    found.tokens += tokens.len();
                    found.possible += tokens.len() / needed;
                }
                Data::Examples(_) => {}
            }
        }
        found
    }
}

fn tokens(shards: &[Shard], cut: TokenCut) -> String {
    let (needed, each) = (cut.window + 1, cut.windows_per_row);
    let rows = Rows::count(shards, needed);
    let short = match rows.short {
        0 => String::new(),
        short => format!(
            "; {short} more are shorter than the {needed} tokens of a window and its last target"
        ),
    };
    let enough = LEAST_WINDOWS.div_ceil(rows.long.max(1));
    let mut ways = Vec::new();
    if rows.room {
        ways.push(format!(
            "--windows-per-row {enough} or more, which takes that many from each row, where the nonce says"
        ));
    }
    if rows.possible > rows.long * each {
        let (tokens, possible) = (rows.tokens, rows.possible);
        ways.push(format!(
            "the same {tokens} tokens as [rows, {needed}], which are up to {possible} rows"
        ));
    }
    ways.push("more rows".into());
    format!(
        "Why: windows from each row: {each}, rows: {} (a tensor [n] is one row){short}. To get more: {}.",
        rows.long,
        ways.join("; or "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards(of: &[(usize, usize)]) -> Vec<Shard> {
        let shard = |(at, (rows, row_length)): (usize, &(usize, usize))| Shard {
            id: at as u64,
            data: Data::Tokens {
                row_length: *row_length,
                tokens: vec![0; rows * row_length],
            },
        };
        of.iter().enumerate().map(shard).collect()
    }

    fn cut(windows_per_row: usize) -> Cut {
        Cut::Tokens(TokenCut {
            window: 128,
            windows_per_row,
            label_shift: 1,
            ignore_index: -100,
        })
    }

    #[test]
    fn it_says_how_many_why_and_how_to_get_more() {
        let flat: &[_] = &[(1, 8000); 4];
        for (of, each, windows, said, unsaid) in [
            (
                flat,
                1,
                4,
                &[
                    "warning: few windows (4)",
                    "below 32",
                    "from each row: 1, rows: 4 (",
                    "[n] is one row",
                    "--windows-per-row 8 or",
                    "32000 tokens as [rows, 129]",
                    "up to 248 rows",
                ][..],
                "shorter",
            ),
            (
                &[(9, 129), (3, 64)],
                1,
                9,
                &[
                    "rows: 9 (",
                    "3 more are shorter than the 129",
                    "up to 10 rows",
                ],
                "--windows-per-row",
            ),
            (&[(3, 129)], 1, 3, &["To get more: more rows."], "as [rows"),
            (
                &[(2, 200)],
                8,
                16,
                &["from each row: 8", "--windows-per-row 16 or"],
                "as [rows",
            ),
        ] {
            let text = shortage(&shards(of), cut(each), windows).unwrap();
            for part in said {
                assert!(text.contains(part), "{part:?} is not in {text}");
            }
            assert!(!text.contains(unsaid), "{unsaid:?} is in {text}");
        }
        assert_eq!(shortage(&shards(flat), cut(8), 32), None);
    }

    #[test]
    fn examples_are_windows() {
        let text = shortage(&[], Cut::Examples, 6).unwrap();
        assert!(
            text.contains("each row of the shards is a window"),
            "{text}"
        );
        assert!(!text.contains("--windows-per-row"), "{text}");
    }
}
