//! A graph, body or function, as far as rewriting has to know it.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::super::graph::opset;
use super::super::operators::output_types;
use super::super::proto::{
    FunctionProto, GraphError, GraphProto, NodeProto, TensorType, ValueInfo, bodies, decode_node,
};
use super::super::values::{Integers, types};

pub(super) struct Scope {
    /// How many messages it is within.
    pub(super) depth: usize,
    /// The version of ONNX's own operators.
    pub(super) opset: i64,
    /// The nodes as they are in the file, and decoded.
    pub(super) encoded: Vec<Bytes>,
    pub(super) nodes: Vec<NodeProto>,
    /// What takes the place of a node.
    pub(super) replaced: HashMap<Bytes, Vec<Bytes>>,
    types: HashMap<String, TensorType>,
    integers: HashMap<String, Integers>,
    /// The names that the scope defines, whatever they hold.
    defined: HashSet<String>,
    outputs: Vec<String>,
}

impl Scope {
    pub(super) fn new(
        depth: usize,
        opset: i64,
        graph: GraphProto,
        outer: &[Self],
    ) -> Result<Self, GraphError> {
        let nodes = graph.node.iter().map(decode_node);
        let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
        let mut integers = HashMap::new();
        // An initializer that is an input as well is only a default.
        let is_input = |name: &str| graph.input.iter().any(|input| input.name() == name);
        for tensor in graph.initializer.iter().filter(|t| !is_input(t.name())) {
            integers.extend(Integers::of(tensor).map(|held| (tensor.name().to_owned(), held)));
        }
        for node in &nodes {
            if let ([output], Some(held)) = (node.output.as_slice(), Integers::of_node(node)?) {
                integers.insert(output.clone(), held);
            }
        }
        let name = |output: &ValueInfo| output.name().to_owned();
        let mut scope = Self {
            depth,
            opset,
            replaced: HashMap::new(),
            types: types(&graph)?,
            integers,
            defined: graph.names()?,
            outputs: graph.output.iter().map(name).collect(),
            encoded: graph.node,
            nodes,
        };
        scope.infer(outer)?;
        Ok(scope)
    }

    /// Adds the types that the graph does not give and operators tell.
    fn infer(&mut self, outer: &[Self]) -> Result<(), GraphError> {
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            let of = |at: usize| self.r#type(outer, node.input.get(at)?)?.elem_type;
            let made = output_types(node, of)?;
            let made: Vec<_> = node.output.iter().cloned().zip(made).collect();
            for (name, elem_type) in made {
                let shape = None;
                let inferred = TensorType { elem_type, shape };
                self.types.entry(name).or_insert(inferred);
            }
        }
        Ok(())
    }

    /// A function sees only its inputs; their types are those of each call.
    pub(super) fn of_function(
        depth: usize,
        model: i64,
        function: FunctionProto,
    ) -> Result<Self, GraphError> {
        let value = |name: String| ValueInfo {
            name: Some(name),
            r#type: None,
        };
        let graph = GraphProto {
            node: function.node,
            input: function.input.into_iter().map(value).collect(),
            output: function.output.into_iter().map(value).collect(),
            ..GraphProto::default()
        };
        let own = opset(&function.opset_import);
        Self::new(depth, own.unwrap_or(model), graph, &[])
    }

    /// The type of a value, as far as the graph gives it.
    pub(super) fn r#type<'a>(&'a self, outer: &'a [Self], name: &str) -> Option<&'a TensorType> {
        self.owner(outer, name)?.types.get(name)
    }

    /// The integers that a name stands for.
    pub(super) fn integers<'a>(&'a self, outer: &'a [Self], name: &str) -> Option<&'a Integers> {
        self.owner(outer, name)?.integers.get(name)
    }

    /// The scope that defines a name: this one, or one that encloses it.
    fn owner<'a>(&'a self, outer: &'a [Self], name: &str) -> Option<&'a Self> {
        let mut scopes = std::iter::once(self).chain(outer.iter().rev());
        scopes.find(|scope| scope.defined.contains(name))
    }

    /// The positions of the nodes that read a value; `None` if it is an output, or a body reads it.
    pub(super) fn readers(&self, value: &str) -> Result<Option<Vec<usize>>, GraphError> {
        if self.outputs.iter().any(|output| output == value) {
            return Ok(None);
        }
        let mut found = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            if node.input.iter().any(|input| input == value) {
                found.push(at);
            }
            for body in bodies(node)? {
                if mentions(&body, value)? {
                    return Ok(None);
                }
            }
        }
        Ok(Some(found))
    }
}

/// Whether a body, or one within it, reads or returns a value of this name, whoever defines it.
fn mentions(body: &GraphProto, value: &str) -> Result<bool, GraphError> {
    if body.output.iter().any(|output| output.name() == value) {
        return Ok(true);
    }
    for node in &body.node {
        let node = decode_node(node)?;
        if node.input.iter().any(|input| input == value) {
            return Ok(true);
        }
        for inner in bodies(&node)? {
            if mentions(&inner, value)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
