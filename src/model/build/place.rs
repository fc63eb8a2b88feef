//! Finds where the graph holds each checkpoint tensor: by contents, as it is or transposed, and by
//! name where contents say nothing. What is not beyond doubt is refused by name.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};

use super::contents::{ContentHash, HashedTensor, by_contents, copies};
use super::precision;
use super::split_shared::{Locations, split_shared};
use crate::model::checkpoint::Tensor;
use crate::model::compare::{Initializer, is_multiple, is_uniform};
use crate::model::manifest::{GraphLocation, PackageError, TensorEntry};
use crate::model::onnx::{Graph, InitializerInfo, InputInfo};

/// The problem of tensors that the graph does not hold.
const NOWHERE: &str = "no initializer holds it";
const NOWHERE_ADVICE: &str = "no initializer holds these, as they are or transposed; export with \
                              torch.onnx.export(..., optimize=False), which folds nothing, and give the checkpoint under \
                              the names and shapes that the model has when it is exported (model.state_dict()); what the \
                              model does not use, leave out with --exclude NAME";

/// Where every tensor is, and whether the graph had to be rewritten to separate equal ones. `why`
/// may know why the graph does not hold a tensor, and `called` gives its name in the checkpoint.
pub(super) fn place(
    checkpoint: &[Tensor],
    initializers: &[Initializer],
    graph: &mut Graph,
    why: impl Fn(&Tensor) -> Option<String>,
    called: impl Fn(&str) -> String,
) -> Result<(BTreeMap<String, TensorEntry>, bool), PackageError> {
    let by_contents = by_contents(checkpoint, initializers);
    let (all, fed) = (graph.initializers(), graph.inputs());
    let known: Vec<HashedTensor<'_>> = checkpoint.iter().map(HashedTensor::new).collect();
    let mut found: Locations = known
        .iter()
        .map(|tensor| match fed_place(tensor, &fed) {
            Some(place) => Ok(vec![place]),
            None => places(tensor, &known, &by_contents),
        })
        .collect();
    let split = split_shared(graph, &known, &by_contents, &mut found)?;
    let mut problems = Problems::default();
    let mut tensors = BTreeMap::new();
    for (tensor, found) in checkpoint.iter().zip(found) {
        let (name, shape) = (&tensor.name, &tensor.shape);
        let problem = match found {
            Ok(places) => {
                let entry = TensorEntry {
                    places,
                    shape: shape.clone(),
                    dtype: tensor.dtype,
                };
                tensors.insert(name.clone(), entry);
                continue;
            }
            Err(problem) => problem,
        };
        let reason = precision::reason(tensor, &all, initializers).or_else(|| why(tensor));
        let reason = reason.or_else(|| other_values(tensor, initializers));
        problems.add(
            format!("{} {shape:?}", called(name)),
            reason.unwrap_or(problem),
        );
    }
    if problems.0.is_empty() && split.problems.is_empty() {
        let graph = graph.initializers();
        problems = stale(checkpoint, initializers, &graph, &tensors, &why);
    }
    if problems.0.is_empty() && split.problems.is_empty() {
        return Ok((tensors, split.rewritten));
    }
    let lines = problems.lines().into_iter().chain(split.problems);
    let lines: Vec<String> = lines.collect();
    Err(PackageError(format!(
        "tensors cannot be placed in the graph:\n{}",
        lines.join("\n")
    )))
}

/// Why tensors cannot be placed, and which.
#[derive(Default)]
struct Problems(Vec<(String, Vec<String>)>);

impl Problems {
    fn add(&mut self, tensor: String, reason: String) {
        match self.0.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, tensors)) => tensors.push(tensor),
            None => self.0.push((reason, vec![tensor])),
        }
    }

    /// The reason of the most tensors comes first, and each reason once.
    fn lines(mut self) -> Vec<String> {
        self.0.sort_by_key(|(_, tensors)| Reverse(tensors.len()));
        let lines = self.0.into_iter().flat_map(|(reason, tensors)| {
            let (reason, alone) = match reason == NOWHERE {
                true => (NOWHERE_ADVICE, false),
                false => (reason.as_str(), tensors.len() == 1),
            };
            match alone {
                true => tensors
                    .iter()
                    .map(|name| format!("  {name}: {reason}"))
                    .collect(),
                false => {
                    let names = tensors.iter().map(|name| format!("    {name}"));
                    let lines = std::iter::once(format!("  {reason}:")).chain(names);
                    lines.collect::<Vec<_>>()
                }
            }
        });
        lines.collect()
    }
}

