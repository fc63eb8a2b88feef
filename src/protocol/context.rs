//! The sender's context, returned with the result. It is checked and limited like every part of a job, but
//! echoed unchanged: MessagePack values with their types, JSON text with its digits.

use rmpv::Value;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::value::RawValue;

use crate::protocol::failure::Failure;
use crate::protocol::job::invalid;
use crate::protocol::tree::packed;

/// The most bytes that it may take as MessagePack.
pub(super) const MAX_BYTES: usize = 4096;
/// The most bytes of its text in JSON, without space: twice what any value needs there that takes
/// no more than [`MAX_BYTES`] in MessagePack. Only numbers can have more digits than mean anything.
const MAX_TEXT_BYTES: usize = 8 * MAX_BYTES;

/// The `context` of a job, and of its result.
#[derive(Debug, Clone)]
pub enum Context {
    /// As MessagePack has it.
    Packed(Value),
    /// As JSON has it, without space.
    Text(Box<RawValue>),
}

impl Context {
    /// One that can be echoed: `value` is what was read of it, `text` what was sent, if that was JSON.
    pub(super) fn new(value: Value, text: Option<Box<RawValue>>) -> Result<Self, Failure> {
        check(&value)?;
        let Some(text) = text else {
            return Ok(Self::Packed(value));
        };
        match text.get().len() {
            0..=MAX_TEXT_BYTES => Ok(Self::Text(text)),
            size => Err(invalid(format!(
                "context: {size} bytes of JSON, at most {MAX_TEXT_BYTES} are allowed"
            ))),
        }
    }
}

/// Measured as MessagePack whatever the job came in, so that both encodings have one limit.
fn check(value: &Value) -> Result<(), Failure> {
    if !value.is_map() {
        return Err(invalid("context: must be a map"));
    }
    match packed(value).len() {
        0..=MAX_BYTES => Ok(()),
        size => Err(invalid(format!(
            "context: {size} bytes encoded, at most {MAX_BYTES} are allowed"
        ))),
    }
}

impl PartialEq for Context {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Packed(one), Self::Packed(other)) => one == other,
            (Self::Text(one), Self::Text(other)) => one.get() == other.get(),
            (Self::Packed(_), Self::Text(_)) | (Self::Text(_), Self::Packed(_)) => false,
        }
    }
}

impl From<Value> for Context {
    fn from(value: Value) -> Self {
        Self::Packed(value)
    }
}

impl Serialize for Context {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Packed(value) => value.serialize(serializer),
            Self::Text(text) if serializer.is_human_readable() => text.serialize(serializer),
            // A result goes back in its job's encoding; anything else would be another context.
            Self::Text(_) => Err(ser::Error::custom(
                "the context is JSON, MessagePack cannot carry it to the digit",
            )),
        }
    }
}

/// What a tree holds; the text of JSON is put in by who has the body.
impl<'de> Deserialize<'de> for Context {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match value.is_map() {
            true => Ok(Self::Packed(value)),
            false => Err(de::Error::custom("must be a map")),
        }
    }
}
