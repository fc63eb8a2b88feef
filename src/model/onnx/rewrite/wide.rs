//! Nodes that compute in f32 what another computes in the type of its input: a sum of 16-bit floats
//! overflows.

use bytes::Bytes;

use super::super::proto::{BFLOAT16, FLOAT, FLOAT16, NodeProto, int};
use super::Successors;
use super::scope::Scope;

/// The first version with `CastLike`.
const CAST_LIKE: i64 = 15;

pub(super) struct Wide<'a> {
    pub(super) nodes: Successors<'a>,
    /// The first input, in f32.
    pub(super) input: String,
    back: Back<'a>,
}

/// How the result gets its own type again.
enum Back<'a> {
    It,
    To(i32),
    Like(&'a str),
}

impl<'a> Wide<'a> {
    /// In the place of a node. `None` where the type is not known and the version has no `CastLike`,
    /// for whole numbers, and for doubles: no provider that lacks an operator computes doubles at all.
    pub(super) fn of(node: &'a NodeProto, scope: &Scope, outer: &[Scope]) -> Option<Self> {
        let x = node.input.first()?;
        let back = match scope.r#type(outer, x).and_then(|t| t.elem_type) {
            Some(FLOAT) => Back::It,
            Some(narrow @ (FLOAT16 | BFLOAT16)) => Back::To(narrow),
            Some(_) => return None,
            None => Back::Like(x),
        };
        let mut nodes = Successors::of(node)?;
        let input = match back {
            Back::It => x.clone(),
            Back::Like(_) if scope.opset < CAST_LIKE => return None,
            Back::To(_) | Back::Like(_) => {
                nodes.push("wide", "Cast", &[x], &[int("to", FLOAT.into())])
            }
        };
        Some(Self { nodes, input, back })
    }

    /// Appends the node that makes the replaced node's output.
    pub(super) fn finish(mut self, op: &str, input: &[&str]) -> Vec<Bytes> {
        let (cast, like, attributes) = match self.back {
            Back::It => return self.nodes.finish(op, input, &[]),
            Back::To(narrow) => ("Cast", None, vec![int("to", narrow.into())]),
            Back::Like(x) => ("CastLike", Some(x), Vec::new()),
        };
        let wide = self.nodes.push("result", op, input, &[]);
        let input: Vec<&str> = std::iter::once(wide.as_str()).chain(like).collect();
        self.nodes.finish(cast, &input, &attributes)
    }
}
