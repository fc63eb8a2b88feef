//! The graph that a session runs: weights become inputs, or constants in a file, and a loss head is
//! appended. Everything else passes through byte for byte, but for the nodes that the provider needs
//! rewritten.
//!
//! Why inputs: the runtime may prepack, fold or merge an initializer, and would then not see a patch
//! to it. An input is always read.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::Path;

use bytes::Bytes;
use prost::Message;

use super::external::embed;
use super::graph::Graph;
use super::proto::{
    EXTERNAL, FLOAT, GraphError, GraphProto, INT64, StringEntry, TensorProto, ValueInfo, elem_type,
    int, node, value_info,
};
use super::rewrite::Rewrite;
use crate::model::tensor::Dtype;

/// Name of the input that carries the targets, int64 `[batch, seq, 1]`.
pub const LABELS: &str = "scorer_labels";

/// Name of the output, f32: log-probability of each target `[batch, seq, 1]`, or losses `[batch]`.
pub const OUTPUT: &str = "scorer_output";

/// What the graph is to return.
#[derive(Debug, Clone, Copy)]
pub enum Head<'a> {
    /// The log-probability of each target, computed by a loss head appended to these logits.
    LogProbs(&'a str),
    /// The loss of each example, computed by the graph itself in this output.
    Loss(&'a str),
}

/// A weight in the form that a graph takes, as an input or a constant.
#[derive(Debug)]
pub struct WeightSpec {
    /// Its name in the graph.
    pub input: String,
    /// In the graph's layout.
    pub shape: Vec<i64>,
    /// Element type.
    pub dtype: Dtype,
    /// Little-endian, in the graph's layout.
    pub bytes: Bytes,
}

impl WeightSpec {
    /// Its contents are in a file of external data.
    fn tensor(&self, file: &str, offset: usize) -> TensorProto {
        let entry = |key: &str, value: String| StringEntry {
            key: Some(key.to_owned()),
            value: Some(value),
        };
        TensorProto {
            name: Some(self.input.clone()),
            dims: self.shape.clone(),
            data_type: Some(elem_type(self.dtype)),
            external_data: vec![
                entry("location", file.to_owned()),
                entry("offset", offset.to_string()),
                entry("length", self.bytes.len().to_string()),
            ],
            data_location: Some(EXTERNAL),
            ..TensorProto::default()
        }
    }
}

impl Graph {
    /// The graph the engine runs: the named initializers as inputs, [`OUTPUT`] as output, and
    /// rewritten as the provider needs it.
    ///
    /// # Errors
    /// Names what is missing.
    pub fn prepare(
        mut self,
        weights: &[&str],
        head: Head<'_>,
        rewrites: &[Rewrite],
        dir: &Path,
    ) -> Result<Vec<u8>, GraphError> {
        let elem = self.output_type(head)?;
        move_to_inputs(self.proto_mut(), weights)?;
        close(self.proto_mut());
        self.append(head, elem);
        embed(self.rewritten(rewrites)?, dir)
    }

    /// The same computation with the weights as constants in a file `data` beside it, for
    /// comparison: the runtime may prepack and fold them as in any ordinary session.
    ///
    /// # Errors
    /// Names what is missing or cannot be written.
    pub fn with_constants(
        mut self,
        weights: &[WeightSpec],
        head: Head<'_>,
        rewrites: &[Rewrite],
        dir: &Path,
        data: &Path,
    ) -> Result<Vec<u8>, GraphError> {
        let constants = self.constants(weights, data)?;
        close(self.proto_mut());
        let elem = self.output_type(head)?;
        self.append(head, elem);
        self = Self::decode(embed(self.rewritten(rewrites)?, dir)?.into())?;
        self.proto_mut().initializer.extend(constants);
        Ok(self.encode())
    }

    /// The same graph with the weights in a file of external data, as large models are exported.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn with_external(
        mut self,
        weights: &[WeightSpec],
        data: &Path,
    ) -> Result<Vec<u8>, GraphError> {
        let constants = self.constants(weights, data)?;
        self.proto_mut().initializer.extend(constants);
        Ok(self.encode())
    }

    /// Removes the weights from the graph and writes their contents to the file.
    fn constants(
        &mut self,
        weights: &[WeightSpec],
        data: &Path,
    ) -> Result<Vec<TensorProto>, GraphError> {
        let fail = |e: std::io::Error| GraphError(format!("{}: {e}", data.display()));
        let name = data.file_name().unwrap_or_default().to_string_lossy();
        let mut file = std::fs::File::create(data).map_err(fail)?;
        let mut tensors = Vec::with_capacity(weights.len());
        let mut offset = 0;
        for weight in weights {
            file.write_all(&weight.bytes).map_err(fail)?;
            tensors.push(weight.tensor(&name, offset));
            offset += weight.bytes.len();
        }
        let graph = self.proto_mut();
        let is_weight = |name: &Option<String>| tensors.iter().any(|t| t.name == *name);
        graph.input.retain(|i| !is_weight(&i.name));
        graph.initializer.retain(|t| !is_weight(&t.name));
        Ok(tensors)
    }

    /// Appends the head to an output of this element type. External data stays in its files: a
    /// frozen base of any size never enters the protobuf.
    fn append(&mut self, head: Head<'_>, elem: i32) {
        let graph = self.proto_mut();
        match head {
            Head::LogProbs(logits) => append_loss_head(graph, logits, elem),
            Head::Loss(loss) => {
                graph
                    .node
                    .push(op("Cast", &[loss], OUTPUT, "to", FLOAT.into()));
                graph.output = vec![value_info(OUTPUT, FLOAT, vec![None])];
            }
        }
    }

    fn output_type(&self, head: Head<'_>) -> Result<i32, GraphError> {
        let (Head::LogProbs(output) | Head::Loss(output)) = head;
        let found = self.output(output).ok_or_else(|| {
            let others = self.outputs();
            GraphError(format!("has no output {output}; it has {others:?}"))
        })?;
        let elem = found.tensor().and_then(|t| t.elem_type);
        Ok(elem.unwrap_or(FLOAT))
    }
}

