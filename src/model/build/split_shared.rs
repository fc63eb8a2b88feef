//! Splits initializers into which an exporter merged tensors of equal contents, so that each tensor
//! has one of its own.

use std::collections::{HashMap, HashSet};

use super::contents::{ContentHash, HashedTensor, copies};
use super::owners::{EqualTensors, SharedInitializer};
use crate::model::manifest::{GraphLocation, PackageError};
use crate::model::onnx::Graph;

/// Where each tensor is, or why it cannot be placed.
pub(super) type Locations = Vec<Result<Vec<GraphLocation>, String>>;

/// The outcome.
#[derive(Debug, Default)]
pub(super) struct SplitOutcome {
    /// Whether the graph was changed.
    pub(super) rewritten: bool,
    /// The tensors that could not be separated, with the reasons.
    pub(super) problems: Vec<String>,
}

/// Separates tensors of equal contents that names alone do not tell apart.
pub(super) fn split_shared(
    graph: &mut Graph,
    checkpoint: &[HashedTensor<'_>],
    by_contents: &HashMap<ContentHash, Vec<&str>>,
    found: &mut Locations,
) -> Result<SplitOutcome, PackageError> {
    let mut outcome = SplitOutcome::default();
    for at in 0..checkpoint.len() {
        let tensor = &checkpoint[at];
        if found[at].is_ok() || copies(tensor, by_contents).is_empty() {
            continue;
        }
        let members: Vec<usize> = (0..checkpoint.len())
            .filter(|other| tensor.has_equal_contents(&checkpoint[*other]))
            .collect();
        let wiring = graph.wiring()?;
        let equal = EqualTensors {
            tensors: members.iter().map(|m| &checkpoint[*m]).collect(),
            wiring: &wiring,
        };
        match equal.assign(by_contents) {
            Ok(shares) => {
                let (places, rewritten) = apply(graph, &equal, &shares)?;
                outcome.rewritten |= rewritten;
                for (member, places) in members.iter().zip(places) {
                    found[*member] = Ok(places);
                }
            }
            Err(problem) => {
                outcome.problems.push(problem);
                members.iter().for_each(|m| found[*m] = Ok(Vec::new()));
            }
        }
    }
    Ok(outcome)
}

/// Splits initializers that have more than one owner; returns the locations of every tensor.
fn apply(
    graph: &mut Graph,
    equal: &EqualTensors<'_>,
    shares: &[SharedInitializer],
) -> Result<(Vec<Vec<GraphLocation>>, bool), PackageError> {
    let mut taken = equal.wiring.values.clone();
    let mut places = vec![Vec::new(); equal.tensors.len()];
    let mut rewritten = false;
    for share in shares {
        let mut copies = Vec::new();
        let whole = share.owners.len() == 1;
        for (tensor, uses) in &share.owners {
            let name = &equal.tensors[*tensor].name;
            let initializer = if whole || *name == share.initializer {
                share.initializer.clone()
            } else {
                free(name, &taken)
            };
            taken.insert(initializer.clone());
            places[*tensor].push(GraphLocation {
                initializer: initializer.clone(),
                transposed: share.transposed[*tensor],
            });
            copies.push((initializer, uses.clone()));
        }
        if copies.len() > 1 {
            graph.split(&share.initializer, &copies)?;
            rewritten = true;
        }
    }
    Ok((places, rewritten))
}

/// The tensor's name, with a number if the name is taken.
fn free(name: &str, taken: &HashSet<String>) -> String {
    let mut free = name.to_owned();
    let mut number = 0;
    while taken.contains(&free) {
        number += 1;
        free = format!("{name}.copy_{number}");
    }
    free
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::build::place::place;
    use crate::model::checkpoint::Tensor;
    use crate::model::manifest::TensorEntry;
    use crate::model::onnx::hand_made::{Made, graph};
    use crate::model::onnx::{InitializerInfo, Use};
    use crate::model::tensor::Dtype;

    const SCOPE_A: &str = "['', 'm', 'm.a', 'mul']";
    const SCOPE_B: &str = "['', 'm', 'm.b', 'mul_1']";
    const A: Made<'static> = node("a", "Mul", &["x", "m.a.weight"], "y", SCOPE_A);
    const B: Made<'static> = node("b", "Mul", &["y", "m.a.weight"], "z", SCOPE_B);

    const fn node<'a>(
        name: &'a str,
        op: &'a str,
        input: &'a [&'a str],
        output: &'a str,
        scopes: &'a str,
    ) -> Made<'a> {
        Made {
            name,
            op,
            input,
            output,
            scopes,
            call: "",
            int: &[],
            ints: &[],
            reduction: "",
            in_body: false,
        }
    }

    fn ones(name: &str, shape: &[usize]) -> Tensor {
        Tensor {
            name: name.into(),
            shape: shape.into(),
            dtype: Dtype::F32,
            bytes: [0, 0, 128, 63].repeat(shape.iter().product()).into(),
        }
    }

    type Placed = Result<(BTreeMap<String, TensorEntry>, bool, Graph), String>;

    fn placed(tensors: &[Tensor], nodes: &[Made<'_>], held: &[(&str, &[usize])]) -> Placed {
        let names: Vec<&str> = held.iter().map(|(name, _)| *name).collect();
        let mut graph = graph(nodes, &names);
        let held: Vec<_> = held
            .iter()
            .map(|(name, shape)| {
                let info = InitializerInfo {
                    name: (*name).into(),
                    shape: shape.to_vec(),
                    dtype: Some(Dtype::F32),
                };
                (info, ones(name, shape).bytes)
            })
            .collect();
        let (tensors, rewritten) =
            place(tensors, &held, &mut graph, |_| None, str::to_owned).map_err(|e| e.0)?;
        Ok((tensors, rewritten, graph))
    }

    fn norms() -> [Tensor; 2] {
        ["m.a.weight", "m.b.weight"].map(|name| ones(name, &[4]))
    }

    /// Where the two tensors of [`norms`] are when the graph holds them once.
    fn merged(nodes: &[Made<'_>]) -> Result<[String; 2], String> {
        let (tensors, rewritten, graph) = placed(&norms(), nodes, &[("m.a.weight", &[4])])?;
        assert!(rewritten);
        let wiring = graph.wiring().unwrap();
        let places = ["m.a.weight", "m.b.weight"].map(|name| {
            let [place] = tensors[name].places.as_slice() else {
                panic!("{name} has {:?}", tensors[name].places);
            };
            assert!(!place.transposed && !wiring.uses(&place.initializer).is_empty());
            place.initializer.clone()
        });
        let held: Vec<_> = graph.initializers().into_iter().map(|i| i.name).collect();
        assert_eq!(held, places);
        Ok(places)
    }

    #[track_caller]
    fn refused(nodes: &[Made<'_>], why: &str) {
        let refusal = merged(nodes).unwrap_err();
        for part in ["m.a.weight [4], m.b.weight [4]", why] {
            assert!(refusal.contains(part), "{refusal}");
        }
    }

    #[test]
    fn each_module_gets_the_copy_of_its_own_tensor() {
        for nodes in [[A, B], [B, A]] {
            let (tensors, _, graph) = placed(&norms(), &nodes, &[("m.a.weight", &[4])]).unwrap();
            let wiring = graph.wiring().unwrap();
            for (name, reader) in [("m.a.weight", "a"), ("m.b.weight", "b")] {
                assert_eq!(tensors[name].places[0].initializer, name);
                let [only] = wiring.uses(name) else {
                    panic!("{name} has {:?}", wiring.uses(name));
                };
                assert_eq!(
                    (wiring.nodes[only.node].name.as_str(), only.input),
                    (reader, 1)
                );
            }
        }
    }

    #[test]
    fn names_of_nodes_tell_modules_too() {
        let a = node("/m/a/Mul", "Mul", &["x", "m.a.weight"], "y", "");
        let b = node("/m/b/Mul", "Mul", &["y", "m.a.weight"], "z", "");
        assert_eq!(merged(&[a, b]).unwrap(), ["m.a.weight", "m.b.weight"]);
        let elsewhere = Made {
            name: "/m/b_1/Mul",
            ..b
        };
        refused(&[a, elsewhere], "/m/b_1/Mul (Mul, module \"m.b_1\")");
    }

    /// The exporter calls a second `norm` `norm_1`, whatever else is called so.
    #[test]
    fn a_number_at_the_end_of_a_called_module_may_be_the_exporter_s() {
        let tensors = ["norm.weight", "norm_1.weight"].map(|name| ones(name, &[4]));
        let first = node("/norm/Mul", "Mul", &["x", "val_1"], "y", "");
        let second = node("/norm_1/Mul", "Mul", &["y", "val_1"], "z", "");
        let refusal = placed(&tensors, &[first, second], &[("val_1", &[4])])
            .err()
            .unwrap();
        assert!(refusal.contains("/norm_1/Mul"), "{refusal}");
        let traced = |name, input, output, scopes| node(name, "Mul", input, output, scopes);
        let nodes = [
            traced("a", &["x", "val_1"], "y", "['', 'norm', 'mul']"),
            traced("b", &["y", "val_1"], "z", "['', 'norm_1', 'mul_1']"),
        ];
        assert!(placed(&tensors, &nodes, &[("val_1", &[4])]).is_ok());
    }

    /// As TorchScript's exporter writes it: the tensor the initializer is named after is read
    /// directly, every other through an Identity that has its name.
    #[test]
    fn an_identity_with_a_tensor_s_name_is_that_tensor() {
        let identity = node("Identity_7", "Identity", &["m.a.weight"], "m.b.weight", "");
        let a = node("/a/Mul", "Mul", &["x", "m.a.weight"], "y", "");
        let b = node("/a_1/Mul", "Mul", &["y", "m.b.weight"], "z", "");
        let places = merged(&[identity, a, b]).unwrap();
        assert_eq!(places, ["m.a.weight", "m.b.weight.copy_1"]);
        let contrary = Made {
            name: "/m/b/Mul",
            ..a
        };
        refused(&[identity, contrary, b], "may read more than one");
    }

    #[test]
    fn what_hands_a_tensor_on_belongs_to_its_only_reader() {
        let cast = |name, output| node(name, "Cast", &["m.a.weight"], output, "");
        let a = Made {
            input: &["x", "w1"],
            ..A
        };
        let b = Made {
            input: &["y", "w2"],
            ..B
        };
        let places = merged(&[cast("c1", "w1"), cast("c2", "w2"), a, b]).unwrap();
        assert_eq!(places, ["m.a.weight", "m.b.weight"]);
        let both = Made {
            input: &["y", "w1"],
            ..B
        };
        refused(
            &[cast("c1", "w1"), a, both],
            "c1 (Cast, no module): its output is read for more",
        );
        refused(
            &[cast("c1", "w1"), A, B],
            "c1 (Cast, no module): nothing reads its output",
        );
    }

    #[test]
    fn what_is_not_told_is_refused() {
        refused(&[A, Made { scopes: "", ..B }], "b (Mul, no module)");
        refused(&[A], "nothing is seen to read m.b.weight");
        let parent = Made {
            scopes: "['', 'm', 'mul']",
            ..B
        };
        refused(&[A, B, parent], "b (Mul, module \"m\")");
        refused(&[A, B, Made { in_body: true, ..B }], "body of a node");
        let output = node("copy", "Identity", &["m.a.weight"], "m.a.weight", "");
        refused(&[A, B, output], "is an output");
        refused(&[A, B, A], "2 nodes of m.a read it");
    }

    /// A normalisation without weights gets ones of its own, which merge with the module's.
    #[test]
    fn a_call_that_does_not_name_the_tensor_does_not_read_it() {
        let calls = |call| Made { call, ..A };
        let [mul, bare] = [
            "%mul : mul(args = (%x, %p_m_a_weight))",
            "%ln : ln(args = (%x, [4]))",
        ]
        .map(calls);
        let b = Made {
            call: "%mul_1 : mul(args = (%y, %p_m_b_weight))",
            ..B
        };
        assert!(merged(&[mul, b]).is_ok());
        assert!(merged(&[mul, mul, b]).is_ok());
        refused(&[mul, bare, b], "a (Mul, module \"m.a\")");
        let other = calls("%mul : mul(args = (%x, %p_m_a_weight_1))");
        refused(&[other, b], "a (Mul, module \"m.a\")");
    }

    #[test]
    fn weight_and_bias_of_one_module_are_told_apart_by_the_operator_alone() {
        let tensors = ["n.bias", "n.weight"].map(|name| ones(name, &[4]));
        let scopes = "['', 'n', 'layer_norm']";
        let op = |op| node("n", op, &["x", "val_1", "val_1"], "y", scopes);
        let held: [(&str, &[usize]); 1] = [("val_1", &[4])];
        let (placed_apart, _, graph) =
            placed(&tensors, &[op("LayerNormalization")], &held).unwrap();
        let wiring = graph.wiring().unwrap();
        for (name, input) in [("n.weight", 1), ("n.bias", 2)] {
            assert_eq!(placed_apart[name].places[0].initializer, name);
            assert_eq!(wiring.uses(name), [Use { node: 0, input }]);
        }
        assert!(!wiring.values.contains("val_1"));
        let refusal = placed(&tensors, &[op("Max")], &held).err().unwrap();
        assert!(
            refusal.contains("n (Max, module \"n\"): it may read more"),
            "{refusal}"
        );
        let alone = placed(&tensors[1..], &[op("LayerNormalization")], &held)
            .err()
            .unwrap();
        assert!(alone.contains("n (LayerNormalization"), "{alone}");
    }

    #[test]
    fn transposes_are_told_by_their_shape_or_not_at_all() {
        let nodes = [
            node("a", "MatMul", &["x", "val_1"], "y", SCOPE_A),
            node("b", "MatMul", &["y", "val_1"], "z", SCOPE_B),
        ];
        let tensors = [ones("m.a.weight", &[2, 4]), ones("m.b.weight", &[4, 2])];
        let (apart, _, _) = placed(&tensors, &nodes, &[("val_1", &[4, 2])]).unwrap();
        assert!(apart["m.a.weight"].places[0].transposed);
        assert!(!apart["m.b.weight"].places[0].transposed);
        let square = ["m.a.weight", "m.b.weight"].map(|name| ones(name, &[4, 4]));
        let refusal = placed(&square, &nodes, &[("val_1", &[4, 4])])
            .err()
            .unwrap();
        assert!(refusal.contains("their own transpose"), "{refusal}");
    }

    /// Renamed and not merged: told by use, and the graph stays as it is.
    #[test]
    fn a_renamed_tensor_of_one_value_is_found_by_who_reads_it() {
        let nodes = [
            Made {
                input: &["x", "val_1"],
                ..A
            },
            Made {
                input: &["y", "val_2"],
                ..B
            },
        ];
        let held: [(&str, &[usize]); 2] = [("val_1", &[4]), ("val_2", &[4])];
        let (tensors, rewritten, _) = placed(&norms(), &nodes, &held).unwrap();
        assert!(!rewritten);
        assert_eq!(tensors["m.b.weight"].places[0].initializer, "val_2");
    }
}
