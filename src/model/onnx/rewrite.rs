//! Operators that a provider lacks and that others express exactly, rewritten before a session is
//! made: in the graph, in the bodies of its nodes and in its local functions. A node of which it
//! cannot be proven that the rewriting means the same stays as it is.

mod clip;
mod constant_of_shape;
mod cross_entropy;
mod is_nan;
mod log_softmax;
mod scope;
mod sequence;
mod softmax;
mod sum;
#[cfg(test)]
mod tests;
mod wide;

use bytes::Bytes;

use super::graph::Graph;
use super::proto::{Attribute, FunctionProto, GraphError, NodeProto, decode, ints, node};
use super::walk::{Change, Kind, Trail, edit};
use scope::Scope;

/// A rewriting that a provider needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rewrite {
    /// `IsNaN` becomes `Not(Equal(x, x))`.
    IsNan,
    /// `SplitToSequence` goes, if only `SequenceAt` reads it, at constant positions: that becomes `Slice`.
    Sequence,
    /// `LogSoftmax` becomes `ReduceMax`, `Sub`, `Exp`, `ReduceSum`, `Log` and `Sub`, in f32.
    LogSoftmax,
    /// `SoftmaxCrossEntropyLoss` and `NegativeLogLikelihoodLoss` of each example, which ONNX Runtime
    /// expands to nodes without names, a `LogSoftmax` among them, become named nodes without it.
    CrossEntropy,
    /// `Sum` becomes `Add`s.
    Sum,
    /// `Softmax` becomes `ReduceMax`, `Sub`, `Exp`, `ReduceSum` and `Div`, which keep NaN and
    /// infinities, as `LogSoftmax` in steps does.
    Softmax,
    /// `Clip` with both bounds and `Relu` become `Max` and `Min`, which keep NaN.
    Clip,
    /// `ConstantOfShape` of floating point numbers becomes `Expand`.
    ConstantOfShape,
}

impl Rewrite {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::IsNan,
        Self::Sequence,
        Self::LogSoftmax,
        Self::CrossEntropy,
        Self::Sum,
        Self::Softmax,
        Self::Clip,
        Self::ConstantOfShape,
    ];
}

impl Graph {
    /// The graph as an ONNX file, with these rewritings. Names of values and of other nodes stay;
    /// new nodes are named after the one that they replace.
    ///
    /// # Errors
    /// When a node cannot be decoded, or bodies are nested too deeply.
    pub fn rewritten(&self, rewrites: &[Rewrite]) -> Result<Vec<u8>, GraphError> {
        let model = self.encode();
        if rewrites.is_empty() {
            return Ok(model);
        }
        let model = Bytes::from(model);
        let mut rewriter = Rewriter {
            rewrites,
            opset: self.opset(),
            scopes: Vec::new(),
        };
        let changed = edit(&model, &mut |trail| rewriter.visit(trail))?;
        Ok(changed.unwrap_or_else(|| model.into()))
    }
}

struct Rewriter<'a> {
    rewrites: &'a [Rewrite],
    opset: i64,
    /// The graph or function that is being walked, and what encloses it, the outermost first.
    scopes: Vec<Scope>,
}

impl Rewriter<'_> {
    fn visit(&mut self, trail: &Trail) -> Result<Change, GraphError> {
        while self.scopes.last().is_some_and(|s| s.depth >= trail.len()) {
            self.scopes.pop();
        }
        match trail.last() {
            Some((Kind::Graph, bytes)) => {
                let opset = self.scopes.last().map_or(self.opset, |outer| outer.opset);
                let graph = decode(bytes, "a graph")?;
                let scope = Scope::new(trail.len(), opset, graph, &self.scopes)?;
                self.enter(scope)?;
            }
            Some((Kind::Function, bytes)) => {
                let function: FunctionProto = decode(bytes, "a function")?;
                self.enter(Scope::of_function(trail.len(), self.opset, function)?)?;
            }
            Some((Kind::Node, bytes)) => {
                let replaced = self.scopes.last().and_then(|s| s.replaced.get(bytes));
                return Ok(replaced.map_or(Change::Keep, |nodes| Change::Replace(nodes.clone())));
            }
            Some((Kind::Model | Kind::Attribute | Kind::Sparse | Kind::Tensor, _)) | None => {}
        }
        Ok(Change::Keep)
    }

    /// Decides which nodes of a graph or function are replaced, before they are visited.
    fn enter(&mut self, mut scope: Scope) -> Result<(), GraphError> {
        let mut replaced = Vec::new();
        for (at, node) in scope.nodes.iter().enumerate() {
            let rewrite = Rewrite::of(&node.op());
            if let Some(rewrite) = rewrite.filter(|rewrite| self.rewrites.contains(rewrite)) {
                replaced.extend(rewrite.apply(at, node, &scope, &self.scopes)?);
            }
        }
        let replaced = replaced.into_iter();
        scope.replaced = replaced
            .map(|(at, nodes)| (scope.encoded[at].clone(), nodes))
            .collect();
        self.scopes.push(scope);
        Ok(())
    }
}

