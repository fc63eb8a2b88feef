//! The message broker: deliveries are settled once, and messages count as sent only when confirmed. The
//! driver is [`amqp`]; exchanges and queues are described in [`topology`], a cluster's nodes in [`nodes`].

pub mod amqp;
pub mod nodes;
pub mod topology;

use crate::protocol::encoding::Encoding;
use crate::protocol::failure::Failure;
use crate::protocol::label::Label;

/// Why a message was not confirmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The broker refused it, because a queue is full. The link is sound; it may be tried again.
    #[error("the broker refused the message: {0}")]
    Refused(String),
    /// No queue takes it. The link is torn down, because the next one declares what is missing.
    #[error("no queue takes the message: {0}")]
    Unroutable(String),
    /// Its fate is unknown. The link is torn down.
    #[error("the link to the broker is lost: {0}")]
    Lost(String),
}

/// The broker did not do what was asked: what was tried, and what the broker said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// The object exists with other arguments. The link is sound.
    #[error("RabbitMQ: {0}")]
    Differs(String),
    /// There is no such queue or exchange. The link is sound.
    #[error("RabbitMQ: {0}")]
    Missing(String),
    /// It is not permitted. The link is sound.
    #[error("RabbitMQ: {0}; {PERMIT}")]
    Forbidden(String),
    /// The login was refused: the user, the password or the virtual host. There is no link.
    #[error("RabbitMQ: {0}; {LOGIN}")]
    Denied(String),
    /// Anything else, including a call that took too long.
    #[error("RabbitMQ: {0}")]
    Failed(String),
}

const PERMIT: &str = "correct the permissions of the user in amqp.url";
const LOGIN: &str =
    "correct the user, the password or the virtual host in amqp.url, or create them";

impl BrokerError {
    /// What to do about it, which its text says too; none where the broker is away or at fault.
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Forbidden(_) => Some(PERMIT),
            Self::Denied(_) => Some(LOGIN),
            Self::Differs(_) | Self::Missing(_) | Self::Failed(_) => None,
        }
    }

    /// What to say when every node failed.
    fn of_all(mut failures: Vec<Self>) -> Self {
        if failures.len() == 1 {
            return failures.remove(0);
        }
        let denied = failures.iter().all(|why| matches!(why, Self::Denied(_)));
        let whys: Vec<String> = failures.into_iter().map(Self::text).collect();
        let text = format!("no node can be used: {}", whys.join("; "));
        match denied {
            true => Self::Denied(text),
            false => Self::Failed(text),
        }
    }

    /// What happened, without what to do about it.
    pub fn text(self) -> String {
        match self {
            Self::Differs(text)
            | Self::Missing(text)
            | Self::Forbidden(text)
            | Self::Denied(text)
            | Self::Failed(text) => text,
        }
    }
}

/// Header that counts a job's attempts. The broker has counters of its own for other purposes.
pub const ATTEMPT: &str = "x-attempt";
/// Header with the reason for which the broker last dead-lettered a message. Newer brokers set it.
pub const LAST_DEATH: &str = "x-last-death-reason";

/// Header with the code of the failure that a job was dead-lettered for.
const ERROR_CODE: &str = "x-error-code";
/// Header with the message of that failure.
const ERROR_MESSAGE: &str = "x-error-message";
/// Header with the worker that dead-lettered a job.
const WORKER_ID: &str = "x-worker-id";

/// Whether a worker sets this header when it dead-letters a job.
fn is_set_by_worker(header: &str) -> bool {
    header.starts_with("x-error-") || header == WORKER_ID
}

/// Whether a header says why a job was dead-lettered, be it a worker's or the broker's own.
pub fn is_dead_letter_header(header: &str) -> bool {
    let by_broker = ["x-first-death-", "x-last-death-"];
    is_set_by_worker(header) || by_broker.iter().any(|prefix| header.starts_with(prefix))
}

