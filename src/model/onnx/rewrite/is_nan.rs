//! `IsNaN(x)` is `Not(Equal(x, x))`: nothing but NaN differs from itself.

use bytes::Bytes;

use super::super::proto::NodeProto;
use super::Successors;

pub(super) fn rewrite(node: &NodeProto) -> Option<Vec<Bytes>> {
    let x = node.input.first()?;
    let mut nodes = Successors::of(node)?;
    let same = nodes.push("equal", "Equal", &[x, x], &[]);
    Some(nodes.finish("Not", &[&same], &[]))
}
