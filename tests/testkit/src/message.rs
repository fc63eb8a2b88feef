//! A message as an aggregator reads it.

use std::collections::HashMap;

use lapin::types::AMQPValue;
use serde_json::Value;

/// A message as it was read.
#[derive(Debug, Clone)]
pub struct Message {
    /// The routing key it came with.
    pub routing_key: String,
    /// The AMQP `message_id`.
    pub message_id: Option<String>,
    /// The AMQP `correlation_id`.
    pub correlation_id: Option<String>,
    /// The AMQP content type.
    pub content_type: Option<String>,
    /// The AMQP priority.
    pub priority: Option<u8>,
    /// The headers; values of other types than text as text.
    pub headers: HashMap<String, String>,
    /// The body.
    pub body: Vec<u8>,
}

impl Message {
    /// Takes what a test looks at from a delivery.
    pub fn new(delivery: &lapin::message::Delivery) -> Self {
        let properties = &delivery.properties;
        let headers = properties.headers().iter().flat_map(|t| t.inner().iter());
        Self {
            routing_key: delivery.routing_key.to_string(),
            message_id: properties.message_id().as_ref().map(ToString::to_string),
            correlation_id: properties
                .correlation_id()
                .as_ref()
                .map(ToString::to_string),
            content_type: properties.content_type().as_ref().map(ToString::to_string),
            priority: *properties.priority(),
            headers: headers
                .map(|(key, value)| (key.to_string(), text(value)))
                .collect(),
            body: delivery.data.clone(),
        }
    }

    /// The body, decoded as its content type says; numbers that are no numbers become null.
    pub fn json(&self) -> Value {
        match self.content_type.as_deref() {
            Some("application/json") => serde_json::from_slice(&self.body).expect("a JSON result"),
            _ => rmpv::ext::from_value(self.message_pack()).expect("a result without odd types"),
        }
    }

    /// The body as MessagePack.
    pub fn message_pack(&self) -> rmpv::Value {
        rmpv::decode::read_value(&mut self.body.as_slice()).expect("a MessagePack result")
    }

    /// Its AMQP `message_id`; a message without one fails the test.
    #[track_caller]
    pub fn id(&self) -> &str {
        self.message_id.as_deref().expect("a message_id")
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "headers of other types are only shown"
)]
fn text(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(s) => String::from_utf8_lossy(s.as_bytes()).into_owned(),
        AMQPValue::ShortString(s) => s.to_string(),
        AMQPValue::LongInt(n) => n.to_string(),
        AMQPValue::LongLongInt(n) => n.to_string(),
        AMQPValue::ShortInt(n) => n.to_string(),
        other => format!("{other:?}"),
    }
}
