//! Walks the encoded file to every tensor of a model: dense and sparse initializers, attributes of
//! nodes, subgraphs, local functions. What is not changed passes through byte for byte.

use std::ops::Range;

use bytes::{Buf, Bytes};
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use super::proto::{FunctionProto, GraphError, TensorProto, decode, decode_node};

/// The maximum nesting of messages.
pub(super) const MAX_DEPTH: usize = 128;

/// A message of ONNX's that is, or may hold, a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Graph,
    Node,
    Attribute,
    Function,
    Sparse,
    Tensor,
}

impl Kind {
    /// What a field of the message holds, by its number in `onnx.proto`.
    fn field(self, number: u32) -> Option<Self> {
        match self {
            Self::Model => match number {
                7 => Some(Self::Graph),
                25 => Some(Self::Function),
                _ => None,
            },
            Self::Graph => match number {
                1 => Some(Self::Node),
                5 => Some(Self::Tensor),
                15 => Some(Self::Sparse),
                _ => None,
            },
            Self::Node => (number == 5).then_some(Self::Attribute),
            Self::Attribute => match number {
                5 | 10 => Some(Self::Tensor),
                6 | 11 => Some(Self::Graph),
                22 | 23 => Some(Self::Sparse),
                _ => None,
            },
            Self::Function => match number {
                7 => Some(Self::Node),
                11 => Some(Self::Attribute),
                _ => None,
            },
            Self::Sparse => matches!(number, 1 | 2).then_some(Self::Tensor),
            Self::Tensor => None,
        }
    }
}

/// What to do with a message.
pub(super) enum Change {
    /// Keep it and visit the messages in it.
    Keep,
    /// Keep it, with these bytes before its own, and visit the messages in it.
    Prepend(Vec<u8>),
    /// Put these messages in its place: none, and it goes.
    Replace(Vec<Bytes>),
}

/// A message and all messages around it, the outermost first.
pub(super) type Trail = [(Kind, Bytes)];

/// Walks a model and applies what `change` returns; `None` if nothing changed.
pub(super) fn edit(
    model: &Bytes,
    change: &mut impl FnMut(&Trail) -> Result<Change, GraphError>,
) -> Result<Option<Vec<u8>>, GraphError> {
    inside(&mut vec![(Kind::Model, model.clone())], change)
}

fn inside(
    trail: &mut Vec<(Kind, Bytes)>,
    change: &mut impl FnMut(&Trail) -> Result<Change, GraphError>,
) -> Result<Option<Vec<u8>>, GraphError> {
    if trail.len() > MAX_DEPTH {
        return Err(GraphError(format!("has more than {MAX_DEPTH} levels")));
    }
    let Some((kind, bytes)) = trail.last().cloned() else {
        return Ok(None);
    };
    let (mut out, mut copied) = (Vec::new(), 0);
    for field in fields(&bytes)? {
        let (Some(kind), Some(body)) = (kind.field(field.number), field.body) else {
            continue;
        };
        trail.push((kind, body.clone()));
        let new = match change(trail)? {
            Change::Keep => inside(trail, change)?.map(|new| vec![new.into()]),
            Change::Prepend(mut start) => {
                start.extend(inside(trail, change)?.unwrap_or_else(|| body.to_vec()));
                Some(vec![start.into()])
            }
            Change::Replace(new) => Some(new),
        };
        trail.pop();
        if let Some(new) = new {
            out.extend_from_slice(&bytes[copied..field.span.start]);
            for message in new {
                append(&mut out, field.number, &message);
            }
            copied = field.span.end;
        }
    }
    Ok((copied > 0).then(|| {
        out.extend_from_slice(&bytes[copied..]);
        out
    }))
}

/// Appends a field that holds a message.
pub(super) fn append(out: &mut Vec<u8>, number: u32, message: &[u8]) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(message.len() as u64, out);
    out.extend_from_slice(message);
}

/// An encoded field.
struct Field {
    number: u32,
    /// With its key.
    span: Range<usize>,
    /// Its contents, if it is length-delimited.
    body: Option<Bytes>,
}

fn fields(message: &Bytes) -> Result<Vec<Field>, GraphError> {
    let broken = |why: &dyn std::fmt::Display| GraphError(format!("not an ONNX file: {why}"));
    let mut rest = message.clone();
    let mut found = Vec::new();
    while rest.has_remaining() {
        let start = message.len() - rest.len();
        let (number, wire) = decode_key(&mut rest).map_err(|e| broken(&e))?;
        let (length, delimited) = match wire {
            WireType::Varint => {
                decode_varint(&mut rest).map_err(|e| broken(&e))?;
                (0, false)
            }
            WireType::SixtyFourBit => (8, false),
            WireType::ThirtyTwoBit => (4, false),
            WireType::LengthDelimited => {
                let length = decode_varint(&mut rest).map_err(|e| broken(&e))?;
                (usize::try_from(length).unwrap_or(usize::MAX), true)
            }
            WireType::StartGroup | WireType::EndGroup => return Err(broken(&"it has groups")),
        };
        if length > rest.len() {
            return Err(broken(&"it ends in the middle of a field"));
        }
        let body = rest.split_to(length);
        found.push(Field {
            number,
            span: start..message.len() - rest.len(),
            body: delimited.then_some(body),
        });
    }
    Ok(found)
}

/// Where the last message of a trail is, in words.
pub(super) fn describe(trail: &Trail) -> String {
    let words = trail.iter().filter_map(|(kind, bytes)| match kind {
        Kind::Function => {
            let function = FunctionProto::decode(bytes.clone()).ok()?;
            Some(format!("function {}", function.name()))
        }
        Kind::Node => {
            let node = decode_node(bytes).ok()?;
            let name = node.display().unwrap_or_default();
            Some(format!("{} {name}", node.op()))
        }
        Kind::Tensor => {
            let tensor = decode_tensor(bytes).ok()?;
            let name = Some(tensor.name()).filter(|name| !name.is_empty());
            name.map(|name| format!("tensor {name}"))
        }
        Kind::Model | Kind::Graph | Kind::Attribute | Kind::Sparse => None,
    });
    let words: Vec<String> = words.collect();
    words.join(", ")
}

pub(super) fn decode_tensor(bytes: &Bytes) -> Result<TensorProto, GraphError> {
    decode(bytes, "a tensor")
}
