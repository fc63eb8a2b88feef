//! Tensors of equal contents under two names: one tied tensor, or separate ones that the exporter
//! merged. The graph tells which.

use std::collections::{BTreeMap, HashMap};

use super::contents::{ContentHash, content_hash};
use crate::model::checkpoint::Tensor;
use crate::model::compare::{Initializer, agrees, is_uniform};
use crate::model::manifest::PackageError;
use crate::model::onnx::{Graph, NodeInfo, Wiring};
use crate::model::tensor::Dtype;

/// Equal contents under two names are one tied tensor, or copies that are still untrained; the
/// graph shows which. A tied tensor keeps the name that the graph uses, and the others become
/// aliases. Uniform tensors (untrained norms, zero biases) are never taken for tied ones.
pub(super) fn split_aliases(
    checkpoint: Vec<Tensor>,
    initializers: &[Initializer],
    graph: &Graph,
) -> Result<(Vec<Tensor>, BTreeMap<String, String>), PackageError> {
    let mut aliases = BTreeMap::new();
    let mut kept: Vec<Tensor> = Vec::new();
    for mut group in groups(checkpoint) {
        let in_graph = |t: &Tensor| initializers.iter().any(|(i, _)| i.name == t.name);
        if group.len() == 1 || group.iter().all(in_graph) {
            kept.append(&mut group);
            continue;
        }
        let holds = |held: &&Initializer| {
            held.0.dtype == Some(group[0].dtype) && agrees(&group[0], held, Dtype::F32).is_some()
        };
        let held = initializers.iter().filter(holds);
        let held: Vec<&str> = held.map(|(info, _)| info.name.as_str()).collect();
        if held.is_empty() {
            // Buffers, for example: each is reported as missing from the graph.
            kept.append(&mut group);
            continue;
        }
        let wiring = graph.wiring()?;
        match tie(&wiring, &group, &held) {
            Tie::Separate => kept.append(&mut group),
            Tie::Tied => {
                let named = group.iter().position(in_graph).unwrap_or(0);
                let tensor = group.swap_remove(named);
                let others = group.into_iter().map(|other| other.name);
                aliases.extend(others.map(|other| (other, tensor.name.clone())));
                kept.push(tensor);
            }
            Tie::Unclear => return Err(unclear(&group, &held)),
        }
    }
    kept.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((kept, aliases))
}

/// Groups tensors of equal contents, except uniform ones.
fn groups(checkpoint: Vec<Tensor>) -> Vec<Vec<Tensor>> {
    let mut groups: Vec<Vec<Tensor>> = Vec::new();
    let mut by_contents: HashMap<ContentHash, usize> = HashMap::new();
    for tensor in checkpoint {
        let contents = content_hash(&tensor.shape, tensor.dtype, &tensor.bytes);
        match by_contents.get(&contents) {
            Some(at) if !is_uniform(&tensor) => groups[*at].push(tensor),
            Some(_) | None => {
                by_contents.insert(contents, groups.len());
                groups.push(vec![tensor]);
            }
        }
    }
    groups
}

fn unclear(group: &[Tensor], held: &[&str]) -> PackageError {
    let names: Vec<&str> = group.iter().map(|t| t.name.as_str()).collect();
    PackageError(format!(
        "{} are equal in the checkpoint, and the graph holds them in {}: whether they are one tied tensor cannot be determined. \
         If they are, leave all names but one out of the checkpoint, as save_pretrained does; if not, export with \
         torch.onnx.export(..., optimize=False), which merges nothing",
        names.join(", "),
        held.join(", ")
    ))
}

/// Whether tensors of equal contents are one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tie {
    /// An embedding and the head that shares it, under two names.
    Tied,
    /// Separate parameters, which the exporter merged.
    Separate,
    /// The graph does not show which.
    Unclear,
}