/// Reports tensors from which the exporter derived further constants, which a change to the tensor
/// would not reach.
fn stale(
    checkpoint: &[Tensor],
    initializers: &[Initializer],
    graph: &[InitializerInfo],
    placed: &BTreeMap<String, TensorEntry>,
    why: impl Fn(&Tensor) -> Option<String>,
) -> Problems {
    let places = placed.values().flat_map(|entry| &entry.places);
    let taken: HashSet<&str> = places.map(|place| place.initializer.as_str()).collect();
    // A shared one was replaced by copies.
    let is_left = |(info, _): &&Initializer| {
        let there = graph.iter().any(|i| i.name == info.name);
        there && !taken.contains(info.name.as_str())
    };
    let left: Vec<_> = initializers.iter().filter(is_left).collect();
    let reason = |tensor: &Tensor| {
        let made = left.iter().find(|held| is_multiple(tensor, held));
        let made = made.map(|(info, _)| {
            format!(
                "{} in the graph was made from it, scaled or rounded, and a change to the tensor would not reach it; \
                 export with torch.onnx.export(..., optimize=False), which folds nothing, and in one type",
                info.name
            )
        });
        made.or_else(|| why(tensor))
    };
    let mut problems = Problems::default();
    for tensor in checkpoint.iter().filter(|tensor| !is_uniform(tensor)) {
        if let Some(reason) = reason(tensor) {
            problems.add(format!("{} {:?}", tensor.name, tensor.shape), reason);
        }
    }
    problems
}

/// An initializer of the same name, type and shape with other values is of another version.
fn other_values(tensor: &Tensor, initializers: &[Initializer]) -> Option<String> {
    let mut initializers = initializers.iter();
    let (info, bytes) = initializers.find(|(info, _)| info.name == tensor.name)?;
    let alike = info.dtype == Some(tensor.dtype) && info.shape == tensor.shape;
    (alike && *bytes != tensor.bytes).then(|| {
        "an initializer of the same name, type and shape has other values; export the graph from this very checkpoint"
            .to_owned()
    })
}

/// An export may leave a weight as an input under its own name.
fn fed_place(tensor: &Tensor, inputs: &[InputInfo]) -> Option<GraphLocation> {
    let shape: Vec<Option<usize>> = tensor.shape.iter().copied().map(Some).collect();
    let is_it = |input: &&InputInfo| input.name == tensor.name && input.shape == shape;
    inputs.iter().find(is_it).map(|input| GraphLocation {
        initializer: input.name.clone(),
        transposed: false,
    })
}

