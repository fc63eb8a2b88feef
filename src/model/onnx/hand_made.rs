//! Graphs made by hand, for the tests here and of packaging. No other build has them.

#![cfg(test)]

use prost::Message;

use super::graph::Graph;
use super::proto::{
    Attribute, GraphProto, ModelProto, NodeProto as Node, OperatorSetId, StringEntry, TensorProto,
    ValueInfo,
};
use crate::model::checkpoint::Tensor;
use crate::model::tensor::Dtype;

/// A node and what its exporter says of it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Made<'a> {
    pub(crate) name: &'a str,
    pub(crate) op: &'a str,
    pub(crate) input: &'a [&'a str],
    pub(crate) output: &'a str,
    pub(crate) scopes: &'a str,
    pub(crate) call: &'a str,
    /// The node sits in the body of an If.
    pub(crate) in_body: bool,
}

pub(super) fn entry(key: &str, value: &str) -> StringEntry {
    StringEntry {
        key: Some(key.into()),
        value: Some(value.into()),
    }
}

impl Made<'_> {
    pub(super) fn node(self) -> Node {
        let told = [
            ("pkg.torch.onnx.name_scopes", self.scopes),
            ("pkg.torch.onnx.fx_node", self.call),
        ];
        let told = told.iter().filter(|(_, value)| !value.is_empty());
        let node = Node {
            name: Some(self.name.into()),
            op_type: Some(self.op.into()),
            input: self.input.iter().map(|i| (*i).to_owned()).collect(),
            output: vec![self.output.into()],
            metadata_props: told.map(|(key, value)| entry(key, value)).collect(),
            ..Node::default()
        };
        if self.in_body { inside(node) } else { node }
    }
}

pub(super) fn inside(node: Node) -> Node {
    let body = Attribute {
        g: Some(GraphProto {
            node: vec![node.encode_to_vec().into()],
            ..GraphProto::default()
        }),
        ..Attribute::default()
    };
    Node {
        name: Some("if".into()),
        op_type: Some("If".into()),
        attribute: vec![body.encode_to_vec().into()],
        ..Node::default()
    }
}

/// A graph whose last node's output is its output; its initializers hold nothing of interest.
pub(crate) fn graph(nodes: &[Made<'_>], initializers: &[&str]) -> Graph {
    let nodes: Vec<Node> = nodes.iter().map(|n| n.node()).collect();
    of_nodes(&nodes, initializers)
}

pub(super) fn of_nodes(nodes: &[Node], initializers: &[&str]) -> Graph {
    let tensor = |name: &&str| TensorProto {
        name: Some((*name).to_owned()),
        raw_data: Some(vec![0; 8].into()),
        ..TensorProto::default()
    };
    let last = nodes.last().and_then(|n| n.output.last().cloned());
    let proto = GraphProto {
        node: nodes.iter().map(|n| n.encode_to_vec().into()).collect(),
        initializer: initializers.iter().map(tensor).collect(),
        output: vec![ValueInfo {
            name: last,
            r#type: None,
        }],
        ..GraphProto::default()
    };
    let opset = OperatorSetId {
        domain: None,
        version: Some(18),
    };
    let model = ModelProto {
        graph: Some(proto),
        opset_import: vec![opset],
        ..ModelProto::default()
    };
    Graph::decode(model.encode_to_vec().into()).expect("a graph")
}

/// A tensor of a checkpoint, in float32.
pub(crate) fn tensor(name: &str, values: &[f32]) -> Tensor {
    Tensor {
        name: name.into(),
        shape: vec![values.len()],
        dtype: Dtype::F32,
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}
