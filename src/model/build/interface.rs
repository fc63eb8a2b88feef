//! The graph's inputs and outputs, apart from weights.

use std::collections::BTreeMap;

use crate::model::manifest::{Inputs, Objective, Outputs, PackageError, TensorEntry};
use crate::model::onnx::Graph;

/// A language model's other inputs are recognised by their usual names.
pub(super) fn inputs(
    graph: &Graph,
    tensors: &BTreeMap<String, TensorEntry>,
    objective: Objective,
) -> Result<Inputs, PackageError> {
    let Objective::CausalLm { .. } = objective else {
        return Ok(Inputs::default());
    };
    let names = graph.inputs().into_iter().map(|input| input.name);
    let names: Vec<String> = names.filter(|name| !tensors.contains_key(name)).collect();
    let usual = |name: &str| names.iter().find(|n| *n == name).cloned();
    let (attention_mask, position_ids) = (usual("attention_mask"), usual("position_ids"));
    let taken = [&attention_mask, &position_ids];
    let rest = |name: &&String| !taken.iter().any(|t| t.as_ref() == Some(*name));
    let rest: Vec<String> = names.iter().filter(rest).cloned().collect();
    let tokens = sole(&rest, &["tokens", "input_ids"], "input")?;
    let unknown = rest.iter().map(String::as_str).filter(|n| *n != tokens);
    let unknown: Vec<&str> = unknown.collect();
    if !unknown.is_empty() {
        return Err(PackageError(format!(
            "graph: it is not known what to feed its input {}; export it without (no cache, no labels)",
            unknown.join(", ")
        )));
    }
    Ok(Inputs {
        tokens: Some(tokens),
        attention_mask,
        position_ids,
    })
}

/// The output from which the loss is computed.
pub(super) fn output(graph: &Graph, objective: Objective) -> Result<String, PackageError> {
    let preferred = match objective {
        Objective::CausalLm { .. } => "logits",
        Objective::GraphLoss {} => "loss",
    };
    sole(&graph.outputs(), &[preferred], "output")
}

pub(super) fn outputs(graph: &Graph, objective: Objective) -> Result<Outputs, PackageError> {
    let output = Some(output(graph, objective)?);
    Ok(match objective {
        Objective::CausalLm { .. } => Outputs {
            logits: output,
            loss: None,
        },
        Objective::GraphLoss {} => Outputs {
            logits: None,
            loss: output,
        },
    })
}

/// A preferred name, or the only one there is.
fn sole(names: &[String], preferred: &[&str], what: &str) -> Result<String, PackageError> {
    if let Some(found) = names.iter().find(|n| preferred.contains(&n.as_str())) {
        return Ok(found.clone());
    }
    match names {
        [only] => Ok(only.clone()),
        other => Err(PackageError(format!(
            "graph: name one {what} {}; it has {other:?}",
            preferred.join(" or ")
        ))),
    }
}
