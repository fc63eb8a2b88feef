//! What goes through the graph besides the weights, and how what comes out becomes losses: checked
//! against the graph once, at load.

use super::session::Feed;
use crate::model::manifest::Objective;
use crate::model::onnx::{Graph, Head, InputInfo, LABELS, Limit};
use crate::model::package::Package;
use crate::model::plan::{Column, Data, TokenCut, Window};
use crate::model::tensor::Elem;
use crate::protocol::failure::{Code, Failure};

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
    /// Checks that the graph takes exactly what the package feeds; also the batch size that the
    /// graph is fixed to, if it is.
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

    /// The inputs for these windows. A graph with a fixed batch gets it filled up; the surplus is
    /// not looked at.
    pub(super) fn feeds<'a>(
        &'a self,
        package: &'a Package,
        windows: &[Window],
        batch: usize,
    ) -> Vec<Feed<'a>> {
        let filled = || windows.iter().cycle().take(batch);
        match self {
            Self::CausalLm {
                tokens,
                mask,
                positions,
                cut,
            } => {
                let (seq, chunks) = (cut.window, filled().filter_map(chunk));
                let (inputs, labels): (Vec<_>, Vec<_>) = chunks
                    .map(|chunk| (&chunk[..seq], &chunk[cut.label_shift..]))
                    .unzip();
                let shape = vec![batch, seq];
                let wide = |token: &i32| i64::from(*token);
                let inputs = inputs.into_iter().flatten().map(wide);
                let target = |token: i64| if token == cut.ignore_index { 0 } else { token };
                let labels = labels.into_iter().flat_map(|labels| {
                    let missing = std::iter::repeat_n(0, seq - labels.len());
                    labels.iter().map(wide).map(target).chain(missing)
                });
                let mut feeds = vec![
                    Feed::integers(&tokens.name, shape, whole(tokens), inputs),
                    Feed::integers(LABELS, vec![batch, seq, 1], Elem::I64, labels),
                ];
                feeds.extend(mask.iter().map(|input| constant(input, batch, seq, |_| 1)));
                feeds.extend(
                    positions
                        .iter()
                        .map(|input| constant(input, batch, seq, |p| p)),
                );
                feeds
            }
            Self::GraphLoss => {
                let first = columns(package, 0);
                let feed = |(at, column): (usize, &'a Column)| {
                    let mut shape = vec![batch];
                    shape.extend(&column.shape);
                    let rows = filled().filter_map(|window| match window {
                        Window::Example { shard, row } => {
                            Some(columns(package, *shard).get(at)?.row(*row))
                        }
                        Window::Tokens(_) => None,
                    });
                    Feed {
                        name: &column.name,
                        shape,
                        elem: column.elem,
                        bytes: rows.flatten().copied().collect(),
                    }
                };
                first.iter().enumerate().map(feed).collect()
            }
        }
    }

    /// The loss of each window, from what the graph gave for the batch.
    pub(super) fn losses(
        &self,
        windows: &[Window],
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

    /// Mean negative log-likelihood over the targets that count, or the graph's own.
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
            // A plan is cut by its package's objective; no number fits this.
            (Self::CausalLm { .. }, Window::Example { .. })
            | (Self::GraphLoss, Window::Tokens(_)) => f64::NAN,
        }
    }
}

/// What the graph is to give for the package's objective.
pub(super) fn head(package: &Package) -> Head<'_> {
    let outputs = &package.manifest.outputs;
    // The manifest was checked to have the one that its objective needs.
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

/// The same for every row of the batch.
fn constant(input: &InputInfo, batch: usize, seq: usize, value: fn(i64) -> i64) -> Feed<'_> {
    let row = (0_i64..).take(seq).map(value);
    let values = std::iter::repeat_n(row, batch).flatten();
    Feed::integers(&input.name, vec![batch, seq], whole(input), values)
}

