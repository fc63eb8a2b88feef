//! `ConstantOfShape` is the `Expand` of one number.

use bytes::Bytes;

use super::super::proto::{
    Attribute, BFLOAT16, FLOAT, FLOAT16, GraphError, NodeProto, TensorProto, attribute,
};
use super::Successors;

/// Integers stay: they are arithmetic on shapes.
pub(super) fn rewrite(node: &NodeProto) -> Result<Option<Vec<Bytes>>, GraphError> {
    let value = attribute(node, "value")?.unwrap_or_else(zero);
    let elem = value.t.as_ref().and_then(|t| t.data_type);
    let is_float = matches!(elem, Some(FLOAT | FLOAT16 | BFLOAT16));
    let (Some(shape), Some(mut nodes), true) = (node.input.first(), Successors::of(node), is_float)
    else {
        return Ok(None);
    };
    let one = nodes.push("value", "Constant", &[], &[value]);
    // Of no dimensions: it may become a single number.
    let number = nodes.push("number", "Squeeze", &[&one], &[]);
    Ok(Some(nodes.finish("Expand", &[&number, shape], &[])))
}

/// The value where none is given.
fn zero() -> Attribute {
    const TENSOR: i32 = 4;
    let value = TensorProto {
        dims: vec![1],
        data_type: Some(FLOAT),
        raw_data: Some(Bytes::from_static(&[0; 4])),
        ..TensorProto::default()
    };
    Attribute {
        name: Some("value".into()),
        t: Some(value),
        r#type: Some(TENSOR),
        ..Attribute::default()
    }
}
