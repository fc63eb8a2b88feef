//! Who reads an initializer: the inputs of nodes, and what the exporter says of each node. Deciding
//! which tensor a reader means is left to packaging.

use std::collections::{HashMap, HashSet};

use super::graph::Graph;
use super::proto::{GraphError, GraphProto, NodeProto, bodies, decode_node};

/// The module that a node was exported from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its full path.
    pub path: String,
    /// Whether the path comes from the node's name, as TorchScript writes it, and not from metadata.
    /// There the exporter appends `_1` to a second module of the same name, or to a second call,
    /// and a module may be named like that anyway.
    pub from_name: bool,
}

/// A node, as packaging sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its operator; one that is not ONNX's own has its domain before it.
    pub op: String,
    /// The names of its outputs.
    pub outputs: Vec<String>,
    /// The module it belongs to, if the exporter says so.
    pub module: Option<Module>,
    /// The traced call it was exported from, with its arguments, if the exporter says so.
    call: Option<String>,
}

impl NodeInfo {
    /// Whether the traced call has the tensor among its arguments, if the exporter wrote the call
    /// down: `torch.export` names the parameter `a.B.weight` `%p_a_b_weight`, and a buffer `%b_...`.
    pub fn passes(&self, name: &str) -> Option<bool> {
        let call = self.call.as_ref()?;
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '%';
        let plain = name.to_lowercase();
        let plain = plain.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let placeholders = [format!("%p_{plain}"), format!("%b_{plain}")];
        let mut words = call.split(|c| !word(c));
        Some(words.any(|found| placeholders.iter().any(|p| p == found)))
    }

    /// Whether the exporter wrote down the traced call.
    pub fn is_traced(&self) -> bool {
        self.call.is_some()
    }
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
    pub nodes: Vec<NodeInfo>,
    /// The names of all values and initializers.
    pub values: HashSet<String>,
    readers: HashMap<String, Vec<Use>>,
    escaping: HashSet<String>,
}

impl Wiring {
    /// The node inputs that read a value.
    pub fn uses(&self, value: &str) -> &[Use] {
        self.readers.get(value).map_or(&[], Vec::as_slice)
    }

    /// Whether a value is also read in a subgraph, or is an output of the graph.
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
            let node = decode_node(bytes)?;
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
            wiring.nodes.push(node_info(node));
        }
        Ok(wiring)
    }

    /// Paths of the modules that the nodes belong to, and of their parent modules, as far as the
    /// exporter gives them.
    ///
    /// # Errors
    /// When a node cannot be decoded.
    pub fn modules(&self) -> Result<HashSet<String>, GraphError> {
        let mut found = HashSet::new();
        for node in self.wiring()?.nodes {
            if let Some(Module { path, .. }) = node.module {
                let ends = path.match_indices('.').map(|(at, _)| at);
                found.extend(ends.map(|end| path[..end].to_owned()));
                found.insert(path);
            }
        }
        Ok(found)
    }
}

/// Notes what a subgraph reads, including its own values: an extra name can only cause a refusal.
fn captured(body: &GraphProto, wiring: &mut Wiring) -> Result<(), GraphError> {
    let outputs = body.output.iter().filter_map(|o| o.name.clone());
    wiring.escaping.extend(outputs);
    for bytes in &body.node {
        let node = decode_node(bytes)?;
        wiring.escaping.extend(node.input.iter().cloned());
        wiring.values.extend(node.output.iter().cloned());
        for inner in bodies(&node)? {
            captured(&inner, wiring)?;
        }
    }
    Ok(())
}

fn node_info(node: NodeProto) -> NodeInfo {
    let told = |key: &str| {
        let mut props = node.metadata_props.iter();
        props.find(|e| e.key() == key)?.value.clone()
    };
    let name = node.name().to_owned();
    let scopes = told("pkg.torch.onnx.name_scopes");
    let from_name = scopes.is_none();
    let path = scopes.map_or_else(|| called(&name), |scopes| innermost(&scopes));
    let module = path.map(|path| Module { path, from_name });
    NodeInfo {
        name,
        op: node.op(),
        module,
        call: told("pkg.torch.onnx.fx_node"),
        outputs: node.output,
    }
}

/// `['', 'layers.0', 'layers.0.norm', 'mul_1']`: the modules from the outermost on, then the call.
fn innermost<'s>(scopes: &'s str) -> Option<String> {
    let list = scopes.strip_prefix('[')?.strip_suffix(']')?;
    let quoted = |item: &'s str| item.trim().strip_prefix('\'')?.strip_suffix('\'');
    let items: Vec<&str> = list.split(',').map(quoted).collect::<Option<_>>()?;
    let at = items.len().checked_sub(2)?;
    Some(items[at].to_owned())
}

/// `/layers.0/norm/Mul_1`: the modules, then the operator.
fn called(name: &str) -> Option<String> {
    let (modules, _) = name.strip_prefix('/')?.rsplit_once('/')?;
    Some(modules.replace('/', "."))
}

#[cfg(test)]
mod tests {
    use super::super::hand_made::{Made, entry, inside, of_nodes};
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
        for (at, from_name) in [(0, false), (1, true)] {
            let path = "layers.0.norm".into();
            assert_eq!(module(at), Some(Module { path, from_name }));
        }
        assert_eq!(module(2), None);
        assert_eq!(wiring.nodes[2].op, "com.microsoft.Mul");
        assert_eq!(wiring.nodes[0].passes("w"), Some(true));
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
}
