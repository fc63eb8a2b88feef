//! What a package measures.

use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::error::{PackageError, require};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Negative log-likelihood of tokens to come.
    CausalLm {
        /// Input tokens of a window, L.
        #[schemars(range(min = 1, max = 1_048_576))]
        window: usize,
        /// Windows taken from each row of a shard.
        #[serde(default = "one")]
        #[schemars(range(min = 1, max = 1_048_576))]
        windows_per_row: usize,
        /// 1 = the next token; 2 = two ahead. At most the window.
        #[serde(default = "one")]
        #[schemars(range(min = 1, max = 255))]
        label_shift: usize,
        /// Targets with this value do not count.
        #[serde(default = "ignore_index")]
        ignore_index: i64,
    },
    /// What the graph itself computes, one loss for each example.
    GraphLoss {},
}

/// The fields of both kinds of objective. They are read as one struct, because what serde derives
/// for a tagged enum neither treats null as absent nor names the invalid field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ObjectiveFields {
    kind: ObjectiveKind,
    window: Option<usize>,
    windows_per_row: Option<usize>,
    label_shift: Option<usize>,
    ignore_index: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ObjectiveKind {
    CausalLm,
    GraphLoss,
}

impl<'de> Deserialize<'de> for Objective {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = ObjectiveFields::deserialize(deserializer)?;
        match fields {
            ObjectiveFields {
                kind: ObjectiveKind::GraphLoss,
                window: None,
                windows_per_row: None,
                label_shift: None,
                ignore_index: None,
            } => Ok(Self::GraphLoss {}),
            ObjectiveFields {
                kind: ObjectiveKind::GraphLoss,
                ..
            } => Err(D::Error::custom("graph_loss has no fields but kind")),
            ObjectiveFields {
                kind: ObjectiveKind::CausalLm,
                window,
                windows_per_row,
                label_shift,
                ignore_index: ignored,
            } => Ok(Self::CausalLm {
                window: window.ok_or_else(|| D::Error::missing_field("window"))?,
                windows_per_row: windows_per_row.unwrap_or_else(one),
                label_shift: label_shift.unwrap_or_else(one),
                ignore_index: ignored.unwrap_or_else(ignore_index),
            }),
        }
    }
}

impl Objective {
    /// Next-token loss on one window of this length from each row.
    pub fn causal_lm(window: usize) -> Self {
        Self::CausalLm {
            window,
            windows_per_row: one(),
            label_shift: one(),
            ignore_index: ignore_index(),
        }
    }

    /// Checks the bounds of its numbers.
    pub(super) fn check(&self) -> Result<(), PackageError> {
        let Objective::CausalLm {
            window,
            windows_per_row,
            label_shift,
            ignore_index: _,
        } = *self
        else {
            return Ok(());
        };
        require(
            (1..=1 << 20).contains(&window),
            "objective.window: must be 1 to 1048576".into(),
        )?;
        require(
            (1..=1 << 20).contains(&windows_per_row),
            "objective.windows_per_row: must be 1 to 1048576".into(),
        )?;
        require(
            (1..=window.min(255)).contains(&label_shift),
            "objective.label_shift: must be at least 1 and at most the window".into(),
        )
    }
}

fn one() -> usize {
    1
}

fn ignore_index() -> i64 {
    -100
}
