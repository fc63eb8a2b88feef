//! Graphs of one node, with which the engine writes and copies weights in a device's memory.

use super::proto::{GraphProto, INT64, ValueInfo, elem_type, model, node};
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
    let free = |name: &str, elem_type: i32| ValueInfo::new(name, elem_type, None);
    let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).collect();
    let name = op_type.to_lowercase();
    let inputs = inputs.iter().map(|(name, elem)| free(name, *elem));
    let graph = GraphProto {
        node: vec![node(&name, op_type, &names, "output", &[])],
        name: Some(name),
        input: inputs.collect(),
        output: vec![free("output", output)],
        ..GraphProto::default()
    };
    model(graph, 8, 16)
}
