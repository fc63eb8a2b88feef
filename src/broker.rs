//! What the rest of the crate knows of a message broker: deliveries that are settled once, and
//! messages that count as sent only when confirmed. The driver is [`amqp`], the objects are
//! described in [`topology`].

pub mod amqp;
pub mod topology;

use crate::protocol::encoding::Encoding;
use crate::protocol::label::Label;

/// Why a message was not confirmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The broker refused it (a full queue); the link is sound, try again.
    #[error("the broker refused the message: {0}")]
    Refused(String),
    /// No queue takes it; the link is being torn down, for the next one declares what is missing.
    #[error("no queue takes the message: {0}")]
    Unroutable(String),
    /// Nobody knows what became of it; the link is being torn down.
    #[error("the link to the broker is lost: {0}")]
    Lost(String),
}

/// The broker did not do what it was asked: what was tried and what it said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// What was to be declared exists with other arguments; the link is sound.
    #[error("RabbitMQ: {0}")]
    Differs(String),
    /// There is no such queue or exchange; the link is sound.
    #[error("RabbitMQ: {0}")]
    Missing(String),
    /// We may not do that; the link is sound.
    #[error("RabbitMQ: {0}")]
    Forbidden(String),
    /// Anything else, a call that took too long included.
    #[error("RabbitMQ: {0}")]
    Failed(String),
}

/// Header that counts a job's attempts; the broker's own counters belong to the broker.
pub const ATTEMPT: &str = "x-attempt";
/// Header with what the broker last took a message out of a queue for, unasked. Newer brokers set it.
pub const LAST_DEATH: &str = "x-last-death-reason";

/// What comes with a body.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Properties {
    /// How the body is encoded.
    pub content_type: Option<String>,
    /// What was done to the encoded body, such as compression.
    pub content_encoding: Option<String>,
    /// The sender's id of the message.
    pub message_id: Option<String>,
    /// Echoed in replies.
    pub correlation_id: Option<String>,
    /// Queue that gets a second copy of the result.
    pub reply_to: Option<String>,
    /// Unix seconds.
    pub timestamp: Option<u64>,
    /// Text headers.
    pub headers: Vec<(String, String)>,
    /// Which try this is, from 1.
    pub attempt: u32,
}

impl Properties {
    /// How the body is encoded.
    pub fn encoding(&self) -> Encoding {
        Encoding::from_content_type(self.content_type.as_deref())
    }

    /// What the message says of its body.
    pub fn label(&self) -> Label {
        Label {
            content_type: self.content_type.clone(),
            content_encoding: self.content_encoding.clone(),
            compression: self.header("compression"),
        }
    }

    /// A text header.
    pub fn header(&self, name: &str) -> Option<String> {
        let mut headers = self.headers.iter();
        headers
            .find(|(n, _)| n == name)
            .map(|(_, text)| text.clone())
    }

    /// Why a parked job was parked: our code, else what the broker itself gave up for.
    pub fn parked_for(&self) -> Option<String> {
        self.header("x-error-code")
            .or_else(|| self.header(LAST_DEATH))
            .or_else(|| self.header("x-first-death-reason"))
    }

    /// Trace headers, to be passed on.
    pub fn trace_headers(&self) -> Vec<(String, String)> {
        let is_trace = |name: &str| name == "traceparent" || name == "tracestate";
        self.headers
            .iter()
            .filter(|(name, _)| is_trace(name))
            .cloned()
            .collect()
    }
}

/// A message to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Empty = the default exchange.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
    /// The body.
    pub body: Vec<u8>,
    /// What comes with it.
    pub properties: Properties,
    /// Whether a message that reaches no queue is an error.
    pub mandatory: bool,
}

impl Outgoing {
    /// The same message for one queue by name, which need not exist any more.
    #[must_use]
    pub fn to_reply_queue(&self, queue: &str) -> Self {
        Self {
            exchange: String::new(),
            routing_key: queue.to_owned(),
            mandatory: false,
            ..self.clone()
        }
    }
}
