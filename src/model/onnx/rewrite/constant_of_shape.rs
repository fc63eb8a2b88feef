//! `ConstantOfShape` is the `Expand` of one number.

use super::super::proto::{BFLOAT16, FLOAT, FLOAT16, GraphError, NodeProto, attribute, floats};
use super::{Replaced, Successors};

/// Integers stay: they are arithmetic on shapes.
pub(super) fn rewrite(at: usize, node: &NodeProto) -> Result<Option<Replaced>, GraphError> {
    let value = attribute(node, "value")?.unwrap_or_else(|| floats("value_floats", &[0.0]));
    let elem = value.t.as_ref().map_or(Some(FLOAT), |t| t.data_type);
    let is_float = matches!(elem, Some(FLOAT | FLOAT16 | BFLOAT16));
    let (Some(shape), Some(mut nodes), true) = (node.input.first(), Successors::of(node), is_float)
    else {
        return Ok(None);
    };
    let one = nodes.push("value", "Constant", &[], &[value]);
    // Of no dimensions: it may become a single number.
    let number = nodes.push("number", "Squeeze", &[&one], &[]);
    Ok(Some((at, nodes.finish("Expand", &[&number, shape], &[]))))
}
