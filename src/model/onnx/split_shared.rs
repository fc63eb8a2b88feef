//! What the graph tells of who reads an initializer, and giving each reader a copy of its own.
//! Deciding whose a reader is happens where packages are made.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::proto::{Attribute, GraphProto, NodeProto};
use super::{Graph, GraphError, Message};

/// The module whose code a node is, as the exporter tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Module {
    /// Its full path, from `torch.onnx.export`'s metadata.
    Path(String),
    /// What the node's name says: the modules as they were called. A second module of the same
    /// name, or a second call, has `_1` appended, just like a module that is really called so.
    Called(String),
}

/// What is known of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// Its operator; one that is not ONNX's own has its domain before it.
    pub op: String,
    /// The values it makes.
    pub outputs: Vec<String>,
    /// Whose code it is, if the exporter says so.
    pub module: Option<Module>,
    /// The traced call it was made from, with its arguments, if the exporter says so.
    pub call: Option<String>,
}

/// An input of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Position of the node in [`Wiring::nodes`].
    pub node: usize,
    /// Position of the input.
    pub input: usize,
}

/// Who reads what.
#[derive(Debug)]
pub struct Wiring {
    /// The graph's nodes, in order.
    pub nodes: Vec<NodeFacts>,
    /// Every name that a value or an initializer has.
    pub values: HashSet<String>,
    readers: HashMap<String, Vec<Use>>,
    escaping: HashSet<String>,
}

impl Wiring {
    /// The node inputs that read a value.
    pub fn uses(&self, value: &str) -> &[Use] {
        self.readers.get(value).map_or(&[], Vec::as_slice)
    }

    /// Whether a value is also read where no node input tells: in the body of a node, or as an
    /// output of the graph.
    pub fn escapes(&self, value: &str) -> bool {
        self.escaping.contains(value)
    }
}

impl Graph {
    /// Who reads what in this graph.
    ///
    /// # Errors
    /// When a node cannot be decoded.
    pub fn wiring(&self) -> Result<Wiring, GraphError> {
        let graph = self.proto();
        let outputs = graph.output.iter().filter_map(|o| o.name.clone());
        let initializers = graph.initializer.iter().filter_map(|t| t.name.clone());
        let inputs = graph.input.iter().filter_map(|i| i.name.clone());
        let mut wiring = Wiring {
            nodes: Vec::new(),
            values: initializers.chain(inputs).collect(),
            readers: HashMap::new(),
            escaping: outputs.collect(),
        };
        for (position, bytes) in graph.node.iter().enumerate() {
            let node = decode(bytes)?;
            for (input, value) in node.input.iter().enumerate() {
                let place = Use {
                    node: position,
                    input,
                };
                wiring.readers.entry(value.clone()).or_default().push(place);
            }
            wiring.values.extend(node.output.iter().cloned());
            for body in bodies(&node)? {
                captured(&body, &mut wiring)?;
            }
            wiring.nodes.push(facts(node));
        }
        Ok(wiring)
    }

    /// Paths of the modules whose code the nodes are, and of those that hold them, as far as the
    /// exporter tells them.
    ///
    /// # Errors
    /// When a node cannot be decoded.
    pub fn modules(&self) -> Result<HashSet<String>, GraphError> {
        let mut found = HashSet::new();
        for node in self.wiring()?.nodes {
            if let Some(Module::Path(path) | Module::Called(path)) = node.module {
                let ends = path.match_indices('.').map(|(at, _)| at);
                found.extend(ends.map(|end| path[..end].to_owned()));
                found.insert(path);
            }
        }
        Ok(found)
    }

    /// Replaces an initializer by copies under the names given, each for the uses given. A copy
    /// may keep the old name; without one the old initializer is gone.
    ///
    /// # Errors
    /// When there is no such initializer, or a node has parts that would be lost.
    pub fn split(
        &mut self,
        initializer: &str,
        copies: &[(String, Vec<Use>)],
    ) -> Result<(), GraphError> {
        let Some(graph) = self.model.graph.as_mut() else {
            return Err(GraphError("has no graph".into()));
        };
        let is_it = |name: &Option<String>| name.as_deref() == Some(initializer);
        let Some(at) = graph.initializer.iter().position(|t| is_it(&t.name)) else {
            return Err(GraphError(format!("has no initializer {initializer}")));
        };
        for (copy, uses) in copies {
            for place in uses {
                rewire(&mut graph.node[place.node], place.input, copy)?;
            }
        }
        let old = graph.initializer.remove(at);
        for (name, _) in copies {
            let mut tensor = old.clone();
            tensor.name = Some(name.clone());
            graph.initializer.push(tensor);
        }
        if !copies.iter().any(|(name, _)| name == initializer) {
            graph.input.retain(|i| !is_it(&i.name));
        }
        Ok(())
    }

