//! Graphs made by hand, for the tests here, of packaging and of sessions. No other build has them.

#![cfg(test)]

use bytes::Bytes;
use prost::Message;

use super::graph::Graph;
use super::prepare::OUTPUT;
use super::proto::{
    Attribute, BOOL, FLOAT, FLOAT16, FunctionProto, GraphProto, ModelProto, NodeProto as Node,
    OperatorSetId, StringEntry, TensorProto, ValueInfo, bodies, decode, decode_node, int, ints,
    node, value_info,
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
    /// Its attributes that are whole numbers, and those that are lists of them.
    pub(crate) int: &'a [(&'a str, i64)],
    pub(crate) ints: &'a [(&'a str, &'a [i64])],
    /// Its attribute `reduction`, if it has one.
    pub(crate) reduction: &'a str,
    /// The node sits in the body of an If.
    pub(crate) in_body: bool,
}

fn reduced(how: &str) -> Attribute {
    const STRING: i32 = 3;
    Attribute {
        name: Some("reduction".into()),
        s: Some(how.to_owned().into()),
        r#type: Some(STRING),
        ..Attribute::default()
    }
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
        let one = self.int.iter().map(|(name, value)| int(name, *value));
        let reduction = Some(self.reduction).filter(|reduction| !reduction.is_empty());
        let attributes = one
            .chain(reduction.map(reduced))
            .chain(self.ints.iter().map(|(name, values)| ints(name, values)));
        let node = Node {
            name: Some(self.name.into()),
            op_type: Some(self.op.into()),
            input: self.input.iter().map(|i| (*i).to_owned()).collect(),
            output: vec![self.output.into()],
            attribute: attributes.map(|a| a.encode_to_vec().into()).collect(),
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

/// A node that is named after its output.
pub(crate) fn made<'a>(op: &'a str, input: &'a [&'a str], output: &'a str) -> Made<'a> {
    Made {
        name: output,
        op,
        input,
        output,
        ..Made::default()
    }
}

/// The same graph with weights of 4 rows and columns among its inputs.
pub(crate) fn with_weights(mut graph: Graph, weights: &[&str]) -> Graph {
    let weight = |name: &&str| value_info(name, FLOAT, vec![Some(4), Some(4)]);
    graph.proto_mut().input.extend(weights.iter().map(weight));
    graph
}

/// A graph that says of one constant how large it is.
pub(crate) fn holding(name: &str, floats: usize) -> Graph {
    let mut graph = graph(&[], &[name]);
    for tensor in &mut graph.proto_mut().initializer {
        tensor.data_type = Some(FLOAT);
        tensor.dims = vec![i64::try_from(floats).unwrap()];
    }
    graph
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

/// Where the nodes of a graph are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the graph itself.
    Graph,
    /// In both branches of an If.
    Body,
    /// In a function of the model's own.
    Function,
}

/// A graph that a session can run: `x` in, and what its nodes make of it as `y`, in f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Runnable<'a> {
    pub(crate) opset: i64,
    pub(crate) place: Place,
    pub(crate) half: bool,
    /// The shape of `x`, if the graph gives it.
    pub(crate) shape: &'a [Option<i64>],
    pub(crate) nodes: &'a [Made<'a>],
}

impl Runnable<'_> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let inner = self
            .nodes
            .iter()
            .map(|n| Bytes::from(n.node().encode_to_vec()));
        let inner: Vec<Bytes> = inner.collect();
        let mut functions = Vec::new();
        let mut nodes = match self.place {
            Place::Graph => inner,
            Place::Body => vec![branching(inner)],
            Place::Function => {
                functions.push(own(inner, self.opset).encode_to_vec().into());
                let mut call = decode_node(&node("call", "Own", &["x"], "y", &[])).unwrap();
                call.domain = Some("own".into());
                vec![call.encode_to_vec().into()]
            }
        };
        let to = [int("to", FLOAT.into())];
        nodes.push(node("out", "Cast", &["y"], OUTPUT, &to));
        let elem = if self.half { FLOAT16 } else { FLOAT };
        let yes = TensorProto {
            name: Some("yes".into()),
            data_type: Some(BOOL),
            int32_data: vec![1],
            ..TensorProto::default()
        };
        let graph = GraphProto {
            name: Some("runnable".into()),
            node: nodes,
            initializer: vec![yes],
            input: vec![value_info("x", elem, self.shape.to_vec())],
            output: vec![ValueInfo::new(OUTPUT, FLOAT, None)],
            ..GraphProto::default()
        };
        let set = |domain: &str, version| OperatorSetId {
            domain: Some(domain.into()),
            version: Some(version),
        };
        let model = ModelProto {
            ir_version: Some(8),
            graph: Some(graph),
            opset_import: vec![set("", self.opset), set("own", 1)],
            functions,
            ..ModelProto::default()
        };
        model.encode_to_vec()
    }
}

fn branching(nodes: Vec<Bytes>) -> Bytes {
    let branch = |name: &str| {
        let body = GraphProto {
            name: Some(name.into()),
            node: nodes.clone(),
            output: vec![ValueInfo {
                name: Some("y".into()),
                r#type: None,
            }],
            ..GraphProto::default()
        };
        const GRAPH: i32 = 5;
        Attribute {
            name: Some(name.into()),
            g: Some(body),
            r#type: Some(GRAPH),
            ..Attribute::default()
        }
    };
    let branches = [branch("then_branch"), branch("else_branch")];
    node("if", "If", &["yes"], "y", &branches)
}

fn own(nodes: Vec<Bytes>, opset: i64) -> FunctionProto {
    FunctionProto {
        name: Some("Own".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        node: nodes,
        opset_import: vec![OperatorSetId {
            domain: Some(String::new()),
            version: Some(opset),
        }],
        domain: Some("own".into()),
        overload: None,
    }
}

/// The operators of all nodes, in bodies and functions as well.
pub(crate) fn operators(model: &[u8]) -> Vec<String> {
    fn add(nodes: &[Bytes], found: &mut Vec<String>) {
        for bytes in nodes {
            let node = decode_node(bytes).unwrap();
            found.push(node.op());
            for body in bodies(&node).unwrap() {
                add(&body.node, found);
            }
        }
    }
    let model = ModelProto::decode(model).unwrap();
    let mut found = Vec::new();
    add(&model.graph.unwrap().node, &mut found);
    for bytes in &model.functions {
        let function: FunctionProto = decode(bytes, "a function").unwrap();
        add(&function.node, &mut found);
    }
    found
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
