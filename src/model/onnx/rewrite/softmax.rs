//! `Softmax(x)` is `e / sum(e)` with `e = exp(x - max(x))`. NaN and infinities reach the result, which
//! not every kernel ensures.

use super::super::proto::{GraphError, NodeProto, integer};
use super::Replaced;
use super::log_softmax::exponentials;
use super::scope::Scope;
use super::wide::Wide;

pub(super) fn rewrite(
    at: usize,
    node: &NodeProto,
    scope: &Scope,
    outer: &[Scope],
) -> Result<Option<Replaced>, GraphError> {
    let Some(mut nodes) = Wide::of(node, scope, outer) else {
        return Ok(None);
    };
    let axis = integer(node, "axis")?.unwrap_or(-1);
    let [_, exp, sum] = exponentials(&mut nodes, axis, scope.opset);
    Ok(Some((at, nodes.finish("Div", &[&exp, &sum]))))
}
