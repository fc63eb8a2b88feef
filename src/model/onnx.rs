//! The ONNX graph as a document: weights become inputs, a loss head is appended, everything else
//! passes through byte for byte. Only the fields we touch are typed; the others stay raw bytes.
//!
//! Why inputs: an initializer may be prepacked, folded or merged, and a patch to it silently not
//! seen. An input cannot.

mod flow;
mod lift;
mod proto;
mod reach;
pub mod split_shared;
pub mod synthetic;
mod tensors;

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use bytes::Bytes;
use prost::Message;

use proto::{
    Attribute, BFLOAT16, BOOL, Dimension, EXTERNAL, FLOAT, FLOAT16, GraphProto, INT32, INT64,
    ModelProto, NodeProto, OperatorSetId, StringEntry, TensorProto, TensorShape, TensorType,
    TypeProto, UINT8, ValueInfo, is_default_domain,
};

use crate::model::tensor::Dtype;
use crate::model::tensor::Elem;
use crate::util::file_type;
pub use flow::{Bar, Flow, Limit};
pub use lift::{Elsewhere, Lifted, lift};
pub use reach::Reach;
pub use tensors::{External, externals, plain_location, relocate};
use tensors::{contents, embed};

/// Name of the input that carries the targets, int64 `[batch, seq, 1]`.
pub const LABELS: &str = "scorer_labels";
/// Name of the output, f32: log-probability of each target `[batch, seq, 1]`, or losses `[batch]`.
pub const OUTPUT: &str = "scorer_output";
const MIN_OPSET: i64 = 13;

/// What is wrong with a graph, by name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("graph: {0}")]
pub struct GraphError(String);

/// What `scorer package` needs to know of an initializer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitializerInfo {
    /// Its name.
    pub name: String,
    /// Its shape in the graph.
    pub shape: Vec<usize>,
    /// Its element type, if it can be a weight.
    pub dtype: Option<Dtype>,
}

/// A weight to be put into a graph.
#[derive(Debug)]
pub struct Constant<'a> {
    /// Its name in the graph.
    pub name: &'a str,
    /// In the graph's layout.
    pub shape: &'a [i64],
    /// Element type.
    pub dtype: Dtype,
    /// Little-endian, in the graph's layout.
    pub bytes: &'a [u8],
}