fn move_to_inputs(graph: &mut GraphProto, weights: &[&str]) -> Result<(), GraphError> {
    let mut found: HashMap<String, TensorProto> = HashMap::new();
    for tensor in std::mem::take(&mut graph.initializer) {
        match tensor.name.as_deref() {
            Some(name) if weights.contains(&name) => {
                found.insert(name.to_owned(), tensor);
            }
            Some(_) | None => graph.initializer.push(tensor),
        }
    }
    for name in weights {
        let listed = graph.input.iter().any(|i| i.name.as_deref() == Some(name));
        match (found.remove(*name), listed) {
            (Some(tensor), false) => {
                let dims = tensor.dims.iter().map(|d| Some(*d)).collect();
                graph
                    .input
                    .push(value_info(name, tensor.data_type.unwrap_or(FLOAT), dims));
            }
            (_, true) => {}
            (None, false) => {
                return Err(GraphError(format!(
                    "has neither an initializer nor an input {name}"
                )));
            }
        }
    }
    Ok(())
}

/// Takes initializers off the inputs, where older exporters list them: a run could then replace them. None does,
/// and only a constant is folded.
fn close(graph: &mut GraphProto) {
    let held: HashSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
    graph.input.retain(|input| !held.contains(input.name()));
}

/// Log-softmax in f32, then the entry of the target: logits never leave the device, and the host
/// adds up in f64. (A hand-written log-sum-exp is 17 times less accurate.)
fn append_loss_head(graph: &mut GraphProto, logits: &str, logits_type: i32) {
    let mut last = logits;
    if logits_type != FLOAT {
        last = "scorer_logits_f32";
        let cast = op("Cast", &[logits], last, "to", FLOAT.into());
        graph.node.push(cast);
    }
    // It is no output any more, which would have said so.
    let wide = ValueInfo::new(last, FLOAT, None);
    graph.value_info.push(wide.encode_to_vec());
    let all = "scorer_log_softmax";
    let softmax = op("LogSoftmax", &[last], all, "axis", -1);
    let targets = op("GatherElements", &[all, LABELS], OUTPUT, "axis", -1);
    graph.node.extend([softmax, targets]);
    let dims = vec![None, None, Some(1)];
    graph.input.push(value_info(LABELS, INT64, dims.clone()));
    graph.output = vec![value_info(OUTPUT, FLOAT, dims)];
}

/// A node with one attribute, named after its output.
fn op(op_type: &str, input: &[&str], output: &str, attribute: &str, value: i64) -> Bytes {
    let attributes = [int(attribute, value)];
    node(
        &format!("{output}_node"),
        op_type,
        input,
        output,
        &attributes,
    )
}

#[cfg(test)]
mod tests {
    use super::super::hand_made::{Made, graph, with_weights};
    use super::*;

    #[test]
    fn an_initializer_that_is_listed_as_an_input_becomes_a_constant_and_nobody_need_feed_it() {
        let sum = Made {
            op: "Sum",
            input: &["x", "w", "c"],
            output: "loss",
            ..Made::default()
        };
        let listed = with_weights(graph(&[sum], &["w", "c"]), &["x", "w", "c"]);
        let none = Path::new("");
        let prepared = listed
            .clone()
            .prepare(&["w"], Head::Loss("loss"), &[], none);
        let weight = WeightSpec {
            input: "w".into(),
            shape: vec![1],
            dtype: Dtype::F32,
            bytes: Bytes::from_static(&[0; 4]),
        };
        let data = tempfile::NamedTempFile::new().unwrap();
        let bare = listed.with_constants(&[weight], Head::Loss("loss"), &[], none, data.path());
        for (made, inputs, constants) in [
            (prepared, &["x", "w"][..], &["c"][..]),
            (bare, &["x"], &["c", "w"]),
        ] {
            let made = Graph::decode(made.unwrap().into()).unwrap();
            let (graph, held) = (made.proto(), made.initializers().into_iter());
            let found: Vec<&str> = graph.input.iter().map(ValueInfo::name).collect();
            assert_eq!(found, inputs);
            assert_eq!(held.map(|held| held.name).collect::<Vec<_>>(), constants);
        }
    }
}
