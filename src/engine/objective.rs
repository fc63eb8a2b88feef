//! How windows are fed to the graph, and how its output becomes losses. [`fit`] checks the graph once,
//! at load.

mod fit;

use super::session::Feed;
use crate::model::manifest::Objective;
use crate::model::onnx::{Graph, Head, InputInfo, LABELS};
use crate::model::package::Package;
use crate::model::plan::{Column, Data, TokenCut, Window};
use crate::model::tensor::Elem;
use crate::protocol::failure::{Code, Failure};
use fit::{causal_lm, check_columns, check_loss, check_values};

/// Feeds windows to the graph and reads their losses.
#[derive(Debug)]
pub(super) enum Measure {
    CausalLm {
        tokens: InputInfo,
        /// Fed with ones.
        mask: Option<InputInfo>,
        /// Fed with 0, 1, 2, ...
        positions: Option<InputInfo>,
        cut: TokenCut,
    },
    GraphLoss,
}

impl Measure {
    /// Checks that the graph takes exactly what the package feeds. Also returns the graph's fixed batch
    /// size, if it has one.
    pub(super) fn new(
        package: &Package,
        graph: &Graph,
        weights: &[&str],
    ) -> Result<(Self, Option<usize>), String> {
        let inputs = graph.inputs().into_iter();
        let inputs: Vec<InputInfo> = inputs
            .filter(|input| !weights.contains(&input.name.as_str()))
            .collect();
        let limits = graph.flow(weights).map_err(|e| e.to_string())?.limits;
        let measure = match package.manifest.objective {
            Objective::CausalLm { .. } => causal_lm(package, graph, &inputs, &limits)?,
            Objective::GraphLoss {} => {
                check_loss(package, graph)?;
                check_columns(package, &inputs)?;
                check_values(package, &limits)?;
                Self::GraphLoss
            }
        };
        let mut batches = inputs.iter().filter_map(|input| *input.shape.first()?);
        Ok((measure, batches.next()))
    }

    /// The inputs for these windows. They repeat to fill the batch; the surplus results are ignored. Of no
    /// windows, the inputs have their shapes and no values.
    pub(super) fn feeds<'a>(
        &'a self,
        package: &'a Package,
        windows: &[&Window],
        batch: usize,
    ) -> Vec<Feed<'a>> {
        let filled = windows.iter().copied().cycle().take(batch);
        match self {
            Self::CausalLm {
                tokens,
                mask,
                positions,
                cut,
            } => {
                let mut feeds = token_feeds(tokens, cut, filled.filter_map(chunk), batch);
                let seq = cut.window;
                feeds.extend(mask.iter().map(|input| constant(input, batch, seq, |_| 1)));
                let positions = positions.iter();
                feeds.extend(positions.map(|input| constant(input, batch, seq, |p| p)));
                feeds
            }
            Self::GraphLoss => {
                let first = columns(package, 0).iter().enumerate();
                let feed = |(at, column)| column_feed(package, at, column, filled.clone(), batch);
                first.map(feed).collect()
            }
        }
    }

    /// The loss of each window, from the graph's output for the batch.
    pub(super) fn losses(
        &self,
        windows: &[&Window],
        batch: usize,
        output: &[f32],
    ) -> Result<Vec<f64>, Failure> {
        let per_window = match self {
            Self::CausalLm { cut, .. } => cut.window,
            Self::GraphLoss => 1,
        };
        if output.len() != batch * per_window {
            let message = format!(
                "the graph gave {} values for {batch} windows of {per_window}",
                output.len()
            );
            return Err(Failure::new(Code::InferenceFailed, message));
        }
        let rows = windows.iter().zip(output.chunks_exact(per_window));
        Ok(rows.map(|(window, row)| self.loss(window, row)).collect())
    }

    /// Whether a loss can be below 0: what the graph computes is its own affair.
    pub(super) fn may_be_negative(&self) -> bool {
        match self {
            Self::CausalLm { .. } => false,
            Self::GraphLoss => true,
        }
    }

    /// Mean negative log-likelihood over the counted targets, or the loss that the graph computed.
    #[expect(
        clippy::cast_precision_loss,
        reason = "target counts are far below 2^52"
    )]
    fn loss(&self, window: &Window, row: &[f32]) -> f64 {
        match (self, window) {
            (Self::CausalLm { cut, .. }, Window::Tokens(chunk)) => {
                let targets = chunk[cut.label_shift..].iter().zip(row);
                let counted = targets.filter(|(target, _)| i64::from(**target) != cut.ignore_index);
                let (sum, count) = counted.fold((0.0, 0_u64), |(sum, n), (_, p)| {
                    (sum - f64::from(*p), n + 1)
                });
                sum / count as f64
            }
            (Self::GraphLoss, Window::Example { .. }) => f64::from(row[0]),
            // Unreachable: a plan's windows match its package's objective.
            (Self::CausalLm { .. }, Window::Example { .. })
            | (Self::GraphLoss, Window::Tokens(_)) => f64::NAN,
        }
    }
}

