//! A sequence of parts that is only read at constant positions needs no sequence: each reader takes
//! a `Slice` of what was split. A position beyond the last part, at which the operator fails, may
//! give an empty part, if the graph does not say how many there are.

use bytes::Bytes;

use super::super::proto::{GraphError, NodeProto, integer};
use super::super::values::Integers;
use super::scope::Scope;
use super::{Replaced, Successors};

/// How a value was split into a sequence.
struct Parts<'a> {
    whole: &'a str,
    axis: i64,
    sizes: Sizes<'a>,
    /// Each part has size 1, and loses its dimension.
    squeezed: bool,
}

enum Sizes<'a> {
    Given(&'a [i64]),
    /// All alike but the last, which may be smaller, and how many there are, if that is known.
    Chunks(i64, Option<i64>),
}

pub(super) fn rewrite(
    at: usize,
    node: &NodeProto,
    scope: &Scope,
    outer: &[Scope],
) -> Result<Vec<Replaced>, GraphError> {
    let (Some(parts), Some(sequence)) = (parts(node, scope, outer)?, node.output.first()) else {
        return Ok(Vec::new());
    };
    let Some(readers) = scope.readers(sequence)? else {
        return Ok(Vec::new());
    };
    let mut replaced = vec![(at, Vec::new())];
    for reader in readers {
        let position = position(&scope.nodes[reader], sequence, scope, outer);
        let span = position.and_then(|position| parts.sizes.span(position));
        let Some(taken) = span.and_then(|span| take(&scope.nodes[reader], &parts, span)) else {
            return Ok(Vec::new());
        };
        replaced.push((reader, taken));
    }
    Ok(replaced)
}

/// How the sequence is made, if that is known before it runs.
fn parts<'a>(
    node: &'a NodeProto,
    scope: &'a Scope,
    outer: &'a [Scope],
) -> Result<Option<Parts<'a>>, GraphError> {
    let axis = integer(node, "axis")?.unwrap_or(0);
    let keep = integer(node, "keepdims")?.unwrap_or(1) != 0;
    let Some(whole) = node.input.first() else {
        return Ok(None);
    };
    let size = size(scope, outer, whole, axis);
    let split = node.input.get(1).filter(|split| !split.is_empty());
    let sizes = match split.map(|split| scope.integers(outer, split)) {
        Some(None) => None,
        Some(Some(Integers::Vector(sizes))) => Some(Sizes::Given(sizes)),
        // ONNX ignores `keepdims` where sizes are given, ONNX Runtime not if they are one number.
        Some(Some(Integers::One(_))) if !keep => None,
        Some(Some(Integers::One(chunk))) => Sizes::chunks(*chunk, size),
        None => Sizes::chunks(1, size),
    };
    Ok(sizes.map(|sizes| Parts {
        whole,
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

impl Sizes<'_> {
    fn chunks(chunk: i64, whole: Option<i64>) -> Option<Self> {
        let count = |whole: i64| whole.div_euclid(chunk) + i64::from(whole.rem_euclid(chunk) > 0);
        (chunk > 0).then(|| Self::Chunks(chunk, whole.map(count)))
    }

    /// Where the part at a position starts and ends.
    fn span(&self, position: i64) -> Option<(i64, i64)> {
        let count = match self {
            Self::Given(sizes) => i64::try_from(sizes.len()).ok(),
            Self::Chunks(_, count) => *count,
        };
        let from_the_start = match position < 0 {
            true => position.checked_add(count?)?,
            false => position,
        };
        if from_the_start < 0 || count.is_some_and(|count| from_the_start >= count) {
            return None;
        }
        match self {
            Self::Given(sizes) => {
                let at = usize::try_from(from_the_start).ok()?;
                let start: i64 = sizes.get(..at)?.iter().sum();
                Some((start, start + sizes.get(at)?))
            }
            Self::Chunks(chunk, _) => {
                let start = from_the_start.checked_mul(*chunk)?;
                Some((start, start.checked_add(*chunk)?))
            }
        }
    }
}

/// The constant position at which a node reads the sequence.
fn position(reader: &NodeProto, sequence: &str, scope: &Scope, outer: &[Scope]) -> Option<i64> {
    let ([read, position], "SequenceAt") = (reader.input.as_slice(), reader.op().as_str()) else {
        return None;
    };
    match scope
        .integers(outer, position)
        .filter(|_| read == sequence)?
    {
        Integers::One(position) => Some(*position),
        Integers::Vector(_) => None,
    }
}

/// The nodes in the place of one that reads the sequence.
fn take(reader: &NodeProto, parts: &Parts<'_>, (start, end): (i64, i64)) -> Option<Vec<Bytes>> {
    let mut nodes = Successors::of(reader)?;
    let start = nodes.constant("start", &[start]);
    let end = nodes.constant("end", &[end]);
    let axis = nodes.constant("axis", &[parts.axis]);
    let slice = [parts.whole, &start, &end, &axis];
    if !parts.squeezed {
        return Some(nodes.finish("Slice", &slice, &[]));
    }
    let part = nodes.push("part", "Slice", &slice, &[]);
    Some(nodes.finish("Squeeze", &[&part, &axis], &[]))
}