/// Decides by the nodes that read them. An exporter records the name of each parameter even if it
/// merged several. A tied one has a single name, and is used by a Gather as well as by a
/// multiplication. Uses of one kind may be of one parameter, or of several whose uses were merged
/// as well.
fn tie(wiring: &Wiring, tensors: &[Tensor], held: &[&str]) -> Tie {
    let uses = held.iter().flat_map(|name| wiring.uses(name));
    let readers = uses.map(|place| (&wiring.nodes[place.node], place.input));
    let readers: Vec<(&NodeInfo, usize)> = readers.collect();
    let named = |tensor: &&Tensor| {
        let reads = |(node, _): &(&NodeInfo, usize)| {
            node.passes(&tensor.name) == Some(true) || node.outputs.contains(&tensor.name)
        };
        held.contains(&tensor.name.as_str()) || readers.iter().any(reads)
    };
    let named = tensors.iter().filter(named).count();
    let looks_up = |(node, input): &(&NodeInfo, usize)| node.op == "Gather" && *input == 0;
    let looked_up = readers.iter().filter(|reader| looks_up(reader)).count();
    if named > 1 {
        Tie::Separate
    } else if looked_up > 0 && looked_up < readers.len() {
        Tie::Tied
    } else {
        Tie::Unclear
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::onnx::InitializerInfo;
    use crate::model::onnx::hand_made::{Made, graph};

    const MATRIX: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

    fn tensor(name: &str) -> Tensor {
        Tensor {
            name: name.into(),
            shape: vec![2, 3],
            dtype: Dtype::F32,
            bytes: MATRIX.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// A graph in which these nodes read the initializers that a tensor of these values is held by.
    fn aliases(
        names: &[&str],
        held: &[&str],
        nodes: &[Made<'_>],
    ) -> Result<Vec<(String, String)>, String> {
        let checkpoint = names.iter().map(|name| tensor(name));
        let graph = graph(nodes, held);
        let info = |name: &&str| InitializerInfo {
            name: (*name).to_owned(),
            shape: vec![2, 3],
            dtype: Some(Dtype::F32),
        };
        let held: Vec<_> = held
            .iter()
            .map(|name| (info(name), tensor("").bytes))
            .collect();
        let (_, aliases) = split_aliases(checkpoint.collect(), &held, &graph).map_err(|e| e.0)?;
        Ok(aliases.into_iter().collect())
    }

    fn reader<'a>(op: &'a str, input: &'a [&'a str], output: &'a str, call: &'a str) -> Made<'a> {
        Made {
            name: output,
            op,
            input,
            output,
            call,
            ..Made::default()
        }
    }

    #[test]
    fn equal_tensors_are_tied_where_one_is_looked_up_and_multiplied_with_and_apart_where_each_is_named()
     {
        let names = ["embed", "head"];
        let tied = [
            reader(
                "Gather",
                &["head", "tokens"],
                "x",
                "%e : embedding(args = (%p_head, %tokens))",
            ),
            reader(
                "MatMul",
                &["x", "head"],
                "y",
                "%l : linear(args = (%x, %p_head))",
            ),
        ];
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            aliases(&names, &["head"], &tied).unwrap(),
            [pair("embed", "head")]
        );
        // Copies of a layer, which the exporter merged but still calls by their names.
        let named = [
            reader(
                "MatMul",
                &["x", "val_1"],
                "y",
                "%a : linear(args = (%x, %p_embed))",
            ),
            reader(
                "MatMul",
                &["y", "val_1"],
                "z",
                "%b : linear(args = (%y, %p_head))",
            ),
        ];
        assert_eq!(aliases(&names, &["val_1"], &named).unwrap(), []);
        assert_eq!(aliases(&names, &["embed", "head"], &named).unwrap(), []);
        let silent = [
            reader("MatMul", &["x", "val_1"], "y", ""),
            reader("MatMul", &["y", "val_1"], "z", ""),
        ];
        let refusal = aliases(&names, &["val_1"], &silent).unwrap_err();
        assert!(
            refusal.contains("embed, head are equal") && refusal.contains("val_1"),
            "{refusal}"
        );
        // What the graph does not hold is told that, each by itself.
        assert_eq!(aliases(&names, &[], &silent).unwrap(), []);
        // One use may be what is left of two.
        let merged = [reader(
            "MatMul",
            &["x", "val_1"],
            "y",
            "%a : linear(args = (%x, %p_embed))",
        )];
        assert!(aliases(&names, &["val_1"], &merged).is_err());
    }
}
