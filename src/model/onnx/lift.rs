//! Weights that an exporter did not make initializers of the graph, but Constant nodes or
//! initializers of subgraphs (If, Loop, Scan). They become initializers, because only those can be
//! patched. Tensors in local functions and sparse tensors cannot be lifted, and are reported.

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;
use prost::Message;

use super::external::contents;
use super::graph::InitializerInfo;
use super::proto::{
    FLOAT, GraphError, GraphProto, NodeProto, SparseTensorProto, TensorProto, decode, decode_node,
    is_default_domain, node, sizes,
};
use super::walk::{Change, Kind, Trail, append, decode_tensor, describe, edit};

/// A tensor that could be a weight but cannot be patched where it is.
#[derive(Debug, Clone, PartialEq)]
pub struct UnliftedTensor {
    /// As an initializer would be described.
    pub info: InitializerInfo,
    /// Where it is, in words.
    pub at: String,
    /// Itself, unless it is sparse.
    tensor: Option<TensorProto>,
}

impl UnliftedTensor {
    /// Its little-endian bytes, if they can be read; `dir` has the external data files.
    pub fn contents(&self, dir: &Path) -> Option<Bytes> {
        contents(self.tensor.as_ref()?, dir).ok()
    }
}

/// A model whose weights are initializers, as far as possible.
#[derive(Debug)]
pub struct Lifted {
    /// The model; `None` if nothing had to be moved.
    pub model: Option<Vec<u8>>,
    /// What was moved: its new name, and where it was.
    pub moved: Vec<(String, String)>,
    /// What could not be moved.
    pub unlifted: Vec<UnliftedTensor>,
}

/// Field numbers of `GraphProto`.
const NODE: u32 = 1;
const INITIALIZER: u32 = 5;

/// Whether a tensor, whose contents are read from a folder on demand, is to be lifted.
type Wanted<'a> = &'a dyn Fn(InitializerInfo, &dyn Fn(&Path) -> Option<Bytes>) -> bool;

/// Makes every `wanted` tensor (judged by name and contents) an initializer of the graph.
///
/// # Errors
/// When the model cannot be decoded.
pub fn lift(model: &Bytes, wanted: Wanted<'_>) -> Result<Lifted, GraphError> {
    let mut lifter = Lifter {
        defined: definitions(model)?,
        wanted,
        taken: Vec::new(),
        moved: Vec::new(),
        unlifted: Vec::new(),
    };
    let changed = edit(model, &mut |trail| lifter.visit(trail))?;
    let mut initializers = Vec::new();
    for tensor in &lifter.taken {
        append(&mut initializers, INITIALIZER, &tensor.encode_to_vec());
    }
    let mut prepend = |trail: &Trail| match trail {
        [(Kind::Model, _), (Kind::Graph, _)] => {
            Ok(Change::Prepend(std::mem::take(&mut initializers)))
        }
        _ => Ok(Change::Keep),
    };
    let whole = changed.map(|changed| edit(&changed.into(), &mut prepend));
    Ok(Lifted {
        model: whole.transpose()?.flatten(),
        moved: lifter.moved,
        unlifted: lifter.unlifted,
    })
}

/// How often each name is defined in the graph and its subgraphs.
fn definitions(model: &Bytes) -> Result<HashMap<String, usize>, GraphError> {
    let mut found: HashMap<String, usize> = HashMap::new();
    edit(model, &mut |trail| {
        let Some((kind, bytes)) = trail.last() else {
            return Ok(Change::Keep);
        };
        if *kind == Kind::Function {
            return Ok(Change::Replace(vec![bytes.clone()]));
        }
        if *kind == Kind::Graph {
            for name in decode_graph(bytes)?.names()? {
                *found.entry(name).or_default() += 1;
            }
        }
        Ok(Change::Keep)
    })?;
    Ok(found)
}

fn decode_graph(bytes: &Bytes) -> Result<GraphProto, GraphError> {
    decode(bytes, "a body")
}

struct Lifter<'a> {
    defined: HashMap<String, usize>,
    wanted: Wanted<'a>,
    taken: Vec<TensorProto>,
    moved: Vec<(String, String)>,
    unlifted: Vec<UnliftedTensor>,
}

