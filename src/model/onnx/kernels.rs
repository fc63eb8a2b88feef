//! Graphs of one node, with which the engine writes and copies weights in a device's memory.

use prost::Message;

use super::proto::{
    GraphProto, INT64, ModelProto, NodeProto, OperatorSetId, TensorType, TypeProto, ValueInfo,
    elem_type,
};
use crate::model::tensor::Dtype;

/// A graph of one `ScatterND`: `output` = `data` with `updates` written at `indices`.
pub fn scatter_graph(dtype: Dtype) -> Vec<u8> {
    let elem = elem_type(dtype);
    let inputs = [("data", elem), ("indices", INT64), ("updates", elem)];
    one_node("ScatterND", &inputs, elem)
}

/// A graph that copies `data` to `output`, whichever device each is on.
pub fn copy_graph(dtype: Dtype) -> Vec<u8> {
    let elem = elem_type(dtype);
    one_node("Identity", &[("data", elem)], elem)
}

fn one_node(op_type: &str, inputs: &[(&str, i32)], output: i32) -> Vec<u8> {
    let free = |name: &str, elem_type: i32| ValueInfo {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorType {
                elem_type: Some(elem_type),
                shape: None,
            }),
        }),
    };
    let node = NodeProto {
        input: inputs.iter().map(|(name, _)| (*name).to_owned()).collect(),
        output: vec!["output".into()],
        name: Some(op_type.to_lowercase()),
        op_type: Some(op_type.into()),
        ..NodeProto::default()
    };
    let graph = GraphProto {
        node: vec![node.encode_to_vec().into()],
        name: Some(op_type.to_lowercase()),
        input: inputs
            .iter()
            .map(|(name, elem)| free(name, *elem))
            .collect(),
        output: vec![free("output", output)],
        ..GraphProto::default()
    };
    let opset = OperatorSetId {
        domain: None,
        version: Some(16),
    };
    let model = ModelProto {
        ir_version: Some(8),
        graph: Some(graph),
        opset_import: vec![opset],
        ..ModelProto::default()
    };
    model.encode_to_vec()
}
