//! ONNX's messages (`onnx.proto`, IR version 13), as far as they are read or written here; the rest
//! stays raw bytes.

use std::collections::HashSet;

use bytes::Bytes;
use prost::Message;

use crate::model::tensor::{Dtype, Elem};

pub(super) const FLOAT: i32 = 1;
pub(super) const UINT8: i32 = 2;
pub(super) const INT32: i32 = 6;
pub(super) const INT64: i32 = 7;
pub(super) const BOOL: i32 = 9;
pub(super) const FLOAT16: i32 = 10;
pub(super) const BFLOAT16: i32 = 16;
/// `TensorProto.data_location`: the data is in a file.
pub(super) const EXTERNAL: i32 = 1;

#[derive(Clone, PartialEq, Message)]
pub(super) struct ModelProto {
    #[prost(int64, optional, tag = "1")]
    pub(super) ir_version: Option<i64>,
    #[prost(string, optional, tag = "2")]
    pub(super) producer_name: Option<String>,
    #[prost(string, optional, tag = "3")]
    pub(super) producer_version: Option<String>,
    #[prost(string, optional, tag = "4")]
    pub(super) domain: Option<String>,
    #[prost(int64, optional, tag = "5")]
    pub(super) model_version: Option<i64>,
    #[prost(string, optional, tag = "6")]
    pub(super) doc_string: Option<String>,
    #[prost(message, optional, tag = "7")]
    pub(super) graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "8")]
    pub(super) opset_import: Vec<OperatorSetId>,
    #[prost(bytes = "vec", repeated, tag = "14")]
    pub(super) metadata_props: Vec<Vec<u8>>,
    /// [`FunctionProto`]s.
    #[prost(bytes = "bytes", repeated, tag = "25")]
    pub(super) functions: Vec<Bytes>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct OperatorSetId {
    #[prost(string, optional, tag = "1")]
    pub(super) domain: Option<String>,
    #[prost(int64, optional, tag = "2")]
    pub(super) version: Option<i64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct GraphProto {
    /// [`NodeProto`]s.
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub(super) node: Vec<Bytes>,
    #[prost(string, optional, tag = "2")]
    pub(super) name: Option<String>,
    #[prost(message, repeated, tag = "5")]
    pub(super) initializer: Vec<TensorProto>,
    #[prost(string, optional, tag = "10")]
    pub(super) doc_string: Option<String>,
    #[prost(message, repeated, tag = "11")]
    pub(super) input: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "12")]
    pub(super) output: Vec<ValueInfo>,
    #[prost(bytes = "vec", repeated, tag = "13")]
    pub(super) value_info: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "14")]
    pub(super) quantization_annotation: Vec<Vec<u8>>,
    #[prost(bytes = "bytes", repeated, tag = "15")]
    pub(super) sparse_initializer: Vec<Bytes>,
    #[prost(bytes = "vec", repeated, tag = "16")]
    pub(super) metadata_props: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    pub(super) dims: Vec<i64>,
    #[prost(int32, optional, tag = "2")]
    pub(super) data_type: Option<i32>,
    #[prost(float, repeated, tag = "4")]
    pub(super) float_data: Vec<f32>,
    #[prost(int32, repeated, tag = "5")]
    pub(super) int32_data: Vec<i32>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub(super) string_data: Vec<Vec<u8>>,
    #[prost(int64, repeated, tag = "7")]
    pub(super) int64_data: Vec<i64>,
    #[prost(string, optional, tag = "8")]
    pub(super) name: Option<String>,
    #[prost(bytes = "bytes", optional, tag = "9")]
    pub(super) raw_data: Option<Bytes>,
    #[prost(double, repeated, tag = "10")]
    pub(super) double_data: Vec<f64>,
    #[prost(uint64, repeated, tag = "11")]
    pub(super) uint64_data: Vec<u64>,
    #[prost(bytes = "vec", optional, tag = "12")]
    pub(super) doc_string: Option<Vec<u8>>,
    #[prost(message, repeated, tag = "13")]
    pub(super) external_data: Vec<StringEntry>,
    #[prost(int32, optional, tag = "14")]
    pub(super) data_location: Option<i32>,
    #[prost(bytes = "vec", repeated, tag = "16")]
    pub(super) metadata_props: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SparseTensorProto {
    /// Its name is the initializer's.
    #[prost(message, optional, tag = "1")]
    pub(super) values: Option<TensorProto>,
    #[prost(int64, repeated, tag = "3")]
    pub(super) dims: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StringEntry {
    #[prost(string, optional, tag = "1")]
    pub(super) key: Option<String>,
    #[prost(string, optional, tag = "2")]
    pub(super) value: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ValueInfo {
    #[prost(string, optional, tag = "1")]
    pub(super) name: Option<String>,
    #[prost(message, optional, tag = "2")]
    pub(super) r#type: Option<TypeProto>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TypeProto {
    #[prost(message, optional, tag = "1")]
    pub(super) tensor_type: Option<TensorType>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TensorType {
    #[prost(int32, optional, tag = "1")]
    pub(super) elem_type: Option<i32>,
    #[prost(message, optional, tag = "2")]
    pub(super) shape: Option<TensorShape>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TensorShape {
    #[prost(message, repeated, tag = "1")]
    pub(super) dim: Vec<Dimension>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Dimension {
    #[prost(int64, optional, tag = "1")]
    pub(super) dim_value: Option<i64>,
    #[prost(string, optional, tag = "2")]
    pub(super) dim_param: Option<String>,
}

/// Every field of a node; those that are not inspected stay raw bytes.
#[derive(Clone, PartialEq, Message)]
pub(super) struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    pub(super) input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub(super) output: Vec<String>,
    #[prost(string, optional, tag = "3")]
    pub(super) name: Option<String>,
    #[prost(string, optional, tag = "4")]
    pub(super) op_type: Option<String>,
    /// [`Attribute`]s.
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub(super) attribute: Vec<Bytes>,
    #[prost(bytes = "vec", optional, tag = "6")]
    pub(super) doc_string: Option<Vec<u8>>,
    #[prost(string, optional, tag = "7")]
    pub(super) domain: Option<String>,
    #[prost(bytes = "vec", optional, tag = "8")]
    pub(super) overload: Option<Vec<u8>>,
    #[prost(message, repeated, tag = "9")]
    pub(super) metadata_props: Vec<StringEntry>,
    #[prost(bytes = "vec", repeated, tag = "10")]
    pub(super) device_configurations: Vec<Vec<u8>>,
}

/// The parts of an attribute that are read or written here.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Attribute {
    #[prost(string, optional, tag = "1")]
    pub(super) name: Option<String>,
    #[prost(int64, optional, tag = "3")]
    pub(super) i: Option<i64>,
    #[prost(bytes = "bytes", optional, tag = "4")]
    pub(super) s: Option<Bytes>,
    #[prost(message, optional, tag = "5")]
    pub(super) t: Option<TensorProto>,
    /// A branch of an If, the body of a Loop or a Scan.
    #[prost(message, optional, tag = "6")]
    pub(super) g: Option<GraphProto>,
    #[prost(float, repeated, tag = "7")]
    pub(super) floats: Vec<f32>,
    #[prost(int64, repeated, tag = "8")]
    pub(super) ints: Vec<i64>,
    #[prost(message, repeated, tag = "11")]
    pub(super) graphs: Vec<GraphProto>,
    #[prost(int32, optional, tag = "20")]
    pub(super) r#type: Option<i32>,
    /// In a function: the attribute of the call whose value it has.
    #[prost(string, optional, tag = "21")]
    pub(super) ref_attr_name: Option<String>,
}

/// An operator that the model defines itself.
#[derive(Clone, PartialEq, Message)]
pub(super) struct FunctionProto {
    #[prost(string, optional, tag = "1")]
    pub(super) name: Option<String>,
    #[prost(string, repeated, tag = "4")]
    pub(super) input: Vec<String>,
    #[prost(string, repeated, tag = "5")]
    pub(super) output: Vec<String>,
    /// [`NodeProto`]s.
    #[prost(bytes = "bytes", repeated, tag = "7")]
    pub(super) node: Vec<Bytes>,
    #[prost(message, repeated, tag = "9")]
    pub(super) opset_import: Vec<OperatorSetId>,
    #[prost(string, optional, tag = "10")]
    pub(super) domain: Option<String>,
    #[prost(bytes = "vec", optional, tag = "13")]
    pub(super) overload: Option<Vec<u8>>,
}

/// What is wrong with a graph.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("graph: {0}")]
pub struct GraphError(pub(super) String);

/// Decodes a message; `what` it is, for the error.
pub(super) fn decode<M: Message + Default>(bytes: &Bytes, what: &str) -> Result<M, GraphError> {
    M::decode(bytes.clone()).map_err(|e| GraphError(format!("{what} is broken: {e}")))
}

pub(super) fn decode_node(bytes: &Bytes) -> Result<NodeProto, GraphError> {
    decode(bytes, "a node")
}

/// The subgraphs of a node: branches of an If, the body of a Loop or Scan.
pub(super) fn bodies(node: &NodeProto) -> Result<Vec<GraphProto>, GraphError> {
    let mut held = Vec::new();
    for attribute in node.attributes() {
        let attribute = attribute?;
        held.extend(attribute.g.into_iter().chain(attribute.graphs));
    }
    Ok(held)
}

/// An encoded node of one output.
pub(super) fn node(
    name: &str,
    op_type: &str,
    input: &[&str],
    output: &str,
    attributes: &[Attribute],
) -> Bytes {
    let encoded = attributes.iter().map(|a| a.encode_to_vec().into());
    let node = NodeProto {
        input: input.iter().map(|i| (*i).to_owned()).collect(),
        output: vec![output.to_owned()],
        name: Some(name.to_owned()),
        op_type: Some(op_type.to_owned()),
        attribute: encoded.collect(),
        ..NodeProto::default()
    };
    node.encode_to_vec().into()
}

/// An attribute that is a whole number.
pub(super) fn int(name: &str, value: i64) -> Attribute {
    const INT: i32 = 2;
    Attribute {
        name: Some(name.into()),
        i: Some(value),
        r#type: Some(INT),
        ..Attribute::default()
    }
}

/// The value of a Constant that is one number in f32.
pub(super) fn scalar(value: f32) -> Attribute {
    const TENSOR: i32 = 4;
    let tensor = TensorProto {
        data_type: Some(FLOAT),
        float_data: vec![value],
        ..TensorProto::default()
    };
    Attribute {
        name: Some("value".into()),
        t: Some(tensor),
        r#type: Some(TENSOR),
        ..Attribute::default()
    }
}

/// An attribute that is a list of whole numbers.
pub(super) fn ints(name: &str, values: &[i64]) -> Attribute {
    const INTS: i32 = 7;
    Attribute {
        name: Some(name.into()),
        ints: values.to_vec(),
        r#type: Some(INTS),
        ..Attribute::default()
    }
}

/// The value of an attribute that is a whole number.
pub(super) fn integer(node: &NodeProto, name: &str) -> Result<Option<i64>, GraphError> {
    Ok(attribute(node, name)?.map(|found| found.i()))
}

/// The attribute of this name.
pub(super) fn attribute(node: &NodeProto, name: &str) -> Result<Option<Attribute>, GraphError> {
    let is_it = |held: &Result<Attribute, _>| held.as_ref().map_or(true, |a| a.name() == name);
    node.attributes().find(is_it).transpose()
}

/// An encoded model of ONNX's own operators.
pub(super) fn model(graph: GraphProto, ir_version: i64, opset: i64) -> Vec<u8> {
    let opset = OperatorSetId {
        domain: None,
        version: Some(opset),
    };
    let model = ModelProto {
        ir_version: Some(ir_version),
        graph: Some(graph),
        opset_import: vec![opset],
        ..ModelProto::default()
    };
    model.encode_to_vec()
}

pub(super) fn value_info(name: &str, elem_type: i32, dims: Vec<Option<i64>>) -> ValueInfo {
    let dim = dims.into_iter().map(|dim_value| Dimension {
        dim_value,
        dim_param: None,
    });
    let dim = dim.collect();
    ValueInfo::new(name, elem_type, Some(TensorShape { dim }))
}

impl ValueInfo {
    pub(super) fn new(name: &str, elem_type: i32, shape: Option<TensorShape>) -> Self {
        let tensor_type = TensorType {
            elem_type: Some(elem_type),
            shape,
        };
        Self {
            name: Some(name.to_owned()),
            r#type: Some(TypeProto {
                tensor_type: Some(tensor_type),
            }),
        }
    }

    pub(super) fn tensor(&self) -> Option<&TensorType> {
        self.r#type.as_ref()?.tensor_type.as_ref()
    }
}

impl TensorType {
    /// The sizes of the dimensions, if they are given; `None` for a dynamic one.
    pub(super) fn sizes(&self) -> Option<Vec<Option<usize>>> {
        let size = |d: &Dimension| usize::try_from(d.dim_value?).ok();
        Some(self.shape.as_ref()?.dim.iter().map(size).collect())
    }
}

pub(super) fn elem_type(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::F32 => FLOAT,
        Dtype::F16 => FLOAT16,
        Dtype::Bf16 => BFLOAT16,
    }
}