impl Lifter<'_> {
    fn visit(&mut self, trail: &Trail) -> Result<Change, GraphError> {
        let Some((kind, bytes)) = trail.last() else {
            return Ok(Change::Keep);
        };
        let in_function = trail.iter().any(|(kind, _)| *kind == Kind::Function);
        let graphs = trail.iter().filter(|(kind, _)| *kind == Kind::Graph);
        let in_body = graphs.count() > 1;
        match kind {
            Kind::Sparse => {
                self.note_sparse(trail, bytes)?;
                Ok(Change::Keep)
            }
            Kind::Tensor if in_function || !is_initializer(trail) => {
                self.note(trail, decode_tensor(bytes)?);
                Ok(Change::Keep)
            }
            Kind::Graph if in_body && !in_function => self.body(trail, bytes),
            Kind::Tensor if in_body && is_initializer(trail) => {
                let tensor = decode_tensor(bytes)?;
                Ok(match self.is_wanted(tensor.name(), &tensor) {
                    true => Change::Replace(Vec::new()),
                    false => Change::Keep,
                })
            }
            Kind::Node if !in_function => self.constant(trail, bytes, in_body),
            Kind::Model
            | Kind::Graph
            | Kind::Node
            | Kind::Attribute
            | Kind::Function
            | Kind::Tensor => Ok(Change::Keep),
        }
    }

    fn is_wanted(&self, name: &str, tensor: &TensorProto) -> bool {
        let mut info = InitializerInfo::of(tensor);
        name.clone_into(&mut info.name);
        info.dtype.is_some() && (self.wanted)(info, &|dir| contents(tensor, dir).ok())
    }

    /// Moves a subgraph's initializers to the graph. One that shares its name with another value,
    /// or is an output of the subgraph, is read through an Identity.
    fn body(&mut self, trail: &Trail, bytes: &Bytes) -> Result<Change, GraphError> {
        let body = decode_graph(bytes)?;
        let mut handed_in = Vec::new();
        for tensor in &body.initializer {
            let name = tensor.name();
            if self.is_wanted(name, tensor) {
                let at = format!("{}, tensor {name}", describe(trail));
                let lifted = self.take(name, tensor.clone(), &body, at);
                if lifted != name {
                    append(&mut handed_in, NODE, &identity(&lifted, name));
                }
            }
        }
        Ok(match handed_in.is_empty() {
            true => Change::Keep,
            false => Change::Prepend(handed_in),
        })
    }

    fn constant(
        &mut self,
        trail: &Trail,
        bytes: &Bytes,
        in_body: bool,
    ) -> Result<Change, GraphError> {
        let node = decode_node(bytes)?;
        let [output] = node.output.as_slice() else {
            return Ok(Change::Keep);
        };
        let Some(tensor) = constant(&node)?.filter(|tensor| self.is_wanted(output, tensor)) else {
            return Ok(Change::Keep);
        };
        if !in_body {
            self.moved.push((output.clone(), describe(trail)));
            self.taken.push(TensorProto {
                name: Some(output.clone()),
                ..tensor
            });
            return Ok(Change::Replace(Vec::new()));
        }
        let holder = trail.iter().rev().find(|(kind, _)| *kind == Kind::Graph);
        let body = holder.map(|(_, bytes)| decode_graph(bytes)).transpose()?;
        let lifted = self.take(output, tensor, &body.unwrap_or_default(), describe(trail));
        Ok(if lifted == *output {
            Change::Replace(Vec::new())
        } else {
            Change::Replace(vec![identity(&lifted, output)])
        })
    }

    /// Makes it an initializer, under its own name if that is unique.
    fn take(&mut self, name: &str, tensor: TensorProto, body: &GraphProto, at: String) -> String {
        let is_output = body.output.iter().any(|o| o.name.as_deref() == Some(name));
        let alone = self.defined.get(name) == Some(&1) && !is_output;
        let mut free = name.to_owned();
        let mut number = 0;
        while !alone && self.defined.contains_key(&free) {
            number += 1;
            free = format!("{name}.lifted_{number}");
        }
        self.defined.entry(free.clone()).or_insert(1);
        self.moved.push((free.clone(), at));
        self.taken.push(TensorProto {
            name: Some(free.clone()),
            ..tensor
        });
        free
    }

    fn note(&mut self, trail: &Trail, tensor: TensorProto) {
        let info = InitializerInfo::of(&tensor);
        self.note_at(info, Some(tensor), || describe(trail));
    }

    /// `at` is asked for only where a weight can be: it may decode a whole function.
    fn note_at(
        &mut self,
        info: InitializerInfo,
        tensor: Option<TensorProto>,
        at: impl FnOnce() -> String,
    ) {
        if info.dtype.is_some() {
            let at = at();
            self.unlifted.push(UnliftedTensor { info, at, tensor });
        }
    }

    fn note_sparse(&mut self, trail: &Trail, bytes: &Bytes) -> Result<(), GraphError> {
        let sparse: SparseTensorProto = decode(bytes, "a sparse tensor")?;
        let mut info = InitializerInfo::of(&sparse.values.unwrap_or_default());
        info.shape = sizes(&sparse.dims);
        let name = info.name.clone();
        self.note_at(info, None, || {
            let at = format!("{} sparse tensor {name}", describe(trail));
            at.trim_start().to_owned()
        });
        Ok(())
    }
}

fn is_initializer(trail: &Trail) -> bool {
    matches!(trail, [.., (Kind::Graph, _), (Kind::Tensor, _)])
}

/// The dense tensor that a Constant node holds.
fn constant(node: &NodeProto) -> Result<Option<TensorProto>, GraphError> {
    if node.op_type.as_deref() != Some("Constant") || !is_default_domain(node.domain.as_deref()) {
        return Ok(None);
    }
    for attribute in node.attributes() {
        let attribute = attribute?;
        match attribute.name.as_deref() {
            Some("value") => return Ok(attribute.t),
            Some("value_floats") => {
                return Ok(Some(TensorProto {
                    dims: i64::try_from(attribute.floats.len()).into_iter().collect(),
                    data_type: Some(FLOAT),
                    float_data: attribute.floats,
                    ..TensorProto::default()
                }));
            }
            Some(_) | None => {}
        }
    }
    Ok(None)
}

fn identity(from: &str, to: &str) -> Bytes {
    node(&format!("{to}_lifted"), "Identity", &[from], to, &[])
}