    /// The graph as an ONNX file.
    pub fn encode(&self) -> Vec<u8> {
        self.model.encode_to_vec()
    }
}

pub(super) fn decode(bytes: &Bytes) -> Result<NodeProto, GraphError> {
    NodeProto::decode(bytes.clone()).map_err(|e| GraphError(format!("a node is broken: {e}")))
}

fn rewire(bytes: &mut Bytes, input: usize, value: &str) -> Result<(), GraphError> {
    let mut node = decode(bytes)?;
    let name = node.name.clone().unwrap_or_default();
    // What is not typed here would be dropped without a word.
    if node.encoded_len() != bytes.len() {
        let message = format!("node {name} has fields that are not known here");
        return Err(GraphError(message));
    }
    let Some(slot) = node.input.get_mut(input) else {
        return Err(GraphError(format!("node {name} has no input {input}")));
    };
    value.clone_into(slot);
    *bytes = node.encode_to_vec().into();
    Ok(())
}

/// The bodies that a node carries: branches of an If, the body of a Loop or a Scan.
pub(super) fn bodies(node: &NodeProto) -> Result<Vec<GraphProto>, GraphError> {
    let mut found = Vec::new();
    for attribute in &node.attribute {
        let held = Attribute::decode(attribute.clone())
            .map_err(|e| GraphError(format!("an attribute is broken: {e}")))?;
        found.extend(held.g);
        found.extend(held.graphs);
    }
    Ok(found)
}

/// Notes what a body reads, its own values included: a name too many only refuses more.
fn captured(body: &GraphProto, wiring: &mut Wiring) -> Result<(), GraphError> {
    let outputs = body.output.iter().filter_map(|o| o.name.clone());
    wiring.escaping.extend(outputs);
    for bytes in &body.node {
        let node = decode(bytes)?;
        wiring.escaping.extend(node.input.iter().cloned());
        wiring.values.extend(node.output.iter().cloned());
        for inner in bodies(&node)? {
            captured(&inner, wiring)?;
        }
    }
    Ok(())
}

fn facts(node: NodeProto) -> NodeFacts {
    let told = |key: &str| {
        let found = node
            .metadata_props
            .iter()
            .find(|e| e.key.as_deref() == Some(key));
        found.and_then(|e| e.value.clone())
    };
    let name = node.name.clone().unwrap_or_default();
    let module = match told("pkg.torch.onnx.name_scopes") {
        Some(scopes) => innermost(&scopes).map(Module::Path),
        None => called(&name).map(Module::Called),
    };
    NodeFacts {
        name,
        op: node.op(),
        module,
        call: told("pkg.torch.onnx.fx_node"),
        outputs: node.output,
    }
}

/// `['', 'layers.0', 'layers.0.norm', 'mul_1']`: the modules from the outermost on, then the call.
fn innermost(scopes: &str) -> Option<String> {
    let list = scopes.strip_prefix('[')?.strip_suffix(']')?;
    let quoted = |item: &str| {
        Some(
            item.trim()
                .strip_prefix('\'')?
                .strip_suffix('\'')?
                .to_owned(),
        )
    };
    let items: Option<Vec<String>> = list.split(',').map(quoted).collect();
    let items = items?;
    items.len().checked_sub(2).map(|at| items[at].clone())
}

/// `/layers.0/norm/Mul_1`: the modules as they were called, then the operator.
fn called(name: &str) -> Option<String> {
    let (modules, _) = name.strip_prefix('/')?.rsplit_once('/')?;
    Some(modules.replace('/', "."))
}