fn causal_lm(
    package: &Package,
    graph: &Graph,
    inputs: &[InputInfo],
    limits: &[Limit],
) -> Result<Measure, String> {
    let Objective::CausalLm {
        window,
        windows_per_row,
        label_shift,
        ignore_index,
    } = package.manifest.objective
    else {
        return Err("objective: is not causal_lm".into());
    };
    let names = &package.manifest.inputs;
    let find = |name: &Option<String>| {
        let Some(name) = name else { return Ok(None) };
        match inputs.iter().find(|input| input.name == *name) {
            Some(input) => check_row(input, window).map(|()| Some(input.clone())),
            None => Err(format!(
                "graph: has no input {name}; it has {}",
                listed(inputs)
            )),
        }
    };
    let tokens = find(&names.tokens)?.ok_or("inputs.tokens: missing")?;
    let (mask, positions) = (find(&names.attention_mask)?, find(&names.position_ids)?);
    let known = |input: &&InputInfo| {
        let fed = [Some(&tokens), mask.as_ref(), positions.as_ref()];
        fed.into_iter().flatten().any(|f| f.name == input.name)
    };
    let unknown: Vec<InputInfo> = inputs.iter().filter(|i| !known(i)).cloned().collect();
    if !unknown.is_empty() {
        return Err(format!(
            "graph: nothing is known to feed its input {}; export it without (no cache, no labels), \
             or name it in inputs.attention_mask or inputs.position_ids",
            listed(&unknown)
        ));
    }
    for input in std::iter::once(&tokens).chain(&positions) {
        if !matches!(input.elem, Some(Elem::I64 | Elem::I32)) {
            return Err(format!(
                "graph: input {} must be int64 or int32",
                input.name
            ));
        }
    }
    check_tokens(package, graph, &tokens.name, limits)?;
    check_positions(positions.as_ref(), window, limits)?;
    Ok(Measure::CausalLm {
        tokens,
        mask,
        positions,
        cut: TokenCut {
            window,
            windows_per_row,
            label_shift,
            ignore_index,
        },
    })
}

fn listed(inputs: &[InputInfo]) -> String {
    let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
    names.join(", ")
}

fn check_row(input: &InputInfo, window: usize) -> Result<(), String> {
    let name = &input.name;
    if input.elem.is_none() {
        return Err(format!(
            "graph: the element type of input {name} cannot be fed"
        ));
    }
    match input.shape.as_slice() {
        [_, None] => Ok(()),
        [_, Some(seq)] if *seq == window => Ok(()),
        [_, Some(seq)] => Err(format!(
            "graph: input {name} takes {seq} tokens, the window has {window}"
        )),
        other => Err(format!(
            "graph: input {name} has {} dimensions, [batch, seq] is needed",
            other.len()
        )),
    }
}

/// Whatever a token is besides (a target that does not count), it is a row of the embedding when it
/// is fed: a negative one would be a row from the end, on some devices one from anywhere.
fn check_tokens(
    package: &Package,
    graph: &Graph,
    input: &str,
    limits: &[Limit],
) -> Result<(), String> {
    let logits = package.manifest.outputs.logits.as_deref();
    let logits = logits.ok_or("outputs.logits: missing")?;
    let shape = graph.output_shape(logits);
    if let Some(shape) = shape.as_ref().filter(|shape| shape.len() != 3) {
        return Err(format!(
            "graph: output {logits} has {} dimensions, [batch, seq, vocab] is needed",
            shape.len()
        ));
    }
    let Some(vocabulary) = shape.and_then(|shape| *shape.last()?) else {
        return Err(format!(
            "graph: the last dimension of output {logits} (the vocabulary) must be fixed"
        ));
    };
    let vocabulary = i64::try_from(vocabulary).unwrap_or(i64::MAX);
    let of_logits = (vocabulary, format!("the vocabulary of {vocabulary}"));
    let rows = limits.iter().filter(|limit| limit.input == input);
    let rows = rows.filter_map(|l| {
        Some((
            l.below?,
            format!("the {} rows that {} picks from", l.below?, l.by),
        ))
    });
    let (below, what) = rows.chain([of_logits]).min().unwrap_or_default();
    for shard in package.shards.iter() {
        let Data::Tokens { tokens, row_length } = &shard.data else {
            return Err(format!("shard {}: holds no tokens", shard.id));
        };
        let foreign = |t: &i32| !(0..below).contains(&i64::from(*t));
        if let Some(at) = tokens.iter().position(foreign) {
            let (row, position) = (at / row_length.max(&1), at % row_length.max(&1));
            return Err(format!(
                "shard {}: row {row}, position {position}: token {} is outside {what}; every token of a shard is fed \
                 to the model, also one whose target does not count: put a token of the model there, such as its padding",
                shard.id, tokens[at]
            ));
        }
    }
    Ok(())
}