impl Rewrite {
    /// That of an operator.
    fn of(op: &str) -> Option<Self> {
        Some(match op {
            "IsNaN" => Self::IsNan,
            "SplitToSequence" => Self::Sequence,
            "LogSoftmax" => Self::LogSoftmax,
            "SoftmaxCrossEntropyLoss" | "NegativeLogLikelihoodLoss" => Self::CrossEntropy,
            "Sum" => Self::Sum,
            "Softmax" => Self::Softmax,
            "Clip" | "Relu" => Self::Clip,
            "ConstantOfShape" => Self::ConstantOfShape,
            _ => return None,
        })
    }

    /// The nodes that are replaced, and by which; none where it cannot be proven to mean the same.
    fn apply(
        self,
        at: usize,
        node: &NodeProto,
        scope: &Scope,
        outer: &[Scope],
    ) -> Result<Vec<Replaced>, GraphError> {
        if node.is_open()? {
            return Ok(Vec::new());
        }
        let replaced = match self {
            Self::IsNan => is_nan::rewrite(node),
            Self::Sequence => return sequence::rewrite(at, node, scope, outer),
            Self::LogSoftmax => log_softmax::rewrite(node, scope, outer)?,
            Self::CrossEntropy => cross_entropy::rewrite(node, scope, outer)?,
            Self::Sum => sum::rewrite(node),
            Self::Softmax => softmax::rewrite(node, scope, outer)?,
            Self::Clip if node.op_type() == "Relu" => clip::relu(node, scope, outer),
            Self::Clip => clip::rewrite(node),
            Self::ConstantOfShape => constant_of_shape::rewrite(node)?,
        };
        Ok(replaced.map(|nodes| (at, nodes)).into_iter().collect())
    }
}

/// The position of a node, and the nodes in its place.
type Replaced = (usize, Vec<Bytes>);

/// Nodes in the place of another, named after it.
struct Successors<'a> {
    /// The name of the node, and that of its first output.
    of: (&'a str, &'a str),
    nodes: Vec<Bytes>,
}

impl<'a> Successors<'a> {
    /// `None` for a node without an output, which computes nothing.
    fn of(node: &'a NodeProto) -> Option<Self> {
        let output = node.output.first()?;
        Some(Self {
            of: (node.display()?, output),
            nodes: Vec::new(),
        })
    }

    /// Appends a node, whose output is named after its `word`.
    fn push(&mut self, word: &str, op: &str, input: &[&str], attributes: &[Attribute]) -> String {
        let output = format!("{}/{word}", self.of.1);
        self.push_to(&output, word, op, input, attributes);
        output
    }

    /// Appends the node that makes the replaced node's own output.
    fn finish(mut self, op: &str, input: &[&str], attributes: &[Attribute]) -> Vec<Bytes> {
        let last = op.to_lowercase();
        self.push_to(self.of.1, &last, op, input, attributes);
        self.nodes
    }

    fn push_to(&mut self, output: &str, word: &str, op: &str, input: &[&str], with: &[Attribute]) {
        let name = format!("{}/{word}", self.of.0);
        self.nodes.push(node(&name, op, input, output, with));
    }

    fn constant(&mut self, word: &str, values: &[i64]) -> String {
        self.push(word, "Constant", &[], &[ints("value_ints", values)])
    }
}
