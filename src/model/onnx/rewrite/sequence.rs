//! A sequence that is only read at constant positions is a `Split`, of which each reader takes its
//! part.

use bytes::Bytes;
use prost::Message;

use super::super::proto::{GraphError, NodeProto, int, integer};
use super::super::values::Integers;
use super::scope::Scope;
use super::{Replaced, Successors};

/// The parts of a sequence, which [`Split`]'s outputs are.
struct Parts {
    axis: i64,
    sizes: Vec<i64>,
    /// Each part has size 1, and loses its dimension.
    squeezed: bool,
}

pub(super) fn rewrite(
    at: usize,
    node: &NodeProto,
    scope: &Scope,
    outer: &[Scope],
) -> Result<Vec<Replaced>, GraphError> {
    let Some(parts) = parts(node, scope, outer)? else {
        return Ok(Vec::new());
    };
    let (Some(sequence), Some(mut split)) = (node.output.first(), Successors::of(node)) else {
        return Ok(Vec::new());
    };
    let Some(readers) = scope.readers(sequence)? else {
        return Ok(Vec::new());
    };
    let mut replaced = Vec::new();
    for reader in readers {
        let Some(taken) = taken(&scope.nodes[reader], sequence, &parts, scope, outer) else {
            return Ok(Vec::new());
        };
        replaced.push((reader, taken));
    }
    let sizes = split.constant("sizes", &parts.sizes);
    split.nodes.push(split_node(node, &sizes, &parts));
    replaced.push((at, split.nodes));
    Ok(replaced)
}

/// What the sequence consists of, if that is known before it runs.
fn parts(node: &NodeProto, scope: &Scope, outer: &[Scope]) -> Result<Option<Parts>, GraphError> {
    let axis = integer(node, "axis")?.unwrap_or(0);
    let keep = integer(node, "keepdims")?.unwrap_or(1) != 0;
    let whole = node
        .input
        .first()
        .and_then(|input| size(scope, outer, input, axis));
    let split = node.input.get(1).filter(|split| !split.is_empty());
    let sizes = match split.map(|split| scope.integers(outer, split)) {
        Some(None) => None,
        Some(Some(Integers::Vector(sizes))) => Some(sizes.clone()),
        // ONNX ignores `keepdims` where sizes are given, ONNX Runtime not if they are one number.
        Some(Some(Integers::One(_))) if !keep => None,
        Some(Some(Integers::One(chunk))) => whole.and_then(|whole| chunks(whole, *chunk)),
        None => whole.and_then(|whole| chunks(whole, 1)),
    };
    Ok(sizes.filter(|sizes| !sizes.is_empty()).map(|sizes| Parts {
        axis,
        sizes,
        squeezed: split.is_none() && !keep,
    }))
}

/// The size of a value along an axis, if the graph gives it.
fn size(scope: &Scope, outer: &[Scope], value: &str, axis: i64) -> Option<i64> {
    let sizes = scope.r#type(outer, value)?.sizes()?;
    let from_the_end = i64::try_from(sizes.len()).ok()? + axis;
    let axis = usize::try_from(axis).or_else(|_| usize::try_from(from_the_end));
    i64::try_from((*sizes.get(axis.ok()?)?)?).ok()
}

/// Chunks of a size, of which the last may be smaller.
fn chunks(whole: i64, chunk: i64) -> Option<Vec<i64>> {
    let step = usize::try_from(chunk).ok().filter(|step| *step > 0)?;
    let starts = (0..whole).step_by(step);
    Some(starts.map(|start| chunk.min(whole - start)).collect())
}

/// The node in the place of one that reads the sequence, if that is at a constant position.
fn taken(
    reader: &NodeProto,
    sequence: &str,
    parts: &Parts,
    scope: &Scope,
    outer: &[Scope],
) -> Option<Vec<Bytes>> {
    let ([read, position], "SequenceAt") = (reader.input.as_slice(), reader.op().as_str()) else {
        return None;
    };
    if read != sequence {
        return None;
    }
    let count = i64::try_from(parts.sizes.len()).ok()?;
    let position = match scope.integers(outer, position)? {
        Integers::One(position) => *position,
        Integers::Vector(positions) => *positions.first().filter(|_| positions.len() == 1)?,
    };
    let from_the_start = if position < 0 {
        position + count
    } else {
        position
    };
    if !(0..count).contains(&from_the_start) {
        return None;
    }
    let part = part(sequence, from_the_start);
    let mut nodes = Successors::of(reader)?;
    Some(match parts.squeezed {
        true => {
            let axes = nodes.constant("axes", &[parts.axis]);
            nodes.finish("Squeeze", &[&part, &axes], &[])
        }
        false => nodes.finish("Identity", &[&part], &[]),
    })
}

fn part(sequence: &str, position: impl std::fmt::Display) -> String {
    format!("{sequence}/{position}")
}

fn split_node(node: &NodeProto, sizes: &str, parts: &Parts) -> Bytes {
    let sequence = node.output.first().map_or("", String::as_str);
    let input = node.input.first().cloned();
    let split = NodeProto {
        input: input.into_iter().chain([sizes.to_owned()]).collect(),
        output: (0..parts.sizes.len())
            .map(|at| part(sequence, at))
            .collect(),
        name: Some(format!("{}/split", node.display().unwrap_or_default())),
        op_type: Some("Split".to_owned()),
        attribute: vec![int("axis", parts.axis).encode_to_vec().into()],
        ..NodeProto::default()
    };
    split.encode_to_vec().into()
}