/// Positions are 0 to the window's last.
fn check_positions(
    input: Option<&InputInfo>,
    window: usize,
    limits: &[Limit],
) -> Result<(), String> {
    let Some(input) = input else { return Ok(()) };
    let limits = limits.iter().filter(|limit| limit.input == input.name);
    let rows = limits
        .filter_map(|limit| usize::try_from(limit.below?).ok())
        .min();
    match rows {
        Some(rows) if rows < window => Err(format!(
            "graph: input {} knows {rows} positions, the window has {window}",
            input.name
        )),
        Some(_) | None => Ok(()),
    }
}

/// Whole numbers that pick rows or classes pick such as there are.
fn check_values(package: &Package, limits: &[Limit]) -> Result<(), String> {
    for (position, shard) in package.shards.iter().enumerate() {
        for (limit, column) in limits.iter().flat_map(|limit| {
            let columns = columns(package, position).iter();
            columns
                .filter(|c| c.name == limit.input)
                .map(move |column| (limit, column))
        }) {
            let below = limit.below.unwrap_or(i64::MAX);
            let foreign = |v: &i64| !(0..below).contains(v) && Some(*v) != limit.ignored;
            let values = whole_numbers(column);
            if let Some(at) = values.iter().position(foreign) {
                let row_length = column.shape.iter().product::<usize>().max(1);
                let known = limit
                    .below
                    .map_or(String::new(), |below| format!(" of {below}"));
                return Err(format!(
                    "shard {}: {}: row {}, position {}: {} is none{known} that {} picks from",
                    shard.id,
                    column.name,
                    at / row_length,
                    at % row_length,
                    values[at],
                    limit.by
                ));
            }
        }
    }
    Ok(())
}

fn whole_numbers(column: &Column) -> Vec<i64> {
    match column.elem {
        Elem::I64 => column
            .bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect(),
        Elem::I32 => {
            let values = column.bytes.as_chunks().0.iter();
            values.map(|b| i32::from_le_bytes(*b).into()).collect()
        }
        Elem::F32 | Elem::F16 | Elem::U8 | Elem::Bool => Vec::new(),
    }
}

/// A mean over the batch would be the same for every example.
fn check_loss(package: &Package, graph: &Graph) -> Result<(), String> {
    let loss = package.manifest.outputs.loss.as_deref().unwrap_or_default();
    match graph.output_shape(loss) {
        Some(shape) if shape.is_empty() => Err(format!(
            "graph: output {loss} is a single number, [batch] is needed: the loss of each example, not their mean"
        )),
        Some(_) | None => Ok(()),
    }
}

/// Every shard has a column for every input of the graph, and none besides.
fn check_columns(package: &Package, inputs: &[InputInfo]) -> Result<(), String> {
    for (position, shard) in package.shards.iter().enumerate() {
        let columns = columns(package, position);
        if let Some(extra) = columns
            .iter()
            .find(|c| !inputs.iter().any(|i| i.name == c.name))
        {
            return Err(format!(
                "shard {}: the graph has no input {}; it has {}",
                shard.id,
                extra.name,
                listed(inputs)
            ));
        }
        for input in inputs {
            let column = columns.iter().find(|column| column.name == input.name);
            let column = column
                .ok_or_else(|| format!("shard {}: has no tensor {}", shard.id, input.name))?;
            check_column(column, input).map_err(|e| format!("shard {}: {e}", shard.id))?;
        }
    }
    Ok(())
}

fn check_column(column: &Column, input: &InputInfo) -> Result<(), String> {
    let name = &input.name;
    if input.elem != Some(column.elem) {
        return Err(format!(
            "{name} is {:?}, the graph takes {:?}",
            column.elem, input.elem
        ));
    }
    let row = input.shape.get(1..).unwrap_or_default();
    let fits = row.len() == column.shape.len()
        && row
            .iter()
            .zip(&column.shape)
            .all(|(free, size)| free.is_none_or(|f| f == *size));
    if fits {
        Ok(())
    } else {
        Err(format!(
            "{name} has rows of shape {:?}, the graph takes {row:?}",
            column.shape
        ))
    }
}
