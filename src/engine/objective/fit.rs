//! Checks that the graph takes exactly what the package feeds, so that no job can fail on it.

use super::{Measure, columns};
use crate::model::onnx::{Graph, IndexLimit, InputInfo};
use crate::model::package::Package;
use crate::model::plan::{Column, Cut, Data, Shard};
use crate::model::tensor::Elem;

pub(super) fn causal_lm(
    package: &Package,
    graph: &Graph,
    inputs: &[InputInfo],
    limits: &[IndexLimit],
) -> Result<Measure, String> {
    let Cut::Tokens(cut) = package.cut() else {
        return Err("objective: is not causal_lm".into());
    };
    let window = cut.window;
    let names = &package.manifest.inputs;
    let find = |name: &Option<String>| {
        let name = name.as_deref();
        name.map(|name| find_row(inputs, name, window)).transpose()
    };
    let tokens = find(&names.tokens)?.ok_or("inputs.tokens: missing")?;
    let (mask, positions) = (find(&names.attention_mask)?, find(&names.position_ids)?);
    check_all_fed(inputs, &[Some(&tokens), mask.as_ref(), positions.as_ref()])?;
    for input in std::iter::once(&tokens).chain(&positions) {
        if !matches!(input.elem, Some(Elem::I64 | Elem::I32)) {
            let name = &input.name;
            return Err(format!("graph: input {name} must be int64 or int32"));
        }
    }
    check_tokens(package, graph, &tokens.name, limits)?;
    check_positions(positions.as_ref(), window, limits)?;
    Ok(Measure::CausalLm {
        tokens,
        mask,
        positions,
        cut,
    })
}

/// The input of this name, if it takes rows of a window.
fn find_row(inputs: &[InputInfo], name: &str, window: usize) -> Result<InputInfo, String> {
    match inputs.iter().find(|input| input.name == name) {
        Some(input) => check_row(input, window).map(|()| input.clone()),
        None => {
            let others = listed(inputs);
            Err(format!("graph: has no input {name}; it has {others}"))
        }
    }
}

/// Every input of the graph is one of those that are fed.
fn check_all_fed(inputs: &[InputInfo], fed: &[Option<&InputInfo>]) -> Result<(), String> {
    let is_fed = |input: &InputInfo| fed.iter().flatten().any(|f| f.name == input.name);
    let unknown: Vec<InputInfo> = inputs.iter().filter(|i| !is_fed(i)).cloned().collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(format!(
        "graph: nothing is known to feed its input {}; export it without (no cache, no labels), \
         or name it in inputs.attention_mask or inputs.position_ids",
        listed(&unknown)
    ))
}

fn listed(inputs: &[InputInfo]) -> String {
    let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
    names.join(", ")
}

fn check_row(input: &InputInfo, window: usize) -> Result<(), String> {
    let name = &input.name;
    let why = match (input.elem, input.shape.as_slice()) {
        (None, _) => format!("the element type of input {name} cannot be fed"),
        (_, [_, None]) => return Ok(()),
        (_, [_, Some(seq)]) if *seq == window => return Ok(()),
        (_, [_, Some(seq)]) => format!("input {name} takes {seq} tokens, the window has {window}"),
        (_, other) => {
            let rank = other.len();
            format!("input {name} has {rank} dimensions, [batch, seq] is needed")
        }
    };
    Err(format!("graph: {why}"))
}

