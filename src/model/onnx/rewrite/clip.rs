//! `Clip` is a `Max` and a `Min`, and `Relu` a `Max` with 0: these keep NaN, which not every kernel of
//! `Clip` and `Relu` does.

use bytes::Bytes;

use super::super::proto::{NodeProto, scalar};
use super::Successors;
use super::scope::Scope;
use super::wide::Wide;

/// With both bounds: one that is left out is the last finite number of the type.
pub(super) fn rewrite(node: &NodeProto) -> Option<Vec<Bytes>> {
    let [x, low, high] = node.input.as_slice() else {
        return None;
    };
    if low.is_empty() || high.is_empty() {
        return None;
    }
    let mut nodes = Successors::of(node)?;
    let raised = nodes.push("raised", "Max", &[x, low], &[]);
    Some(nodes.finish("Min", &[&raised, high], &[]))
}

/// In f32, so that the type of the 0 is known.
pub(super) fn relu(node: &NodeProto, scope: &Scope, outer: &[Scope]) -> Option<Vec<Bytes>> {
    let mut wide = Wide::of(node, scope, outer)?;
    let zero = [scalar(0.0)];
    let zero = wide.nodes.push("zero", "Constant", &[], &zero);
    let x = wide.input.clone();
    Some(wide.finish("Max", &[&x, &zero]))
}
