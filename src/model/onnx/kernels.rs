//! Graphs of one node, with which the engine writes and copies weights in a device's memory.

use bytes::Bytes;

use super::proto::{FLOAT, GraphProto, INT64, ValueInfo, elem_type, int, model, node};
use crate::model::tensor::Dtype;

/// The input of these graphs that is the weight.
pub const DATA: &str = "data";

/// A graph of one `ScatterND`: `output` = `data` with `updates` written at `indices`.
pub fn scatter_graph(dtype: Dtype) -> Vec<u8> {
    let elem = elem_type(dtype);
    let inputs = [(DATA, elem), ("indices", INT64), ("updates", elem)];
    one_node("ScatterND", &inputs, elem)
}

/// A graph that copies `data` to `output`, whichever device each is on.
pub fn copy_graph(dtype: Dtype) -> Vec<u8> {
    let elem = elem_type(dtype);
    one_node("Identity", &[(DATA, elem)], elem)
}

/// A graph that tells for each entry of `data` whether it is unlike itself: `output` is 1 for NaN, else 0, in
/// f32.
pub fn nan_graph(dtype: Dtype) -> Vec<u8> {
    let float = [int("to", FLOAT.into())];
    let nodes = vec![
        node("equal", "Equal", &[DATA, DATA], "same", &[]),
        node("not", "Not", &["same"], "unlike", &[]),
        node("cast", "Cast", &["unlike"], "output", &float),
    ];
    kernel("nan", nodes, &[(DATA, elem_type(dtype))], FLOAT)
}

fn one_node(op_type: &str, inputs: &[(&str, i32)], output: i32) -> Vec<u8> {
    let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).collect();
    let name = op_type.to_lowercase();
    let nodes = vec![node(&name, op_type, &names, "output", &[])];
    kernel(&name, nodes, inputs, output)
}

fn kernel(name: &str, node: Vec<Bytes>, inputs: &[(&str, i32)], output: i32) -> Vec<u8> {
    let free = |name: &str, elem_type: i32| ValueInfo::new(name, elem_type, None);
    let inputs = inputs.iter().map(|(name, elem)| free(name, *elem));
    let graph = GraphProto {
        node,
        name: Some(name.to_owned()),
        input: inputs.collect(),
        output: vec![free("output", output)],
        ..GraphProto::default()
    };
    model(graph, 8, 16)
}
