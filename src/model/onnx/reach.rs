//! What an output depends on: a weight on which the loss does not depend is in the wrong place,
//! whatever its values are.

use std::collections::{HashMap, HashSet};

use super::graph::Graph;
use super::proto::{GraphError, GraphProto, NodeProto, bodies, decode_node, is_default_domain};

impl Graph {
    /// The names of everything that an output depends on. Subgraphs are followed at any depth; a
    /// local function is assumed to use all its inputs.
    ///
    /// # Errors
    /// When a node cannot be decoded.
    pub(super) fn reach(&self, output: &str) -> Result<HashSet<String>, GraphError> {
        led_to(self.proto(), vec![output.to_owned()])
    }
}

/// The names on which any of the wanted ones depends. Nodes may be in any order.
fn led_to(graph: &GraphProto, mut wanted: Vec<String>) -> Result<HashSet<String>, GraphError> {
    let nodes = graph.node.iter().map(decode_node);
    let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
    let outputs = |node: usize| nodes[node].output.iter().map(move |name| (name, node));
    let makers: HashMap<&String, usize> = (0..nodes.len()).flat_map(outputs).collect();
    let (mut found, mut seen) = (HashSet::new(), HashSet::new());
    while let Some(name) = wanted.pop() {
        if let Some(maker) = makers.get(&name).filter(|maker| seen.insert(**maker)) {
            let node = &nodes[*maker];
            wanted.extend(node.input.iter().take(valued(node)).cloned());
            for body in bodies(node)? {
                wanted.extend(captured(&body)?);
            }
        }
        // An optional input that is left out has the empty name.
        if !name.is_empty() {
            found.insert(name);
        }
    }
    Ok(found)
}

/// What a subgraph's outputs depend on outside of it; names that it defines itself are left out.
fn captured(body: &GraphProto) -> Result<HashSet<String>, GraphError> {
    let outputs = body.output.iter().filter_map(|output| output.name.clone());
    let mut names = led_to(body, outputs.collect())?;
    for own in body.names()? {
        names.remove(&own);
    }
    Ok(names)
}

/// How many of a node's inputs matter by value; of the others only the shape or type does.
fn valued(node: &NodeProto) -> usize {
    let ours = is_default_domain(node.domain.as_deref());
    match node.op_type.as_deref().filter(|_| ours) {
        Some("Shape" | "Size" | "EyeLike" | "RandomNormalLike" | "RandomUniformLike") => 0,
        Some("CastLike") => 1,
        Some(_) | None => usize::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::super::hand_made::{Made, of_nodes};
    use super::super::proto::{Attribute, NodeProto as Node, TensorProto, ValueInfo};
    use super::*;
    use prost::Message;

    fn node(op: &str, input: &[&str], output: &str) -> Node {
        Made {
            op,
            input,
            output,
            ..Made::default()
        }
        .node()
    }

    /// A node with a body that takes `inputs`, holds `constants` and gives what its last node gives.
    fn with_body(nodes: Vec<Node>, inputs: &[&str], constants: &[&str], output: &str) -> Node {
        let last = nodes.last().and_then(|node| node.output.first().cloned());
        let named = |name: Option<String>| ValueInfo { name, r#type: None };
        let given = |name: &&str| Some((*name).to_owned());
        let tensor = |name: &&str| TensorProto {
            name: given(name),
            ..TensorProto::default()
        };
        let body = GraphProto {
            initializer: constants.iter().map(tensor).collect(),
            input: inputs.iter().map(|name| named(given(name))).collect(),
            output: vec![named(last)],
            node: nodes.iter().map(|n| n.encode_to_vec().into()).collect(),
            ..GraphProto::default()
        };
        let body = Attribute {
            g: Some(body),
            ..Attribute::default()
        };
        let mut outer = node("If", &["condition"], output);
        outer.attribute = vec![body.encode_to_vec().into()];
        outer
    }

    /// Which of the names lead to `loss`, the last node's output.
    fn leading<'a>(nodes: &[Node], names: &[&'a str]) -> Vec<&'a str> {
        let reach = of_nodes(nodes, names).reach("loss").unwrap();
        let leads = |name: &&str| reach.contains(*name);
        names.iter().copied().filter(leads).collect()
    }

    #[test]
    fn ways_are_followed_in_any_order_of_nodes_and_dead_ends_are_none() {
        let nodes = [
            node("Add", &["product", "bias"], "loss"),
            node("Mul", &["tokens", "weight", ""], "product"),
            node("Mul", &["tokens", "unused"], "dead_end"),
        ];
        let names = ["weight", "bias", "unused", "unread", ""];
        assert_eq!(leading(&nodes, &names), ["weight", "bias"]);
    }

    #[test]
    fn who_looks_at_a_shape_or_a_type_alone_does_not_look_at_values() {
        for op in ["Shape", "Size", "EyeLike", "RandomNormalLike"] {
            let nodes = [
                node(op, &["stale"], "of"),
                node("Add", &["of", "copy"], "loss"),
            ];
            assert_eq!(leading(&nodes, &["stale", "copy"]), ["copy"], "{op}");
            // Whoever gives an operator of their own that name means something else.
            let mut foreign = nodes;
            foreign[0].domain = Some("com.example".into());
            assert_eq!(leading(&foreign, &["stale", "copy"]), ["stale", "copy"]);
        }
        let cast = [node("CastLike", &["weight", "like"], "loss")];
        assert_eq!(leading(&cast, &["weight", "like"]), ["weight"]);
    }

    #[test]
    fn a_body_is_walked_into_however_deep() {
        let inner = with_body(vec![node("Mul", &["x", "deep"], "z")], &["x"], &[], "y");
        let dead = node("Mul", &["dead", "dead"], "nobody_reads_it");
        let outer = with_body(vec![dead, inner], &[], &[], "loss");
        let names = ["deep", "dead", "condition", "x"];
        assert_eq!(leading(&[outer], &names), ["deep", "condition"]);
    }

    #[test]
    fn what_a_body_calls_by_the_same_name_is_another_value() {
        let of = |constants: &[&str]| {
            let nodes = vec![node("Mul", &["x", "weight"], "y")];
            [with_body(nodes, &["x"], constants, "loss")]
        };
        assert_eq!(leading(&of(&[]), &["weight"]), ["weight"]);
        assert_eq!(leading(&of(&["weight"]), &["weight"]), [] as [&str; 0]);
    }

    #[test]
    fn a_local_function_looks_at_all_that_it_is_given() {
        let mut call = node("Attention", &["q", "unused_inside"], "loss");
        call.domain = Some("local".into());
        let names = ["q", "unused_inside"];
        assert_eq!(leading(&[call], &names), names);
    }
}