fn places(
    tensor: &HashedTensor<'_>,
    checkpoint: &[HashedTensor<'_>],
    by_contents: &HashMap<ContentHash, Vec<&str>>,
) -> Result<Vec<GraphLocation>, String> {
    let found = copies(tensor, by_contents);
    let equal = checkpoint.iter().filter(|t| t.hash == tensor.hash);
    let equal: HashSet<&str> = equal.map(|t| t.name.as_str()).collect();
    if found.is_empty() {
        Err(NOWHERE.into())
    } else if equal.len() > 1 || is_uniform(tensor) || tensor.is_symmetric() {
        by_name(tensor, found, &equal)
    } else {
        not_frozen_copies(&found)?;
        Ok(found)
    }
}

/// Two parameters of the graph with the same contents may be one tied tensor, or a tensor and a frozen
/// copy of it: a target or reference network.
fn not_frozen_copies(found: &[GraphLocation]) -> Result<(), String> {
    let names = found.iter().map(|place| place.initializer.as_str());
    let names: Vec<&str> = names.filter(|name| is_parameter(name)).collect();
    if names.len() < 2 {
        return Ok(());
    }
    Err(format!(
        "{} in the graph have its contents: whether they are one tied tensor or copies cannot be determined; export a tied \
         tensor as one initializer, or copies with other contents",
        names.join(", ")
    ))
}

/// Equal contents can be told apart only by name, and only if every copy has one.
fn by_name(
    tensor: &Tensor,
    found: Vec<GraphLocation>,
    equal: &HashSet<&str>,
) -> Result<Vec<GraphLocation>, String> {
    let is_own = |p: &GraphLocation| p.initializer == tensor.name && !p.transposed;
    let (own, others): (Vec<_>, Vec<_>) = found.into_iter().partition(is_own);
    let others = others.iter().map(|p| p.initializer.as_str());
    let nameless = others.filter(|name| !is_parameter(name) && !equal.contains(name));
    let nameless: Vec<&str> = nameless.collect();
    if own.is_empty() {
        return Err(
            "other tensors or constants have the same contents and no initializer has its name; \
                    export with the checkpoint's names, or train it"
                .into(),
        );
    }
    if !nameless.is_empty() {
        return Err(format!(
            "{} in the graph may be copies of it and have no checkpoint name; train it, or export without them",
            nameless.join(", ")
        ));
    }
    Ok(own)
}

/// Whether a name comes from the model (`layers.0.norm.weight`) and not from the exporter (`val_7`,
/// `onnx::MatMul_7`): another, frozen parameter is not a copy of this one.
pub(super) fn is_parameter(name: &str) -> bool {
    name.contains('.') && !name.contains("::")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::onnx::hand_made::graph;
    use crate::model::tensor::Dtype;

    fn tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
        Tensor {
            name: name.into(),
            shape: shape.into(),
            dtype: Dtype::F32,
            bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// Places where nothing but names and contents can tell.
    fn placed(checkpoint: &[Tensor], held: &[Tensor]) -> Result<Vec<(String, bool)>, String> {
        let names: Vec<&str> = held.iter().map(|t| t.name.as_str()).collect();
        let mut graph = graph(&[], &names);
        let held: Vec<_> = held
            .iter()
            .map(|t| {
                let info = InitializerInfo {
                    name: t.name.clone(),
                    shape: t.shape.clone(),
                    dtype: Some(t.dtype),
                };
                (info, t.bytes.clone())
            })
            .collect();
        let (tensors, rewritten) =
            place(checkpoint, &held, &mut graph, |_| None, str::to_owned).map_err(|e| e.0)?;
        assert!(!rewritten);
        let places = tensors[&checkpoint[0].name].places.iter();
        Ok(places
            .map(|p| (p.initializer.clone(), p.transposed))
            .collect())
    }

    #[test]
    fn a_frozen_copy_in_the_graph_is_not_patched_along() {
        let online = tensor("online.weight", &[2], &[1.0, 2.0]);
        let target = Tensor {
            name: "target.weight".into(),
            ..online.clone()
        };
        let checkpoint = [online.clone()];
        let alone = placed(&checkpoint, &checkpoint);
        assert_eq!(alone, Ok(vec![("online.weight".into(), false)]));
        let said = placed(&checkpoint, &[online.clone(), target]).unwrap_err();
        assert!(said.contains("online.weight, target.weight"), "{said}");
        // An exporter's copy is one.
        let copy = Tensor {
            name: "onnx::MatMul_7".into(),
            ..online.clone()
        };
        let both = placed(&checkpoint, &[online, copy]).unwrap();
        assert_eq!(both.len(), 2);
    }

    #[test]
    fn a_matrix_that_is_its_own_transpose_is_told_by_its_name_or_refused() {
        let identity = [1.0, 0.0, 0.0, 1.0];
        let own = tensor("mix", &[2, 2], &identity);
        let folded = tensor("val_0", &[2, 2], &identity);
        let found = placed(std::slice::from_ref(&own), std::slice::from_ref(&own)).unwrap();
        assert_eq!(found, [("mix".to_owned(), false)]);
        for held in [&[folded.clone()][..], &[own.clone(), folded]] {
            assert!(placed(std::slice::from_ref(&own), held).is_err());
        }
    }

    #[test]
    fn what_was_made_from_a_tensor_and_would_not_follow_it_is_refused() {
        let values: Vec<f32> = (0..12_u8).map(|n| f32::from(n) * 0.37 - 1.9).collect();
        let flipped: Vec<f32> = (0..12).map(|at| values[(at % 3) * 4 + at / 3]).collect();
        let scaled: Vec<f32> = flipped.iter().map(|v| v * 0.25).collect();
        let near: Vec<f32> = values.iter().map(|v| v * 1.001 + 0.01).collect();
        let checkpoint = [tensor("w", &[3, 4], &values)];
        let made = |other: Tensor| placed(&checkpoint, &[checkpoint[0].clone(), other]);
        let refusal = made(tensor("t", &[4, 3], &scaled)).unwrap_err();
        assert!(
            refusal.contains("t in the graph was made from it"),
            "{refusal}"
        );
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let round = |v: &f32| crate::model::weights::round_to(dtype, *v);
            let narrow = values.iter().map(round).flat_map(|v| match dtype {
                Dtype::F16 => half::f16::from_f32(v).to_le_bytes(),
                Dtype::F32 | Dtype::Bf16 => half::bf16::from_f32(v).to_le_bytes(),
            });
            let rounded = Tensor {
                dtype,
                bytes: narrow.collect(),
                ..tensor("h", &[3, 4], &[])
            };
            assert!(made(rounded).is_err(), "{dtype:?}");
        }
        // Weights of another version, a mask, and one of another shape are none of its business.
        assert!(made(tensor("reference", &[3, 4], &near)).is_ok());
        assert!(made(tensor("mask", &[3, 4], &[1.0; 12])).is_ok());
        assert!(made(tensor("flat", &[12, 1], &values)).is_ok());
    }

    #[test]
    fn another_parameter_of_equal_contents_is_no_copy() {
        let ones = [1.0; 4];
        let checkpoint = [tensor("layers.2.norm", &[4], &ones)];
        let frozen = tensor("layers.0.norm", &[4], &ones);
        let found = placed(&checkpoint, &[frozen, checkpoint[0].clone()]).unwrap();
        assert_eq!(found, [("layers.2.norm".to_owned(), false)]);
    }

    const MATRIX: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

    #[test]
    fn a_tensor_is_found_in_every_place_it_has() {
        let checkpoint = [tensor("w", &[2, 3], &MATRIX)];
        let graph = [
            tensor("renamed", &[2, 3], &MATRIX),
            tensor("folded", &[3, 2], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]),
            tensor("other", &[3, 2], &MATRIX),
        ];
        let expected = [("renamed".to_owned(), false), ("folded".to_owned(), true)];
        assert_eq!(placed(&checkpoint, &graph).unwrap(), expected);
        let lost = placed(&checkpoint, &graph[2..]).unwrap_err();
        assert!(lost.contains("w [2, 3]"), "{lost}");
    }

    #[test]
    fn equal_tensors_are_told_apart_by_name_or_refused() {
        let ones = [1.0; 2];
        let checkpoint = [tensor("norm.a", &[2], &ones), tensor("norm.b", &[2], &ones)];
        assert_eq!(
            placed(&checkpoint, &checkpoint).unwrap(),
            [("norm.a".to_owned(), false)]
        );
        let merged = placed(&checkpoint, &checkpoint[..1]).unwrap_err();
        assert!(merged.contains("norm.a [2], norm.b [2]"), "{merged}");
    }

    #[test]
    fn a_copy_without_a_name_is_refused_where_contents_say_nothing() {
        let checkpoint = [tensor("w", &[2, 3], &[0.5; 6])];
        let graph = [
            tensor("w", &[2, 3], &[0.5; 6]),
            tensor("val_7", &[3, 2], &[0.5; 6]),
        ];
        assert_eq!(
            placed(&checkpoint, &graph[..1]).unwrap(),
            [("w".to_owned(), false)]
        );
        let doubt = placed(&checkpoint, &graph).unwrap_err();
        assert!(doubt.contains("val_7"), "{doubt}");
    }

    #[test]
    fn a_reason_is_given_once_and_that_of_the_most_tensors_first() {
        let mut problems = Problems::default();
        problems.add("tied [2]".into(), NOWHERE.into());
        problems.add("odd [1]".into(), "is odd".into());
        problems.add("a [3]".into(), "has other values".into());
        problems.add("b [3]".into(), "has other values".into());
        let advice = format!("  {NOWHERE_ADVICE}:");
        let expected = [
            "  has other values:",
            "    a [3]",
            "    b [3]",
            &advice,
            "    tied [2]",
            "  odd [1]: is odd",
        ];
        assert_eq!(problems.lines(), expected);
    }
}
