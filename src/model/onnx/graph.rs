//! A decoded ONNX graph, and what it says of its initializers, inputs and outputs. Only the fields
//! that are read or written here are typed; the others stay raw bytes.

use std::path::Path;

use bytes::Bytes;
use prost::Message;

use super::external::contents;
use super::proto::{
    GraphError, GraphProto, ModelProto, OperatorSetId, TensorProto, TensorType, ValueInfo,
    dtype_of, elem_of, is_default_domain, sizes,
};
use crate::model::tensor::{Dtype, Elem};
use crate::util::file_type;

const MIN_OPSET: i64 = 13;

/// An initializer, as packaging sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitializerInfo {
    /// Its name.
    pub name: String,
    /// Its shape in the graph.
    pub shape: Vec<usize>,
    /// Its element type, if it can be a weight.
    pub dtype: Option<Dtype>,
}

impl InitializerInfo {
    pub(super) fn of(tensor: &TensorProto) -> Self {
        Self {
            name: tensor.name().to_owned(),
            shape: sizes(&tensor.dims),
            dtype: tensor.data_type.and_then(dtype_of),
        }
    }
}

/// An input that is not a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputInfo {
    /// Its name.
    pub name: String,
    /// Its element type, if it can be fed.
    pub elem: Option<Elem>,
    /// The sizes of its dimensions; `None` for a dynamic one.
    pub shape: Vec<Option<usize>>,
}

/// A decoded graph.
#[derive(Debug, Clone)]
pub struct Graph {
    pub(super) model: ModelProto,
}

impl Graph {
    /// Decodes an ONNX file.
    ///
    /// # Errors
    /// When it is not one, or its opset is too old for the loss head.
    pub fn decode(bytes: Bytes) -> Result<Self, GraphError> {
        let none = |why: &dyn std::fmt::Display| GraphError(format!("not an ONNX file: {why}"));
        let model = ModelProto::decode(bytes.clone())
            .map_err(|e| none(&format!("{}: {e}", file_type::describe(&bytes))))?;
        if model.graph.is_none() {
            return Err(none(&"it has no graph"));
        }
        let version = opset(&model.opset_import).unwrap_or(0);
        if version < MIN_OPSET {
            return Err(GraphError(format!(
                "has opset {version}, at least {MIN_OPSET} is needed; export it again"
            )));
        }
        Ok(Self { model })
    }

    pub(super) fn proto(&self) -> &GraphProto {
        static EMPTY: std::sync::LazyLock<GraphProto> =
            std::sync::LazyLock::new(GraphProto::default);
        self.model.graph.as_ref().unwrap_or(&EMPTY)
    }

    /// Empty, if the model has no graph; decoding refuses such a model.
    pub(super) fn proto_mut(&mut self) -> &mut GraphProto {
        self.model.graph.get_or_insert_default()
    }

    /// The version of ONNX's own operators.
    pub(super) fn opset(&self) -> i64 {
        opset(&self.model.opset_import).unwrap_or(0)
    }

    /// All initializers.
    pub fn initializers(&self) -> Vec<InitializerInfo> {
        let tensors = self.proto().initializer.iter();
        tensors.map(InitializerInfo::of).collect()
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
        let outputs = self.proto().output.iter();
        outputs.filter_map(|o| o.name.clone()).collect()
    }

    /// The sizes of an output's dimensions, if the graph gives them; `None` for a dynamic one.
    pub fn output_shape(&self, output: &str) -> Option<Vec<Option<usize>>> {
        self.output(output)?.tensor()?.sizes()
    }

    pub(super) fn output(&self, name: &str) -> Option<&ValueInfo> {
        let mut outputs = self.proto().output.iter();
        outputs.find(|o| o.name.as_deref() == Some(name))
    }

    /// An initializer's little-endian bytes, from the graph or its external file in `dir`.
    ///
    /// # Errors
    /// When it does not exist or its data cannot be read.
    pub fn initializer(&self, name: &str, dir: &Path) -> Result<Bytes, GraphError> {
        let mut tensors = self.proto().initializer.iter();
        let tensor = tensors.find(|t| t.name.as_deref() == Some(name));
        let tensor = tensor.ok_or_else(|| GraphError(format!("has no initializer {name}")))?;
        contents(tensor, dir)
    }

    /// The graph as an ONNX file.
    pub fn encode(&self) -> Vec<u8> {
        self.model.encode_to_vec()
    }
}

/// The version of ONNX's own operators among the imported ones.
pub(super) fn opset(imported: &[OperatorSetId]) -> Option<i64> {
    let mut own = imported.iter();
    own.find(|set| is_default_domain(set.domain.as_deref()))?
        .version
}

fn input_info(input: &ValueInfo) -> InputInfo {
    let tensor = input.tensor();
    InputInfo {
        name: input.name().to_owned(),
        elem: tensor.and_then(|t| t.elem_type).and_then(elem_of),
        shape: tensor.and_then(TensorType::sizes).unwrap_or_default(),
    }
}