/// Graphs made by hand, for tests here and where packages are made.
#[cfg(test)]
pub(crate) mod hand_made {
    use super::super::proto::{
        Attribute, GraphProto, ModelProto, NodeProto as Node, OperatorSetId, StringEntry,
        TensorProto, ValueInfo,
    };
    use super::{Graph, Message};

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
        pub(in crate::model::onnx) fn node(self) -> Node {
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

    pub(in crate::model::onnx) fn of_nodes(nodes: &[Node], initializers: &[&str]) -> Graph {
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
}

#[cfg(test)]
mod tests {
    use super::hand_made::{Made, entry, inside, of_nodes};
    use super::*;

    type Node = NodeProto;

    fn node(name: &str, op: &str, input: &[&str], output: &str) -> Node {
        Made {
            name,
            op,
            input,
            output,
            ..Made::default()
        }
        .node()
    }

    #[test]
    fn the_module_is_read_from_metadata_or_from_the_name() {
        let mut traced = node("node_mul_1", "Mul", &["x", "w"], "y");
        traced.metadata_props = vec![
            entry(
                "pkg.torch.onnx.name_scopes",
                "['', 'layers.0', 'layers.0.norm', 'mul_1']",
            ),
            entry("pkg.torch.onnx.fx_node", "%mul_1 : (args = (%x, %p_w))"),
        ];
        let scripted = node("/layers.0/norm/Mul_1", "Mul", &["y", "w"], "z");
        let mut foreign = node("Mul_7", "Mul", &["z", "w"], "out");
        foreign.domain = Some("com.microsoft".into());
        let wiring = of_nodes(&[traced, scripted, foreign], &["w"])
            .wiring()
            .unwrap();
        let module = |at: usize| wiring.nodes[at].module.clone();
        assert_eq!(module(0), Some(Module::Path("layers.0.norm".into())));
        assert_eq!(module(1), Some(Module::Called("layers.0.norm".into())));
        assert_eq!(module(2), None);
        assert_eq!(wiring.nodes[2].op, "com.microsoft.Mul");
        assert!(wiring.nodes[0].call.as_ref().unwrap().contains("%p_w"));
        let uses: Vec<_> = wiring.uses("w").iter().map(|u| (u.node, u.input)).collect();
        assert_eq!(uses, [(0, 1), (1, 1), (2, 1)]);
        assert!(wiring.escapes("out") && !wiring.escapes("w"));
    }

    #[test]
    fn scopes_that_are_no_list_of_modules_say_nothing() {
        assert_eq!(innermost("['', 'mul']"), Some(String::new()));
        for odd in [
            "",
            "[]",
            "['mul']",
            "mul",
            "['', \"it's\", 'mul']",
            "['', mul]",
        ] {
            assert_eq!(innermost(odd), None, "{odd}");
        }
        assert_eq!(called("/Mul_1"), None);
        assert_eq!(called("node/norm/Mul"), None);
    }

    #[test]
    fn what_a_body_reads_escapes_however_deep() {
        let nested = inside(inside(node("mul", "Mul", &["x", "w"], "z")));
        let wiring = of_nodes(&[nested], &["w", "v"]).wiring().unwrap();
        assert!(wiring.escapes("w") && !wiring.escapes("v"));
        assert!(wiring.values.contains("z"));
    }

    #[test]
    fn a_split_gives_copies_and_keeps_every_other_part_of_a_node() {
        let mut first = node("a", "Mul", &["x", "w"], "y");
        first.attribute = vec![Bytes::from_static(&[0x0A, 1, b'k', 0x18, 5])];
        first.metadata_props = vec![entry("k", "v")];
        first.overload = Some(b"o".to_vec());
        let second = node("b", "Mul", &["y", "w"], "z");
        let mut graph = of_nodes(&[first.clone(), second], &["w", "other"]);
        let place = |node| vec![Use { node, input: 1 }];
        let copies = [("w".to_owned(), place(0)), ("v".to_owned(), place(1))];
        graph.split("w", &copies).unwrap();
        let again = Graph::decode(graph.encode().into()).unwrap();
        let names: Vec<_> = again.initializers().into_iter().map(|i| i.name).collect();
        assert_eq!(names, ["other", "w", "v"]);
        let proto = again.proto();
        assert_eq!(decode(&proto.node[0]).unwrap(), first);
        assert_eq!(decode(&proto.node[1]).unwrap().input, ["y", "v"]);
        assert!(graph.split("nowhere", &[]).is_err());
    }

    #[test]
    fn a_node_with_unknown_fields_is_not_rewritten() {
        let mut bytes = node("a", "Mul", &["x", "w"], "y").encode_to_vec();
        bytes.extend([0xF8, 0x01, 1]);
        let error = rewire(&mut bytes.into(), 1, "v").unwrap_err();
        assert!(error.to_string().contains("node a"), "{error}");
    }
}
