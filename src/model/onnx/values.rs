//! What a graph says of its values: element types, shapes, and the integers that it holds.

use std::collections::HashMap;

use bytes::Bytes;

use super::proto::{
    Dimension, EXTERNAL, GraphError, GraphProto, INT32, INT64, NodeProto, TensorProto, TensorShape,
    TensorType, ValueInfo, decode, is_default_domain,
};

/// The types of a graph's own values by name, as far as the graph gives them.
pub(super) fn types(graph: &GraphProto) -> Result<HashMap<String, TensorType>, GraphError> {
    let mut found = HashMap::new();
    for bytes in &graph.value_info {
        let bytes = Bytes::copy_from_slice(bytes);
        let info: ValueInfo = decode(&bytes, "a value's type")?;
        found.extend(typed(&info));
    }
    found.extend(graph.output.iter().filter_map(typed));
    found.extend(graph.input.iter().filter_map(typed));
    found.extend(graph.initializer.iter().map(initializer));
    Ok(found)
}

fn typed(info: &ValueInfo) -> Option<(String, TensorType)> {
    Some((info.name.clone()?, info.tensor()?.clone()))
}

fn initializer(tensor: &TensorProto) -> (String, TensorType) {
    let dim = |size: &i64| Dimension {
        dim_value: Some(*size),
        dim_param: None,
    };
    let shape = TensorShape {
        dim: tensor.dims.iter().map(dim).collect(),
    };
    let tensor_type = TensorType {
        elem_type: tensor.data_type,
        shape: Some(shape),
    };
    (tensor.name().to_owned(), tensor_type)
}

/// A tensor of integers: one number, or a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Integers {
    One(i64),
    Vector(Vec<i64>),
}

impl Integers {
    /// The integers of a tensor that is in the graph and is no matrix.
    pub(super) fn of(tensor: &TensorProto) -> Option<Self> {
        if tensor.data_location == Some(EXTERNAL) {
            return None;
        }
        let raw = tensor.raw_data.as_deref();
        let values: Vec<i64> = match tensor.data_type? {
            INT64 => match raw {
                Some(raw) => words(raw, i64::from_le_bytes),
                None => tensor.int64_data.clone(),
            },
            INT32 => match raw {
                Some(raw) => words(raw, |word| i32::from_le_bytes(word).into()),
                None => tensor.int32_data.iter().map(|v| i64::from(*v)).collect(),
            },
            _ => return None,
        };
        match (tensor.dims.as_slice(), values.as_slice()) {
            ([], [value]) => Some(Self::One(*value)),
            ([count], _) => {
                let whole = usize::try_from(*count) == Ok(values.len());
                whole.then_some(Self::Vector(values))
            }
            (_, _) => None,
        }
    }

    /// The integers that a Constant node holds.
    pub(super) fn of_node(node: &NodeProto) -> Result<Option<Self>, GraphError> {
        if node.op_type() != "Constant" || !is_default_domain(node.domain.as_deref()) {
            return Ok(None);
        }
        for attribute in node.attributes() {
            let attribute = attribute?;
            if attribute.ref_attr_name.is_some() {
                return Ok(None);
            }
            match attribute.name() {
                "value" => return Ok(attribute.t.as_ref().and_then(Self::of)),
                "value_int" => return Ok(attribute.i.map(Self::One)),
                "value_ints" => return Ok(Some(Self::Vector(attribute.ints))),
                _ => {}
            }
        }
        Ok(None)
    }
}

fn words<const N: usize>(raw: &[u8], read: impl Fn([u8; N]) -> i64) -> Vec<i64> {
    raw.as_chunks().0.iter().map(|word| read(*word)).collect()
}
