//! `IsNaN(x)` is `Not(Equal(x, x))`: nothing but NaN differs from itself.

use super::super::proto::NodeProto;
use super::{Replaced, Successors};

pub(super) fn rewrite(at: usize, node: &NodeProto) -> Option<Replaced> {
    let x = node.input.first()?;
    let mut nodes = Successors::of(node)?;
    let same = nodes.push("equal", "Equal", &[x, x], &[]);
    Some((at, nodes.finish("Not", &[&same], &[])))
}