pub(super) fn dtype_of(data_type: i32) -> Option<Dtype> {
    match data_type {
        FLOAT => Some(Dtype::F32),
        FLOAT16 => Some(Dtype::F16),
        BFLOAT16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// The element type of an input that can be fed.
pub(super) fn elem_of(data_type: i32) -> Option<Elem> {
    match data_type {
        FLOAT => Some(Elem::F32),
        FLOAT16 => Some(Elem::F16),
        INT64 => Some(Elem::I64),
        INT32 => Some(Elem::I32),
        UINT8 => Some(Elem::U8),
        BOOL => Some(Elem::Bool),
        _ => None,
    }
}

/// Bytes of an element of this type, if it is of a fixed size.
pub(super) fn element_size(data_type: i32) -> Option<u64> {
    match data_type {
        // u8, i8 and bool; u16, i16, f16 and bf16; f32, i32 and u32; i64, f64 and u64.
        2 | 3 | 9 => Some(1),
        4 | 5 | 10 | 16 => Some(2),
        1 | 6 | 12 => Some(4),
        7 | 11 | 13 => Some(8),
        _ => None,
    }
}

/// Dimensions as sizes; a negative one is none.
pub(super) fn sizes(dims: &[i64]) -> Vec<usize> {
    dims.iter()
        .map(|d| usize::try_from(*d).unwrap_or(0))
        .collect()
}

/// ONNX's own operators: `ai.onnx` is another way to write the empty domain.
pub(super) fn is_default_domain(domain: Option<&str>) -> bool {
    matches!(domain, None | Some("" | "ai.onnx"))
}

impl GraphProto {
    /// The names that the graph itself defines: inputs, initializers and outputs of nodes.
    pub(super) fn names(&self) -> Result<HashSet<String>, GraphError> {
        let inputs = self.input.iter().filter_map(|i| i.name.clone());
        let initializers = self.initializer.iter().filter_map(|t| t.name.clone());
        let mut names: HashSet<String> = inputs.chain(initializers).collect();
        for node in &self.node {
            names.extend(decode_node(node)?.output);
        }
        Ok(names)
    }
}

impl NodeProto {
    /// The operator; one outside ONNX's own domain is prefixed with its domain.
    pub(super) fn op(&self) -> String {
        let op = self.op_type.clone().unwrap_or_default();
        match self.domain.as_deref() {
            domain if is_default_domain(domain) => op,
            domain => format!("{}.{op}", domain.unwrap_or_default()),
        }
    }

    /// A node's name, or that of its first output.
    pub(super) fn display(&self) -> Option<&str> {
        let name = self.name.as_deref().filter(|name| !name.is_empty());
        name.or(self.output.first().map(String::as_str))
    }

    /// Whether an attribute's value is that of a call of the function around it.
    pub(super) fn is_open(&self) -> Result<bool, GraphError> {
        let mut open = self
            .attributes()
            .map(|held| Ok(held?.ref_attr_name.is_some()));
        open.try_fold(
            false,
            |any, open: Result<bool, GraphError>| Ok(any || open?),
        )
    }

    /// One at a time: a decoded attribute is many times what it takes in the file.
    pub(super) fn attributes(&self) -> impl Iterator<Item = Result<Attribute, GraphError>> {
        let attributes = self.attribute.iter();
        attributes.map(|a| decode(a, "an attribute"))
    }
}