impl Constant<'_> {
    /// Its contents are in a file of external data.
    fn tensor(&self, file: &str, offset: usize) -> TensorProto {
        let entry = |key: &str, value: String| StringEntry {
            key: Some(key.to_owned()),
            value: Some(value),
        };
        TensorProto {
            name: Some(self.name.to_owned()),
            dims: self.shape.to_vec(),
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

/// What the graph is to give.
#[derive(Debug, Clone, Copy)]
pub enum Head<'a> {
    /// The log-probability of each target; a loss head is appended to these logits.
    LogProbs(&'a str),
    /// The loss of each example, as the graph computes it in this output.
    Loss(&'a str),
}

/// An input that is no weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputInfo {
    /// Its name.
    pub name: String,
    /// Its element type, if it can be fed.
    pub elem: Option<Elem>,
    /// The fixed sizes of its dimensions; `None` where one is free.
    pub shape: Vec<Option<usize>>,
}

/// A decoded graph.
#[derive(Debug, Clone)]
pub struct Graph {
    model: ModelProto,
}

impl Graph {
    /// Decodes an ONNX file.
    ///
    /// # Errors
    /// When it is none, or too old for the loss head.
    pub fn decode(bytes: Bytes) -> Result<Self, GraphError> {
        let none = |why: &dyn std::fmt::Display| GraphError(format!("not an ONNX file: {why}"));
        let model = ModelProto::decode(bytes.clone())
            .map_err(|e| none(&format!("{}: {e}", file_type::describe(&bytes))))?;
        if model.graph.is_none() {
            return Err(none(&"it has no graph"));
        }
        let opset = model
            .opset_import
            .iter()
            .find(|o| is_default_domain(o.domain.as_deref()));
        let version = opset.and_then(|o| o.version).unwrap_or(0);
        if version < MIN_OPSET {
            return Err(GraphError(format!(
                "has opset {version}, at least {MIN_OPSET} is needed; export it again"
            )));
        }
        Ok(Self { model })
    }

    fn proto(&self) -> &GraphProto {
        static EMPTY: std::sync::LazyLock<GraphProto> =
            std::sync::LazyLock::new(GraphProto::default);
        self.model.graph.as_ref().unwrap_or(&EMPTY)
    }

    /// All initializers.
    pub fn initializers(&self) -> Vec<InitializerInfo> {
        let info = |t: &TensorProto| InitializerInfo {
            name: t.name.clone().unwrap_or_default(),
            shape: t
                .dims
                .iter()
                .map(|d| usize::try_from(*d).unwrap_or(0))
                .collect(),
            dtype: t.data_type.and_then(dtype_of),
        };
        self.proto().initializer.iter().map(info).collect()
    }

    /// The inputs that are not initializers.
    pub fn inputs(&self) -> Vec<InputInfo> {
        let graph = self.proto();
        let is_weight = |input: &&ValueInfo| graph.initializer.iter().any(|t| t.name == input.name);
        let inputs = graph.input.iter().filter(|input| !is_weight(input));
        inputs.map(input_info).collect()
    }

    /// Names of the outputs.
    pub fn outputs(&self) -> Vec<String> {
        self.proto()
            .output
            .iter()
            .filter_map(|o| o.name.clone())
            .collect()
    }

    /// The sizes of an output's dimensions, as far as the graph says them; `None` where one is free.
    pub fn output_shape(&self, output: &str) -> Option<Vec<Option<usize>>> {
        let mut outputs = self.proto().output.iter();
        let found = outputs.find(|o| o.name.as_deref() == Some(output))?;
        let tensor = found.r#type.as_ref()?.tensor_type.as_ref()?;
        let size = |d: &Dimension| d.dim_value.and_then(|v| usize::try_from(v).ok());
        Some(tensor.shape.as_ref()?.dim.iter().map(size).collect())
    }

    /// An initializer's little-endian bytes, from the graph or its external file in `dir`.
    ///
    /// # Errors
    /// When it is not there or its data cannot be read.
    pub fn initializer(&self, name: &str, dir: &Path) -> Result<Bytes, GraphError> {
        let tensor = self
            .proto()
            .initializer
            .iter()
            .find(|t| t.name.as_deref() == Some(name));
        let tensor = tensor.ok_or_else(|| GraphError(format!("has no initializer {name}")))?;
        contents(tensor, dir)
    }

    /// The graph the engine runs: the named initializers as inputs, [`OUTPUT`] as output.
    ///
    /// # Errors
    /// Names what is missing.
    pub fn prepare(
        mut self,
        weights: &[&str],
        head: Head<'_>,
        dir: &Path,
    ) -> Result<Vec<u8>, GraphError> {
        self.edit(head, |graph| move_to_inputs(graph, weights))?;
        embed(self.model.encode_to_vec(), dir)
    }

    /// The same computation with the weights as constants in a file `data` beside it, for
    /// comparison: the runtime may prepack and fold them as in any session that nobody patches.
    ///
    /// # Errors
    /// Names what is missing or cannot be written.
    pub fn with_constants(
        mut self,
        weights: &[Constant<'_>],
        head: Head<'_>,
        dir: &Path,
        data: &Path,
    ) -> Result<Vec<u8>, GraphError> {
        let constants = self.constants(weights, data)?;
        self.edit(head, |_| Ok(()))?;
        self.model = ModelProto::decode(Bytes::from(embed(self.model.encode_to_vec(), dir)?))
            .map_err(|e| GraphError(e.to_string()))?;
        self.add(constants);
        Ok(self.model.encode_to_vec())
    }

    /// The same graph with the weights in a file of external data, as large models are exported.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn with_external(
        mut self,
        weights: &[Constant<'_>],
        data: &Path,
    ) -> Result<Vec<u8>, GraphError> {
        let constants = self.constants(weights, data)?;
        self.add(constants);
        Ok(self.model.encode_to_vec())
    }

    /// Takes the weights out and writes their contents.
    fn constants(
        &mut self,
        weights: &[Constant<'_>],
        data: &Path,
    ) -> Result<Vec<TensorProto>, GraphError> {
        let fail = |e: std::io::Error| GraphError(format!("{}: {e}", data.display()));
        let name = data.file_name().unwrap_or_default().to_string_lossy();
        let mut file = std::fs::File::create(data).map_err(fail)?;
        let mut tensors = Vec::with_capacity(weights.len());
        let mut offset = 0;
        for weight in weights {
            file.write_all(weight.bytes).map_err(fail)?;
            tensors.push(weight.tensor(&name, offset));
            offset += weight.bytes.len();
        }
        if let Some(graph) = self.model.graph.as_mut() {
            let is_weight = |name: &Option<String>| tensors.iter().any(|t| t.name == *name);
            graph.input.retain(|i| !is_weight(&i.name));
            graph.initializer.retain(|t| !is_weight(&t.name));
        }
        Ok(tensors)
    }

    fn add(&mut self, constants: Vec<TensorProto>) {
        if let Some(graph) = self.model.graph.as_mut() {
            graph.initializer.extend(constants);
        }
    }

    /// Moves the weights and appends the head. What else is in files stays there: a frozen base of
    /// any size never enters the protobuf.
    fn edit(
        &mut self,
        head: Head<'_>,
        weights: impl FnOnce(&mut GraphProto) -> Result<(), GraphError>,
    ) -> Result<(), GraphError> {
        let (Head::LogProbs(output) | Head::Loss(output)) = head;
        let elem = self.output_type(output)?;
        let Some(graph) = self.model.graph.as_mut() else {
            return Err(GraphError("has no graph".into()));
        };
        weights(graph)?;
        match head {
            Head::LogProbs(logits) => append_loss_head(graph, logits, elem),
            Head::Loss(loss) => {
                let cast = node("Cast", &[loss], OUTPUT, "to", FLOAT.into());
                graph.node.push(cast);
                graph.output = vec![value_info(OUTPUT, FLOAT, vec![None])];
            }
        }
        Ok(())
    }

    fn output_type(&self, output: &str) -> Result<i32, GraphError> {
        let found = self
            .proto()
            .output
            .iter()
            .find(|o| o.name.as_deref() == Some(output));
        let found = found.ok_or_else(|| {
            GraphError(format!(
                "has no output {output}; it has {:?}",
                self.outputs()
            ))
        })?;
        let elem = found
            .r#type
            .as_ref()
            .and_then(|t| t.tensor_type.as_ref())
            .and_then(|t| t.elem_type);
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

/// Log-softmax in f32, then the target's own entry: logits never leave the device, and the sums
/// are taken by the host in f64. (A log-sum-exp of our own measures 17 times less exact.)
fn append_loss_head(graph: &mut GraphProto, logits: &str, logits_type: i32) {
    let mut last = logits.to_owned();
    if logits_type != FLOAT {
        let cast = node("Cast", &[&last], "scorer_logits_f32", "to", FLOAT.into());
        graph.node.push(cast);
        last = "scorer_logits_f32".into();
    }
    graph.node.push(node(
        "LogSoftmax",
        &[&last],
        "scorer_log_softmax",
        "axis",
        -1,
    ));
    graph.node.push(node(
        "GatherElements",
        &["scorer_log_softmax", LABELS],
        OUTPUT,
        "axis",
        -1,
    ));
    graph
        .input
        .push(value_info(LABELS, INT64, vec![None, None, Some(1)]));
    graph.output = vec![value_info(OUTPUT, FLOAT, vec![None, None, Some(1)])];
}

/// A graph of one `ScatterND`: `output` = `data` with `updates` written at `indices`.
pub fn scatter_graph(dtype: Dtype) -> Vec<u8> {
    let elem = elem_type(dtype);
    let inputs = [("data", elem), ("indices", INT64), ("updates", elem)];
    one_node("ScatterND", &inputs, elem)
}

/// A graph that hands `data` on to `output`, wherever each of them is.
pub fn copy_graph(dtype: Dtype) -> Vec<u8> {
    let elem = elem_type(dtype);
    one_node("Identity", &[("data", elem)], elem)
}

fn one_node(op_type: &str, inputs: &[(&str, i32)], output: i32) -> Vec<u8> {
    let free = |name: &str, elem_type: i32| ValueInfo {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorType {
                elem_type: Some(elem_type),
                shape: None,
            }),
        }),
    };
    let node = NodeProto {
        input: inputs.iter().map(|(name, _)| (*name).to_owned()).collect(),
        output: vec!["output".into()],
        name: Some(op_type.to_lowercase()),
        op_type: Some(op_type.into()),
        ..NodeProto::default()
    };
    let graph = GraphProto {
        node: vec![node.encode_to_vec().into()],
        name: Some(op_type.to_lowercase()),
        input: inputs
            .iter()
            .map(|(name, elem)| free(name, *elem))
            .collect(),
        output: vec![free("output", output)],
        ..GraphProto::default()
    };
    let opset = OperatorSetId {
        domain: None,
        version: Some(16),
    };
    let model = ModelProto {
        ir_version: Some(8),
        graph: Some(graph),
        opset_import: vec![opset],
        ..ModelProto::default()
    };
    model.encode_to_vec()
}

fn node(op_type: &str, input: &[&str], output: &str, attribute: &str, value: i64) -> Bytes {
    const INT: i32 = 2;
    let attribute = Attribute {
        name: Some(attribute.into()),
        i: Some(value),
        r#type: Some(INT),
        ..Attribute::default()
    };
    NodeProto {
        input: input.iter().map(|i| (*i).to_owned()).collect(),
        output: vec![output.to_owned()],
        name: Some(format!("{output}_node")),
        op_type: Some(op_type.to_owned()),
        attribute: vec![attribute.encode_to_vec().into()],
        ..NodeProto::default()
    }
    .encode_to_vec()
    .into()
}

fn value_info(name: &str, elem_type: i32, dims: Vec<Option<i64>>) -> ValueInfo {
    let dim = dims
        .into_iter()
        .map(|dim_value| Dimension {
            dim_value,
            dim_param: None,
        })
        .collect();
    let tensor_type = TensorType {
        elem_type: Some(elem_type),
        shape: Some(TensorShape { dim }),
    };
    ValueInfo {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto {
            tensor_type: Some(tensor_type),
        }),
    }
}

fn elem_type(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::F32 => FLOAT,
        Dtype::F16 => FLOAT16,
        Dtype::Bf16 => BFLOAT16,
    }
}

fn dtype_of(data_type: i32) -> Option<Dtype> {
    match data_type {
        FLOAT => Some(Dtype::F32),
        FLOAT16 => Some(Dtype::F16),
        BFLOAT16 => Some(Dtype::Bf16),
        _ => None,
    }
}

fn input_info(input: &ValueInfo) -> InputInfo {
    let tensor = input.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
    let elem = match tensor.and_then(|t| t.elem_type) {
        Some(FLOAT) => Some(Elem::F32),
        Some(FLOAT16) => Some(Elem::F16),
        Some(INT64) => Some(Elem::I64),
        Some(INT32) => Some(Elem::I32),
        Some(UINT8) => Some(Elem::U8),
        Some(BOOL) => Some(Elem::Bool),
        Some(_) | None => None,
    };
    let dims = tensor.and_then(|t| t.shape.as_ref()).map(|s| &s.dim);
    let size = |d: &Dimension| d.dim_value.and_then(|v| usize::try_from(v).ok());
    InputInfo {
        name: input.name.clone().unwrap_or_default(),
        elem,
        shape: dims.into_iter().flatten().map(size).collect(),
    }
}
