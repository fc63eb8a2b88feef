//! A `Sum` is a chain of `Add`s, from the first input to the last.

use bytes::Bytes;

use super::super::proto::NodeProto;
use super::Successors;

pub(super) fn rewrite(node: &NodeProto) -> Option<Vec<Bytes>> {
    let (first, others) = node.input.split_first()?;
    let mut nodes = Successors::of(node)?;
    let Some((last, others)) = others.split_last() else {
        return Some(nodes.finish("Identity", &[first], &[]));
    };
    let mut sum = first.clone();
    for (at, next) in others.iter().enumerate() {
        sum = nodes.push(&format!("sum_{at}"), "Add", &[&sum, next], &[]);
    }
    Some(nodes.finish("Add", &[&sum, last], &[]))
}
