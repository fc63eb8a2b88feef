//! Names that the exported module has for tensors that the checkpoint calls otherwise: `lm_head.weight`
//! for a tied embedding, or for what `save_pretrained` renames to `embed_out.weight`. A trainer may
//! use either.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::place::is_parameter;
use crate::model::checkpoint::Tensor;
use crate::model::compare::is_uniform;
use crate::model::manifest::TensorEntry;
use crate::model::onnx::{NodeInfo, Wiring};

/// The other names of tensors, and whose they are. A name that may be of two tensors is left out.
pub(super) fn live_names(
    tensors: &[Tensor],
    placed: &BTreeMap<String, TensorEntry>,
    exported: &HashSet<String>,
    wiring: &Wiring,
) -> BTreeMap<String, String> {
    let mut owners: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for tensor in tensors {
        for place in placed.get(&tensor.name).iter().flat_map(|e| &e.places) {
            let initializer = &place.initializer;
            // Initializers of one value are merged, and then have the name of any of them.
            let own = exported.contains(initializer) && is_parameter(initializer);
            let own = (own && !is_uniform(tensor)).then(|| initializer.clone());
            let readers = wiring.uses(initializer).iter();
            let called = readers.filter_map(|place| name_in(&wiring.nodes[place.node], tensor));
            // A parameter that the graph still holds is itself, and no other.
            let called = called.filter(|name| !exported.contains(name));
            for name in own.into_iter().chain(called) {
                owners.entry(name).or_default().insert(&tensor.name);
            }
        }
    }
    let others = owners
        .into_iter()
        .filter(|(name, owners)| owners.len() == 1 && !placed.contains_key(name));
    others
        .filter_map(|(name, owners)| Some((name, (*owners.first()?).to_owned())))
        .collect()
}

/// The name that the node's traced call has for the tensor, if it is a parameter of the node's module.
fn name_in(node: &NodeInfo, tensor: &Tensor) -> Option<String> {
    if node.passes(&tensor.name)? {
        return None;
    }
    let module = node.module.as_ref().filter(|module| !module.from_name)?;
    let last = tensor.name.rsplit('.').next()?;
    let name = format!("{}.{last}", module.path);
    node.passes(&name)?.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::manifest::GraphLocation;
    use crate::model::onnx::hand_made::{Made, graph, tensor};

    const HEAD: &str = "['', 'm', 'm.lm_head', 'linear']";
    const CALL: &str = "%linear : linear(args = (%x, %p_m_lm_head_weight))";

    fn reader<'a>(input: &'a [&'a str], scopes: &'a str, call: &'a str) -> Made<'a> {
        Made {
            name: "node",
            op: "MatMul",
            input,
            output: "y",
            scopes,
            call,
            ..Made::default()
        }
    }

    /// The names found for tensors that are each in one initializer.
    fn found(placed: &[(Tensor, &str)], nodes: &[Made<'_>]) -> Vec<(String, String)> {
        let held: Vec<&str> = placed.iter().map(|(_, initializer)| *initializer).collect();
        let entry = |(tensor, initializer): &(Tensor, &str)| {
            let place = GraphLocation {
                initializer: (*initializer).to_owned(),
                transposed: false,
            };
            let entry = TensorEntry {
                places: vec![place],
                shape: tensor.shape.clone(),
                dtype: tensor.dtype,
            };
            (tensor.name.clone(), entry)
        };
        let entries = placed.iter().map(entry).collect();
        let tensors: Vec<Tensor> = placed.iter().map(|(tensor, _)| tensor.clone()).collect();
        let exported = held.iter().map(|name| (*name).to_owned()).collect();
        let wiring = graph(nodes, &held).wiring().unwrap();
        live_names(&tensors, &entries, &exported, &wiring)
            .into_iter()
            .collect()
    }

    fn alias(name: &str, of: &str) -> Vec<(String, String)> {
        vec![(name.to_owned(), of.to_owned())]
    }

    #[test]
    fn an_initializer_s_name_or_the_traced_call_s_is_another_name_of_what_it_holds() {
        let varied = |name| tensor(name, &[1.0, 2.0]);
        let expected = alias("m.lm_head.weight", "m.embed_out.weight");
        let silent = [reader(&["x", "m.lm_head.weight"], "", "")];
        let held = [(varied("m.embed_out.weight"), "m.lm_head.weight")];
        assert_eq!(found(&held, &silent), expected);
        // Folding renames the initializer.
        let folded = [reader(&["x", "val_7"], HEAD, CALL)];
        let held = [(varied("m.embed_out.weight"), "val_7")];
        assert_eq!(found(&held, &folded), expected);
        // The module and the checkpoint agree.
        let held = [(varied("m.lm_head.weight"), "val_7")];
        assert_eq!(found(&held, &folded), []);
        // An exporter's own names are nobody's.
        let held = [(varied("m.embed_out.weight"), "val_7")];
        let silent = [reader(&["x", "val_7"], "", "")];
        assert_eq!(found(&held, &silent), []);
    }

    #[test]
    fn a_parameter_that_the_graph_holds_is_no_other_name_of_another() {
        // One node reads both: the checkpoint calls `a` otherwise, and lacks `f`.
        let call = "%m : mul(args = (%p_f_weight, %p_a_weight))";
        let nodes = [reader(&["f.weight", "a.weight"], "['', 'f', 'mul']", call)];
        let held = [
            (tensor("aa.weight", &[1.0, 2.0]), "a.weight"),
            (tensor("g.weight", &[3.0, 4.0]), "f.weight"),
        ];
        let mut expected = alias("a.weight", "aa.weight");
        expected.extend(alias("f.weight", "g.weight"));
        assert_eq!(found(&held, &nodes), expected);
    }

    #[test]
    fn a_name_that_may_be_another_tensor_s_is_none() {
        let ones = |name| tensor(name, &[1.0, 1.0]);
        let merged = [reader(&["x", "m.a.weight"], "", "")];
        assert_eq!(found(&[(ones("m.b.weight"), "m.a.weight")], &merged), []);
        // The call names a parameter of another kind in this module: a bias is no weight.
        let call = "%l : linear(args = (%x, %p_m_lm_head_weight, %p_m_lm_head_bias))";
        let nodes = [reader(&["x", "val_1"], HEAD, call)];
        let held = [(ones("m.scale"), "val_1")];
        assert_eq!(found(&held, &nodes), []);
        let nodes = [
            reader(&["x", "val_1"], HEAD, CALL),
            reader(&["x", "val_2"], HEAD, CALL),
        ];
        let held = [
            (tensor("a.weight", &[1.0, 2.0]), "val_1"),
            (tensor("b.weight", &[3.0, 4.0]), "val_2"),
        ];
        assert_eq!(found(&held, &nodes), []);
        let held = [
            (tensor("a.weight", &[1.0, 2.0]), "val_1"),
            (tensor("m.lm_head.weight", &[3.0, 4.0]), "val_2"),
        ];
        assert_eq!(found(&held, &nodes), []);
    }
}
