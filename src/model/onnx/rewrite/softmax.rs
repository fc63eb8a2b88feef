//! `Softmax(x)` is `e / sum(e)` with `e = exp(x - max(x))`. NaN and infinities reach the result, which
//! not every kernel ensures.

use bytes::Bytes;

use super::super::proto::{GraphError, NodeProto, integer};
use super::log_softmax::exponentials;
use super::scope::Scope;
use super::wide::Wide;

pub(super) fn rewrite(
    node: &NodeProto,
    scope: &Scope,
    outer: &[Scope],
) -> Result<Option<Vec<Bytes>>, GraphError> {
    let Some(mut nodes) = Wide::of(node, scope, outer) else {
        return Ok(None);
    };
    let axis = integer(node, "axis")?.unwrap_or(-1);
    let [_, exp, sum] = exponentials(&mut nodes, axis, scope.opset);
    Ok(Some(nodes.finish("Div", &[&exp, &sum])))
}
