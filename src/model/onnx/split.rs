//! Giving each reader of an initializer a copy of its own.

use bytes::Bytes;
use prost::Message;

use super::graph::Graph;
use super::proto::{GraphError, decode_node};
use super::wiring::Use;

impl Graph {
    /// Replaces an initializer by copies with the given names, each for the given uses. A copy may
    /// keep the old name; otherwise the old initializer is removed.
    ///
    /// # Errors
    /// When there is no such initializer, or a node has fields that would be lost.
    pub fn split(
        &mut self,
        initializer: &str,
        copies: &[(String, Vec<Use>)],
    ) -> Result<(), GraphError> {
        let graph = self.proto_mut();
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
}

fn rewire(bytes: &mut Bytes, input: usize, value: &str) -> Result<(), GraphError> {
    let mut node = decode_node(bytes)?;
    let name = node.name.clone().unwrap_or_default();
    // Unknown fields would be dropped silently.
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

#[cfg(test)]
mod tests {
    use super::super::hand_made::{Made, entry, of_nodes};
    use super::super::proto::NodeProto;
    use super::*;

    fn node(name: &str, input: &[&str], output: &str) -> NodeProto {
        Made {
            name,
            op: "Mul",
            input,
            output,
            ..Made::default()
        }
        .node()
    }

    #[test]
    fn a_split_gives_copies_and_keeps_every_other_part_of_a_node() {
        let mut first = node("a", &["x", "w"], "y");
        first.attribute = vec![Bytes::from_static(&[0x0A, 1, b'k', 0x18, 5])];
        first.metadata_props = vec![entry("k", "v")];
        first.overload = Some(b"o".to_vec());
        let second = node("b", &["y", "w"], "z");
        let mut graph = of_nodes(&[first.clone(), second], &["w", "other"]);
        let place = |node| vec![Use { node, input: 1 }];
        let copies = [("w".to_owned(), place(0)), ("v".to_owned(), place(1))];
        graph.split("w", &copies).unwrap();
        let again = Graph::decode(graph.encode().into()).unwrap();
        let names: Vec<_> = again.initializers().into_iter().map(|i| i.name).collect();
        assert_eq!(names, ["other", "w", "v"]);
        let proto = again.proto();
        assert_eq!(decode_node(&proto.node[0]).unwrap(), first);
        assert_eq!(decode_node(&proto.node[1]).unwrap().input, ["y", "v"]);
        assert!(graph.split("nowhere", &[]).is_err());
    }

    #[test]
    fn a_node_with_unknown_fields_is_not_rewritten() {
        let mut bytes = node("a", &["x", "w"], "y").encode_to_vec();
        bytes.extend([0xF8, 0x01, 1]);
        let error = rewire(&mut bytes.into(), 1, "v").unwrap_err();
        assert!(error.to_string().contains("node a"), "{error}");
    }
}
