//! The loss of each example is the negative log-probability of its target, and 0 where the target is
//! the ignored one. Weights of classes, sums and means, and log-probabilities as a second output
//! stay with the operator.

use bytes::Bytes;

use super::super::proto::{GraphError, INT64, NodeProto, attribute, int, integer, scalar};
use super::Successors;
use super::log_softmax::until_the_last;
use super::scope::Scope;
use super::wide::Wide;

/// Of the classes.
const AXIS: i64 = 1;

pub(super) fn rewrite(
    node: &NodeProto,
    scope: &Scope,
    outer: &[Scope],
) -> Result<Option<Vec<Bytes>>, GraphError> {
    let reduction = attribute(node, "reduction")?.and_then(|reduction| reduction.s);
    let each = reduction.as_deref() == Some(b"none");
    let ([_, targets], [_], true) = (node.input.as_slice(), node.output.as_slice(), each) else {
        return Ok(None);
    };
    let Some(mut wide) = Wide::of(node, scope, outer) else {
        return Ok(None);
    };
    let log_probs = match node.op_type() == "SoftmaxCrossEntropyLoss" {
        true => {
            let [shifted, log] = until_the_last(&mut wide, AXIS, scope.opset);
            wide.nodes.push("log_probs", "Sub", &[&shifted, &log], &[])
        }
        false => wide.input.clone(),
    };
    let ignored = integer(node, "ignore_index")?;
    let loss = picked(&mut wide.nodes, &log_probs, targets, ignored);
    Ok(Some(wide.finish("Neg", &[&loss])))
}

/// The log-probability of each target, and 0 for the ignored ones.
fn picked(
    nodes: &mut Successors<'_>,
    log_probs: &str,
    targets: &str,
    ignored: Option<i64>,
) -> String {
    let classes = nodes.constant("classes", &[AXIS]);
    let wide = [int("to", INT64.into())];
    let targets = nodes.push("targets", "Cast", &[targets], &wide);
    let column = nodes.push("column", "Unsqueeze", &[&targets, &classes], &[]);
    let gather = |nodes: &mut Successors<'_>, column: &str| {
        let axis = [int("axis", AXIS)];
        nodes.push("picked", "GatherElements", &[log_probs, column], &axis)
    };
    let Some(ignored) = ignored else {
        let picked = gather(nodes, &column);
        return nodes.push("flat", "Squeeze", &[&picked, &classes], &[]);
    };
    let none = nodes.constant("none", &[ignored]);
    let first = nodes.constant("first", &[0]);
    let zero = nodes.push("zero", "Constant", &[], &[scalar(0.0)]);
    let mask = nodes.push("mask", "Equal", &[&column, &none], &[]);
    let valid = nodes.push("valid", "Where", &[&mask, &first, &column], &[]);
    let picked = gather(nodes, &valid);
    let kept = nodes.push("kept", "Where", &[&mask, &zero, &picked], &[]);
    nodes.push("flat", "Squeeze", &[&kept, &classes], &[])
}
