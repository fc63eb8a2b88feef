//! The two encodings of a message's body.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

/// How a body is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// `application/msgpack`.
    MessagePack,
    /// `application/json`.
    Json,
}

impl Encoding {
    /// The AMQP content type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::MessagePack => "application/msgpack",
            Self::Json => "application/json",
        }
    }

    /// Encodes a job; in MessagePack the candidate's bytes are `bin`, in JSON base64 text.
    pub fn encode(self, job: &Value) -> Vec<u8> {
        match self {
            Self::Json => serde_json::to_vec(job).expect("a JSON value"),
            Self::MessagePack => pack(&message_pack(job)),
        }
    }
}

/// Serializes a MessagePack value.
pub fn pack(value: &rmpv::Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).expect("writing to memory");
    bytes
}

/// A job as a MessagePack value, its inline bytes as `bin`.
pub fn message_pack(job: &Value) -> rmpv::Value {
    let mut message = rmpv::ext::to_value(job).expect("JSON fits into MessagePack");
    let candidate = entry(&mut message, "candidate");
    if let Some(data) = candidate.and_then(|c| entry(c, "data"))
        && let Some(bytes) = data.as_str().and_then(|text| BASE64.decode(text).ok())
    {
        *data = rmpv::Value::Binary(bytes);
    }
    message
}

fn entry<'a>(map: &'a mut rmpv::Value, name: &str) -> Option<&'a mut rmpv::Value> {
    let rmpv::Value::Map(fields) = map else {
        return None;
    };
    fields
        .iter_mut()
        .find(|(key, _)| key.as_str() == Some(name))
        .map(|(_, value)| value)
}
