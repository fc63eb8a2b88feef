//! A `Sum` is a chain of `Add`s, from the first input to the last.

use super::super::proto::NodeProto;
use super::{Replaced, Successors};

pub(super) fn rewrite(at: usize, node: &NodeProto) -> Option<Replaced> {
    let (first, others) = node.input.split_first()?;
    let mut nodes = Successors::of(node)?;
    let Some((last, others)) = others.split_last() else {
        return Some((at, nodes.finish("Identity", &[first], &[])));
    };
    let mut sum = first.clone();
    for (at, next) in others.iter().enumerate() {
        sum = nodes.push(&format!("sum_{at}"), "Add", &[&sum, next], &[]);
    }
    Some((at, nodes.finish("Add", &[&sum, last], &[])))
}