/// The output that the package's objective needs.
pub(super) fn head(package: &Package) -> Head<'_> {
    let outputs = &package.manifest.outputs;
    // Validation ensures that the manifest names it.
    match package.manifest.objective {
        Objective::CausalLm { .. } => Head::LogProbs(outputs.logits.as_deref().unwrap_or_default()),
        Objective::GraphLoss {} => Head::Loss(outputs.loss.as_deref().unwrap_or_default()),
    }
}

fn chunk(window: &Window) -> Option<&[i32]> {
    match window {
        Window::Tokens(chunk) => Some(chunk),
        Window::Example { .. } => None,
    }
}

fn columns(package: &Package, shard: usize) -> &[Column] {
    match package.shards.get(shard).map(|shard| &shard.data) {
        Some(Data::Examples(columns)) => columns,
        Some(Data::Tokens { .. }) | None => &[],
    }
}

fn whole(input: &InputInfo) -> Elem {
    input.elem.unwrap_or(Elem::I64)
}

/// An input that is the same for every row of the batch.
fn constant(input: &InputInfo, batch: usize, seq: usize, value: fn(i64) -> i64) -> Feed<'_> {
    let row = (0_i64..).take(seq).map(value);
    let values = std::iter::repeat_n(row, batch).flatten();
    Feed::integers(&input.name, vec![batch, seq], whole(input), values)
}

/// The tokens and the labels of the chunks.
fn token_feeds<'a, 'w>(
    tokens: &'a InputInfo,
    cut: &TokenCut,
    chunks: impl Iterator<Item = &'w [i32]>,
    batch: usize,
) -> Vec<Feed<'a>> {
    let seq = cut.window;
    let (inputs, labels): (Vec<_>, Vec<_>) = chunks
        .map(|chunk| (&chunk[..seq], &chunk[cut.label_shift..]))
        .unzip();
    let wide = |token: &i32| i64::from(*token);
    let inputs = inputs.into_iter().flatten().map(wide);
    let target = |token: i64| if token == cut.ignore_index { 0 } else { token };
    let labels = labels.into_iter().flat_map(|labels| {
        let missing = std::iter::repeat_n(0, seq - labels.len());
        labels.iter().map(wide).map(target).chain(missing)
    });
    vec![
        Feed::integers(&tokens.name, vec![batch, seq], whole(tokens), inputs),
        Feed::integers(LABELS, vec![batch, seq, 1], Elem::I64, labels),
    ]
}

/// The rows that the examples have in the column at this position.
fn column_feed<'a, 'w>(
    package: &'a Package,
    at: usize,
    column: &'a Column,
    windows: impl Iterator<Item = &'w Window>,
    batch: usize,
) -> Feed<'a> {
    let mut shape = vec![batch];
    shape.extend(&column.shape);
    let rows = windows.filter_map(|window| match window {
        Window::Example { shard, row } => Some(columns(package, *shard).get(at)?.row(*row)),
        Window::Tokens(_) => None,
    });
    Feed {
        name: &column.name,
        shape,
        elem: column.elem,
        bytes: rows.flatten().copied().collect(),
    }
}