/// The properties of a message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Properties {
    /// How the body is encoded.
    pub content_type: Option<String>,
    /// How the encoded body was transformed, such as by compression.
    pub content_encoding: Option<String>,
    /// The sender's id of the message.
    pub message_id: Option<String>,
    /// Echoed in replies.
    pub correlation_id: Option<String>,
    /// Queue that gets a second copy of the result.
    pub reply_to: Option<String>,
    /// Which jobs the broker delivers first. Copies of a job keep it.
    pub priority: Option<u8>,
    /// Unix seconds.
    pub timestamp: Option<u64>,
    /// Text headers.
    pub headers: Vec<(String, String)>,
    /// The number of this attempt, from 1.
    pub attempt: u32,
}

impl Properties {
    /// How the body is encoded.
    pub fn encoding(&self) -> Encoding {
        Encoding::from_content_type(self.content_type.as_deref())
    }

    /// How the message describes its body.
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

    /// Why a job was dead-lettered: the code of our failure, else the broker's own reason.
    pub fn dead_letter_reason(&self) -> Option<String> {
        self.header(ERROR_CODE)
            .or_else(|| self.header(LAST_DEATH))
            .or_else(|| self.header("x-first-death-reason"))
    }

    /// The message of the failure that a worker dead-lettered the job for.
    pub fn dead_letter_message(&self) -> Option<String> {
        self.header(ERROR_MESSAGE)
    }

    /// The worker that dead-lettered the job.
    pub fn dead_lettered_by(&self) -> Option<String> {
        self.header(WORKER_ID)
    }

    /// The same for a copy of the job that is dead-lettered.
    #[must_use]
    pub fn dead_lettered(&self, failure: &Failure, worker_id: &str) -> Self {
        let headers = self.headers.iter();
        let headers = headers.filter(|(name, _)| !is_set_by_worker(name)).cloned();
        let ours = [
            (ERROR_CODE, failure.code.as_str().to_owned()),
            (ERROR_MESSAGE, failure.message.clone()),
            (WORKER_ID, worker_id.to_owned()),
        ];
        let ours = ours.map(|(name, value)| (name.to_owned(), value));
        Self {
            headers: headers.chain(ours).collect(),
            ..self.clone()
        }
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
    /// Its properties.
    pub properties: Properties,
    /// Whether a message that reaches no queue is an error.
    pub mandatory: bool,
}

impl Outgoing {
    /// The same message for one queue by name, which may no longer exist.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::failure::Code;

    #[test]
    fn a_dead_lettered_copy_says_why_and_forgets_what_an_older_one_said() {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let job = Properties {
            headers: vec![
                header("x-error-code", "stale"),
                header("x-error-other", "stale"),
                header("mine", "kept"),
                header(LAST_DEATH, "expired"),
            ],
            priority: Some(7),
            attempt: 3,
            ..Properties::default()
        };
        assert_eq!(job.dead_letter_reason().as_deref(), Some("stale"));
        let copy = job.dead_lettered(&Failure::new(Code::Poisoned, "why"), "w1");
        assert_eq!(copy.dead_letter_reason().as_deref(), Some("poisoned"));
        assert_eq!(copy.dead_letter_message().as_deref(), Some("why"));
        assert_eq!(copy.dead_lettered_by().as_deref(), Some("w1"));
        assert_eq!((copy.attempt, copy.priority), (3, Some(7)));
        let others = copy
            .headers
            .iter()
            .filter(|(name, _)| !is_set_by_worker(name));
        let others: Vec<_> = others.map(|(name, _)| name.as_str()).collect();
        assert_eq!(others, ["mine", LAST_DEATH]);
        assert_eq!(copy.header("x-error-other"), None);
        let broker_alone = Properties {
            headers: vec![header(LAST_DEATH, "delivery_limit")],
            ..Properties::default()
        };
        let reason = broker_alone.dead_letter_reason();
        assert_eq!(reason.as_deref(), Some("delivery_limit"));
    }

    #[test]
    fn what_says_why_a_job_was_dead_lettered_is_told_from_the_senders_headers() {
        for (header, says_why) in [
            ("x-error-code", true),
            ("x-error-anything", true),
            ("x-worker-id", true),
            ("x-first-death-queue", true),
            ("x-last-death-reason", true),
            ("x-attempt", false),
            ("x-worker", false),
            ("traceparent", false),
        ] {
            assert_eq!(is_dead_letter_header(header), says_why, "{header}");
        }
    }
}
