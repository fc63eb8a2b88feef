//! `LogSoftmax(x)` is `s - log(sum(exp(s)))` with `s = x - max(x)`. `ReduceLogSumExp` would be less
//! exact by far.

use bytes::Bytes;

use super::super::proto::{GraphError, NodeProto, integer, ints};
use super::scope::Scope;
use super::wide::Wide;

/// The first version with the axes of `ReduceMax` as an input.
const AXES_AS_INPUT: i64 = 18;

pub(super) fn rewrite(
    node: &NodeProto,
    scope: &Scope,
    outer: &[Scope],
) -> Result<Option<Vec<Bytes>>, GraphError> {
    let Some(mut nodes) = Wide::of(node, scope, outer) else {
        return Ok(None);
    };
    let axis = integer(node, "axis")?.unwrap_or(-1);
    let [shifted, log] = until_the_last(&mut nodes, axis, scope.opset);
    let nodes = nodes.finish("Sub", &[&shifted, &log]);
    Ok(Some(nodes))
}

/// All steps but the last: what it subtracts from what.
pub(super) fn until_the_last(wide: &mut Wide<'_>, axis: i64, opset: i64) -> [String; 2] {
    let [shifted, _, sum] = exponentials(wide, axis, opset);
    let log = wide.nodes.push("log", "Log", &[&sum], &[]);
    [shifted, log]
}

/// What is left of the input without its maximum, its exponentials, and their sum.
pub(super) fn exponentials(wide: &mut Wide<'_>, axis: i64, opset: i64) -> [String; 3] {
    let (nodes, x) = (&mut wide.nodes, wide.input.as_str());
    let axes = nodes.constant("axes", &[axis]);
    let max = match opset < AXES_AS_INPUT {
        true => nodes.push("max", "ReduceMax", &[x], &[ints("axes", &[axis])]),
        false => nodes.push("max", "ReduceMax", &[x, &axes], &[]),
    };
    let shifted = nodes.push("shifted", "Sub", &[x, &max], &[]);
    let exp = nodes.push("exp", "Exp", &[&shifted], &[]);
    let sum = nodes.push("sum", "ReduceSum", &[&exp, &axes], &[]);
    [shifted, exp, sum]
}
