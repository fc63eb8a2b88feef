//! `LogSoftmax(x)` is `s - log(sum(exp(s)))` with `s = x - max(x)`. `ReduceLogSumExp` would be less
//! exact by far.

use super::super::proto::{DOUBLE, FLOAT, GraphError, NodeProto, int, integer, ints};
use super::scope::Scope;
use super::{Replaced, Successors};

/// The first version with `CastLike`, and with the axes of `ReduceMax` as an input.
const CAST_LIKE: i64 = 15;
const AXES_AS_INPUT: i64 = 18;

/// What is not known to be f32 is computed in f32 and cast back: a sum of 16-bit floats overflows. A
/// double stays, since no provider without this operator computes doubles.
pub(super) fn rewrite(
    at: usize,
    node: &NodeProto,
    scope: &Scope,
    outer: &[Scope],
) -> Result<Option<Replaced>, GraphError> {
    let (Some(x), Some(mut nodes)) = (node.input.first(), Successors::of(node)) else {
        return Ok(None);
    };
    let wide = match scope.r#type(outer, x).and_then(|t| t.elem_type) {
        Some(FLOAT) => true,
        Some(DOUBLE) => return Ok(None),
        Some(_) | None if scope.opset < CAST_LIKE => return Ok(None),
        Some(_) | None => false,
    };
    let axes = [integer(node, "axis")?.unwrap_or(-1)];
    let input = match wide {
        true => x.clone(),
        false => nodes.push("wide", "Cast", &[x], &[int("to", FLOAT.into())]),
    };
    let over = nodes.constant("axes", &axes);
    let max = match scope.opset < AXES_AS_INPUT {
        true => nodes.push("max", "ReduceMax", &[&input], &[ints("axes", &axes)]),
        false => nodes.push("max", "ReduceMax", &[&input, &over], &[]),
    };
    let shifted = nodes.push("shifted", "Sub", &[&input, &max], &[]);
    let exp = nodes.push("exp", "Exp", &[&shifted], &[]);
    let sum = nodes.push("sum", "ReduceSum", &[&exp, &over], &[]);
    let log = nodes.push("log", "Log", &[&sum], &[]);
    if wide {
        return Ok(Some((at, nodes.finish("Sub", &[&shifted, &log], &[]))));
    }
    let narrow = nodes.push("narrow", "Sub", &[&shifted, &log], &[]);
    Ok(Some((at, nodes.finish("CastLike", &[&narrow, x], &[]))))
}
