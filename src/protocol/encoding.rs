//! How a message is encoded, MessagePack or JSON, and how a body becomes a tree of values.

use rmpv::Value;
use serde::Serialize;
use serde_json::value::RawValue;

use super::{json, tree};

/// Maps and lists in each other; the body itself is one.
pub(super) const MAX_NESTING: usize = 64;
/// How deep a decoder of MessagePack goes: it counts two steps per map or list, and up to three for what
/// is in the innermost.
pub(super) const MAX_STEPS: usize = 2 * MAX_NESTING + 3;

/// How a body is encoded; the result comes back the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// `application/msgpack`, the default.
    MessagePack,
    /// `application/json`.
    Json,
}

impl Encoding {
    /// What an AMQP `content_type` says; anything that does not name JSON is MessagePack.
    pub fn from_content_type(content_type: Option<&str>) -> Self {
        let essence = content_type.and_then(|said| said.split(';').next());
        let essence = essence.unwrap_or_default().trim().to_ascii_lowercase();
        match essence.split_once('/') {
            Some(("application" | "text", "json")) => Self::Json,
            Some((_, subtype)) if subtype.ends_with("+json") => Self::Json,
            Some(_) | None => Self::MessagePack,
        }
    }

    /// The AMQP `content_type` of this encoding.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::MessagePack => "application/msgpack",
            Self::Json => "application/json",
        }
    }

    /// Encodes a message with named fields.
    ///
    /// # Errors
    /// When the value holds something the encoding cannot express.
    pub fn encode(self, message: &impl Serialize) -> anyhow::Result<Vec<u8>> {
        Ok(match self {
            Self::MessagePack => rmp_serde::to_vec_named(message)?,
            Self::Json => serde_json::to_vec(message)?,
        })
    }

    /// Decodes a message into a tree of values, nothing left over. A float without a fraction is the
    /// integer that it equals, but for what is under the outermost `context`.
    ///
    /// # Errors
    /// A sentence for the sender.
    pub fn decode(self, body: &[u8]) -> Result<Value, String> {
        self.decode_within(body, tree::MOST_VALUES)
    }

    /// As [`Encoding::decode`], of at most so many values, keys included.
    ///
    /// # Errors
    /// A sentence for the sender.
    pub fn decode_within(self, body: &[u8], most_values: usize) -> Result<Value, String> {
        match self {
            Self::Json => json::read(body, most_values),
            Self::MessagePack => decode_messagepack(body, most_values),
        }
    }

    /// The `context` of a body that was decoded, as it is to be echoed.
    pub(crate) fn context_text(self, body: &[u8]) -> Option<Box<RawValue>> {
        match self {
            Self::Json => json::context(body),
            Self::MessagePack => None,
        }
    }
}

fn decode_messagepack(body: &[u8], most_values: usize) -> Result<Value, String> {
    tree::check_count(body, most_values)?;
    let mut rest = body;
    let mut value = rmpv::decode::read_value_with_max_depth(&mut rest, MAX_STEPS)
        .map_err(|e| format!("not MessagePack: {e}"))?;
    if !rest.is_empty() {
        let n = rest.len();
        return Err(format!(
            "not MessagePack: {n} bytes after the end of the value"
        ));
    }
    // The decoder's own limit keeps the stack whole, but counts otherwise.
    if tree::depth(&value) > MAX_NESTING {
        return Err(format!("nested deeper than {MAX_NESTING} levels"));
    }
    if let Value::Map(fields) = &mut value {
        let ours = fields
            .iter_mut()
            .filter(|(key, _)| key.as_str() != Some("context"));
        ours.for_each(|(_, value)| tree::make_whole(value));
    }
    Ok(value)
}
