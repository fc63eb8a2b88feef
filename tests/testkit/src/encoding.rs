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

/// A job as a MessagePack value, the inline bytes of its candidate, or of each of its members, as `bin`.
pub fn message_pack(job: &Value) -> rmpv::Value {
    let mut message = rmpv::ext::to_value(job).expect("JSON fits into MessagePack");
    pack_data(&mut message);
    if let Some(rmpv::Value::Array(members)) = entry(&mut message, "members") {
        members.iter_mut().for_each(pack_data);
    }
    message
}

fn pack_data(holder: &mut rmpv::Value) {
    let data = entry(holder, "candidate").and_then(|candidate| entry(candidate, "data"));
    if let Some(data) = data
        && let Some(bytes) = data.as_str().and_then(|text| BASE64.decode(text).ok())
    {
        *data = rmpv::Value::Binary(bytes);
    }
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