/// Checks that every token is a row of the embedding, also one that is no counted target: a negative
/// token would read a row from the end, or on some devices from anywhere.
fn check_tokens(
    package: &Package,
    graph: &Graph,
    input: &str,
    limits: &[IndexLimit],
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
    let rows = rows.filter_map(|limit| Some((limit.below?, &limit.by)));
    let rows = rows.map(|(n, by)| (n, format!("the {n} rows that {by} picks from")));
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

/// Checks that the graph knows as many positions as a window has.
fn check_positions(
    input: Option<&InputInfo>,
    window: usize,
    limits: &[IndexLimit],
) -> Result<(), String> {
    let Some(input) = input else { return Ok(()) };
    let limits = limits.iter().filter(|limit| limit.input == input.name);
    let rows = limits.filter_map(|limit| usize::try_from(limit.below?).ok());
    match rows.min() {
        Some(rows) if rows < window => Err(format!(
            "graph: input {} knows {rows} positions, the window has {window}",
            input.name
        )),
        Some(_) | None => Ok(()),
    }
}

/// Checks that integers that select rows or classes are in range.
pub(super) fn check_values(package: &Package, limits: &[IndexLimit]) -> Result<(), String> {
    for (position, shard) in package.shards.iter().enumerate() {
        for limit in limits {
            let mut columns = columns(package, position).iter();
            let Some(column) = columns.find(|column| column.name == limit.input) else {
                continue;
            };
            let below = limit.below.unwrap_or(i64::MAX);
            let foreign = |v: &i64| !(0..below).contains(v) && Some(*v) != limit.ignored;
            let values = whole_numbers(column);
            if let Some(at) = values.iter().position(foreign) {
                let row_length = column.shape.iter().product::<usize>().max(1);
                let known = limit.below.map(|below| format!(" of {below}"));
                let known = known.unwrap_or_default();
                let (row, at, value) = (at / row_length, at % row_length, values[at]);
                let (id, name, by) = (shard.id, &column.name, &limit.by);
                return Err(format!(
                    "shard {id}: {name}: row {row}, position {at}: {value} is none{known} that {by} picks from"
                ));
            }
        }
    }
    Ok(())
}

fn whole_numbers(column: &Column) -> Vec<i64> {
    match column.elem {
        Elem::I64 => {
            let values = column.bytes.as_chunks().0.iter();
            values.map(|b| i64::from_le_bytes(*b)).collect()
        }
        Elem::I32 => {
            let values = column.bytes.as_chunks().0.iter();
            values.map(|b| i32::from_le_bytes(*b).into()).collect()
        }
        Elem::F32 | Elem::F16 | Elem::U8 | Elem::Bool => Vec::new(),
    }
}

/// Checks that the loss is per example: a mean over the batch would be the same for all.
pub(super) fn check_loss(package: &Package, graph: &Graph) -> Result<(), String> {
    let loss = package.manifest.outputs.loss.as_deref().unwrap_or_default();
    match graph.output_shape(loss) {
        Some(shape) if shape.is_empty() => Err(format!(
            "graph: output {loss} is a single number, [batch] is needed: the loss of each example, not their mean"
        )),
        Some(_) | None => Ok(()),
    }
}

/// Checks that every shard has exactly one column per input of the graph.
pub(super) fn check_columns(package: &Package, inputs: &[InputInfo]) -> Result<(), String> {
    for (position, shard) in package.shards.iter().enumerate() {
        let columns = columns(package, position);
        let is_extra = |c: &&Column| !inputs.iter().any(|i| i.name == c.name);
        if let Some(extra) = columns.iter().find(is_extra) {
            let (id, name, others) = (shard.id, &extra.name, listed(inputs));
            return Err(format!(
                "shard {id}: the graph has no input {name}; it has {others}"
            ));
        }
        for input in inputs {
            let column = columns.iter().find(|column| column.name == input.name);
            let column = column
                .ok_or_else(|| format!("shard {}: has no tensor {}", shard.id, input.name))?;
            check_column(column, input).map_err(|e| format!("shard {}: {e}", shard.id))?;
            check_alike(column, &package.shards[0])
                .map_err(|e| format!("shard {}: {e}", shard.id))?;
        }
    }
    Ok(())
}

/// Checks that the rows have the shape of those of the first shard: they may run in one batch.
fn check_alike(column: &Column, first: &Shard) -> Result<(), String> {
    let Data::Examples(others) = &first.data else {
        return Ok(());
    };
    let mut others = others.iter();
    let expected = others.find(|c| c.name == column.name).map(|c| &c.shape);
    match expected {
        Some(expected) if *expected != column.shape => Err(format!(
            "{} has rows of shape {:?}, those of shard {} have {expected:?}; all shards need the same",
            column.name, column.shape, first.id
        )),
        Some(_) | None => Ok(()),
    }
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
    let mut sizes = row.iter().zip(&column.shape);
    let fits = sizes.all(|(free, size)| free.is_none_or(|f| f == *size));
    if fits && row.len() == column.shape.len() {
        return Ok(());
    }
    Err(format!(
        "{name} has rows of shape {:?}, the graph takes {row:?}",
        column.shape
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_another_shape_than_the_first_shard_has_are_refused() {
        let column = |size: usize| Column {
            name: "x".into(),
            elem: Elem::F32,
            shape: vec![size],
            bytes: vec![0; 4 * size],
        };
        let first = Shard {
            id: 1,
            data: Data::Examples(vec![column(3)]),
        };
        assert_eq!(check_alike(&column(3), &first), Ok(()));
        let error = check_alike(&column(4), &first).unwrap_err();
        assert!(error.contains("[4], those of shard 1 have [3]"), "{error}");
    }
}
